"""Q5_K on the CPU: 5-bit codes, 6-bit scales and minima per 32 elements under two f16."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._kquants import encode_affine
from ggufx.kernels._scales import scales_and_minima
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_affine"]

_NBYTES = 176


@block_intrinsic
def _block(b: Block) -> None:
    scales, minima = scales_and_minima(b)
    for i in range(0, 256, LANES):
        codes = b.codes(i, (48, 4, 32), (16, 1, 32))
        b.store(i, codes.floats() * scales.spread(i // 32) - minima.spread(i // 32))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
