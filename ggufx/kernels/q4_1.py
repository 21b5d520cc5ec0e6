"""Q4_1 on the CPU: an f16 scale, an f16 minimum and 16 bytes of nibbles, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import code_lookup, half_to_float, kernel, load16

_decode16 = code_lookup(4, minimum=True)
_NONE = np.uint8(0)


@kernel
def decode(rows, out, block_len):
    half = block_len // 2
    block_nbytes = half + 4
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start, position = b * block_nbytes, b * block_len
            d = half_to_float(load16(row, start))
            # Adding m is subtracting -m, to the bit.
            minimum = -half_to_float(load16(row, start + 2))
            codes = start + 4
            _decode16(row, codes, _NONE, codes, _NONE, d, np.int8(0), y, position, minimum)
            _decode16(row, codes, np.uint8(4), codes, _NONE, d, np.int8(0), y, position + half, minimum)
