"""IQ2_KL on the CPU: an f16 scale per row, 6-bit sub-scales per 32 elements, 5-bit codes for pairs."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._books import pair_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import half_at, kernel, subroutine
from ggufx.kernels._lanes import planes
from ggufx.kernels._vector import LANES, Block, block_intrinsic

_NBYTES = 86


@block_intrinsic
def _block(b: Block) -> None:
    # Nibbles k and k + 4 share a byte.
    low, high = b.fields(2, 4, [0, 8, 16, 24, 4, 12, 20, 28]), b.fields(0, 2, range(0, 16, 2))
    scales = b.d.take(range(8)) * ((low | high << 4) - 32).floats()
    even, odd = zip(*tables.KL_PAIRS, strict=True)
    in_turn = [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)]
    for k in range(8):
        codes = b.codes(16 * k, (6, 4, 16), (70, 1, 16))
        values = codes.lookup(even).take(in_turn, codes.lookup(odd))
        b.store(32 * k, scales.take([k] * 32) * values.floats())


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = half_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 2 + b * _NBYTES, d, y, b * block_len)


_store_low = planes(128, 4, 0, 16)
_store_high = planes(128, 1, 4, 16)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    row[0], row[1] = d_bits & 255, d_bits >> 8
    for b in range(scales.shape[0] // 8):
        block = row[2 + b * _NBYTES : 2 + (b + 1) * _NBYTES]
        at = 8 * b
        high = 0
        for k in range(8):
            high |= scales[at + k] >> 4 << 2 * k
        block[0], block[1] = high & 255, high >> 8
        for k in range(4):
            block[2 + k] = (scales[at + k] & 15) | (scales[at + k + 4] & 15) << 4
        _store_low(codes, 128 * b, block, 6)
        _store_high(codes, 128 * b, block, 70)


search = codebook_search(
    pair_book(tables.KL_PAIRS),
    shift=0,
    sub_len=32,
    low=-32,
    step=1,
    count=64,
    whole_row=True,
    half=True,
    sigma=2.25,
    plain=0.0,
    starts=(26.0, 76.0),
    store=_store,
    root=True,
)
