"""IQ2_KS on a GPU."""

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

_SHAPE = _launch.Shape(block_len=256, block_nbytes=70, header_nbytes=2, parts=8, warps=8, repeat=1)

_T0, _T1 = table_words([*tables.IQ2, *(v + tables.SHIFTS[2] for v in tables.IQ2)], 128)
_U0, _U1 = table_words([*tables.IQ2, *(v + tables.SHIFTS[2] for v in tables.IQ2)])


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, header, row_exists, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 2, 70, 256, 8
    )
    # Eight code bytes a lane: eight elements of each of four sub-blocks, 32 elements apart.
    half, group = part // 4, part % 4
    a, b = words2(words, block + 6 + 8 * part, mask, ALIGNED)
    d = half_at(words, header, row_exists, EVEN)
    extra = short_at(words, block, mask, EVEN) >> (4 * half).to(tl.uint32)
    scales = word_at(words, block + 2, mask, ALIGNED) >> (16 * half).to(tl.uint32)
    at += 128 * half + 8 * group
    for pair in tl.static_range(2):
        # Sub-blocks ``pair`` and ``pair + 2`` are the even and the odd nibbles; bit 2 of a nibble chooses the shifted table.
        flags = ((extra >> pair) & 1) * 0x04040404 + ((extra >> (pair + 2)) & 1) * 0x40404040
        x = ((a >> (2 * pair)) & 0x33333333) | flags
        y = ((b >> (2 * pair)) & 0x33333333) | flags
        x0, x1 = permute(_T0, _T1, x), permute(_T0, _T1, x >> 16)
        y0, y1 = permute(_T0, _T1, y), permute(_T0, _T1, y >> 16)
        for odd in tl.static_range(2):
            s = ((scales >> (4 * pair + 8 * odd)) & 15) | (((extra >> (8 + pair + 2 * odd)) & 1) << 4)
            dl = d * (s.to(tl.int32) - 16).to(tl.float32)
            order = 0x6420 + 0x1111 * odd + x * 0
            put_bytes(
                target,
                at + 32 * pair + 64 * odd,
                permute(x0, x1, order),
                permute(y0, y1, order),
                MAGIC + 128,
                dl,
                mask,
                TILE,
            )


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 70
    part = unit % 8
    half = part // 4
    # Of the flags (one from bit 0 on, and, of the scales, one from bit 8 on) and of the scales those of the lane's half.
    return words2(words, block + 6 + 8 * part, mask, ALIGNED) + (
        bits_at(words, block, 4 * half, mask, EVEN),
        bits_at(words, block + 2 + 2 * half, 0 * half, mask, EVEN),
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, flags, scales = raw
    _, low, high = known
    # Nibbles of ``a`` beside those of ``b``: what is looked up together then belongs to one sub-block.
    first = merge(a, b * 16, 0x0F0F0F0F)
    second = merge(a >> 4, b, 0x0F0F0F0F)
    # Scales 0, 2, 1 and 3, a byte each: four bits, and above them the bit that a product moves to bits 4, 12, 20 and 28.
    s = (scales & 0x0F0F) + ((scales >> 4) & 0x0F0F) * 0x10000
    s = s | (times((flags >> 8) & 15, 0x02080410 + a * 0) & 0x10101010)
    total = (a * 0).to(tl.int32)
    for sub in tl.static_range(4):
        codes = first if sub < 2 else second
        # Bit 2 of every nibble chooses the table's twin. A bit times a number that moves it costs no shift.
        if sub == 3:
            choice = times((flags >> 1) & 4, 0x11111111 + a * 0)
        else:
            choice = times(flags & (1 << sub), (0x44444444 >> sub) + a * 0)
        p = ((codes >> (2 * (sub % 2))) & 0x33333333) | choice
        product = dots2(x, 2 * sub, permute(low, high, p), permute(low, high, p >> 16), True)
        # At most 2^26 times 16, four times: within 32 bits.
        total += product * dot4(s, (1 << (8 * (sub // 2 + 2 * (sub % 2)))) + a * 0, total * 0 - 16)
    return total.to(tl.float32)


@triton.jit
def _header(words, header):
    return half_at(words, header, header >= 0, False)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_header,
    order=ORDER,
    layout=(70, 2),
    unit_nbytes=70 / 8,
    tuned=((2, 128, 2, False), (2, 64, 2, False), (2, 128, 4, False)),
    settled=((4, 128, 1, False), (4, 32, 1, False)),
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
