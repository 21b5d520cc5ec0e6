"""NVFP4 on the CPU: an unsigned E4M3 scale per 16 E2M1 codes, the two nibbles of a byte 8 elements apart."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._jit import kernel
from ggufx.kernels._vector import LANES, Block, block_intrinsic

_NBYTES = 36
_ONE = np.float32(1)  # there is no scale per block


@block_intrinsic
def _block(b: Block) -> None:
    c = b.load(0, 4).widen(32)
    exponent = c >> 3 & 15
    subnormal = exponent.equals(0).widen(32)
    significand = (c & 7) + 8 - (subnormal << 3)
    # Half of the scale, as the table is doubled; code 0x7F is zero, 0xFF is not.
    power = ((exponent + subnormal + (127 - 11)) << 23).float_bits()
    scales = ((c.equals(0x7F).mask_of(32) ^ -1) & significand).floats() * power
    for k in range(0, 4, 2):
        # 16 bytes are two sub-blocks. Shuffling bytes before or after a lookup would keep it from becoming one instruction.
        both = scales.take([k] * 8 + [k + 1] * 8)
        low, high = (
            (b.load(4 + 8 * k, LANES) >> 4 * half & 15).lookup(tables.E2M1_DOUBLED).floats() * both for half in range(2)
        )
        b.store(16 * k, low.take([*range(8), *range(16, 24)], high))
        b.store(16 * k + 16, low.take([*range(8, 16), *range(24, 32)], high))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, _ONE, y, b * block_len)
