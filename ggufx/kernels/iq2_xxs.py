"""IQ2_XXS on the CPU: points of a grid of 256 with signs, 4-bit scales per 32 elements under an f16."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._jit import half_to_float, kernel, load16, load64, scale_signed16

_GRID = tables.GRID_IQ2_XXS.view(np.uint64).ravel()
_SIGNS = np.array(tables.EVEN_SIGNS, np.uint64)
_NBYTES = 66
_INDEX = np.uint64(255)
_SIGN = np.uint64(127)
_EIGHT = np.uint64(8)


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start))
            for s in range(8):
                # Four bytes of indices, four times seven bits of signs, and the scale on top.
                group = load64(row, start + 2 + 8 * s)
                scale = (d * (np.float32(0.5) + np.float32(group >> np.uint64(60)))) * np.float32(0.25)
                for half in range(2):
                    index, sign = group >> np.uint64(16 * half), group >> np.uint64(32 + 14 * half)
                    first, second = _GRID[index & _INDEX], _GRID[(index >> _EIGHT) & _INDEX]
                    signs = _SIGNS[sign & _SIGN] | (_SIGNS[(sign >> np.uint64(7)) & _SIGN] << _EIGHT)
                    scale_signed16(first, second, np.uint16(signs), scale, y, position + 32 * s + 16 * half)
