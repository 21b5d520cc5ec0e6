"""IQ1_M on the CPU: points of a ternary grid of 2048, shifted by an eighth; 3-bit scales per 16 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._grids import EITHER, searcher
from ggufx.kernels._iq1 import POINTS
from ggufx.kernels._jit import half_to_float, kernel, load16, load64, scale_signed16

_NBYTES = 56
_LOW8 = np.uint64(0xFF)
_HIGH4 = np.uint64(0xF00)

search = searcher(tables.GRID_IQ1, EITHER, groups=16, unit=0.125, last=7, shifts=(1, -1), factor=8)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            # Four uint16 of four 3-bit scales each, and a nibble of d on top.
            scales = load64(row, start + 48)
            bits = (scales >> np.uint64(12)) & np.uint64(0xF)
            bits |= (scales >> np.uint64(24)) & np.uint64(0xF0)
            bits |= (scales >> np.uint64(36)) & np.uint64(0xF00)
            bits |= (scales >> np.uint64(48)) & np.uint64(0xF000)
            d = half_to_float(np.uint16(bits)) * np.float32(0.125)
            for s in range(16):
                a = (scales >> np.uint64(16 * (s // 4) + 3 * (s % 4))) & np.uint64(7)
                scale = d * np.float32(np.uint64(2) * a + np.uint64(1))
                # Two runs of eight: a byte of index, three bits more, and the sign of the shift each.
                low, high = np.uint64(load16(row, start + 2 * s)), np.uint64(row[start + 32 + s])
                first = POINTS[(low & _LOW8) | ((high << np.uint64(8)) & _HIGH4)]
                second = POINTS[(low >> np.uint64(8)) | ((high << np.uint64(4)) & _HIGH4)]
                scale_signed16(first, second, np.uint16(0), scale, y, position + 16 * s)
