"""Q4_0: an f16 scale and 32 four-bit codes around zero."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import encode_block32, kernel_of, locked
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32


class Q4_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 8) * d``, 32 elements in 18 bytes; byte j of ``qs`` holds elements j (low) and j + 16 (high)."""

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (BLOCK_LEN // 2,))]))
    reproduces: ClassVar = True
    rms_bound: ClassVar = 0.089
    weighting: ClassVar = Weighting(factor=1.0, span=0)
    ids: ClassVar = {"llama.cpp": 2}
    file_types: ClassVar = {"llama.cpp": 2}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Multiply; exact for finite scales."""
        return (w.floats(w.fields(block["qs"], 4, 16)) - 8) * w.half(block["d"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_block32`.

        Effort ``reference`` gives the C library's bytes: plain rounding, or with importance its search over 19 scales. Only
        a scale beyond binary16, which the library stores as infinity, is clamped to 65504.
        """
        if search.effort == "reference":
            kernel = kernel_of(self)
            kernel.encode_reference(locked(values), locked(importance), out)
        else:
            encode_block32(self, 4, values, out, importance, search)
