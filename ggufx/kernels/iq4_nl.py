"""IQ4_NL on the CPU: an f16 scale and 16 bytes of nibbles into a table, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._codebook import block_search
from ggufx.kernels._jit import half_to_float, kernel, load16, nibble_lookup, subroutine
from ggufx.kernels._lanes import planes

_decode16 = nibble_lookup(tables.IQ4)


@kernel
def decode(rows, out, block_len):
    half = block_len // 2
    block_nbytes = half + 2
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start, position = b * block_nbytes, b * block_len
            _decode16(row, start + 2, half_to_float(load16(row, start)), y, position, position + half)


_store_low = planes(32, 4, 0, 16)


@subroutine
def _store(row, block, d_bits, codes):
    start = 18 * block
    row[start], row[start + 1] = d_bits & 255, d_bits >> 8
    _store_low(codes, 0, row, start + 2)


search = block_search(tables.IQ4, length=32, sigma=2.0, starts=(90.0, 150.0), store=_store)
