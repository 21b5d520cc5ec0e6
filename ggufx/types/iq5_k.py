"""IQ5_K: 5-bit codes into a table of 32, 6-bit scales per 16 elements."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ5_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * IQ5[n]``, or the table's shifted twin where the sub-block's bit of ``extra`` says so.

    256 elements in 176 bytes. Nibbles are 32 apart, not 16 as in IQ4_K. Source: ggml-common.h and iqk_quantize.cpp of
    ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype(
            [
                ("d", "<f2"),
                ("extra", "<u2"),
                ("scales_h", "u1", (4,)),
                ("scales_l", "u1", (8,)),
                ("qs", "u1", (128,)),
                ("qh", "u1", (32,)),
            ]
        ),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.5, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 140}
    file_types: ClassVar = {"ik_llama.cpp": 141}
    fallbacks: ClassVar = {"ik_llama.cpp": "Q6_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales -32..31; exact."""
        scales = w.floats(w.fields(block["scales_l"], 4) | w.fields(block["scales_h"], 2) << 4) - 32
        codes = w.fields(block["qs"], 4, 32) | w.fields(block["qh"], 1, 32) << 4
        return w.scaled(w.half(block["d"]), scales, w.twin(tables.IQ5, codes, w.fields(block["extra"], 1)))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``0.25*sigma2 + x^2`` without; sigma2 is
        2 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 16, values, out, importance, search)
