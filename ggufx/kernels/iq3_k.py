"""IQ3_K on the CPU: an f16 scale, odd sub-scales, their signs and a table flag per 16 elements, 3-bit codes."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._books import table_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import half_at, kernel, subroutine
from ggufx.kernels._lanes import planes
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


_store_low = planes(256, 2, 0, 32)
_store_high = planes(256, 1, 2, 32)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    block = row[group * _NBYTES : (group + 1) * _NBYTES]
    extra, signs = 0, 0
    for k in range(16):
        extra |= flags[k] << k
        signs |= (1 if scales[k] < 16 else 0) << k
    block[0], block[1] = d_bits & 255, d_bits >> 8
    block[2], block[3] = extra & 255, extra >> 8
    block[4], block[5] = signs & 255, signs >> 8
    # Numbers 0..31 of the scales -31, -29, .. 31; magnitudes count from 1 on.
    for k in range(0, 16, 2):
        low = scales[k] - 16 if scales[k] >= 16 else 15 - scales[k]
        high = scales[k + 1] - 16 if scales[k + 1] >= 16 else 15 - scales[k + 1]
        block[6 + k // 2] = low | high << 4
    _store_low(codes, 0, block, 14)
    _store_high(codes, 0, block, 78)


search = codebook_search(
    table_book(tables.IQ3, staged=False),
    shift=tables.SHIFTS[3],
    sub_len=16,
    low=-31,
    step=2,
    count=32,
    whole_row=False,
    half=True,
    sigma=1.5,
    plain=0.25,
    starts=(40.0, 72.0),
    store=_store,
)
