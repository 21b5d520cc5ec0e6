"""IQ2_S on the CPU: points of a grid of 1024 with signs, 4-bit scales per 16 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._grids import FREE, searcher
from ggufx.kernels._jit import half_to_float, kernel, load16, load64, scale_signed16

_GRID = tables.GRID_IQ2_S.view(np.uint64).ravel()
_NBYTES = 82
_LOW8 = np.uint64(0xFF)
_HIGH2 = np.uint64(0x300)
_EIGHT = np.uint64(8)

search = searcher(tables.GRID_IQ2_S, FREE, groups=16, unit=0.125, last=15)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start))
            high, scales = load64(row, start + 66), load64(row, start + 74)
            for s in range(16):
                a = np.float32((scales >> np.uint64(4 * s)) & np.uint64(15))
                scale = (d * (np.float32(0.5) + a)) * np.float32(0.25)
                # Two runs of eight: a byte of index, two bits more, and eight signs each.
                low, top = np.uint64(load16(row, start + 2 + 2 * s)), high >> np.uint64(4 * s)
                first = _GRID[(low & _LOW8) | ((top << _EIGHT) & _HIGH2)]
                second = _GRID[(low >> _EIGHT) | ((top << np.uint64(6)) & _HIGH2)]
                scale_signed16(first, second, load16(row, start + 34 + 2 * s), scale, y, position + 16 * s)
