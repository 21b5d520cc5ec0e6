"""Q5_1 on the CPU: an f16 scale, an f16 minimum, a uint32 of fifth bits and 16 bytes of nibbles as in Q4_0."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import half_to_float, kernel, load16, load32, nibbles_and_bits

_NBYTES = 24


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start = b * _NBYTES
            d, fifth = half_to_float(load16(row, start)), load32(row, start + 4)
            # Adding m is subtracting -m, to the bit.
            minimum = -half_to_float(load16(row, start + 2))
            nibbles_and_bits(row, start + 8, fifth, d, np.int8(0), minimum, y, b * block_len)
