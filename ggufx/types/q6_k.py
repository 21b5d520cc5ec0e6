"""Q6_K: 6-bit codes; signed 8-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_plain
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256


class Q6_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * (n - 32)``, 256 elements in 210 bytes.

    128 elements share 64 bytes of ``ql`` (64 low nibbles, then 64 high ones) and 32 of ``qh``, two bits for every 32.

    Source: ``dequantize_row_q6_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<f2")])
    )
    weighting: ClassVar = Weighting(factor=1.0, plain_factor=1.0, plain_power=0.5)
    ids: ClassVar = {"llama.cpp": 14}
    file_types: ClassVar = {"llama.cpp": 18}
    fallbacks: ClassVar = {"llama.cpp": "Q8_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Put the codes together and multiply, scale by sub-scale first."""
        codes = w.fields(block["ql"], 4, 64) | w.fields(block["qh"], 2, 32) << 4
        return w.scaled(w.half(block["d"]), w.reinterpreted(block["scales"], "i1"), w.floats(codes) - 32)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales; see :func:`ggufx.types.scalar.encode_plain`."""
        encode_plain(self, 6, values, out, importance, search)
