"""F16 on the CPU: binary16 to float32, sixteen at a time."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import half_to_float, kernel, put, widen_halves16


@kernel
def decode(rows, out, block_len):
    row_len = out.shape[1]
    whole = row_len - row_len % 16
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for i in range(0, whole, 16):
            widen_halves16(row, 2 * i, y, i)
        for i in range(whole, row_len):
            bits = np.uint16(row[2 * i] | (np.uint16(row[2 * i + 1]) << np.uint16(8)))
            put(y, i, half_to_float(bits))
