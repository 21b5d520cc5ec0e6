"""IQ4_KT on the CPU: a float32 scale per row, 7-bit sub-scales, a 15-bit trellis index per 4 elements."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import float_at, kernel
from ggufx.kernels._trellis import points, search
from ggufx.kernels._vector import LANES, Block, block_intrinsic, trellis

__all__ = ["decode", "points", "search"]

_NBYTES = 128


@block_intrinsic
def _block(b: Block) -> None:
    words = b.load(0, 8, 32)
    scales = b.d.take(range(8)) * ((words >> 1 & 127) - 64).floats()
    offsets = ((words & 1) << 15) + tables.TRELLIS_OFFSET
    for i in range(0, 64, LANES):  # 16 groups, of two sub-blocks
        pair = [i // 8] * 8 + [i // 8 + 1] * 8
        low, middle = b.load(32 + i, LANES), b.codes(i, (96, 4, 32))
        high = words.take(pair) >> [8 + 3 * (lane % 8) for lane in range(LANES)] & 7
        seeds = (low.widen(32) | middle.widen(32) << 8 | high << 12) + offsets.take(pair)
        for part in range(4):
            values = trellis(seeds.take([4 * part + lane // 4 for lane in range(LANES)]), 4)
            position = 4 * i + 16 * part
            b.store(position, scales.spread(position // 32) * values.floats())


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = float_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 4 + b * _NBYTES, d, y, b * block_len)
