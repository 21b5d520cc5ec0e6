"""Q6_K on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch
from ggufx.kernels.cuda._words import MAGIC, byte_at, half_at, locate, put_bytes, words2

__all__ = ["decode"]

_SHAPE = _launch.Shape(block_len=256, block_nbytes=210, header_nbytes=0, parts=16)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks, 
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 210, 256, 16
    )
    # Eight bytes of low nibbles a lane: low ones are elements of 64, high ones are 64 further on; eight bytes of two high bits.
    half, group = part // 8, part % 8
    a, b = words2(words, block + 8 * part, mask, ALIGNED)
    p, r = words2(words, block + 128 + 32 * half + 8 * (group % 4), mask, ALIGNED)
    shift = (2 * (group // 4)).to(tl.uint32)
    p, r = p >> shift, r >> shift
    d = half_at(words, block + 208, mask, EVEN)
    scales = block + 192 + 8 * half + group // 2
    at += 128 * half + 8 * group
    for odd in tl.static_range(2):
        s = byte_at(words, scales + 4 * odd, mask).to(tl.int32)
        dl = d * ((s ^ 128) - 128).to(tl.float32)
        low = ((a >> (4 * odd)) & 0x0F0F0F0F) | (((p >> (4 * odd)) & 0x03030303) << 4)
        high = ((b >> (4 * odd)) & 0x0F0F0F0F) | (((r >> (4 * odd)) & 0x03030303) << 4)
        put_bytes(target, at + 64 * odd, low, high, MAGIC + 32, dl, mask, TILE)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out)
