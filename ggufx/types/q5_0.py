"""Q5_0: an f16 scale and 32 signed 5-bit codes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_block32
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32


class Q5_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 16) * d``, 32 elements in 22 bytes; nibbles as in Q4_0, bit i of ``qh`` is the fifth bit of element i.

    Source: ``dequantize_row_q5_0`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))]))
    weighting: ClassVar = Weighting(factor=1.0, span=0)
    ids: ClassVar = {"llama.cpp": 6}
    file_types: ClassVar = {"llama.cpp": 8}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Put nibbles and fifth bits together and scale."""
        codes = w.fields(block["qs"], 4, 16) | w.fields(block["qh"], 1) << 4
        return w.half(block["d"]) * (w.floats(codes) - 16)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_block32`."""
        encode_block32(self, 5, values, out, importance, search)
