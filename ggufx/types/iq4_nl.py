"""IQ4_NL: an f16 scale and 32 nibbles into a table of 16 values."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_blocks
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32

IQ4 = np.array(tables.IQ4, np.int8)


class IQ4_NL(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = d * IQ4[n]``, 32 elements in 18 bytes; byte j of ``qs`` holds elements j (low) and j + 16 (high).

    Source: ``dequantize_row_iq4_nl`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (16,))]))
    weighting: ClassVar = Weighting(factor=2.0, plain_power=1.0, span=32)
    ids: ClassVar = {"llama.cpp": 20}
    file_types: ClassVar = {"llama.cpp": 25}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up and scale."""
        return w.half(block["d"]) * w.look_up(tables.IQ4, w.fields(block["qs"], 4, 16))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``x^2`` without; sigma2 is
        2 times the mean of x^2 over 32 elements.
        """
        search_blocks(self.name, 32, values, out, importance, search)
