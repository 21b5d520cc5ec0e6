"""IQ2_K: 2-bit codes into a table of four, 4-bit scales per 16 elements."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ2_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * IQ2[n]``, or the table's shifted twin where the sub-block's bit of ``extra`` says so.

    256 elements in 76 bytes. Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("d", "<f2"), ("extra", "<u2"), ("scales", "u1", (8,)), ("qs", "u1", (64,))]),
    )
    weighting: ClassVar = Weighting(factor=1.5, plain_factor=0.375, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 137}
    file_types: ClassVar = {"ik_llama.cpp": 138}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales -8..7; exact."""
        values = w.twin(tables.IQ2, w.fields(block["qs"], 2, 32), w.fields(block["extra"], 1))
        return w.scaled(w.half(block["d"]), w.floats(w.fields(block["scales"], 4)) - 8, values)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``0.25*sigma2 + x^2`` without; sigma2 is
        1.5 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 16, values, out, importance, search)
