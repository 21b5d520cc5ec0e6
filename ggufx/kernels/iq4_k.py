"""IQ4_K on the CPU: an f16 scale, 6-bit sub-scales and a table flag per 16 elements, 4-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._vector import Block, block_intrinsic

_NBYTES = 144


@block_intrinsic
def _block(b: Block) -> None:
    scales = (b.fields(8, 4, range(0, 64, 4)) | b.fields(4, 2, range(0, 32, 2)) << 4) - 32
    b.store_twins(tables.IQ4, b.d * scales.floats(), b.flags(2, 16), lambda i: b.codes(i, (16, 4, 16)))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
