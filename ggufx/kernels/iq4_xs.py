"""IQ4_XS on the CPU: nibbles into the table of IQ4_NL, signed 6-bit scales per 32 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._jit import half_to_float, kernel, load16, load32, nibble_lookup

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
