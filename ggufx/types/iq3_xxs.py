"""IQ3_XXS: points of four elements of a grid of 256, with signs; 4-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import EVEN_SIGNS, fields, negated, widen

BLOCK_LEN = 256


class IQ3_XXS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.5) * +-grid[g][i % 4]``, 256 elements in 98 bytes.

    The first 64 bytes of ``qs`` are grid indices; then every 32 elements have a uint32 of signs and scale as in IQ2_XXS.

    Source: ``dequantize_row_iq3_xxs`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (96,))]))
    ids: ClassVar = {"llama.cpp": 18}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Look up points, apply signs and scale."""
        _, blocks = self.layout.split(rows)
        words = blocks["qs"][..., 64:].copy().view("<u4")[..., None]
        signs = EVEN_SIGNS[words >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)]
        points = tables.GRID_IQ3_XXS[blocks["qs"][..., :64]].reshape(*blocks.shape, 8, 32)
        values = negated(points, fields(signs, 1, 1))
        with np.errstate(invalid="ignore"):
            scales = widen(blocks["d"]) * (np.float32(0.5) + (words[..., 0] >> 28).astype(np.float32)) * np.float32(0.5)
            out.reshape(values.shape)[...] = scales[..., None] * values
