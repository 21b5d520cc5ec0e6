"""Q6_K on the CPU: 6-bit codes, signed 8-bit scales per 16 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import code_lookup, half_to_float, kernel, load16

_decode16 = code_lookup(4, 2)
_NBYTES = 210


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start + 208))
            for s in range(16):
                scale = d * np.float32(np.int8(row[start + 192 + s]))
                # 128 elements share 64 bytes of low nibbles, then the same bytes' high ones, and 32 bytes of high bits.
                low = start + 64 * (s // 8) + 16 * (s % 4)
                high = start + 128 + 32 * (s // 8) + 16 * (s % 2)
                half, quarter = np.uint8(4 * (s // 4 % 2)), np.uint8(2 * (s // 2 % 4))
                _decode16(row, low, half, high, quarter, scale, np.int8(-32), y, position + 16 * s)
