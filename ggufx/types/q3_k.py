"""Q3_K: 3-bit codes; signed 6-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_plain
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256


class Q3_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (s - 32)) * (n - 4)``, 256 elements in 110 bytes.

    Low two bits of n in ``qs`` as in Q2_K, the third in ``hmask``, whose byte i % 32 holds it for every 32nd element. Nibbles
    of the first eight bytes of ``scales`` are the low bits of s, two bits of each of the last four the high ones.

    Source: ``dequantize_row_q3_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), ("d", "<f2")])
    )
    weighting: ClassVar = Weighting(factor=1.0, plain_factor=1.0, plain_power=0.5)
    ids: ClassVar = {"llama.cpp": 11}
    fallbacks: ClassVar = {"llama.cpp": "Q4_0", "ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Put codes and scales together from their parts and multiply."""
        codes = w.fields(block["qs"], 2, 32) | w.fields(block["hmask"], 1, 32) << 2
        packed = block["scales"]
        scales = w.fields(packed[..., :8], 4, 8) | w.fields(packed[..., 8:], 2, 4) << 4
        return w.scaled(w.half(block["d"]), w.floats(scales) - 32, w.floats(codes) - 4)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales; see :func:`ggufx.types.scalar.encode_plain`."""
        encode_plain(self, 3, values, out, importance, search)
