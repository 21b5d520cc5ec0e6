"""IQ5_KS: 5-bit codes into a table of 32, 7-bit odd scales per 32 elements, one float32 scale per row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ5_KS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (D * s) * IQ5[n]``, or the table's shifted twin: bit 0 of the sub-block's scale byte c; ``s = (c & 254) - 127``.

    256 elements in 168 bytes after 4 bytes per row; two roundings. Source: ggml-common.h and iqk_quantize.cpp of
    ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("scales", "u1", (8,)), ("qs", "u1", (128,)), ("qh", "u1", (32,))]),
        np.dtype([("d", "<f4")]),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 152}
    file_types: ClassVar = {"ik_llama.cpp": 150}
    fallbacks: ClassVar = {"ik_llama.cpp": "Q5_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales are odd, -127..127, never 0."""
        c = block["scales"]
        codes = w.fields(block["qs"], 4, 32) | w.fields(block["qh"], 1, 32) << 4
        return w.scaled(w.single(header["d"]), w.floats(c & 254) - 127, w.twin(tables.IQ5, codes, c & 1))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``x^2`` without; sigma2 is
        2 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 32, values, out, importance, search, fine=True)
