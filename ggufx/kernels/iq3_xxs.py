"""IQ3_XXS on the CPU: points of four elements of a grid of 256 with signs, 4-bit scales per 32 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._grids import PAIRS, searcher
from ggufx.kernels._jit import half_to_float, kernel, load16, load32, load64, scale_signed16

_GRID = tables.GRID_IQ3_XXS.view(np.uint32).ravel().astype(np.uint64)
_SIGNS = np.array(tables.EVEN_SIGNS, np.uint32)
_NBYTES = 98
_INDEX = np.uint64(255)
_SIGN = np.uint32(127)
_WORD = np.uint64(32)

search = searcher(tables.GRID_IQ3_XXS, PAIRS, groups=8, unit=0.25, last=15)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start))
            for s in range(8):
                # Four times seven bits of signs, and the scale on top.
                word = load32(row, start + 66 + 4 * s)
                scale = (d * (np.float32(0.5) + np.float32(word >> np.uint32(28)))) * np.float32(0.5)
                indices = load64(row, start + 2 + 8 * s)
                for half in range(2):
                    index, sign = indices >> np.uint64(32 * half), word >> np.uint32(14 * half)
                    first = _GRID[index & _INDEX] | (_GRID[(index >> np.uint64(8)) & _INDEX] << _WORD)
                    index = index >> np.uint64(16)
                    second = _GRID[index & _INDEX] | (_GRID[(index >> np.uint64(8)) & _INDEX] << _WORD)
                    signs = _SIGNS[sign & _SIGN] | (_SIGNS[(sign >> np.uint32(7)) & _SIGN] << np.uint32(8))
                    scale_signed16(first, second, np.uint16(signs), scale, y, position + 32 * s + 16 * half)
