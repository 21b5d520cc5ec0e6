"""IQ5_K on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import more4
from ggufx.kernels.cuda._words import (
    MAGIC,
    add,
    byte_at,
    codes16,
    dot4,
    half_at,
    locate,
    merge,
    permute,
    put_bytes,
    rotate,
    short_at,
    table_words,
    times,
    upper,
    vector4,
    widen_half,
    word_at,
    words2,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.EIGHTS32.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=176, header_nbytes=0, parts=16, warps=8, repeat=2)

_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = table_words(tables.IQ5, 128)
_WORDS = table_words(tables.IQ5[:16], 128) + table_words(
    high - low for low, high in zip(tables.IQ5[:16], tables.IQ5[16:], strict=True)
)
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
    if ALIGNED == 16:
        first, high, low, last = vector4(words, block, mask, ALIGNED)
        low = tl.where(q < 2, low, last)
    else:
        first, high = words2(words, block, mask, ALIGNED)
        low = word_at(words, block + 8 + 4 * (q // 2), mask, ALIGNED)
    a, b, c, e = vector4(words, block + 16 + 16 * (unit % 8), mask, ALIGNED)
    p, r, t, u = vector4(words, block + 144 + 16 * side, mask, ALIGNED)
    # Bits 2q and 2q + 1 of a byte of fifth bits moved to bits 2 and 3 or, of every other word, 6 and 7.
    up = (64 >> (2 * q)).to(tl.uint32)
    return (
        a,
        b,
        c,
        e,
        merge(rotate(p, 2 * q - 2), times(r, up), 0x0F0F0F0F),
        merge(rotate(t, 2 * q - 2), times(u, up), 0x0F0F0F0F),
        first,
        first >> (15 + 4 * q + side).to(tl.uint32),
        low >> (16 * (q % 2) + 4 * side).to(tl.uint32),
        high >> (8 * q + 2 * side).to(tl.uint32),
    )


@triton.jit
def _codes(n, m, e, f, known):
    """Four codes, plus 128, of four selectors of four nibbles: see :func:`_lookup`."""
    _, t0, t1, t2, t3, d0, d1, d2, d3 = known
    return add(permute(t0, t1, n) + permute(t2, t3, m) + permute(d0, d1, e), permute(d2, d3, f))


@triton.jit
def _lookup(n, fifths, known):
    """Look up eight codes, plus 128: the nibbles of ``n`` and, above them, the fourth bits of the nibbles of ``fifths``."""
    # A permute repeats the sign, 0, of the byte that a nibble of 8 or more, less 8, names. So the codes of 4 bits are the sum
    # of the lookups in either half of their table, and what a fifth bit adds to them (100 to 127) the sum of two more, whose
    # selectors are 8 or more without the bit. No byte carries.
    m = n ^ 0x88888888
    e, f = n | (~fifths & 0x88888888), m | (~fifths & 0x88888888)
    return _codes(n, m, e, f, known), _codes(upper(n), upper(m), upper(e), upper(f), known)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, p, q, first, flags, low, high = raw
    # Nibbles of neighbouring words beside each other: what is looked up together then belongs to one sub-block.
    c0, c1 = _lookup(merge(a, b * 16, 0x0F0F0F0F), times(p, 2 + a * 0), known)
    c2, c3 = _lookup(merge(c, e * 16, 0x0F0F0F0F), times(q, 2 + a * 0), known)
    sum0 = more4(x, 0, c0, c1, c2, c3, ((flags & 2) | 0xFFFFFF80).to(tl.int32, bitcast=True) * sums[0], False)
    c0, c1 = _lookup(merge(a >> 4, b, 0x0F0F0F0F), p, known)
    c2, c3 = _lookup(merge(c >> 4, e, 0x0F0F0F0F), q, known)
    sum1 = more4(x, 4, c0, c1, c2, c3, (((flags >> 2) & 2) | 0xFFFFFF80).to(tl.int32, bitcast=True) * sums[1], False)
    # Both scales, a byte each: four bits, and above them two that a product moves to bits 4 and 12.
    s = (low & 0x0F0F) | (times(high & 0x33, 0x0110 + a * 0) & 0x3030)
    s0 = dot4(s, 0x0001 + a * 0, sum0 * 0 - 32)
    s1 = dot4(s, 0x0100 + a * 0, sum0 * 0 - 32)
    # At most 16 * 126 * 32767 times 32: each within 32 bits, both together not.
    return widen_half(first) * ((sum0 * s0).to(tl.float32) + (sum1 * s1).to(tl.float32))


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(176, 0),
    unit_nbytes=176 / 8,
    tuned=((2, 128, 4, False), (2, 128, 2, False), (4, 128, 4, False)),
    settled=((2, 32, 1, False), (2, 32, 1, False)),
    words=tuple(word.value for word in _WORDS),
    known=8,
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
