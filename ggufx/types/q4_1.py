"""Q4_1: an f16 scale, an f16 minimum and 32 unsigned nibbles."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_affine32
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32


class Q4_1(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = n * d + m`` in two roundings, 32 elements in 20 bytes.

    Byte j of ``qs`` holds elements j (low) and j + 16 (high).

    Source: ``dequantize_row_q4_1`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", (16,))]))
    reproduces: ClassVar = True
    weighting: ClassVar = Weighting(factor=1.0, span=0)
    ids: ClassVar = {"llama.cpp": 3}
    file_types: ClassVar = {"llama.cpp": 3}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale the codes, add the minimum."""
        return w.half(block["d"]) * w.fields(block["qs"], 4, 16) + w.half(block["m"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scale and minimum of every block; see :func:`ggufx.types.scalar.encode_affine32`."""
        encode_affine32(self, 4, values, out, importance, search)
