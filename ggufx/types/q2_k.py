"""Q2_K: 2-bit codes; 4-bit scales and minima of 16 elements under two f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_affine
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256


class Q2_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * n - (dmin * m)`` in four roundings, 256 elements in 84 bytes.

    Byte b of ``scales`` holds s (low nibble) and m (high) of elements 16 b and on; 128 elements share 32 bytes of ``qs``, two
    bits for every 32.

    Source: ``dequantize_row_q2_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("scales", "u1", (16,)), ("qs", "u1", (64,)), ("d", "<f2"), ("dmin", "<f2")])
    )
    weighting: ClassVar = Weighting(factor=1.0, plain_factor=1.0, plain_power=0.5)
    ids: ClassVar = {"llama.cpp": 10}
    file_types: ClassVar = {"llama.cpp": 10}
    fallbacks: ClassVar = {"llama.cpp": "Q4_0", "ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale the codes of every 16 elements, subtract their minimum."""
        codes = w.parted(w.fields(block["qs"], 2, 32), 16, 16)
        scales = w.half(block["d"]) * (block["scales"] & 15)
        minima = w.half(block["dmin"]) * (block["scales"] >> 4)
        return w.joined(scales[..., None] * codes - minima[..., None])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales and minima; see :func:`ggufx.types.scalar.encode_affine`."""
        encode_affine(self, 2, values, out, importance, search)
