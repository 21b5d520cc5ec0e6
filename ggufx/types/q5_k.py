"""Q5_K: 5-bit codes; 6-bit scales and minima of 32 elements under two f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_affine
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256


class Q5_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * n - (dmin * m)`` in four roundings, 256 elements in 176 bytes.

    As Q4_K, and bit i / 32 of byte i % 32 of ``qh`` is the fifth bit of n.

    Source: ``dequantize_row_q5_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN,
        np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (12,)), ("qh", "u1", (32,)), ("qs", "u1", (128,))]),
    )
    weighting: ClassVar = Weighting(factor=1.0, plain_factor=1.0, plain_power=0.5)
    ids: ClassVar = {"llama.cpp": 13}
    fallbacks: ClassVar = {"llama.cpp": "Q5_1", "ik_llama.cpp": "Q6_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale the codes of every 32 elements, subtract their minimum."""
        codes = w.parted(w.fields(block["qs"], 4, 32) | w.fields(block["qh"], 1, 32) << 4, 8, 32)
        s, m = w.scales_and_minima(block["scales"])
        scales, minima = (w.half(block["d"]) * s, w.half(block["dmin"]) * m)
        return w.joined(scales[..., None] * codes - minima[..., None])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales and minima; see :func:`ggufx.types.scalar.encode_affine`."""
        encode_affine(self, 5, values, out, importance, search)
