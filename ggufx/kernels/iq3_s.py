"""IQ3_S on the CPU: points of four elements of a grid of 512 with signs, 4-bit scales per 32 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._grids import FREE, searcher
from ggufx.kernels._jit import half_to_float, kernel, load16, load32, load64, scale_signed16

_GRID = tables.GRID_IQ3_S.view(np.uint32).ravel().astype(np.uint64)
_NBYTES = 110
_LOW8 = np.uint64(0xFF)
_NINTH = np.uint64(0x100)
_WORD = np.uint64(32)

search = searcher(tables.GRID_IQ3_S, FREE, groups=8, unit=1, last=15)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start))
            scales = load32(row, start + 106)
            for s in range(8):
                a = (scales >> np.uint32(4 * s)) & np.uint32(15)
                scale = d * np.float32(np.uint32(1) + np.uint32(2) * a)
                # Points of four elements: a byte of index and a ninth bit each.
                low, ninth = load64(row, start + 2 + 8 * s), np.uint64(row[start + 66 + s]) << np.uint64(8)
                for half in range(2):
                    p0 = _GRID[(low & _LOW8) | (ninth & _NINTH)]
                    p1 = _GRID[((low >> np.uint64(8)) & _LOW8) | ((ninth >> np.uint64(1)) & _NINTH)]
                    p2 = _GRID[((low >> np.uint64(16)) & _LOW8) | ((ninth >> np.uint64(2)) & _NINTH)]
                    p3 = _GRID[((low >> np.uint64(24)) & _LOW8) | ((ninth >> np.uint64(3)) & _NINTH)]
                    low, ninth = low >> _WORD, ninth >> np.uint64(4)
                    signs = load16(row, start + 74 + 4 * s + 2 * half)
                    first, second = p0 | (p1 << _WORD), p2 | (p3 << _WORD)
                    scale_signed16(first, second, signs, scale, y, position + 32 * s + 16 * half)
