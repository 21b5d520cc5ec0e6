"""IQ4_K on the CPU: an f16 scale, 6-bit sub-scales and a table flag per 16 elements, 4-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._books import table_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import half_at, kernel, subroutine
from ggufx.kernels._lanes import planes
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


_store_low = planes(256, 4, 0, 16)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    block = row[group * _NBYTES : (group + 1) * _NBYTES]
    extra = 0
    for k in range(16):
        extra |= flags[k] << k
    block[0], block[1] = d_bits & 255, d_bits >> 8
    block[2], block[3] = extra & 255, extra >> 8
    for k in range(0, 16, 2):
        block[8 + k // 2] = (scales[k] & 15) | (scales[k + 1] & 15) << 4
    for k in range(0, 16, 4):
        block[4 + k // 4] = scales[k] >> 4 | scales[k + 1] >> 4 << 2 | scales[k + 2] >> 4 << 4 | scales[k + 3] >> 4 << 6
    _store_low(codes, 0, block, 16)


search = codebook_search(
    table_book(tables.IQ4, staged=True),
    shift=tables.SHIFTS[4],
    sub_len=16,
    low=-32,
    step=1,
    count=64,
    whole_row=False,
    half=True,
    sigma=2.0,
    plain=0.0,
    starts=(100.0, 146.0),
    store=_store,
)
