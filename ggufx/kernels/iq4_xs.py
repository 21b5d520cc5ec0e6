"""IQ4_XS on the CPU: nibbles into the table of IQ4_NL, signed 6-bit scales per 32 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._books import table_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import half_to_float, kernel, load16, load32, nibble_lookup, subroutine
from ggufx.kernels._lanes import planes

_decode16 = nibble_lookup(tables.IQ4)
_NBYTES = 136
_LOW4 = np.uint32(15)
_HIGH2 = np.uint32(3)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start))
            high, low = np.uint32(load16(row, start + 2)), load32(row, start + 4)
            for s in range(8):
                low4, high2 = (low >> np.uint32(4 * s)) & _LOW4, (high >> np.uint32(2 * s)) & _HIGH2
                scale = d * np.float32(np.int32(low4 | (high2 << np.uint32(4))) - np.int32(32))
                where = position + 32 * s
                _decode16(row, start + 8 + 16 * s, scale, y, where, where + 16)


_store_low = planes(256, 4, 0, 16)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    block = row[group * _NBYTES : (group + 1) * _NBYTES]
    block[0], block[1] = d_bits & 255, d_bits >> 8
    high = 0
    for k in range(8):
        high |= scales[k] >> 4 << 2 * k
    block[2], block[3] = high & 255, high >> 8
    for k in range(0, 8, 2):
        block[4 + k // 2] = (scales[k] & 15) | (scales[k + 1] & 15) << 4
    _store_low(codes, 0, block, 8)


search = codebook_search(
    table_book(tables.IQ4, staged=True),
    shift=0,
    sub_len=32,
    low=-32,
    step=1,
    count=64,
    whole_row=False,
    half=True,
    sigma=2.0,
    plain=0.0,
    starts=(88.0, 146.0),
    store=_store,
)
