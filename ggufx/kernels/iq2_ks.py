"""IQ2_KS on the CPU: an f16 scale per row, 5-bit sub-scales and a table flag per 32 elements, 2-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._books import table_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import half_at, kernel, subroutine
from ggufx.kernels._lanes import planes
from ggufx.kernels._vector import Block, block_intrinsic

_NBYTES = 70


@block_intrinsic
def _block(b: Block) -> None:
    # Low byte of the first two: table flags; high byte: fifth bits of the scales, worth 16 above the -16.
    scales = b.fields(2, 4, range(0, 32, 4)) - 16 + (b.flags(1, 8).widen(32) << 4)
    b.store_twins(tables.IQ2, b.d.take(range(8)) * scales.floats(), b.flags(0, 8), lambda i: b.codes(i, (6, 2, 32)))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = half_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 2 + b * _NBYTES, d, y, b * block_len)


_store_low = planes(256, 2, 0, 32)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    row[0], row[1] = d_bits & 255, d_bits >> 8
    for b in range(scales.shape[0] // 8):
        block = row[2 + b * _NBYTES : 2 + (b + 1) * _NBYTES]
        at = 8 * b
        table, high = 0, 0
        for k in range(8):
            table |= flags[at + k] << k
            high |= scales[at + k] >> 4 << k
        block[0], block[1] = table, high
        for k in range(4):
            block[2 + k] = (scales[at + 2 * k] & 15) | (scales[at + 2 * k + 1] & 15) << 4
        _store_low(codes, 256 * b, block, 6)


search = codebook_search(
    table_book(tables.IQ2, staged=False),
    shift=tables.SHIFTS[2],
    sub_len=32,
    low=-16,
    step=1,
    count=32,
    whole_row=True,
    half=True,
    sigma=1.5,
    plain=0.25,
    starts=(14.0, 46.0),
    store=_store,
)
