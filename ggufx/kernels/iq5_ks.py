"""IQ5_KS on the CPU: a float32 scale per row, a byte (odd sub-scale, table flag) per 32 elements, 5-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import float_at, kernel
from ggufx.kernels._vector import Block, block_intrinsic

_NBYTES = 168


@block_intrinsic
def _block(b: Block) -> None:
    c = b.load(0, 8)
    scales = b.d.take(range(8)) * ((c & 254) - 127).floats()
    b.store_twins(tables.IQ5, scales, (c & 1).narrow(1), lambda i: b.codes(i, (8, 4, 32), (136, 1, 32)))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = float_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 4 + b * _NBYTES, d, y, b * block_len)
