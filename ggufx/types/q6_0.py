"""Q6_0: an f16 scale and 32 six-bit codes around zero."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_block32
from ggufx.types.words import Array, Fields, Words


class Q6_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 32) * d``, 32 elements in 26 bytes.

    Byte j of ``qs`` holds the low bits of elements j and j + 16; byte j of ``qh`` the high bits of j, j + 16, j + 8 and
    j + 24. Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        32,
        np.dtype([("d", "<f2"), ("qh", "u1", (8,)), ("qs", "u1", (16,))]),
    )
    weighting: ClassVar = Weighting(factor=1.0, span=0)
    ids: ClassVar = {"ik_llama.cpp": 133}
    file_types: ClassVar = {"ik_llama.cpp": 135}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Multiply; exact for finite scales."""
        # Bit pairs 0 and 2 of a byte belong to the first 16 elements, 1 and 3 to the others.
        pairs = w.fields(block["qh"], 2, 8)
        high = w.concatenate([pairs[..., 8 * n : 8 * n + 8] for n in (0, 2, 1, 3)])
        return (w.floats(w.fields(block["qs"], 4, 16) | high << 4) - 32) * w.half(block["d"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_block32`."""
        encode_block32(self, 6, values, out, importance, search)
