"""Q2_0 on the CPU: an f16 scale and 64 two-bit codes, four to a byte."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._levels import encode_levels
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_levels"]

_NBYTES = 18


@block_intrinsic
def _block(b: Block) -> None:
    for i in range(0, 64, LANES):
        b.store(i, (b.fields(2 + i // 4, 2, range(0, 32, 2)) - 1).floats() * b.d)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
