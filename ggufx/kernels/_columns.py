"""Sums over the columns of float rows, on the CPU."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import kernel

__all__ = ["add_squares"]


@kernel
def add_squares(values, sums):
    """Add the squares of ``values`` float32 [n, row_len] to ``sums`` float64 [row_len], one row after the other."""
    for r in range(values.shape[0]):
        row = values[r]
        for i in range(sums.shape[0]):
            x = np.float64(row[i])
            sums[i] += x * x
