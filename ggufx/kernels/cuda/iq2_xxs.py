"""IQ2_XXS on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._words import (
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
# For the product, with the sign in bit 2 of a choice, and with the sign in bit 0.
_U0, _U1 = table_words([*LEVELS, 0, *(-level for level in LEVELS), 0])
_V0, _V1 = table_words([sign * level for level in (*LEVELS, 0) for sign in (1, -1)])
POINTS = tuple(sum(LEVELS.index(int(value)) << 4 * j for j, value in enumerate(point)) for point in tables.GRID_IQ2_XXS)
"""uint32 [256]: the levels 0..2 of a grid point, a nibble each: half of a permute's choice, the sign is its bit 2."""


def _packed(point: Any) -> int:
    # Elements 0, 2, 4 and 6 in the low byte, the others in the high one. Beside an element's two bits, in the same nibble, lie
    # those of the element two further on, below its own: what is moved down by one leaves the place below it to the sign.
    entry = 0
    for j, value in enumerate(point):
        entry |= LEVELS.index(int(value)) << (8 * (j % 2) + 4 * (j // 4) + (2 if j % 4 < 2 else 0))
    return entry


_ENTRIES = [_packed(point) for point in tables.GRID_IQ2_XXS]
# A table of 16-bit entries: 32 lanes that read 128 words at random wait for each other less than with 256.
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
        d = tl.load((words.to(tl.pointer_type(tl.uint16)) + (block >> 1)), mask, other=0)
        d = d.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        d = half_at(words, block, mask, False)
    return words2(words, block + 2 + 8 * (unit % 8), mask, ALIGNED) + (d,)


@triton.jit
def _entry(table, indices, run: tl.constexpr):
    # A product instead of a shift and a mask, and a byte's pointer, so that nothing scales it once more.
    at = dot4(indices, (2 << (8 * run)) + indices * 0, (indices * 0).to(tl.int32)).to(tl.uint32)
    entry = (table.to(tl.pointer_type(tl.uint8)) + 16 + at).to(tl.pointer_type(tl.uint16))
    return tl.load(entry).to(tl.uint32)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    indices, fields, d = raw
    table, sign2_low, sign2_high, sign0_low, sign0_high = known
    # The levels of four points, a byte each: of elements 0, 2, 4 and 6, and of the others.
    first = _entry(table, indices, 0) + _entry(table, indices, 1) * 65536
    second = _entry(table, indices, 2) + _entry(table, indices, 3) * 65536
    even, odd = permute(first, second, 0x6420 + first * 0), permute(first, second, 0x7531 + first * 0)
    # Of signs there is no table: reads at random are what the first-level cache is busy with. Four times seven bits, a byte
    # each; shifts to the left, as these are products, and what they leave in bit 7 is not looked at.
    signs = merge(fields, fields * 4, 0x00003FFF)
    signs = merge(signs, signs * 2, 0x007F007F)
    # The parity of a byte's seven bits, in its bit 6.
    parity = signs ^ (signs * 2) ^ (signs * 4)
    parity = parity ^ (parity * 8) ^ (signs * 64)
    # Signs lie four a nibble, and all but the last can stay where they are: a permute's choice is a level's two bits around a
    # sign. For elements 3 and 7 they are moved down by one, and 1 and 5 come along. Bit 3 of a choice must be zero.
    even_signs = signs & 0x77777777
    odd_signs = merge(signs >> 1, parity, 0x3F3F3F3F) & 0x77777777
    total = (indices * 0).to(tl.int32)
    for j in tl.static_range(4):
        # Elements j and j + 4 of every point.
        levels = odd if j % 2 else even
        bits = odd_signs if j % 2 else even_signs
        if j < 2:
            choice = merge(levels >> 1, bits, 0x66666666)
            a, b = permute(sign0_low, sign0_high, choice), permute(sign0_low, sign0_high, choice >> 16)
        else:
            choice = merge(levels, bits, 0x33333333)
            a, b = permute(sign2_low, sign2_high, choice), permute(sign2_low, sign2_high, choice >> 16)
        total = dot2_low(x[4 * j], a, total, True)
        total = dot2_high(x[4 * j + 1], a, total, True)
        total = dot2_low(x[4 * j + 2], b, total, True)
        total = dot2_high(x[4 * j + 3], b, total, True)
    # Times 0.5 + scale, doubled: at most 32 * 32767 * 43 * 31, within 32 bits.
    total += times((total * 2).to(tl.uint32, bitcast=True), fields >> 28).to(tl.int32, bitcast=True)
    return total.to(tl.float32) * d * 0.125


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(66, 0),
    unit_nbytes=66 / 8,
    tuned=((2, 128, 2, False), (2, 64, 2, False), (2, 128, 4, False)),
    settled=((4, 128, 2, False), (4, 32, 1, False)),
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
