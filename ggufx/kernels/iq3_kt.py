"""IQ3_KT on the CPU: a float32 scale per row, 4-bit sub-scales, a trellis index per 8 magnitudes, signs."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import float_at, kernel
from ggufx.kernels._trellis import points, search
from ggufx.kernels._vector import LANES, WORD, Block, block_intrinsic, trellis

__all__ = ["decode", "points", "search"]

_NBYTES = 100


@block_intrinsic
def _block(b: Block) -> None:
    scales = b.d.take(range(8)) * b.fields(0, 4, [0, 8, 16, 24, 4, 12, 20, 28]).floats()
    for i in range(0, 256, LANES):
        seeds = b.load(4 + i // 128 * 32, 16, 16).widen(32) + tables.TRELLIS_OFFSET
        pair = i // 8 % 16
        values = trellis(seeds.take([pair] * 8 + [pair + 1] * 8), 8).floats()
        magnitudes = scales.spread(i // 32) * (values.cast(WORD, LANES) & 0x7FFFFFFF).float_bits()
        # The sign comes last, so that it shows on zeros.
        signs = b.load(68 + i % 32, LANES).widen(32) << 31 - i // 32 & 0x80000000
        b.store(i, (magnitudes.cast(WORD, LANES) ^ signs).float_bits())


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = float_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 4 + b * _NBYTES, d, y, b * block_len)
