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
        # 16 bytes are two sub-blocks: look up in whole vectors, then put the halves together.
        codes = b.load(4 + 8 * k, LANES)
        low, high = ((codes >> shift & 15).lookup(tables.E2M1_DOUBLED) for shift in (0, 4))
        for part in range(2):
            values = low.take([8 * part + lane + 8 * (lane // 8) for lane in range(LANES)], high)
            b.store(16 * (k + part), values.floats() * scales.spread(k + part))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, _ONE, y, b * block_len)
