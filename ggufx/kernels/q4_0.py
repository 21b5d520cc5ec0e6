"""Q4_0 on the CPU: an f16 scale and 16 bytes of nibbles, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import half_to_float, kernel, nibble_lookup
from ggufx.kernels._linear import encode_block32
from ggufx.kernels._linear import encode_block32_reference as encode_reference

__all__ = ["decode", "encode_block32", "encode_reference"]

_decode16 = nibble_lookup(tuple(range(-8, 8)))


@kernel
def decode(rows, out, block_len):
    half = block_len // 2
    block_nbytes = half + 2
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start = b * block_nbytes
            d = half_to_float(np.uint16(row[start] | (np.uint16(row[start + 1]) << np.uint16(8))))
            _decode16(row, start + 2, d, y, b * block_len, b * block_len + half)
