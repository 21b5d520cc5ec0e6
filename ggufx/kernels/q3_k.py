"""Q3_K on the CPU: 3-bit codes, signed 6-bit scales per 16 elements under an f16."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._kquants import encode_plain
from ggufx.kernels._vector import Block, block_intrinsic

__all__ = ["decode", "encode_plain"]

_NBYTES = 110


@block_intrinsic
def _block(b: Block) -> None:
    low = b.fields(96, 4, [8 * (k % 8) + 4 * (k // 8) for k in range(16)])
    high = b.fields(104, 2, [8 * (k % 4) + 2 * (k // 4) for k in range(16)])
    scales = b.d * ((low | high << 4) - 32).floats()
    for k in range(16):
        codes = b.codes(16 * k, (32, 2, 32), (0, 1, 32)) - 4
        b.store(16 * k, codes.floats() * scales.spread(k))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES + 108), y, b * block_len)
