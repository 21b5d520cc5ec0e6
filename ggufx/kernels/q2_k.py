"""Q2_K on the CPU: 2-bit codes, 4-bit scales and minima per 16 elements under two f16."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import code_lookup, half_to_float, kernel, load16

_decode16 = code_lookup(2, minimum=True)
_NBYTES = 84
_NONE = np.uint8(0)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d, dmin = half_to_float(load16(row, start + 80)), half_to_float(load16(row, start + 82))
            for s in range(16):
                packed = row[start + s]
                scale = d * np.float32(packed & np.uint8(15))
                minimum = dmin * np.float32(packed >> np.uint8(4))
                # 128 elements share 32 bytes, two bits for every 32.
                codes = start + 16 + 32 * (s // 8) + 16 * (s % 2)
                quarter = np.uint8(2 * (s // 2 % 4))
                _decode16(row, codes, quarter, codes, _NONE, scale, np.int8(0), y, position + 16 * s, minimum)
