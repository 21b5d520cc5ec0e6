"""Q4_1 on the CPU: an f16 scale, an f16 minimum and 16 bytes of nibbles, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

from ggufx.kernels._affine import encode_affine32, encode_reference
from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._vector import LANES, Block, block_intrinsic

__all__ = ["decode", "encode_affine32", "encode_reference"]

_NBYTES = 20


@block_intrinsic
def _block(b: Block) -> None:
    minimum = b.half(2)
    for i in range(0, 32, LANES):
        b.store(i, b.codes(i, (4, 4, 16)).floats() * b.d + minimum)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, half_at(row, b * _NBYTES), y, b * block_len)
