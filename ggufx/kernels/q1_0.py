"""Q1_0 on the CPU: an f16 scale and 128 signs."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._levels import encode_signs
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_signs"]

_NBYTES = 18


@block_intrinsic
def _block(b: Block) -> None:
    minus = -b.d
    for i in range(0, 128, LANES):
        b.store(i, b.flags(2 + i // 8, LANES).choose(b.d, minus))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
