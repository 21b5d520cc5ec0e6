"""Q4_K on the CPU: 4-bit codes, 6-bit scales and minima per 32 elements under two f16."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import code_lookup, half_to_float, kernel, load16
from ggufx.kernels._scales import scales_and_minima

_decode16 = code_lookup(4, minimum=True)
_NBYTES = 144
_BYTE = np.uint64(255)
_NONE = np.uint8(0)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d, dmin = half_to_float(load16(row, start)), half_to_float(load16(row, start + 2))
            scales, minima = scales_and_minima(row, start + 4)
            for s in range(8):
                scale = d * np.float32((scales >> np.uint64(8 * s)) & _BYTE)
                minimum = dmin * np.float32((minima >> np.uint64(8 * s)) & _BYTE)
                # 64 elements share 32 bytes: low nibbles, then high ones.
                half = np.uint8(4 * (s % 2))
                for run in range(0, 32, 16):
                    codes = start + 16 + 32 * (s // 2) + run
                    where = position + 32 * s + run
                    _decode16(row, codes, half, codes, _NONE, scale, np.int8(0), y, where, minimum)
