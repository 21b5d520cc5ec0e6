"""Q5_1: an f16 scale, an f16 minimum and 32 unsigned 5-bit codes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_affine32
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32


class Q5_1(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = n * d + m`` in two roundings, 32 elements in 24 bytes; codes as in Q5_0, without its offset.

    Source: ``dequantize_row_q5_1`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))])
    )
    reproduces: ClassVar = True
    weighting: ClassVar = Weighting(factor=1.0, span=0)
    ids: ClassVar = {"llama.cpp": 7}
    file_types: ClassVar = {"llama.cpp": 9}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale the codes, add the minimum."""
        codes = w.fields(block["qs"], 4, 16) | w.fields(block["qh"], 1) << 4
        return w.half(block["d"]) * codes + w.half(block["m"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scale and minimum of every block; see :func:`ggufx.types.scalar.encode_affine32`."""
        encode_affine32(self, 5, values, out, importance, search)
