"""TQ2_0 on the CPU: ternary codes, two bits each, under an f16."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import code_lookup, half_to_float, kernel, load16

_decode16 = code_lookup(2)
_NBYTES = 66
_NONE = np.uint8(0)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start + 64))
            for s in range(16):
                # 128 elements share 32 bytes, two bits for every 32.
                codes = start + 32 * (s // 8) + 16 * (s % 2)
                quarter = np.uint8(2 * (s // 2 % 4))
                _decode16(row, codes, quarter, codes, _NONE, d, np.int8(-1), y, position + 16 * s)
