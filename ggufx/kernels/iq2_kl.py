"""IQ2_KL on the CPU: an f16 scale per row, 6-bit sub-scales per 32 elements, 5-bit codes for pairs."""

from __future__ import annotations

from ggufx import tables
from ggufx.kernels._jit import half_at, kernel
from ggufx.kernels._vector import LANES, Block, block_intrinsic

_NBYTES = 86


@block_intrinsic
def _block(b: Block) -> None:
    # Nibbles k and k + 4 share a byte.
    low, high = b.fields(2, 4, [0, 8, 16, 24, 4, 12, 20, 28]), b.fields(0, 2, range(0, 16, 2))
    scales = b.d.take(range(8)) * ((low | high << 4) - 32).floats()
    even, odd = zip(*tables.KL_PAIRS, strict=True)
    in_turn = [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)]
    for k in range(8):
        codes = b.codes(16 * k, (6, 4, 16), (70, 1, 16))
        values = codes.lookup(even).take(in_turn, codes.lookup(odd))
        b.store(32 * k, scales.take([k] * 32) * values.floats())


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        d = half_at(row, 0)
        for b in range(y.shape[0] // block_len):
            _block(row, 2 + b * _NBYTES, d, y, b * block_len)
