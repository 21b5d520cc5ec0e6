"""Q8_0 on the CPU: an f16 scale and 32 signed bytes."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import half_to_float, kernel


@kernel
def decode(rows, out, block_len):  # type: ignore[no-untyped-def]  # noqa: D103
    block_nbytes = block_len + 2
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start = b * block_nbytes
            d = half_to_float(np.uint16(row[start] | (np.uint16(row[start + 1]) << np.uint16(8))))
            codes = row[start + 2 : start + block_nbytes]
            z = y[b * block_len : (b + 1) * block_len]
            for i in range(codes.shape[0]):
                z[i] = np.float32(np.int8(codes[i])) * d
