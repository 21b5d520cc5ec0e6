"""IQ1_M: points of a ternary grid of 2048, shifted by an eighth; 3-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, widen

BLOCK_LEN = 256

SHIFT = np.float32(0.125)


class IQ1_M(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (2 a + 1)) * (grid[g][i % 8] +- 0.125)``, 256 elements in 56 bytes.

    ``qs`` has the low bits of the grid indices; every nibble of ``qh`` the high three bits of an index and the sign of its
    shift. ``scales`` is four uint16: each has four scales a, and a nibble of the f16 d on top.

    Source: ``dequantize_row_iq1_m`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("qs", "u1", (32,)), ("qh", "u1", (16,)), ("scales", "u1", (8,))]))
    ids: ClassVar = {"llama.cpp": 29}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Gather the scale from its nibbles; look up points, shift and scale."""
        _, blocks = self.layout.split(rows)
        words = blocks["scales"].view("<u2")
        d = np.bitwise_or.reduce(words >> 12 << np.arange(0, 16, 4, dtype=np.uint16), axis=-1).view(np.float16)
        high = fields(blocks["qh"], 4, 1)
        indices = blocks["qs"] | (high & 7).astype(np.uint16) << 8
        values = tables.GRID_IQ1[indices] + np.where(high >> 3, -SHIFT, SHIFT)[..., None]
        values = values.reshape(*blocks.shape, 16, 16)
        a = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
        with np.errstate(invalid="ignore"):
            scales = widen(d) * (2 * a + 1).reshape(*blocks.shape, 16).astype(np.float32)
            out.reshape(values.shape)[...] = scales[..., None] * values
