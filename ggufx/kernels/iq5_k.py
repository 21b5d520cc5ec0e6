"""IQ5_K on the CPU: an f16 scale, 6-bit sub-scales and a table flag per 16 elements, 5-bit codes into a table."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._jit import code_lookup, half_to_float, kernel

_decode16 = code_lookup(4, 1, tables.IQ5)
_SHIFT = np.int8(tables.SHIFTS[5])
_NBYTES = 176


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            block = row[start : start + _NBYTES]
            d = half_to_float(np.uint16(block[0] | (np.uint16(block[1]) << np.uint16(8))))
            flags = block[2] | (np.uint16(block[3]) << np.uint16(8))
            for s in range(16):
                low4 = (block[8 + s // 2] >> np.uint8(4 * (s % 2))) & np.uint8(15)
                high2 = (block[4 + s // 4] >> np.uint8(2 * (s % 4))) & np.uint8(3)
                scale = d * np.float32(np.int32(low4 | (high2 << np.uint8(4))) - np.int32(32))
                shift = _SHIFT if (flags >> np.uint16(s)) & np.uint16(1) else np.int8(0)
                # 64 elements share 32 bytes of low nibbles; all eight runs of 32 share the bytes of fifth bits.
                low = 16 + 32 * (s // 4) + 16 * (s % 2)
                high = 144 + 16 * (s % 2)
                half = np.uint8(4 * (s // 2 % 2))
                _decode16(block, low, half, high, np.uint8(s // 2), scale, shift, y, position + 16 * s)
