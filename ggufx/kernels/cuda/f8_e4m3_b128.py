"""F8_E4M3_B128 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch
from ggufx.kernels.cuda._words import byte_at, e4m3_pairs, first_half, locate, put8, second_half, words2

__all__ = ["decode"]

_SHAPE = _launch.Shape(block_len=128, block_nbytes=129, header_nbytes=0, parts=16)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks, 
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 129, 128, 16
    )
    # Eight codes a lane.
    a, b = words2(words, block + 1 + 8 * part, mask, ALIGNED)
    e = byte_at(words, block, mask)
    # 0 is a float32 subnormal, 255 NaN.
    bits = tl.where(e == 0, 0x00400000, tl.where(e == 255, 0x7FC00000, e << 23).to(tl.uint32)).to(tl.uint32)
    scale = bits.to(tl.float32, bitcast=True)
    c0, c1 = e4m3_pairs(a, HARDWARE)
    c2, c3 = e4m3_pairs(b, HARDWARE)
    put8(
        target,
        at + 8 * part,
        first_half(c0) * scale,
        second_half(c0) * scale,
        first_half(c1) * scale,
        second_half(c1) * scale,
        first_half(c2) * scale,
        second_half(c2) * scale,
        first_half(c3) * scale,
        second_half(c3) * scale,
        mask,
        TILE,
    )


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out, HARDWARE=_launch.converts_e4m3(rows.device))
