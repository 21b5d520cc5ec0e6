"""IQ2_XXS on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots2
from ggufx.kernels.cuda._words import (
    MAGIC,
    byte_at,
    half_at,
    locate,
    permute,
    put_bytes,
    short_at,
    table_words,
    word_at,
    words2,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.NATURAL.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=66, header_nbytes=0, parts=32, warps=8, repeat=2)

LEVELS = (8, 25, 43)
_T0, _T1 = table_words([*LEVELS, 0, *(-level for level in LEVELS), 0], 128)
_U0, _U1 = table_words([*LEVELS, 0, *(-level for level in LEVELS), 0])
POINTS = tuple(sum(LEVELS.index(int(value)) << 4 * j for j, value in enumerate(point)) for point in tables.GRID_IQ2_XXS)
"""uint32 [256]: the levels 0..2 of a grid point, a nibble each: half of a permute's choice, the sign is its bit 2."""
_SPREAD = tuple(sum(((signs >> j) & 1) << (4 * j + 2) for j in range(8)) for signs in tables.EVEN_SIGNS)
_WORDS = (_U0.value, _U1.value, *POINTS, *_SPREAD)


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
    return words2(words, block + 2 + 8 * (unit % 8), mask, ALIGNED) + (half_at(words, block, mask, EVEN),)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    indices, signs, d = raw
    points, low, high = known
    total = (indices * 0).to(tl.int32)
    for run in tl.static_range(4):
        # Two reads in the first-level cache are fewer instructions than spreading the signs.
        point = tl.load(points + 2 + ((indices >> (8 * run)) & 255)).to(tl.uint32, bitcast=True)
        choice = point | tl.load(points + 258 + ((signs >> (7 * run)) & 127)).to(tl.uint32, bitcast=True)
        total += dots2(x, 2 * run, permute(low, high, choice), permute(low, high, choice >> 16), True)
    return total.to(tl.float32) * (d * (0.5 + (signs >> 28).to(tl.float32))) * 0.25


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(66, 0),
    unit_nbytes=66 / 8,
    tuned=((2, 128, 4, False), (2, 128, 4, False), (4, 256, 8, False)),
    words=_WORDS,
    known=2,
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
