"""IQ3_KS on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots2
from ggufx.kernels.cuda._words import (
    MAGIC,
    bits_at,
    dot4,
    half_at,
    locate,
    merge,
    moved2,
    nibbles_at,
    permute,
    put_bytes,
    short_at,
    table_words,
    times,
    word_at,
    words2,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.QUARTERS.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=102, header_nbytes=2, parts=8, warps=8, repeat=1)

_T0, _T1 = table_words(tables.IQ3, 128)
_U0, _U1 = table_words(tables.IQ3)
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
            s = ((scales >> (8 * pair + 16 * odd)) & 15) | (((extra >> (pair + 2 * odd)) & 1) << 4)
            dl = d * (s.to(tl.int32) - 16).to(tl.float32)
            bias = MAGIC + 128 - _SHIFT * ((extra >> (8 + pair + 2 * odd)) & 1).to(tl.float32)
            order = 0x6420 + 0x1111 * odd + x * 0
            put_bytes(
                target, at + 32 * pair + 64 * odd, permute(x0, x1, order), permute(y0, y1, order), bias, dl, mask, TILE
            )


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 102
    part = unit % 8
    shift = 4 * (part // 4)
    p, q = moved2(words, block + 70 + 8 * (part % 4), shift, mask)
    # Of the flags (from bit 0 on the scales' fifth bits, from bit 8 on the table's), scales and third bits those of the lane's
    # half; the third bits of the second word one nibble up.
    return words2(words, block + 6 + 8 * part, mask, ALIGNED) + (
        bits_at(words, block, shift, mask, EVEN),
        nibbles_at(words, block + 2, shift, mask, ALIGNED),
        merge(p, q * 16, 0x0F0F0F0F),
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, flags, scales, third = raw
    _, low, high = known
    # Nibbles of ``a`` beside those of ``b``: what is looked up together then belongs to one sub-block.
    first = merge(a, b * 16, 0x0F0F0F0F)
    second = merge(a >> 4, b, 0x0F0F0F0F)
    # The four scales, a byte each: four bits, and above them the bit that a product moves to bits 4, 12, 20 and 28.
    s = (scales & 0x0F0F0F0F) | (times(flags & 15, 0x02040810 + a * 0) & 0x10101010)
    # Third bits of two sub-blocks each: moved to bit 2 of a nibble, either leaves bit 3 zero.
    even, odd = third & 0x55555555, third & 0xAAAAAAAA
    table = flags >> 8
    total = (a * 0).to(tl.int32)
    for sub in tl.static_range(4):
        codes = first if sub < 2 else second
        bits = odd >> 1 if sub == 3 else (odd if sub == 1 else even) * (4 >> sub)
        p = merge(codes >> (2 * (sub % 2)), bits, 0x33333333)
        # The shift is added to four bytes at once: no entry lies so little below zero that it would carry. A bit times a
        # number that moves it costs no shift.
        if sub == 3:
            more = times((table >> 3) & 1, _SHIFT * 0x01010101 + a * 0)
        else:
            more = times(table & (1 << sub), (_SHIFT >> sub) * 0x01010101 + a * 0)
        product = dots2(x, 2 * sub, permute(low, high, p) + more, permute(low, high, p >> 16) + more, True)
        # At most 2^24 times 16, four times: within 32 bits.
        total += product * dot4(s, (1 << (8 * sub)) + a * 0, total * 0 - 16)
    return total.to(tl.float32)


@triton.jit
def _header(words, header):
    return half_at(words, header, header >= 0, False)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_header,
    order=ORDER,
    layout=(102, 2),
    unit_nbytes=102 / 8,
    tuned=((4, 128, 2, False), (4, 128, 2, False), (1, 256, 8, False)),
    settled=((4, 128, 1, False), (2, 32, 1, False)),
    words=(_U0.value, _U1.value),
    known=2,
)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out)


def linear(
    x: torch.Tensor | _linear.Prepared,
    rows: torch.Tensor,
    out: torch.Tensor,
    *,
    planes: None = None,
    ids: torch.Tensor | None = None,
    settled: bool = False,
) -> None:
    """Fill ``out`` with ``x @ decode(rows).T``: see :func:`ggufx.kernels.cuda._linear.linear`."""
    _linear.linear(_FUSED, x, rows, out, ids=ids, settled=settled)
