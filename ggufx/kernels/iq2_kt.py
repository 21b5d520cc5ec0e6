"""IQ2_KT on the CPU: a float32 scale per row, 4-bit sub-scales into a table, a trellis index per 8 elements."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import float_at, kernel
from ggufx.kernels._trellis import points, search
from ggufx.kernels._vector import LANES, Block, block_intrinsic, trellis

__all__ = ["decode", "points", "search"]

_NBYTES = 68


@block_intrinsic
def _block(b: Block) -> None:
    # Nibbles k and k + 4 share a byte; the lookup takes 16 codes, the upper half is unused.
    nibbles = b.fields(0, 4, [0, 8, 16, 24, 4, 12, 20, 28] * 2)
    scales = b.d * nibbles.narrow(8).lookup(tables.IQ4).floats()
    for i in range(0, 256, LANES):
        seeds = b.load(4 + i // 128 * 32, 16, 16).widen(32) + tables.TRELLIS_OFFSET
        pair = i // 8 % 16
        values = trellis(seeds.take([pair] * 8 + [pair + 1] * 8), 8)
        b.store(i, scales.spread(i // 32) * values.floats())


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = float_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 4 + b * _NBYTES, d, y, b * block_len)
