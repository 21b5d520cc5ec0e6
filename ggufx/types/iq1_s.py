"""IQ1_S: points of a ternary grid of 2048, shifted by an eighth; 3-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import widen

BLOCK_LEN = 256

SHIFT = np.float32(0.125)


class IQ1_S(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (2 a + 1)) * (grid[g][i % 8] +- 0.125)``, 256 elements in 50 bytes.

    ``qs`` has the low bits of the grid indices. Every 32 elements have a uint16 of ``qh``: four times the high three bits of an
    index, the scale a, and on top the sign of the shift.

    Source: ``dequantize_row_iq1_s`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (32,)), ("qh", "<u2", (8,))]))
    ids: ClassVar = {"llama.cpp": 19}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Look up points, shift and scale."""
        _, blocks = self.layout.split(rows)
        qh = blocks["qh"][..., None]
        high = qh >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
        indices = blocks["qs"].reshape(high.shape) | high << 8
        values = tables.GRID_IQ1[indices].reshape(*blocks.shape, 8, 32) + np.where(qh >> 15, -SHIFT, SHIFT)
        with np.errstate(invalid="ignore"):
            scales = widen(blocks["d"]) * (2 * (blocks["qh"] >> 12 & 7) + 1).astype(np.float32)
            out.reshape(values.shape)[...] = scales[..., None] * values
