"""IQ1_S on the CPU: points of a ternary grid of 2048, shifted by an eighth; 3-bit scales per 32 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._grids import SAME, searcher
from ggufx.kernels._iq1 import POINTS
from ggufx.kernels._jit import half_to_float, kernel, load16, load32, scale_signed16

_NBYTES = 50
_LOW8 = np.uint64(0xFF)
_HIGH3 = np.uint64(0x700)
_SHIFT = np.uint64(0x800)

search = searcher(tables.GRID_IQ1, SAME, groups=8, unit=0.125, last=7, shifts=(1, -1), factor=8)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start)) * np.float32(0.125)
            for s in range(8):
                # Four times the high three bits of an index, the scale, and the sign of the shift.
                qh, low = np.uint64(load16(row, start + 34 + 2 * s)), np.uint64(load32(row, start + 2 + 4 * s))
                a = (qh >> np.uint64(12)) & np.uint64(7)
                scale = d * np.float32(np.uint64(2) * a + np.uint64(1))
                shift = (qh >> np.uint64(4)) & _SHIFT
                for half in range(2):
                    index, high = low >> np.uint64(16 * half), qh >> np.uint64(6 * half)
                    first = POINTS[(index & _LOW8) | ((high << np.uint64(8)) & _HIGH3) | shift]
                    second = POINTS[((index >> np.uint64(8)) & _LOW8) | ((high << np.uint64(5)) & _HIGH3) | shift]
                    scale_signed16(first, second, np.uint16(0), scale, y, position + 32 * s + 16 * half)
