"""Q5_0: an f16 scale and 32 signed 5-bit codes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, widen

BLOCK_LEN = 32


class Q5_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 16) * d``, 32 elements in 22 bytes; nibbles as in Q4_0, bit i of ``qh`` is the fifth bit of element i.

    Source: ``dequantize_row_q5_0`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))]))
    ids: ClassVar = {"llama.cpp": 6}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Put nibbles and fifth bits together and scale."""
        _, blocks = self.layout.split(rows)
        codes = fields(blocks["qs"], 4, 16) | fields(blocks["qh"], 1, 1) << 4
        with np.errstate(invalid="ignore"):
            out.reshape(codes.shape)[...] = widen(blocks["d"]) * (codes.astype(np.int8) - np.int8(16))
