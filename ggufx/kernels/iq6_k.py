"""IQ6_K on the CPU: an f16 scale, signed 8-bit sub-scales and a flag per 16 elements, 6-bit codes into a cubic."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._books import cubic_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import half_at, kernel, subroutine
from ggufx.kernels._lanes import planes
from ggufx.kernels._vector import LANES, Block, block_intrinsic

_NBYTES = 212


@block_intrinsic
def _block(b: Block) -> None:
    # As float32; LLVM wants constants that are.
    a0, a1, a2, a3 = (float(np.float32(x)) for x in tables.P6_COEFFICIENTS)
    scales = b.d * b.load(4, LANES).floats()
    flags = b.flags(2, LANES).widen(32).floats()
    for k in range(16):
        n = b.codes(16 * k, (20, 4, 32), (148, 2, 32)).floats()
        # Each step rounds once: that is what the format's table of 64 values is. x86 before 2013 has no such instruction:
        # there LLVM calls the C library's fmaf, exact and slow.
        cubic = n.fused(a3, a2).fused(n, a1).fused(n, a0)
        b.store(16 * k, scales.spread(k) * (cubic + flags.spread(k)))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)


_store_low = planes(256, 4, 0, 32)
_store_high = planes(256, 2, 4, 32)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    block = row[group * _NBYTES : (group + 1) * _NBYTES]
    extra = 0
    for k in range(16):
        extra |= flags[k] << k
        block[4 + k] = scales[k] - 127 & 255
    block[0], block[1] = d_bits & 255, d_bits >> 8
    block[2], block[3] = extra & 255, extra >> 8
    _store_low(codes, 0, block, 20)
    _store_high(codes, 0, block, 148)


search = codebook_search(
    cubic_book(),
    shift=tables.SHIFTS[6],
    sub_len=16,
    low=-127,
    step=1,
    count=255,
    whole_row=False,
    half=True,
    sigma=2.0,
    plain=0.25,
    starts=(82.0, 136.0),
    store=_store,
)
