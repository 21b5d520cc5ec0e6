"""Q2_0: an f16 scale and 64 two-bit codes for -1, 0, 1, 2."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.scalar import encode_levels
from ggufx.types.words import Array, Fields, Words


class Q2_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 1) * d``, 64 elements in 18 bytes, four codes a byte, lowest bits first.

    Id 42 is another type in the nisparks dialect. Source: ggml-common.h and ggml-quants.c of llama.cpp.
    """

    layout: ClassVar = Layout(
        64,
        np.dtype([("d", "<f2"), ("qs", "u1", (16,))]),
    )
    reproduces: ClassVar = True
    ids: ClassVar = {"llama.cpp": 42}
    file_types: ClassVar = {"llama.cpp": 41}
    fallbacks: ClassVar = {"llama.cpp": "Q4_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Multiply; exact for finite scales."""
        return (w.floats(w.fields(block["qs"], 2)) - 1) * w.half(block["d"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_levels`."""
        encode_levels(self, 0, values, out, importance, search)
