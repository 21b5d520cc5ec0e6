"""IQ4_K on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import (
    MAGIC,
    byte_at,
    codes16,
    half_at,
    locate,
    permute,
    put_bytes,
    short_at,
    table_words,
    words2,
    words4,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.NATURAL.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=144, header_nbytes=0, parts=16, warps=8, repeat=1)

_T0, _T1, _T2, _T3 = table_words(tables.IQ4, 128)
_U0, _U1, _U2, _U3 = table_words(tables.IQ4)
_SHIFT = tl.constexpr(tables.SHIFTS[4])


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 144, 256, 16
    )
    # Eight code bytes a lane: low nibbles are elements of sub-block 2g, high ones, 16 further on, of 2g + 1.
    g, half = part // 2, part % 2
    a, b = words2(words, block + 16 + 8 * part, mask, ALIGNED)
    d = half_at(words, block, mask, EVEN)
    flags = short_at(words, block + 2, mask, EVEN) >> (2 * g).to(tl.uint32)
    low = byte_at(words, block + 8 + g, mask)
    high = byte_at(words, block + 4 + g // 2, mask) >> (4 * (g % 2)).to(tl.uint32)
    at += 32 * g + 8 * half
    a0, a1 = codes16(a, _T0, _T1, _T2, _T3), codes16(a >> 16, _T0, _T1, _T2, _T3)
    b0, b1 = codes16(b, _T0, _T1, _T2, _T3), codes16(b >> 16, _T0, _T1, _T2, _T3)
    for odd in tl.static_range(2):
        s = ((low >> (4 * odd)) & 15) | (((high >> (2 * odd)) & 3) << 4)
        dl = d * (s.to(tl.int32) - 32).to(tl.float32)
        bias = MAGIC + 128 - _SHIFT * ((flags >> odd) & 1).to(tl.float32)
        order = 0x6420 + 0x1111 * odd + a * 0
        put_bytes(target, at + 16 * odd, permute(a0, a1, order), permute(b0, b1, order), bias, dl, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 144
    g = unit % 8
    shift = (4 * (g % 2)).to(tl.uint32)
    return words4(words, block + 16 + 16 * g, mask, ALIGNED) + (
        half_at(words, block, mask, EVEN),
        short_at(words, block + 2, mask, EVEN) >> (2 * g).to(tl.uint32),
        byte_at(words, block + 8 + g, mask),
        byte_at(words, block + 4 + g // 2, mask) >> shift,
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, d, flags, low, high = raw
    a0, a1 = codes16(a, _U0, _U1, _U2, _U3), codes16(a >> 16, _U0, _U1, _U2, _U3)
    b0, b1 = codes16(b, _U0, _U1, _U2, _U3), codes16(b >> 16, _U0, _U1, _U2, _U3)
    c0, c1 = codes16(c, _U0, _U1, _U2, _U3), codes16(c >> 16, _U0, _U1, _U2, _U3)
    e0, e1 = codes16(e, _U0, _U1, _U2, _U3), codes16(e >> 16, _U0, _U1, _U2, _U3)
    order = 0x6420 + a * 0
    first = dots4(
        x, 0, permute(a0, a1, order), permute(b0, b1, order), permute(c0, c1, order), permute(e0, e1, order), True
    )
    order = 0x7531 + a * 0
    second = dots4(
        x, 4, permute(a0, a1, order), permute(b0, b1, order), permute(c0, c1, order), permute(e0, e1, order), True
    )
    first += _SHIFT * (flags & 1).to(tl.int32) * sums[0]
    second += _SHIFT * ((flags >> 1) & 1).to(tl.int32) * sums[1]
    s0 = ((low & 15) | ((high & 3) << 4)).to(tl.int32) - 32
    s1 = ((low >> 4) | (((high >> 2) & 3) << 4)).to(tl.int32) - 32
    return d * (s0.to(tl.float32) * first.to(tl.float32) + s1.to(tl.float32) * second.to(tl.float32))


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(144, 0),
    unit_nbytes=144 / 8,
    tuned=((4, 128, 2, False), (4, 128, 2, False), (1, 128, 4, False)),
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
