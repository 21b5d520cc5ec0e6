"""Encoders of the codebook types on a GPU: the search of ``kernels/_codebook.py``, effort ``normal``, with the same bytes.

Its three stages are kernels over sub-blocks, one a lane, whose elements lie in registers; what belongs to a group (a row, or
256 elements) is folded between them in the CPU's order. The parabolas of all 64 candidates of a sub-block go through memory
(16 to 32 bytes a weight), so a tensor is encoded in pieces of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda._encode_common import (
    MAGIC,
    MAGNITUDE,
    STRICT,
    bits_of,
    down,
    empty,
    exponent_field,
    float_of,
    greatest,
    halving_sum,
    inverse_of,
    lanes_of,
    load_quads,
    ratio,
    rounded,
    scaled_by,
    table,
    times,
    up,
)

__all__ = ["CODEBOOKS", "encode"]

_PIECE_LEN: Final = 1 << 25
"""Weights encoded at a time: scratch memory is 20 to 40 bytes a weight."""
_STARTS: Final = 8
_WINDOW: Final = 16
_VALUES: Final = 256
_SPAN: Final = (0.5, 1.3)
_LOWEST_BYTE = tl.constexpr(0x4B400000 - 128)
"""Bits of 1.5 * 2^23 - 128, so that index 0 of a lookup table is -128."""


@dataclass(frozen=True)
class Codebook:
    """A type's search and layout; fields up to ``staged`` are those of ``kernels._codebook.codebook_search``.

    ``planes`` are (bits, shift, run, start) of the code bytes: ``run`` bytes hold ``8 / bits`` runs of codes, the first in
    their lowest bits. ``heads`` names the layout of the scales.
    """

    table: tuple[int, ...]
    shift: int
    sub_len: int
    low: int
    step: int
    count: int
    whole_row: bool
    half: bool
    sigma: float
    plain: float
    starts: tuple[float, float]
    staged: bool
    block_nbytes: int
    heads: int
    planes: tuple[tuple[int, int, int, int], ...]

    @property
    def lanes(self) -> int:
        """Sub-blocks a program of four warps searches.

        Two a thread pay for the smallest table only (H200: 1.12 times as fast); others then want for registers.
        """
        return 256 if len(self.table) == 4 else 128

    @property
    def header_nbytes(self) -> int:
        """Bytes of the row header."""
        return (2 if self.half else 4) if self.whole_row else 0


CODEBOOKS: Final = {
    "IQ2_KS": Codebook(
        tables.IQ2, tables.SHIFTS[2], 32, -16, 1, 32, True, True, 1.5, 0.25, (14.0, 46.0), False, 70, 0, ((2, 0, 32, 6),)
    ),
    "IQ3_KS": Codebook(
        tables.IQ3, tables.SHIFTS[3], 32, -16, 1, 32, True, True, 2.0, 0.0, (40.0, 76.0), False, 102, 1,
        ((2, 0, 32, 6), (1, 2, 32, 70)),
    ),
    "IQ4_KS": Codebook(
        tables.IQ4, tables.SHIFTS[4], 32, -127, 2, 128, True, False, 2.0, 0.0, (100.0, 146.0), True, 136, 2,
        ((4, 0, 16, 8),),
    ),
    "IQ4_K": Codebook(
        tables.IQ4, tables.SHIFTS[4], 16, -32, 1, 64, False, True, 2.0, 0.0, (100.0, 146.0), True, 144, 3,
        ((4, 0, 16, 16),),
    ),
    "IQ5_K": Codebook(
        tables.IQ5, tables.SHIFTS[5], 16, -32, 1, 64, False, True, 2.0, 0.25, (100.0, 146.0), True, 176, 3,
        ((4, 0, 32, 16), (1, 4, 32, 144)),
    ),
}  # fmt: skip


def _midpoints(values: tuple[int, ...]) -> tuple[float, ...]:
    return tuple((a + b) / 2 for a, b in pairwise(values))


@cache
def _lookup(values: tuple[int, ...], shift: int) -> Any:
    """Return a builder of float32 [2, 256]: entry of the table, and of its twin, nearest to the byte of a staged search."""

    def build() -> np.ndarray:
        mids = np.floor(np.array(_midpoints(values)))
        index = (np.arange(-128, 128)[:, None] > mids).sum(axis=1)
        entries = np.array(values, np.float32)[index]
        return np.stack([entries, entries + np.float32(shift)])

    return build


@cache
def _units(starts: tuple[float, float]) -> Any:
    """Return a builder of float32 [8]: what the largest element is tried as.

    In the order in which the CPU's tournament prefers equals: by the reversed bits of the position.
    """

    def build() -> np.ndarray:
        low, high = np.float32(starts[0]), np.float32(starts[1])
        units = low + (high - low) * np.arange(_STARTS, dtype=np.float32) / np.float32(_STARTS - 1)
        return units[[0, 4, 2, 6, 1, 5, 3, 7]]

    return build


@cache
def _multiples(symmetric: bool) -> Any:
    """Return a builder of float32 [256]: values of D over that of the widest sub-block."""

    def build() -> np.ndarray:
        low, spread = np.float32(_SPAN[0]), np.float32(_SPAN[1] - _SPAN[0])
        j = np.arange(_VALUES)
        if symmetric:
            return low + spread * j.astype(np.float32) / np.float32(_VALUES - 1)
        found = low + spread * (j // 2).astype(np.float32) / np.float32(_VALUES // 2 - 1)
        return np.where(j & 1, -found, found)

    return build


# Stage 0: what belongs to rows and to 256 elements -------------------------------------------------------------------


@triton.jit
def _tops(values, top, row_len, TILE: tl.constexpr):
    """Bits of the largest magnitude of every row."""
    row = tl.program_id(0)
    start = values + row.to(tl.int64) * row_len
    found = tl.zeros([TILE], tl.int32)
    for at in range(0, row_len, TILE):
        i = at + tl.arange(0, TILE)
        found = tl.maximum(found, bits_of(tl.load(start + i, mask=i < row_len, other=0.0)) & MAGNITUDE)
    tl.store(top + row, tl.max(found, axis=0))


@triton.jit
def _means(values, top, mean, n_blocks, blocks_per_row, WHOLE_ROW: tl.constexpr, BLOCKS: tl.constexpr):
    """Mean square of every 256 elements, in units of the group's power of two."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < n_blocks
    inside = real[:, None]
    at = block.to(tl.int64)[:, None] * 256 + tl.arange(0, 32)[None, :]
    parts = load_elements_strided(values, at, inside)
    if WHOLE_ROW:
        magnitude = tl.load(top + block // blocks_per_row, mask=real, other=0)
    else:
        found = tl.zeros([BLOCKS, 32], tl.int32)
        for k in tl.static_range(8):
            found = tl.maximum(found, bits_of(parts[k]) & MAGNITUDE)
        magnitude = tl.max(found, axis=1)
        tl.store(top + block, magnitude, mask=real)
    parts = scaled_by(parts, down(exponent_field(magnitude))[:, None], 8)
    # 256 terms are added by halving: eight runs of 32 first, then within the 32.
    terms = halving_sum(times(parts, parts, 8), 8, 3)
    terms = tl.sum(tl.reshape(terms, [BLOCKS, 2, 16]), axis=1)
    terms = tl.sum(tl.reshape(terms, [BLOCKS, 2, 8]), axis=1)
    terms = tl.sum(tl.reshape(terms, [BLOCKS, 2, 4]), axis=1)
    terms = tl.sum(tl.reshape(terms, [BLOCKS, 2, 2]), axis=1)
    tl.store(mean + block, tl.sum(terms, axis=1) * (1.0 / 256), mask=real)


@triton.jit
def load_elements_strided(values, at, mask):
    found = ()
    for k in tl.static_range(8):
        found = found + (tl.load(values + at + 32 * k, mask=mask, other=0.0),)
    return found


# Stage 1: real scales of both signs and tables -----------------------------------------------------------------------


@triton.jit
def _weighed(
    values, importance, top, mean, sub, n_subs, subs_per_group, subs_per_row,
    N: tl.constexpr, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, MSE: tl.constexpr, SIGMA: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Return the normalised elements of a lane's sub-block and their weights."""
    real = sub < n_subs
    field = exponent_field(tl.load(top + sub // subs_per_group, mask=real, other=0))
    x = scaled_by(load_quads(values, sub.to(tl.int64) * N, real, N), down(field), N)
    level = tl.load(mean + sub // (256 // N), mask=real, other=0.0)
    w = ()
    if WEIGHTED:
        squares = halving_sum(times(x, x, N), N, LEVELS)
        size = up(field)
        dead = squares * size * size <= N * 1e-18
        m = load_quads(importance, (sub % subs_per_row) * N, real, N)
        level = SIGMA * level + 1e-18
        for j in tl.static_range(N):
            weight = tl.where(dead, 1e-9, m[j])
            if not MSE:
                weight = weight * tl.sqrt_rn(level + x[j] * x[j])
            w = w + (weight,)
    else:
        level = PLAIN * level + 1e-12
        for j in tl.static_range(N):
            if MSE:
                w = w + (tl.full(sub.shape, 1.0, tl.float32),)
            else:
                w = w + (level + x[j] * x[j],)
    return x, w


@triton.jit
def _sums(
    x, w, wx, inverse, off, lookup,
    N: tl.constexpr, STAGED: tl.constexpr, TABLE: tl.constexpr, MIDS: tl.constexpr,
):  # fmt: skip
    """``sum w x v`` and ``sum w v v`` in order of elements, v the entries nearest to ``x * inverse``.

    ``off`` is what the twin adds; staged, the product is rounded to a byte first, which indexes ``lookup``.
    """
    s1 = tl.zeros(inverse.shape, tl.float32)
    s2 = tl.zeros(inverse.shape, tl.float32)
    for j in tl.static_range(N):
        z = x[j] * inverse
        if STAGED:
            z = tl.minimum(tl.maximum(z + (MAGIC - off), MAGIC - 128.0), MAGIC + 127.0)
            v = tl.load(lookup + (bits_of(z) - _LOWEST_BYTE))
        else:
            z = z - off
            v = tl.full(inverse.shape, TABLE[0], tl.float32)
            for k in tl.static_range(len(MIDS)):
                v = tl.where(z > MIDS[k], TABLE[k + 1], v)
            v = v + off
        s1 += wx[j] * v
        s2 += w[j] * v * v
    return s1, s2


@triton.jit
def _starts(
    values, importance, top, mean, units, lookup, fits, total, n_subs, subs_per_group, subs_per_row,
    N: tl.constexpr, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, MSE: tl.constexpr, SIGMA: tl.constexpr, PLAIN: tl.constexpr,
    STAGED: tl.constexpr, TABLE: tl.constexpr, MIDS: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Best real scale of each kind (table, negative scale; then the twin), its curvature and energy: ``fits`` [3, 4, subs]."""
    sub = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = sub < n_subs
    x, w = _weighed(
        values, importance, top, mean, sub, n_subs, subs_per_group, subs_per_row,
        N, LEVELS, WEIGHTED, MSE, SIGMA, PLAIN,
    )  # fmt: skip
    wx = times(w, x, N)
    tl.store(total + sub, halving_sum(times(x, wx, N), N, LEVELS), mask=real)
    largest = greatest(x, N)
    usual = largest > 1e-30
    back = tl.where(usual, inverse_of(tl.where(usual, largest, 1.0)), 0.0)
    for kind in range(4):
        off = (kind >> 1) * SHIFT
        sign = 1.0 - 2.0 * (kind & 1)
        best = tl.full([LANES], float("-inf"), tl.float32)
        scale = tl.zeros([LANES], tl.float32)
        curve = tl.zeros([LANES], tl.float32)
        for c in range(STARTS):
            inverse = (tl.load(units + c) * sign) * back
            s1, s2 = _sums(x, w, wx, inverse, off, lookup + (kind >> 1) * 256, N, STAGED, TABLE, MIDS)
            centre = ratio(s1, s2)
            energy = centre * s1
            better = energy > best
            best = tl.where(better, energy, best)
            scale = tl.where(better, centre, scale)
            curve = tl.where(better, s2, curve)
        to = fits + kind * n_subs + sub
        tl.store(to, scale, mask=real)
        tl.store(to + 4 * n_subs, curve, mask=real)
        tl.store(to + 8 * n_subs, best, mask=real)


# Stage 2: D by the parabolas -----------------------------------------------------------------------------------------


@triton.jit
def _stored(d, grow, shrink, HALF: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Round D, in normalised units, as the file stores it, never to zero or infinity."""
    lowest = 2.0**-60  # of a group near 1: keeps the way back from underflowing
    value = tl.where(tl.abs(d) < lowest, tl.where(d < 0.0, -lowest, lowest), d) * grow
    # By bits: Triton takes a literal below the normal float32 for a float64.
    least = float_of(tl.full(d.shape, LEAST, tl.int32))
    size = tl.minimum(tl.maximum(tl.abs(value), least), MOST)
    if HALF:
        size = size.to(tl.float16).to(tl.float32)
    return tl.where(value < 0.0, -size, size) * shrink


@triton.jit
def _choose(
    fits, top, multiples, d_first, d_now, n_subs, subs_per_group,
    HALF: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    EXTREME: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Value of D, one of ``VALUES`` (the lanes), that costs a group least when each sub-block takes its best parabola."""
    group = tl.program_id(0)
    start = fits + group * subs_per_group
    field = exponent_field(tl.load(top + group))
    grow, shrink = up(field), down(field)
    j = tl.arange(0, VALUES)
    widest = tl.zeros([VALUES], tl.float32)
    for first in range(0, subs_per_group, VALUES):
        real = first + j < subs_per_group
        for kind in range(4):
            scale = tl.load(start + kind * n_subs + first + j, mask=real, other=0.0)
            widest = tl.maximum(widest, tl.abs(scale))
    widest = tl.max(widest, axis=0) + tl.zeros([VALUES], tl.float32)
    base = tl.maximum(tl.div_rn(widest, tl.full([VALUES], EXTREME, tl.float32)), 1e-30)
    d = _stored(base * tl.load(multiples + j), grow, shrink, HALF, LEAST, MOST)
    back = inverse_of(d)
    cost = tl.zeros([VALUES], tl.float32)
    for first in range(0, subs_per_group, 4):  # always a multiple of 8
        parabolas = ()
        for k in tl.static_range(4):
            for kind in tl.static_range(4):
                at = start + kind * n_subs + first + k
                parabolas = parabolas + (tl.load(at), tl.load(at + 4 * n_subs), tl.load(at + 8 * n_subs))
        for k in tl.static_range(4):
            least = tl.full([VALUES], float("inf"), tl.float32)
            for kind in tl.static_range(4):
                centre = parabolas[12 * k + 3 * kind]
                index = (centre * back - LOW) * (1.0 / STEP)
                index = rounded(tl.minimum(tl.maximum(index, 0.0), COUNT - 1.0))
                off = d * (index * STEP + LOW) - centre
                least = tl.minimum(
                    least, parabolas[12 * k + 3 * kind + 1] * off * off - parabolas[12 * k + 3 * kind + 2]
                )
            cost += least
    where = tl.min(tl.where(cost == tl.min(cost, axis=0), j, VALUES), axis=0)
    chosen = tl.sum(tl.where(j == where, d, 0.0), axis=0)
    tl.store(d_first + group, chosen)
    tl.store(d_now + group, chosen)


# Stage 3: exact sums of legal scales near the optima -----------------------------------------------------------------


@triton.jit
def _window(optimum, d, LOW: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, WINDOW: tl.constexpr):
    """Number of the first legal scale of the window round ``optimum / d``."""
    index = (tl.div_rn(optimum, d) - LOW) * (1.0 / STEP)
    index = rounded(tl.minimum(tl.maximum(index, 0.0), COUNT - 1.0))
    return tl.maximum(tl.minimum(index - (WINDOW // 2), COUNT - WINDOW + 0.0), 0.0)


@triton.jit
def _windows(
    values, importance, top, mean, fits, d_first, lookup, sums, n_subs, subs_per_group, subs_per_row,
    N: tl.constexpr, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, MSE: tl.constexpr, SIGMA: tl.constexpr, PLAIN: tl.constexpr,
    STAGED: tl.constexpr, TABLE: tl.constexpr, MIDS: tl.constexpr, SHIFT: tl.constexpr,
    LOW: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, WINDOW: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sums of ``WINDOW`` legal scales of each kind: ``sums`` [2, 4 * WINDOW, subs], candidate ``4 * place + kind``."""
    sub = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = sub < n_subs
    x, w = _weighed(
        values, importance, top, mean, sub, n_subs, subs_per_group, subs_per_row,
        N, LEVELS, WEIGHTED, MSE, SIGMA, PLAIN,
    )  # fmt: skip
    wx = times(w, x, N)
    d = tl.load(d_first + sub // subs_per_group, mask=real, other=1.0)
    for kind in range(4):
        off = (kind >> 1) * SHIFT
        first = _window(tl.load(fits + kind * n_subs + sub, mask=real, other=0.0), d, LOW, STEP, COUNT, WINDOW)
        for place in range(WINDOW):
            s = tl.minimum(first + place, COUNT - 1.0) * STEP + LOW
            inverse = inverse_of(d * s)
            s1, s2 = _sums(x, w, wx, inverse, off, lookup + (kind >> 1) * 256, N, STAGED, TABLE, MIDS)
            to = sums + (4 * place + kind) * n_subs + sub
            tl.store(to, s1, mask=real)
            tl.store(to + 4 * WINDOW * n_subs, s2, mask=real)


@triton.jit
def _pick(
    fits, sums, total, d_first, d_now, chosen, terms, n_subs, subs_per_group,
    LOW: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Candidate of least error under ``d_now``; of equal ones (to 17 bits) the first.

    ``terms`` gets its part in the sums that D is fitted from; at last, ``chosen`` the number of its scale, the twin's flag
    above it, and ``terms`` what elements are multiplied by.
    """
    sub = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = sub < n_subs
    group = sub // subs_per_group
    d0 = tl.load(d_first + group, mask=real, other=1.0)
    d = tl.load(d_now + group, mask=real, other=1.0)
    energy = tl.load(total + sub, mask=real, other=0.0)
    least = tl.full([LANES], 0x7FFFFFFF, tl.int32)
    legal = tl.zeros([LANES], tl.float32)
    for kind in tl.static_range(4):
        first = _window(tl.load(fits + kind * n_subs + sub, mask=real, other=0.0), d0, LOW, STEP, COUNT, WINDOW)
        for place in range(WINDOW):
            s = tl.minimum(first + place, COUNT - 1.0) * STEP + LOW
            number = 4 * place + kind
            at = sums + number * n_subs + sub
            s1 = tl.load(at, mask=real, other=0.0)
            s2 = tl.load(at + 4 * WINDOW * n_subs, mask=real, other=0.0)
            scale = s * d
            error = tl.maximum(scale * (scale * s2 - (s1 + s1)) + energy, 0.0)
            key = (bits_of(error) & -128) | number
            legal = tl.where(key < least, s, legal)
            least = tl.minimum(key, least)
    number = least & 127
    if LAST:
        index = ((legal - LOW) * (1.0 / STEP)).to(tl.int32)
        tl.store(chosen + sub, index | ((number & 2) << 7), mask=real)
        tl.store(terms + sub, inverse_of(d * legal), mask=real)
    else:
        at = sums + number * n_subs + sub
        s1 = tl.load(at, mask=real, other=0.0)
        s2 = tl.load(at + 4 * WINDOW * n_subs, mask=real, other=0.0)
        tl.store(terms + sub, legal * s1, mask=real)
        tl.store(terms + n_subs + sub, legal * legal * s2, mask=real)


@triton.jit
def _refit(
    terms, top, d_now, n_groups, n_subs, subs_per_group,
    HALF: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """D of least error for the scales picked: a quotient of sums in order of sub-blocks."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    real = group < n_groups
    above = tl.zeros([GROUPS], tl.float32)
    below = tl.zeros([GROUPS], tl.float32)
    # Many loads at a time: each waits long, and the sums are short.
    for first in range(0, subs_per_group, BATCH):
        tops = ()
        bottoms = ()
        for k in tl.static_range(BATCH):
            at = terms + group * subs_per_group + first + k
            inside = real & (group * 0 + (first + k) < subs_per_group)
            tops = tops + (tl.load(at, mask=inside, other=0.0),)
            bottoms = bottoms + (tl.load(at + n_subs, mask=inside, other=0.0),)
        for k in tl.static_range(BATCH):
            above += tops[k]
            below += bottoms[k]
    field = exponent_field(tl.load(top + group, mask=real, other=0))
    fitted = _stored(ratio(above, below), up(field), down(field), HALF, LEAST, MOST)
    d = tl.load(d_now + group, mask=real, other=1.0)
    tl.store(d_now + group, tl.where(below > 0.0, fitted, d), mask=real)


# Bytes ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(chosen, at, real, nothing, ZERO: tl.constexpr):
    return tl.where(nothing, ZERO, tl.load(chosen + at, mask=real, other=0))


@triton.jit
def _heads(chosen, out, first, real, nothing, HEADS: tl.constexpr, ZERO: tl.constexpr):
    """Write a block's scales and flags: ``first`` its first sub-block, ``out`` its bytes; ``ZERO`` where it has nothing."""
    if HEADS == 2:
        for k in tl.static_range(8):
            c = _scale(chosen, first + k, real, nothing, ZERO)
            tl.store(out + k, ((c & 127) << 1 | c >> 8).to(tl.uint8), mask=real)
    elif HEADS == 3:
        flags = tl.zeros(first.shape, tl.int32)
        for q in tl.static_range(4):
            high = tl.zeros(first.shape, tl.int32)
            for k in tl.static_range(4):
                c = _scale(chosen, first + 4 * q + k, real, nothing, ZERO)
                flags |= (c >> 8) << (4 * q + k)
                high |= (c >> 4 & 3) << (2 * k)
                if k % 2 == 0:
                    low = c & 15
                else:
                    tl.store(out + (8 + 2 * q + k // 2), (low | (c & 15) << 4).to(tl.uint8), mask=real)
            tl.store(out + (4 + q), high.to(tl.uint8), mask=real)
        tl.store(out + 2, (flags & 255).to(tl.uint8), mask=real)
        tl.store(out + 3, (flags >> 8).to(tl.uint8), mask=real)
    else:
        flags = tl.zeros(first.shape, tl.int32)
        high = tl.zeros(first.shape, tl.int32)
        for q in tl.static_range(4):
            # Nibbles: pairs of neighbours in IQ2_KS (0), sub-blocks four apart in IQ3_KS (1).
            left = _scale(chosen, first + (q * (2 - HEADS)), real, nothing, ZERO)
            right = _scale(chosen, first + (q * (2 - HEADS) + (1 + 3 * HEADS)), real, nothing, ZERO)
            flags |= (left >> 8) << (q * (2 - HEADS)) | (right >> 8) << (q * (2 - HEADS) + (1 + 3 * HEADS))
            high |= (left >> 4 & 1) << (q * (2 - HEADS)) | (right >> 4 & 1) << (q * (2 - HEADS) + (1 + 3 * HEADS))
            tl.store(out + (2 + q), (left & 15 | (right & 15) << 4).to(tl.uint8), mask=real)
        if HEADS:
            flags, high = high, flags
        tl.store(out, flags.to(tl.uint8), mask=real)
        tl.store(out + 1, high.to(tl.uint8), mask=real)


@triton.jit
def _plane(
    values, chosen, terms, start, block, inside, nothing, shrink,
    N: tl.constexpr, BITS: tl.constexpr, FROM: tl.constexpr, RUN: tl.constexpr, AT: tl.constexpr,
    SHIFT: tl.constexpr, MIDS: tl.constexpr, POSITIVE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write ``BITS`` bits of every code, those from bit ``FROM`` on, at byte ``AT`` of the blocks."""
    t = tl.arange(0, 32 * BITS)[None, :]
    packed = tl.zeros([BLOCKS, 32 * BITS], tl.int32)
    for q in tl.static_range(8 // BITS):
        e = (t // RUN) * (RUN * (8 // BITS)) + q * RUN + t % RUN
        sub = block[:, None] * (256 // N) + e // N
        x = tl.load(values + (block.to(tl.int64)[:, None] * 256 + e), mask=inside, other=0.0) * shrink
        off = (tl.load(chosen + sub, mask=inside, other=0) >> 8) * SHIFT
        z = x * tl.load(terms + sub, mask=inside, other=0.0) - off
        code = tl.zeros([BLOCKS, 32 * BITS], tl.int32)
        for k in tl.static_range(len(MIDS)):
            code += (z > MIDS[k]).to(tl.int32)
        code = tl.where(nothing, POSITIVE, code)
        packed |= (code >> FROM & ((1 << BITS) - 1)) << (q * BITS)
    tl.store(start[:, None] + (AT + t), packed.to(tl.uint8), mask=inside)


@triton.jit
def _pack(
    values, top, d_now, chosen, terms, out, n_blocks, blocks_per_row, row_nbytes,
    N: tl.constexpr, WHOLE_ROW: tl.constexpr, HALF: tl.constexpr, HEADER: tl.constexpr, BLOCK_NBYTES: tl.constexpr,
    HEADS: tl.constexpr, PLANES: tl.constexpr, SHIFT: tl.constexpr, MIDS: tl.constexpr, POSITIVE: tl.constexpr,
    ZERO: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the bytes of blocks: D, scales and the nearest codes."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < n_blocks
    group = block // blocks_per_row if WHOLE_ROW else block
    magnitude = tl.load(top + group, mask=real, other=0)
    empty_group = magnitude == 0
    field = exponent_field(magnitude)
    row = out + (block // blocks_per_row).to(tl.int64) * row_nbytes
    start = row + HEADER + (block % blocks_per_row) * BLOCK_NBYTES
    value = tl.load(d_now + group, mask=real, other=0.0) * up(field)
    if HALF:
        stored = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        stored = bits_of(value)
    stored = tl.where(empty_group, 0, stored)
    first_of_row = real & (block % blocks_per_row == 0) if WHOLE_ROW else real
    for k in tl.static_range(2 if HALF else 4):
        tl.store(row + k if WHOLE_ROW else start + k, (stored >> (8 * k) & 255).to(tl.uint8), mask=first_of_row)
    _heads(chosen, start, block * (256 // N), real, empty_group, HEADS, ZERO)
    inside = real[:, None]
    for p in tl.static_range(len(PLANES)):
        _plane(
            values, chosen, terms, start, block, inside, empty_group[:, None], down(field)[:, None],
            N, PLANES[p][0], PLANES[p][1], PLANES[p][2], PLANES[p][3], SHIFT, MIDS, POSITIVE, BLOCKS,
        )  # fmt: skip


def _weights(importance: torch.Tensor, sub_len: int) -> torch.Tensor:
    """Return the importance with the largest near 1, and sub-blocks that have next to none at an even 1e-9."""
    wide = importance.double()
    _, exponent = torch.frexp(wide.max())
    # A power of two, so that products with it stay finite and exact; in two steps, as torch makes it a float32.
    half = -exponent // 2
    blocks = torch.ldexp(torch.ldexp(wide, half), -exponent - half).float().reshape(-1, sub_len)
    dead = (blocks.double() ** 2).sum(dim=1, keepdim=True) <= sub_len * 1e-18
    return torch.where(dead, float(np.float32(1e-9)), blocks).reshape(-1)


def encode(book: Codebook, values: torch.Tensor, importance: torch.Tensor | None, out: torch.Tensor, mse: bool) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from finite ``values`` float32 [R, row_len]; importance float32 [row_len] or None."""
    weights = None if importance is None else _weights(importance, book.sub_len)
    rows = max(1, _PIECE_LEN // values.shape[1])
    for first in range(0, values.shape[0], rows):
        _encode_rows(book, values[first : first + rows], weights, out[first : first + rows], mse)


def _encode_rows(
    book: Codebook, values: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor, mse: bool
) -> None:
    n_rows, row_len = values.shape
    device = values.device
    n = book.sub_len
    blocks_per_row = row_len // 256
    subs_per_row = row_len // n
    n_blocks, n_subs = n_rows * blocks_per_row, n_rows * subs_per_row
    n_groups = n_rows if book.whole_row else n_blocks
    subs_per_group = n_subs // n_groups
    symmetric = book.low == -(book.low + book.step * (book.count - 1))
    lookup = table(_lookup(book.table, book.shift), device)
    mids = _midpoints(book.table)
    positive = sum(v < 0 for v in book.table)  # so that zeros come out without a sign
    extreme = float(max(abs(book.low), abs(book.low + book.step * (book.count - 1))))
    kept = {
        "HALF": book.half,
        "LEAST": int(np.float32(2.0**-24 if book.half else 2.0**-149).view(np.int32)),
        "MOST": 65504.0 if book.half else float(np.float32(3.4e38 / 127 / 127)),
    }
    legal = {"LOW": float(book.low), "STEP": float(book.step), "COUNT": float(book.count)}
    search = {
        "N": n,
        "LEVELS": n.bit_length() - 1,
        "WEIGHTED": weights is not None,
        "MSE": mse,
        "SIGMA": book.sigma,
        "PLAIN": book.plain * book.sigma,
        "STAGED": book.staged,
        "TABLE": tuple(float(v) for v in book.table),
        "MIDS": mids,
        "SHIFT": float(book.shift),
        "LANES": book.lanes,
        "num_warps": 4,
        **STRICT,
    }
    top = empty(n_groups, values, torch.int32)
    mean, total = empty(n_blocks, values), empty(n_subs, values)
    fits, sums, terms = empty(12 * n_subs, values), empty(8 * _WINDOW * n_subs, values), empty(2 * n_subs, values)
    chosen = empty(n_subs, values, torch.int32)
    d_first, d_now = empty(n_groups, values), empty(n_groups, values)
    m = values if weights is None else weights
    launch: Any = _tops[(n_rows,)]
    if book.whole_row:
        launch(values, top, row_len, TILE=1024, num_warps=4, **STRICT)
    launch = _means[lanes_of(n_blocks, 16)]
    launch(values, top, mean, n_blocks, blocks_per_row, WHOLE_ROW=book.whole_row, BLOCKS=16, num_warps=4, **STRICT)
    launch = _starts[lanes_of(n_subs, book.lanes)]
    launch(
        values, m, top, mean, table(_units(book.starts), device), lookup, fits, total, n_subs, subs_per_group, subs_per_row,
        STARTS=_STARTS, **search,
    )  # fmt: skip
    launch = _choose[(n_groups,)]
    launch(
        fits, top, table(_multiples(symmetric), device), d_first, d_now, n_subs, subs_per_group,
        EXTREME=extreme, VALUES=_VALUES, num_warps=2 if book.whole_row else 1, **legal, **kept, **STRICT,
    )  # fmt: skip
    launch = _windows[lanes_of(n_subs, book.lanes)]
    launch(
        values, m, top, mean, fits, d_first, lookup, sums, n_subs, subs_per_group, subs_per_row,
        WINDOW=_WINDOW, **legal, **search,
    )  # fmt: skip
    # A row is summed by a program of its own, small groups side by side.
    groups = 1 if book.whole_row else 128
    for turn in range(4):
        last = turn == 3
        launch = _pick[lanes_of(n_subs, 128)]
        launch(
            fits, sums, total, d_first, d_now, chosen, terms, n_subs, subs_per_group,
            WINDOW=_WINDOW, LAST=last, LANES=128, num_warps=4, **legal, **STRICT,
        )  # fmt: skip
        if not last:
            launch = _refit[lanes_of(n_groups, groups)]
            launch(
                terms, top, d_now, n_groups, n_subs, subs_per_group,
                BATCH=32 if book.whole_row else 16, GROUPS=groups, num_warps=1 if book.whole_row else 4, **kept, **STRICT,
            )  # fmt: skip
    launch = _pack[lanes_of(n_blocks, 8)]
    launch(
        values, top, d_now, chosen, terms, out, n_blocks, blocks_per_row, out.shape[1],
        N=n, WHOLE_ROW=book.whole_row, HALF=book.half, HEADER=book.header_nbytes, BLOCK_NBYTES=book.block_nbytes,
        HEADS=book.heads, PLANES=book.planes, SHIFT=float(book.shift), MIDS=mids, POSITIVE=positive,
        ZERO=-book.low if book.step == 1 else book.count // 2, BLOCKS=8, num_warps=4, **STRICT,
    )  # fmt: skip
