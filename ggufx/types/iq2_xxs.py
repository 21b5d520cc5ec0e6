"""IQ2_XXS: points of a grid of 256, with signs; 4-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import EVEN_SIGNS, fields, negated, widen

BLOCK_LEN = 256


class IQ2_XXS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.25) * +-grid[g][i % 8]``, 256 elements in 66 bytes.

    Every 32 elements have eight bytes of ``qs``: four grid indices, then a uint32 of four times seven sign bits (the eighth is
    their parity) and, on top, the scale a.

    Source: ``dequantize_row_iq2_xxs`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "<u2", (32,))]))
    ids: ClassVar = {"llama.cpp": 16}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Look up points, apply signs and scale."""
        _, blocks = self.layout.split(rows)
        groups = blocks["qs"].reshape(*blocks.shape, 8, 4)
        indices = groups[..., :2].copy().view(np.uint8)
        words = groups[..., 2:].copy().view("<u4")
        signs = EVEN_SIGNS[words >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)]
        values = negated(tables.GRID_IQ2_XXS[indices], fields(signs[..., None], 1, 1)).reshape(*blocks.shape, 8, 32)
        with np.errstate(invalid="ignore"):
            scales = (
                widen(blocks["d"]) * (np.float32(0.5) + (words[..., 0] >> 28).astype(np.float32)) * np.float32(0.25)
            )
            out.reshape(values.shape)[...] = scales[..., None] * values
