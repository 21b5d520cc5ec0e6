"""IQ3_KS on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch
from ggufx.kernels.cuda._words import MAGIC, half_at, locate, permute, put_bytes, short_at, table_words, word_at, words2

__all__ = ["decode"]

_SHAPE = _launch.Shape(block_len=256, block_nbytes=102, header_nbytes=2, parts=8)

_T0, _T1 = table_words(tables.IQ3, 128)
_SHIFT = tl.constexpr(tables.SHIFTS[3])


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks, 
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, header, row_exists, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 2, 102, 256, 8
    )
    # Eight bytes of low and of high bits a lane: eight elements of each of four sub-blocks, 32 elements apart.
    half, group = part // 4, part % 4
    a, b = words2(words, block + 6 + 8 * part, mask, ALIGNED)
    p, q = words2(words, block + 70 + 8 * group, mask, ALIGNED)
    p, q = p >> (4 * half).to(tl.uint32), q >> (4 * half).to(tl.uint32)
    d = half_at(words, header, row_exists, EVEN)
    extra = short_at(words, block, mask, EVEN) >> (4 * half).to(tl.uint32)
    scales = word_at(words, block + 2, mask, ALIGNED) >> (4 * half).to(tl.uint32)
    at += 128 * half + 8 * group
    for pair in tl.static_range(2):
        # Sub-blocks ``pair`` and ``pair + 2`` are the even and the odd nibbles.
        x = ((a >> (2 * pair)) & 0x33333333) | ((p << (2 - pair)) & 0x04040404) | ((p << (4 - pair)) & 0x40404040)
        y = ((b >> (2 * pair)) & 0x33333333) | ((q << (2 - pair)) & 0x04040404) | ((q << (4 - pair)) & 0x40404040)
        x0, x1 = permute(_T0, _T1, x), permute(_T0, _T1, x >> 16)
        y0, y1 = permute(_T0, _T1, y), permute(_T0, _T1, y >> 16)
        for odd in tl.static_range(2):
            k: tl.constexpr = pair + 2 * odd
            s = ((scales >> (8 * k)) & 15) | (((extra >> k) & 1) << 4)
            dl = d * (s.to(tl.int32) - 16).to(tl.float32)
            bias = MAGIC + 128 - _SHIFT * ((extra >> (8 + k)) & 1).to(tl.float32)
            order = 0x6420 + 0x1111 * odd + x * 0
            put_bytes(target, at + 32 * k, permute(x0, x1, order), permute(y0, y1, order), bias, dl, mask, TILE)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out)
