"""TQ2_0: ternary codes, two bits each, under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.scalar import encode_levels
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256


class TQ2_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 1) * d``, 256 elements in 66 bytes; 128 elements share 32 bytes of ``qs``, two bits for every 32.

    Source: ``dequantize_row_tq2_0`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("qs", "u1", (64,)), ("d", "<f2")]))
    reproduces: ClassVar = True
    ids: ClassVar = {"llama.cpp": 35}
    file_types: ClassVar = {"llama.cpp": 37}
    fallbacks: ClassVar = {"llama.cpp": "Q4_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale the codes. Code 3 is no ternary digit, and decodes to 2."""
        return w.half(block["d"]) * (w.floats(w.fields(block["qs"], 2, 32)) - 1)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_levels`."""
        encode_levels(self, 2, values, out, importance, search)
