"""A Numba kernel of TERNARY. Without it the type works as well, at the speed of NumPy."""

from __future__ import annotations

import numpy as np

from ggufx.kernels.jit import half_at, kernel, put

__all__ = ["OUTPUTS", "decode"]

OUTPUTS = ("float32", "float16", "bfloat16")
"""What ``decode`` can fill, thanks to ``put``."""


@kernel
def decode(rows, out, block_len):
    """Fill ``out`` with what the specification gives: an f16 scale and four codes a byte."""
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            start = b * 6
            d = half_at(row, start)
            for i in range(block_len):
                code = row[start + 2 + i // 4] >> np.uint8(2 * (i % 4)) & np.uint8(3)
                put(y, b * block_len + i, (np.float32(code) - np.float32(1)) * d)
