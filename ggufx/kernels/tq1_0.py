"""TQ1_0 on the CPU: ternary codes, five (or four) to a byte, under an f16."""

from __future__ import annotations

from ggufx.kernels._jit import half_to_float, kernel, load16, load32, trits4, trits16
from ggufx.kernels._levels import encode_levels

__all__ = ["decode", "encode_levels"]

_NBYTES = 54


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // _NBYTES):
            start, position = b * _NBYTES, b * block_len
            d = half_to_float(load16(row, start + 52))
            # A run of 32 bytes, one of 16, and four bytes of four codes.
            trits16(row, start, d, y, position, 32)
            trits16(row, start + 16, d, y, position + 16, 32)
            trits16(row, start + 32, d, y, position + 160, 16)
            trits4(load32(row, start + 48), d, y, position + 240)
