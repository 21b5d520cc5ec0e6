"""Q3_K on the CPU: 3-bit codes, signed 6-bit scales per 16 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import code_lookup, half_to_float, kernel, load16

_decode16 = code_lookup(2, 1)
_NBYTES = 110


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start + 108))
            for s in range(16):
                low4 = (row[start + 96 + s % 8] >> np.uint8(4 * (s // 8))) & np.uint8(15)
                high2 = (row[start + 104 + s % 4] >> np.uint8(2 * (s // 4))) & np.uint8(3)
                scale = d * np.float32(np.int32(low4 | (high2 << np.uint8(4))) - np.int32(32))
                # 128 elements share 32 bytes of low bits, two for every 32; all eight runs of 32 those of third bits.
                low, high = start + 32 + 32 * (s // 8) + 16 * (s % 2), start + 16 * (s % 2)
                quarter, eighth = np.uint8(2 * (s // 2 % 4)), np.uint8(s // 2)
                _decode16(row, low, quarter, high, eighth, scale, np.int8(-4), y, position + 16 * s)
