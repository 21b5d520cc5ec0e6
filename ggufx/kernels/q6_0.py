"""Q6_0 on the CPU: an f16 scale and 6-bit codes around zero, the high bits of four elements in a byte."""

from __future__ import annotations

from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._vector import Block, block_intrinsic

_NBYTES = 26


@block_intrinsic
def _block(b: Block) -> None:
    for half in range(2):
        # Byte j has the high bits of elements j, j + 16, j + 8 and j + 24.
        high = b.load(2, 8) >> 2 * half & 3
        high = high.take(range(16), b.load(2, 8) >> 2 * half + 4 & 3)
        b.store(16 * half, ((b.codes(16 * half, (10, 4, 16)) | high << 4) - 32).floats() * b.d)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
