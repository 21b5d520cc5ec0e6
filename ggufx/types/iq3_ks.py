"""IQ3_KS: 3-bit codes into a table of eight, 5-bit scales per 32 elements, one f16 scale per row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ3_KS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (D * s) * IQ3[n]``, or the table's shifted twin where the sub-block's flag says so.

    256 elements in 102 bytes after 2 bytes per row. The bytes of ``extra`` have the opposite roles of IQ2_KS (low:
    fifth bits of the scales, high: flags), and the scale nibbles another order. Source: ggml-common.h and
    iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("extra", "<u2"), ("scales", "u1", (4,)), ("qs", "u1", (64,)), ("qh", "u1", (32,))]),
        np.dtype([("d", "<f2")]),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 156}
    file_types: ClassVar = {"ik_llama.cpp": 154}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales -16..15; exact."""
        extra = w.fields(block["extra"], 1)
        scales = w.floats(w.fields(block["scales"], 4, 4) | extra[..., :8] << 4) - 16
        codes = w.fields(block["qs"], 2, 32) | w.fields(block["qh"], 1, 32) << 2
        return w.scaled(w.half(header["d"]), scales, w.twin(tables.IQ3, codes, extra[..., 8:]))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``x^2`` without; sigma2 is
        2 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 32, values, out, importance, search)
