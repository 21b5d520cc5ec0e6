"""Q5_1 on the CPU: an f16 scale, an f16 minimum, a uint32 of fifth bits and 16 bytes of nibbles as in Q4_0."""

from __future__ import annotations

from ggufx.kernels._affine import encode_affine32, encode_reference
from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_affine32", "encode_reference"]

_NBYTES = 24


@block_intrinsic
def _block(b: Block) -> None:
    minimum = b.half(2)
    for i in range(0, 32, LANES):
        fifth = b.flags(4 + i // 8, LANES).mask_of(8) & 16
        b.store(i, (b.codes(i, (8, 4, 16)) | fifth).floats() * b.d + minimum)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
