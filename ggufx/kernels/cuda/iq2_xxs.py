"""IQ2_XXS on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._words import (
    INTERPRETED,
    MAGIC,
    byte_at,
    dot2_high,
    dot2_low,
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

ORDER = _linear.STRIDED.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=66, header_nbytes=0, parts=32, warps=8, repeat=2)

LEVELS = (8, 25, 43)
_T0, _T1 = table_words([*LEVELS, 0, *(-level for level in LEVELS), 0], 128)
_U0, _U1 = table_words([*LEVELS, 0, *(-level for level in LEVELS), 0])
POINTS = tuple(sum(LEVELS.index(int(value)) << 4 * j for j, value in enumerate(point)) for point in tables.GRID_IQ2_XXS)
"""uint32 [256]: the levels 0..2 of a grid point, a nibble each: half of a permute's choice, the sign is its bit 2."""
_V0, _V1 = table_words([sign * level for level in (*LEVELS, 0) for sign in (1, -1)])


def _entry(point: Any) -> int:
    entry = 0
    for j, value in enumerate(point):
        k = j % 4
        entry |= LEVELS.index(int(value)) << (8 * (k % 2) + 4 * (j // 4) + 2 * (k < 2))
    return entry


_ENTRIES = [_entry(point) for point in tables.GRID_IQ2_XXS]
_WORDS = (
    _U0.value, _U1.value, _V0.value, _V1.value,
    *(a | b << 16 for a, b in zip(_ENTRIES[::2], _ENTRIES[1::2], strict=True)),
)  # fmt: skip


@triton.jit
def spread_signs(index):
    """Spread seven sign bits and their parity, the eighth, over bit 2 of eight nibbles."""
    parity = index ^ (index >> 4)
    # Bit p of this constant is the parity of the four bits of p.
    parity = (0x6996 >> (parity & 15)) & 1
    bits = index | (parity << 7)
    bits = (bits | (bits << 12)) & 0x000F000F
    bits = (bits | (bits << 6)) & 0x03030303
    return (((bits | (bits << 3)) & 0x11111111) << 2).to(tl.uint32)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks, points,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 66, 256, 32 // RUNS
    )
    # RUNS points, eight elements each, a lane.
    group = part // (4 // RUNS)
    first = part % (4 // RUNS) * RUNS
    signs = word_at(words, block + 6 + 8 * group, mask, ALIGNED)
    d = half_at(words, block, mask, EVEN)
    scale = (d * (0.5 + (signs >> 28).to(tl.float32))) * 0.25
    if RUNS == 1:
        indices = byte_at(words, block + 2 + 8 * group + first, mask)
    elif RUNS == 2:
        indices = short_at(words, block + 2 + 8 * group + first, mask, EVEN)
    else:
        indices = word_at(words, block + 2 + 8 * group, mask, ALIGNED)
    signs = signs >> (7 * first).to(tl.uint32)
    at += 32 * group + 8 * first
    for run in tl.static_range(RUNS):
        point = tl.load(points + ((indices >> (8 * run)) & 255), mask, other=0).to(tl.uint32, bitcast=True)
        choice = point | spread_signs((signs >> (7 * run)) & 127)
        low, high = permute(_T0, _T1, choice), permute(_T0, _T1, choice >> 16)
        put_bytes(target, at + 8 * run, low, high, MAGIC + 128, scale, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 66
    if EVEN:
        d = tl.load((words.to(tl.pointer_type(tl.uint8)) + block).to(tl.pointer_type(tl.float16)), mask, other=0).to(tl.float32)
    else:
        d = half_at(words, block, mask, EVEN)
    return words2(words, block + 2 + 8 * (unit % 8), mask, ALIGNED) + (d,)


@triton.jit
def entry(points, indices, run: tl.constexpr, one):
    if INTERPRETED:
        return tl.load(points.to(tl.pointer_type(tl.uint16)) + 8 + ((indices >> (8 * run)) & 255)).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise("{ .reg .b64 a; .reg .b32 lo, hi; .reg .b16 h; mov.b64 {lo, hi}, $1; dp4a.u32.u32 lo, $2, $3, lo; mov.b64 a, {lo, hi}; ld.global.nc.u16 h, [a+16]; cvt.u32.u16 $0, h; }", "=r,l,r,r", [points.to(tl.int64), indices, indices * 0 + (2 << (8 * run))], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    indices, fields, d = raw
    points, low, high, low0, high0 = known
    e0 = entry(points, indices, 0, 0)
    e1 = entry(points, indices, 1, 0)
    e2 = entry(points, indices, 2, 0)
    e3 = entry(points, indices, 3, 0)
    first, second = e0 + e1 * 65536, e2 + e3 * 65536
    a, b = permute(first, second, 0x6420 + first * 0), permute(first, second, 0x7531 + first * 0)
    u = merge(fields, fields * 4, 0x00003FFF)
    u = merge(u, u * 2, 0x007F007F)
    y = u ^ (u * 2) ^ (u * 4)
    y = y ^ (y * 8) ^ (u * 64)
    s0 = u & 0x77777777
    s1 = merge(u >> 1, y, 0x3F3F3F3F) & 0x77777777
    total = (indices * 0).to(tl.int32)
    for k in tl.static_range(4):
        codes = b if k % 2 else a
        s = s1 if k % 2 else s0
        if k < 2:
            choice = merge(codes >> 1, s, 0x66666666)
            c0, c1 = permute(low0, high0, choice), permute(low0, high0, choice >> 16)
        else:
            choice = merge(codes, s, 0x33333333)
            c0, c1 = permute(low, high, choice), permute(low, high, choice >> 16)
        total = dot2_low(x[4 * k], c0, total, True)
        total = dot2_high(x[4 * k + 1], c0, total, True)
        total = dot2_low(x[4 * k + 2], c1, total, True)
        total = dot2_high(x[4 * k + 3], c1, total, True)
    total += times((total * 2).to(tl.uint32, bitcast=True), fields >> 28).to(tl.int32, bitcast=True)
    return total.to(tl.float32) * d * 0.125


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(66, 0),
    unit_nbytes=66 / 8,
    tuned=((2, 128, 4, False), (2, 128, 4, False), (4, 256, 8, False)),
    words=_WORDS,
    known=4,
)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out, _launch.table(POINTS, rows.device), RUNS=32 // _SHAPE.parts)


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
