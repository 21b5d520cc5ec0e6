"""IQ5_KS on the CPU: a float32 scale per row, a byte (odd sub-scale, table flag) per 32 elements, 5-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._books import table_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import float_at, kernel, subroutine
from ggufx.kernels._lanes import planes
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


_store_low = planes(256, 4, 0, 32)
_store_high = planes(256, 1, 4, 32)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    row[0], row[1], row[2], row[3] = d_bits & 255, d_bits >> 8 & 255, d_bits >> 16 & 255, d_bits >> 24
    for b in range(scales.shape[0] // 8):
        block = row[4 + b * _NBYTES : 4 + (b + 1) * _NBYTES]
        at = 8 * b
        for k in range(8):
            block[k] = scales[at + k] << 1 | flags[at + k]
        _store_low(codes, 256 * b, block, 8)
        _store_high(codes, 256 * b, block, 136)


search = codebook_search(
    table_book(tables.IQ5, staged=True),
    shift=tables.SHIFTS[5],
    sub_len=32,
    low=-127,
    step=2,
    count=128,
    whole_row=True,
    half=False,
    sigma=2.0,
    plain=0.0,
    starts=(90.0, 146.0),
    store=_store,
)
