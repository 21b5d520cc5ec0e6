"""IQ2_XS on the CPU: points of a grid of 512 with signs, 4-bit scales per 16 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._grids import PARITY, searcher
from ggufx.kernels._jit import half_to_float, kernel, load16, load32, load64, scale_signed16

_GRID = tables.GRID_IQ2_XS.view(np.uint64).ravel()
_SIGNS = np.array(tables.EVEN_SIGNS, np.uint32)
_NBYTES = 74
_INDEX = np.uint32(511)
_SIGN = np.uint32(127)

search = searcher(tables.GRID_IQ2_XS, PARITY, groups=16, unit=0.125, last=15)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start))
            scales = load64(row, start + 66)
            for s in range(16):
                a = np.float32((scales >> np.uint64(4 * s)) & np.uint64(15))
                scale = (d * (np.float32(0.5) + a)) * np.float32(0.25)
                # Two runs of eight: nine bits of index and seven of signs each.
                pair = load32(row, start + 2 + 4 * s)
                first, second = _GRID[pair & _INDEX], _GRID[(pair >> np.uint32(16)) & _INDEX]
                lower, upper = _SIGNS[(pair >> np.uint32(9)) & _SIGN], _SIGNS[pair >> np.uint32(25)]
                signs = np.uint16(lower | (upper << np.uint32(8)))
                scale_signed16(first, second, signs, scale, y, position + 16 * s)
