"""IQ4_KSS on the CPU: a float32 scale per row, 4-bit codes, a scale byte in the low bits of eight words."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import float_at, kernel
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
