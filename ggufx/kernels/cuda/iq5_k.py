"""IQ5_K on a GPU."""

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

ORDER = _linear.PAIR32.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=176, header_nbytes=0, parts=16, warps=8, repeat=2)

_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = table_words(tables.IQ5, 128)
_SHIFT = tl.constexpr(tables.SHIFTS[5])


@triton.jit
def codes32(nibbles, fifths):
    """Look up four codes of five bits: the low nibbles of ``nibbles``, with bits 0 and 1 of a byte of ``fifths`` for two."""
    low = codes16(nibbles, _T0, _T1, _T2, _T3)
    high = codes16(nibbles, _T4, _T5, _T6, _T7)
    # Bit 0 of byte j belongs to nibble 2j, bit 1 to nibble 2j + 1: moved to bit 2 of the nibbles of a choice.
    pick = ((fifths << 2) & 0x04040404) | ((fifths << 5) & 0x40404040) | 0x32103210
    return permute(low, high, pick)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 176, 256, 16
    )
    # Eight code bytes a lane: low nibbles are elements of sub-block k, high ones, 32 further on, of k + 2.
    q, group = part // 4, part % 4
    k = 4 * q + group // 2
    a, b = words2(words, block + 16 + 8 * part, mask, ALIGNED)
    p, r = words2(words, block + 144 + 8 * group, mask, ALIGNED)
    p, r = p >> (2 * q).to(tl.uint32), r >> (2 * q).to(tl.uint32)
    d = half_at(words, block, mask, EVEN)
    flags = short_at(words, block + 2, mask, EVEN) >> k.to(tl.uint32)
    # Nibbles k % 2 of two neighbouring bytes; two bits k % 4 and k % 4 + 2 of one.
    low = short_at(words, block + 8 + 2 * q, mask, EVEN) >> (4 * (k % 2)).to(tl.uint32)
    high = byte_at(words, block + 4 + q, mask) >> (2 * (k % 2)).to(tl.uint32)
    at += 64 * q + 8 * group
    a0, a1 = codes32(a, p), codes32(a >> 16, p >> 16)
    b0, b1 = codes32(b, r), codes32(b >> 16, r >> 16)
    for odd in tl.static_range(2):
        s = ((low >> (8 * odd)) & 15) | (((high >> (4 * odd)) & 3) << 4)
        dl = d * (s.to(tl.int32) - 32).to(tl.float32)
        bias = MAGIC + 128 - _SHIFT * ((flags >> (2 * odd)) & 1).to(tl.float32)
        order = 0x6420 + 0x1111 * odd + a * 0
        put_bytes(target, at + 32 * odd, permute(a0, a1, order), permute(b0, b1, order), bias, dl, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 176
    q, side = (unit % 8) // 2, unit % 2
    k = 4 * q + side
    return (
        words4(words, block + 16 + 16 * (unit % 8), mask, ALIGNED)
        + words4(words, block + 144 + 16 * side, mask, ALIGNED)
        + (
            half_at(words, block, mask, EVEN),
            short_at(words, block + 2, mask, EVEN) >> k.to(tl.uint32),
            short_at(words, block + 8 + 2 * q, mask, EVEN) >> (4 * side).to(tl.uint32),
            byte_at(words, block + 4 + q, mask) >> (2 * side).to(tl.uint32),
            (2 * q).to(tl.uint32),
        )
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, p, q, r, t, d, flags, low, high, shift = raw
    p, q, r, t = p >> shift, q >> shift, r >> shift, t >> shift
    a0, a1, b0, b1 = codes32(a, p), codes32(a >> 16, p >> 16), codes32(b, q), codes32(b >> 16, q >> 16)
    c0, c1, e0, e1 = codes32(c, r), codes32(c >> 16, r >> 16), codes32(e, t), codes32(e >> 16, t >> 16)
    order = 0x6420 + a * 0
    first = dots4(
        x, 0, permute(a0, a1, order), permute(b0, b1, order), permute(c0, c1, order), permute(e0, e1, order), False
    )
    order = 0x7531 + a * 0
    second = dots4(
        x, 4, permute(a0, a1, order), permute(b0, b1, order), permute(c0, c1, order), permute(e0, e1, order), False
    )
    first += (_SHIFT * (flags & 1).to(tl.int32) - 128) * sums[0]
    second += (_SHIFT * ((flags >> 2) & 1).to(tl.int32) - 128) * sums[1]
    s0 = ((low & 15) | ((high & 3) << 4)).to(tl.int32) - 32
    s1 = (((low >> 8) & 15) | (((high >> 4) & 3) << 4)).to(tl.int32) - 32
    return d * (s0.to(tl.float32) * first.to(tl.float32) + s1.to(tl.float32) * second.to(tl.float32))


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(176, 0),
    unit_nbytes=176 / 8,
    tuned=((2, 128, 4, False), (4, 128, 2, False), (1, 128, 4, False)),
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
