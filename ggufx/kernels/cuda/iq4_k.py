"""IQ4_K on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._codebook4 import WORDS
from ggufx.kernels.cuda._linear import more4
from ggufx.kernels.cuda._words import (
    MAGIC,
    byte_at,
    codes16,
    dot4,
    half_at,
    load_byte,
    locate,
    merge,
    permute,
    put_bytes,
    rotate,
    short_at,
    table_words,
    upper,
    vector4,
    widen_half,
    words2,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.EIGHTS.value
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
    first, high = words2(words, block, mask, ALIGNED)
    return vector4(words, block + 16 + 16 * g, mask, ALIGNED) + (
        first,
        first >> (14 + 2 * g).to(tl.uint32),
        rotate(high, 4 * unit + 22),
        load_byte(words, block + 8 + g, mask),
    )


@triton.jit
def _lookup(x, FIRST: tl.constexpr, a, b, total, known, DOUBLE: tl.constexpr):
    """Add to ``total`` the integer product of the codes of two words with pairs from ``2 * FIRST`` on."""
    if not DOUBLE:
        # Several rows of activations share the lookups, not the products.
        a0, a1 = codes16(a, _U0, _U1, _U2, _U3), codes16(a >> 16, _U0, _U1, _U2, _U3)
        b0, b1 = codes16(b, _U0, _U1, _U2, _U3), codes16(b >> 16, _U0, _U1, _U2, _U3)
        return more4(x, FIRST, a0, a1, b0, b1, total, True)
    else:
        _, t4, t5, t6, t7 = known
        # As in codes_product: all of the lower half are negative and all of the upper half positive, so what one table's lookup
        # gives for the other's codes is -1 or 0, and both are multiplied.
        c, e = a ^ 0x88888888, b ^ 0x88888888
        total = more4(
            x,
            FIRST,
            permute(t4, t5, a),
            permute(t4, t5, a >> 16),
            permute(t4, t5, b),
            permute(t4, t5, b >> 16),
            total,
            True,
        )
        return more4(
            x,
            FIRST,
            permute(t6, t7, c),
            permute(t6, t7, upper(c)),
            permute(t6, t7, e),
            permute(t6, t7, upper(e)),
            total,
            True,
        )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, first, flags, high, low = raw
    # Nibbles of neighbouring words beside each other: what is looked up together then belongs to one sub-block.
    sum0 = _lookup(
        x,
        0,
        merge(a, b * 16, 0x0F0F0F0F),
        merge(c, e * 16, 0x0F0F0F0F),
        (flags & 4).to(tl.int32) * sums[0],
        known,
        DOUBLE,
    )
    sum1 = _lookup(
        x,
        4,
        merge(a >> 4, b, 0x0F0F0F0F),
        merge(c >> 4, e, 0x0F0F0F0F),
        ((flags >> 1) & 4).to(tl.int32) * sums[1],
        known,
        DOUBLE,
    )
    # Low bits of both scales below, high bits from bit 10 on.
    s = low | (high & 0x3C00)
    s0 = dot4(s & 0x0C0F, 0x0401 + a * 0, sum0 * 0 - 32)
    s1 = dot4((s >> 4) & 0x030F, 0x1001 + a * 0, sum0 * 0 - 32)
    # At most 16 * 127 * 32767 times 32: each within 32 bits, both together not.
    return widen_half(first) * ((sum0 * s0).to(tl.float32) + (sum1 * s1).to(tl.float32))


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(144, 0),
    unit_nbytes=144 / 8,
    tuned=((2, 128, 2, False), (4, 128, 4, False), (2, 128, 4, False)),
    settled=((4, 32, 1, True), (2, 32, 1, False)),
    words=WORDS,
    known=4,
    double=True,
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
