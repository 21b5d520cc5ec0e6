"""IQ3_K on the CPU: an f16 scale, odd sub-scales, their signs and a table flag per 16 elements, 3-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._vector import Block, block_intrinsic

_NBYTES = 110


@block_intrinsic
def _block(b: Block) -> None:
    magnitudes = (b.fields(6, 4, range(0, 64, 4)) << 1) + 1
    scales = b.d * b.flags(4, 16).choose(-magnitudes, magnitudes).floats()
    b.store_twins(tables.IQ3, scales, b.flags(2, 16), lambda i: b.codes(i, (14, 2, 32), (78, 1, 32)))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
