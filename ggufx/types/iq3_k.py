"""IQ3_K: 3-bit codes into a table of eight, 4-bit odd scales with a sign per 16 elements."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ3_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * IQ3[n]``, or the table's shifted twin where the sub-block's bit of ``extra`` says so.

    256 elements in 110 bytes. Bits of ``scales_h`` are the signs of the scales. Source: ggml-common.h and
    iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype(
            [
                ("d", "<f2"),
                ("extra", "<u2"),
                ("scales_h", "<u2"),
                ("scales_l", "u1", (8,)),
                ("qs", "u1", (64,)),
                ("qh", "u1", (32,)),
            ]
        ),
    )
    weighting: ClassVar = Weighting(factor=1.5, plain_factor=0.375, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 138}
    file_types: ClassVar = {"ik_llama.cpp": 139}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales are odd, -31..31, never 0; exact."""
        magnitudes = 2 * w.floats(w.fields(block["scales_l"], 4)) + 1
        scales = w.where(w.fields(block["scales_h"], 1) != 0, -magnitudes, magnitudes)
        codes = w.fields(block["qs"], 2, 32) | w.fields(block["qh"], 1, 32) << 2
        return w.scaled(w.half(block["d"]), scales, w.twin(tables.IQ3, codes, w.fields(block["extra"], 1)))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``0.25*sigma2 + x^2`` without; sigma2 is
        1.5 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 16, values, out, importance, search)
