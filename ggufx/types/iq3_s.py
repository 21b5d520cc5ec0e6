"""IQ3_S: points of four elements of a grid of 512, with signs; 4-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, negated, widen

BLOCK_LEN = 256


class IQ3_S(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (1 + 2 a)) * +-grid[g][i % 4]``, 256 elements in 110 bytes.

    ``qs`` has the low bits of the grid indices, ``qh`` their ninth, a bit a point; ``signs`` a bit an element. Nibble k of
    ``scales`` is the scale a of elements 32 k and on.

    Source: ``dequantize_row_iq3_s`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN,
        np.dtype(
            [("d", "<f2"), ("qs", "u1", (64,)), ("qh", "u1", (8,)), ("signs", "u1", (32,)), ("scales", "u1", (4,))]
        ),
    )
    ids: ClassVar = {"llama.cpp": 21}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Look up points, apply signs and scale."""
        _, blocks = self.layout.split(rows)
        indices = blocks["qs"] | fields(blocks["qh"], 1, 1).astype(np.uint16) << 8
        signs = fields(blocks["signs"], 1, 1).reshape(*blocks.shape, 8, 32)
        values = negated(tables.GRID_IQ3_S[indices].reshape(signs.shape), signs)
        with np.errstate(invalid="ignore"):
            scales = widen(blocks["d"]) * (1 + 2 * fields(blocks["scales"], 4, 1))
            out.reshape(values.shape)[...] = scales[..., None] * values
