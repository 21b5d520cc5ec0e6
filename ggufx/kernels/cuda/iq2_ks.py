"""IQ2_KS on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots2
from ggufx.kernels.cuda._words import MAGIC, half_at, locate, permute, put_bytes, short_at, table_words, word_at, words2

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
    return words2(words, block + 6 + 8 * part, mask, ALIGNED) + (
        short_at(words, block, mask, EVEN) >> (4 * half).to(tl.uint32),
        word_at(words, block + 2, mask, ALIGNED) >> (16 * half).to(tl.uint32),
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, extra, scales = raw
    _, low, high = known
    total = (a * 0).to(tl.int32)
    for pair in tl.static_range(2):
        # A bit times a number that moves it costs no shift.
        flags = (extra & (1 << pair)) * (0x04040404 >> pair) + (extra & (4 << pair)) * (0x10101010 >> pair)
        p = ((a >> (2 * pair)) & 0x33333333) | flags
        q = ((b >> (2 * pair)) & 0x33333333) | flags
        p0, p1 = permute(low, high, p), permute(low, high, p >> 16)
        q0, q1 = permute(low, high, q), permute(low, high, q >> 16)
        for odd in tl.static_range(2):
            order = 0x6420 + 0x1111 * odd + a * 0
            product = dots2(x, 2 * pair + 4 * odd, permute(p0, p1, order), permute(q0, q1, order), True)
            s = ((scales >> (4 * pair + 8 * odd)) & 15) | ((extra >> (4 + pair + 2 * odd)) & 16)
            # At most 2^26 times 16, four times: within 32 bits.
            total += product * (s.to(tl.int32) - 16)
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
    tuned=((2, 128, 4, False), (4, 128, 4, False), (1, 128, 4, False)),
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
