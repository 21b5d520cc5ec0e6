"""Q2_K on the CPU: 2-bit codes, 4-bit scales and minima per 16 elements under two f16."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._kquants import encode_affine
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_affine"]

_NBYTES = 84


@block_intrinsic
def _block(b: Block) -> None:
    packed = b.load(0, LANES)
    scales, minima = b.d * (packed & 15).floats(), b.half(82) * (packed >> 4).floats()
    for k in range(16):
        codes = b.codes(16 * k, (16, 2, 32))
        b.store(16 * k, codes.floats() * scales.spread(k) - minima.spread(k))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES + 80), y, b * block_len)
