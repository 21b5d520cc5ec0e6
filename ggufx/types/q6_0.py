"""Q6_0: an f16 scale and 32 six-bit codes around zero."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.packing import fields
from ggufx.types.scalar import encode_block32


class Q6_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 32) * d``, 32 elements in 26 bytes.

    Byte j of ``qs`` holds the low bits of elements j and j + 16; byte j of ``qh`` the high bits of j, j + 16, j + 8 and
    j + 24. Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        32,
        np.dtype([("d", "<f2"), ("qh", "u1", (8,)), ("qs", "u1", (16,))]),
    )
    ids: ClassVar = {"ik_llama.cpp": 133}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Multiply; exact for finite scales."""
        _, blocks = self.layout.split(rows)
        high = fields(blocks["qh"], 2, 8).reshape(*blocks.shape, 2, 2, 8).swapaxes(-3, -2).reshape(*blocks.shape, 32)
        levels = (fields(blocks["qs"], 4, 16) | high << 4).astype(np.float32) - np.float32(32)
        with np.errstate(invalid="ignore"):
            out.reshape(levels.shape)[...] = levels * blocks["d"].astype(np.float32)[..., None]

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_block32`."""
        encode_block32(self, 6, values, out, importance, search)
