"""Q6_K on the CPU: 6-bit codes, signed 8-bit scales per 16 elements under an f16."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._kquants import encode_plain
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_plain"]

_NBYTES = 210


@block_intrinsic
def _block(b: Block) -> None:
    scales = b.d * b.load(192, LANES).floats()
    for k in range(16):
        codes = b.codes(16 * k, (0, 4, 64), (128, 2, 32)) - 32
        b.store(16 * k, codes.floats() * scales.spread(k))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES + 208), y, b * block_len)
