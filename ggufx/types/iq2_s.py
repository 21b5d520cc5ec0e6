"""IQ2_S: points of a grid of 1024, with signs; 4-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, negated, widen

BLOCK_LEN = 256


class IQ2_S(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.25) * +-grid[g][i % 8]``, 256 elements in 82 bytes.

    The first 32 bytes of ``qs`` are the low bits of the grid indices, the others the signs, a bit an element; ``qh`` has the
    indices' high two bits. Nibble b of ``scales`` is the scale a of elements 16 b and on.

    Source: ``dequantize_row_iq2_s`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (64,)), ("qh", "u1", (8,)), ("scales", "u1", (8,))])
    )
    ids: ClassVar = {"llama.cpp": 22}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Look up points, apply signs and scale."""
        _, blocks = self.layout.split(rows)
        indices = blocks["qs"][..., :32] | fields(blocks["qh"], 2, 1).astype(np.uint16) << 8
        signs = fields(blocks["qs"][..., 32:, None], 1, 1)
        values = negated(tables.GRID_IQ2_S[indices], signs).reshape(*blocks.shape, 16, 16)
        with np.errstate(invalid="ignore"):
            scales = widen(blocks["d"]) * (np.float32(0.5) + fields(blocks["scales"], 4, 1)) * np.float32(0.25)
            out.reshape(values.shape)[...] = scales[..., None] * values
