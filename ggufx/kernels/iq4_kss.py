"""IQ4_KSS on the CPU: a float32 scale per row, 4-bit codes, a scale byte in the low bits of eight words."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._books import even_book
from ggufx.kernels._codebook import codebook_search
from ggufx.kernels._jit import float_at, kernel, subroutine
from ggufx.kernels._lanes import planes
from ggufx.kernels._vector import BYTE, LANES, Block, Vector, block_intrinsic

_NBYTES = 128


@block_intrinsic
def _block(b: Block) -> None:
    # Bit 0 of word p is bit p of the sub-block's scale byte: four words at a time, then the halves of the byte.
    bits = b.load(0, 16, 64) & 0x0001_0001_0001_0001
    bits = bits | bits >> 15
    bits = (bits | bits >> 30).narrow(32) & 15
    c = bits.take(range(0, 16, 2)) | bits.take(range(1, 16, 2)) << 4
    scales = b.d.take(range(8)) * ((c & 254) - 127).floats()

    def codes(i: int) -> Vector:
        words = b.load(i // 32 * 16, 8, 16) & 0xFFFE
        nibbles = (words ^ (words >> 1)).cast(BYTE, LANES)
        return nibbles >> 4 if i % 32 else nibbles & 15

    b.store_twins(tables.IQ4, scales, (c & 1).narrow(1), codes)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = float_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 4 + b * _NBYTES, d, y, b * block_len)


_store_low = planes(256, 4, 0, 16)


@subroutine
def _store(row, group, d_bits, scales, flags, codes):
    row[0], row[1], row[2], row[3] = d_bits & 255, d_bits >> 8 & 255, d_bits >> 16 & 255, d_bits >> 24
    for b in range(scales.shape[0] // 8):
        block = row[4 + b * _NBYTES : 4 + (b + 1) * _NBYTES]
        _store_low(codes, 256 * b, block, 0)
        for i in range(0, _NBYTES, 2):
            # What xor with itself shifted right by one takes back: every bit is the parity of those from its own on.
            word = block[i] | block[i + 1] << 8
            word ^= word >> 1
            word ^= word >> 2
            word ^= word >> 4
            word ^= word >> 8
            k = 8 * b + i // 16
            word |= (scales[k] << 1 | flags[k]) >> (i // 2 & 7) & 1
            block[i], block[i + 1] = word & 255, word >> 8


search = codebook_search(
    even_book(tables.IQ4),
    shift=tables.SHIFTS[4],
    sub_len=32,
    low=-127,
    step=2,
    count=128,
    whole_row=True,
    half=False,
    sigma=2.0,
    plain=0.0,
    starts=(95.0, 150.0),
    store=_store,
)
