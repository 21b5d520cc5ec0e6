"""Encoder of IQ2_XXS on a GPU: the exact search of ``kernels/_iq2_xxs.py``, effort ``normal``, with the same bytes.

For a run of eight, a grid point g at scale s has the error ``sum w x^2 - 2 s B_g + s^2 A_g``. Blocks of 256 are the lanes; a
program has one of their runs, or of their groups of four runs, so that what goes through memory lies side by side. A_g and
B_g are sums of the two halves of a point: of the points with the same left half, that one is computed once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda._encode_common import (
    STRICT,
    bits_of,
    down,
    empty,
    exponent_field,
    greatest_bits,
    half_bits,
    half_value,
    lanes_of,
    load_quads,
    ratio,
    relative,
    rounded,
    scaled_by,
    store_half,
    table,
    up,
)

__all__ = ["encode"]

_PIECE_LEN: Final = 1 << 26
"""Weights encoded at a time: scratch memory is 8.3 bytes a weight."""
_LANES: Final = 128
_SWEEP_LANES: Final = 256
"""Lanes of the sweeps over all points, two a thread: what is read of a point serves both."""
_SAMPLES: Final = (0.35, 1.1, 8)
"""Sampled scales of a group, in units of its largest magnitude over 43: least, largest, number; effort ``normal``."""


def _grid() -> np.ndarray:
    """Return float32 [256, 8]: the points."""
    return tables.GRID_IQ2_XXS.astype(np.float32)


@cache
def _by_left() -> tuple[np.ndarray, np.ndarray]:
    """Return the points in an order that keeps equal left halves together, and int32 [1 + halves] where each begins."""
    grid = _grid()
    _, left = np.unique(grid[:, :4], axis=0, return_inverse=True)
    order = np.argsort(left.reshape(-1), kind="stable")
    begins = np.flatnonzero(np.diff(left.reshape(-1)[order], prepend=-1))
    return order.astype(np.int32), np.append(begins, 256).astype(np.int32)


def _order() -> np.ndarray:
    return _by_left()[0]


def _begins() -> np.ndarray:
    return _by_left()[1]


def _multiples() -> np.ndarray:
    return np.linspace(*_SAMPLES, dtype=np.float32)


def _ratios() -> np.ndarray:
    """Return float32 [64]: values of d over the one that puts the largest group at the top."""
    return np.float32(0.72) + np.float32(0.01) * np.arange(64, dtype=np.float32)


@triton.jit
def _survey(values, fields, sigma, tops, n_blocks, LANES: tl.constexpr):
    """Per block: exponent field, mean square and, of each group of 32, the largest magnitude (``tops`` [8, blocks])."""
    block = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = block < n_blocks
    at = block.to(tl.int64) * 256
    top = tl.zeros([LANES], tl.int32)
    for group in range(8):
        found = greatest_bits(load_quads(values, at + group * 32, real, 32), 32)
        top = tl.maximum(top, found)
        tl.store(tops + group * n_blocks + block, found, mask=real)
    field = exponent_field(top)
    shrink = down(field)
    total = tl.zeros([LANES], tl.float32)
    # Every 64th element is summed first, then the 64 sums.
    for i in range(0, 64, 4):
        a = scaled_by(load_quads(values, at + i, real, 4), shrink, 4)
        b = scaled_by(load_quads(values, at + (64 + i), real, 4), shrink, 4)
        c = scaled_by(load_quads(values, at + (128 + i), real, 4), shrink, 4)
        d = scaled_by(load_quads(values, at + (192 + i), real, 4), shrink, 4)
        for j in tl.static_range(4):
            total += a[j] * a[j] + b[j] * b[j] + c[j] * c[j] + d[j] * d[j]
    tl.store(fields + block, field, mask=real)
    tl.store(sigma + block, total * (1.0 / 256), mask=real)


@triton.jit
def _run(
    values, importance, sigma, field, block, real, blocks_per_row, at,
    BY_ENERGY: tl.constexpr,
):  # fmt: skip
    """Return of a run of eight from ``at`` on: magnitudes, weights, sign bits, 2 if they are odd, energy with a margin."""
    raw = load_quads(values, block.to(tl.int64) * 256 + at, real, 8)
    m = load_quads(importance, (block % blocks_per_row) * 256 + at, real, 8)
    shrink = down(field)
    level = tl.load(sigma + block, mask=real, other=0.0)
    signs = tl.zeros(block.shape, tl.int32)
    odd = tl.zeros(block.shape, tl.int32)
    total = tl.zeros(block.shape, tl.float32)
    size = ()
    w = ()
    for j in tl.static_range(8):
        v = raw[j] * shrink
        if BY_ENERGY:
            weight = m[j] * tl.sqrt_rn(level + v * v)
        else:
            weight = m[j]
        negative = (v < 0.0).to(tl.int32)
        signs |= negative << j
        odd ^= negative
        v = tl.abs(v)
        total += weight * v * v
        size = size + (v,)
        w = w + (weight,)
    return size, w, signs, odd * 2.0, total * 1.001 + 1e-30


@triton.jit
def _half(grid, size, w, FIRST: tl.constexpr):
    """``sum w g^2``, ``sum w x g`` and ``min w x g`` over the four elements from ``FIRST``; ``grid`` points at the point."""
    g0 = tl.load(grid + FIRST)
    g1 = tl.load(grid + FIRST + 1)
    g2 = tl.load(grid + FIRST + 2)
    g3 = tl.load(grid + FIRST + 3)
    a = w[FIRST] * (g0 * g0) + w[FIRST + 1] * (g1 * g1) + w[FIRST + 2] * (g2 * g2) + w[FIRST + 3] * (g3 * g3)
    y0 = size[FIRST] * w[FIRST] * g0
    y1 = size[FIRST + 1] * w[FIRST + 1] * g1
    y2 = size[FIRST + 2] * w[FIRST + 2] * g2
    y3 = size[FIRST + 3] * w[FIRST + 3] * g3
    return a, y0 + y1 + y2 + y3, tl.minimum(tl.minimum(y0, y1), tl.minimum(y2, y3))


@triton.jit
def _key(scale, a, b2, lift, g):
    """Error over s, not negative, whose bits sort as an integer; the low ones are the point's number."""
    return (bits_of(scale * a - b2 + lift) & -256) | g


@triton.jit
def _line(grid, size, w, twice_odd, key):
    """A and B of the points in the low bits of ``key``."""
    point = grid + (key & 255) * 8
    left_a, left_b, left_c = _half(point, size, w, 0)
    right_a, right_b, right_c = _half(point, size, w, 4)
    return left_a + right_a, left_b + right_b - twice_odd * tl.minimum(left_c, right_c)


@triton.jit
def _sample(
    values, importance, fields, sigma, tops, multiples, grid, order, begins, lines, n_blocks, blocks_per_row,
    BY_ENERGY: tl.constexpr, LEFTS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Best points of runs at 8 sampled scales of their group: their A and B, ``lines`` [32 runs, 8 scales, 2, blocks]."""
    lane = tl.arange(0, LANES)
    block = tl.program_id(0) * BLOCKS + lane % BLOCKS
    run = tl.program_id(1) * (LANES // BLOCKS) + lane // BLOCKS
    real = block < n_blocks
    field = tl.load(fields + block, mask=real, other=1)
    size, w, _signs, twice_odd, energy = _run(
        values, importance, sigma, field, block, real, blocks_per_row, run * 8, BY_ENERGY
    )
    top = tl.load(tops + (run // 4) * n_blocks + block, mask=real, other=0).to(tl.float32, bitcast=True) * down(field)
    top = tl.div_rn(tl.maximum(top, 43e-12), tl.full([LANES], 43.0, tl.float32))
    scales = ()
    lifts = ()
    for k in tl.static_range(8):
        s = tl.load(multiples + k) * top
        scales = scales + (s,)
        lifts = lifts + (tl.div_rn(energy, s),)
    best0 = tl.full([LANES], 0x7FFFFFFF, tl.int32)
    best1 = best0
    best2 = best0
    best3 = best0
    best4 = best0
    best5 = best0
    best6 = best0
    best7 = best0
    for p in range(LEFTS):
        first = tl.load(begins + p)
        end = tl.load(begins + p + 1)
        left_a, left_b, left_c = _half(grid + tl.load(order + first) * 8, size, w, 0)
        for at in range(first, end):
            g = tl.load(order + at)
            right_a, right_b, right_c = _half(grid + g * 8, size, w, 4)
            a = left_a + right_a
            b2 = 2.0 * (left_b + right_b - twice_odd * tl.minimum(left_c, right_c))
            best0 = tl.minimum(best0, _key(scales[0], a, b2, lifts[0], g))
            best1 = tl.minimum(best1, _key(scales[1], a, b2, lifts[1], g))
            best2 = tl.minimum(best2, _key(scales[2], a, b2, lifts[2], g))
            best3 = tl.minimum(best3, _key(scales[3], a, b2, lifts[3], g))
            best4 = tl.minimum(best4, _key(scales[4], a, b2, lifts[4], g))
            best5 = tl.minimum(best5, _key(scales[5], a, b2, lifts[5], g))
            best6 = tl.minimum(best6, _key(scales[6], a, b2, lifts[6], g))
            best7 = tl.minimum(best7, _key(scales[7], a, b2, lifts[7], g))
    best = (best0, best1, best2, best3, best4, best5, best6, best7)
    for k in tl.static_range(8):
        a, b = _line(grid, size, w, twice_odd, best[k])
        to = lines + (run * 16 + 2 * k) * n_blocks + block
        tl.store(to, a, mask=real)
        tl.store(to + n_blocks, b, mask=real)


@triton.jit
def _evaluate(lines, fitted, d, n_blocks, block, real, LANES: tl.constexpr):
    """Best sub-scales within 1 of the nearest and best lines for d: error, ``sum u B``, ``sum u^2 A``, sub-scales."""
    total = tl.zeros([LANES], tl.float32)
    ub = tl.zeros([LANES], tl.float32)
    uua = tl.zeros([LANES], tl.float32)
    word = tl.zeros([LANES], tl.int32)
    infinity = tl.full([LANES], float("inf"), tl.float32)
    for group in range(8):
        scale = tl.load(fitted + group * n_blocks + block, mask=real, other=0.0)
        centre = rounded((tl.div_rn(scale, d) * 8.0 - 1.0) * 0.5)
        centre = tl.minimum(tl.maximum(centre, 0.0), 15.0)
        least = infinity
        least_a = tl.zeros([LANES], tl.float32)
        least_b = tl.zeros([LANES], tl.float32)
        least_u = tl.zeros([LANES], tl.float32)
        best = tl.zeros([LANES], tl.float32)
        for near in range(-1, 2):
            number = centre + near
            u = (2.0 * number + 1.0) * 0.125
            s = d * u
            error = tl.zeros([LANES], tl.float32)
            sum_a = tl.zeros([LANES], tl.float32)
            sum_b = tl.zeros([LANES], tl.float32)
            for run in tl.static_range(4):
                low = infinity
                low_a = tl.zeros([LANES], tl.float32)
                low_b = tl.zeros([LANES], tl.float32)
                for k in tl.static_range(8):
                    at = lines + ((group * 4 + run) * 16 + 2 * k) * n_blocks + block
                    a = tl.load(at, mask=real, other=0.0)
                    b = tl.load(at + n_blocks, mask=real, other=0.0)
                    e = s * (s * a - 2.0 * b)
                    better = e < low
                    low = tl.where(better, e, low)
                    low_a = tl.where(better, a, low_a)
                    low_b = tl.where(better, b, low_b)
                error += low
                sum_a += low_a
                sum_b += low_b
            better = (number >= 0.0) & (number <= 15.0) & (error < least)
            least = tl.where(better, error, least)
            least_a = tl.where(better, sum_a, least_a)
            least_b = tl.where(better, sum_b, least_b)
            least_u = tl.where(better, u, least_u)
            best = tl.where(better, number, best)
        total += least
        ub += least_u * least_b
        uua += least_u * least_u * least_a
        word |= best.to(tl.int32) << (group * 4)
    return total, ub, uua, word


@triton.jit
def _fit(
    lines, fields, ratios, fitted, chosen, stored, n_blocks, LANES: tl.constexpr,
):  # fmt: skip
    """Choose d (half bits, ``stored``; 0 for nothing) and the eight sub-scales (nibbles of ``chosen``) of every block.

    ``fitted`` [8, blocks] is scratch: the groups' best scales.
    """
    block = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = block < n_blocks
    field = tl.load(fields + block, mask=real, other=1)
    largest = tl.zeros([LANES], tl.float32)
    scales = ()
    curves = ()
    for group in tl.static_range(8):
        most = tl.zeros([LANES], tl.float32)
        scale = tl.zeros([LANES], tl.float32)
        curve = tl.zeros([LANES], tl.float32)
        for k in range(8):
            sum_a = tl.zeros([LANES], tl.float32)
            sum_b = tl.zeros([LANES], tl.float32)
            for run in tl.static_range(4):
                at = lines + ((group * 4 + run) * 16 + 2 * k) * n_blocks + block
                sum_a += tl.load(at, mask=real, other=0.0)
                sum_b += tl.load(at + n_blocks, mask=real, other=0.0)
            centre = ratio(sum_b, sum_a)
            better = (sum_a > 0.0) & (sum_b > 0.0) & (sum_b * centre > most)
            most = tl.where(better, sum_b * centre, most)
            scale = tl.where(better, centre, scale)
            curve = tl.where(better, sum_a, curve)
        tl.store(fitted + group * n_blocks + block, scale, mask=real)
        largest = tl.maximum(largest, scale)
        scales = scales + (scale,)
        curves = curves + (curve,)
    d0 = largest * (8.0 / 31.0)
    some = d0 > 0.0
    d0 = tl.where(some, d0, 1.0)
    least = tl.full([LANES], float("inf"), tl.float32)
    d = d0
    for k in range(64):
        tried = d0 * tl.load(ratios + k)
        step = tl.div_rn(tl.full([LANES], 8.0, tl.float32), tried)
        cost = tl.zeros([LANES], tl.float32)
        for group in tl.static_range(8):
            a = rounded((scales[group] * step - 1.0) * 0.5)
            a = tl.minimum(tl.maximum(a, 0.0), 15.0)
            off = tried * (2.0 * a + 1.0) * 0.125 - scales[group]
            cost += curves[group] * off * off
        better = cost < least
        least = tl.where(better, cost, least)
        d = tl.where(better, tried, d)
    found = _evaluate(lines, fitted, d, n_blocks, block, real, LANES)
    ub = found[1]
    uua = found[2]
    usual = (uua > 0.0) & (ub > 0.0)
    d = tl.where(usual, ratio(ub, uua), d)
    middle = half_bits(d * up(field))
    # Half subnormals are far apart: the nearest one need not be the best.
    subnormal = some & (middle < 0x0400)
    reach = tl.where(subnormal, 3, 0)
    widest = tl.max(reach, axis=0)
    # Errors are counted from that of zeros, which stay where every half of d is too large.
    least = tl.zeros([LANES], tl.float32)
    best = tl.zeros([LANES], tl.int32)
    word = tl.zeros([LANES], tl.int32)
    for shift in range(-widest, widest + 1):
        bits = middle + shift
        valid = some & (bits > 0) & (tl.abs(shift + tl.zeros([LANES], tl.int32)) <= reach)
        tried = half_value(tl.where(valid, bits, 0x3C00)) * down(field)
        error, ub, uua, numbers = _evaluate(lines, fitted, tried, n_blocks, block, real, LANES)
        better = valid & (error < least)
        least = tl.where(better, error, least)
        best = tl.where(better, bits, best)
        word = tl.where(better, numbers, word)
    tl.store(stored + block, best, mask=real)
    tl.store(chosen + block, word, mask=real)


@triton.jit
def _write(
    values, importance, fields, sigma, chosen, stored, grid, order, begins, out, n_blocks, blocks_per_row,
    BY_ENERGY: tl.constexpr, LEFTS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the bytes of a group of every block, its points the best of the whole grid."""
    lane = tl.arange(0, LANES)
    block = tl.program_id(0) * BLOCKS + lane % BLOCKS
    group = tl.program_id(1) * (LANES // BLOCKS) + lane // BLOCKS
    real = (block < n_blocks) & (group < 8)
    field = tl.load(fields + block, mask=real, other=1)
    bits = tl.load(stored + block, mask=real, other=0)
    some = bits > 0
    number = (tl.load(chosen + block, mask=real, other=0) >> (group * 4)) & 15
    d = half_value(bits) * down(field)
    scale = tl.maximum(d * (2 * number + 1).to(tl.float32) * 0.125, 1e-12)
    start = out + block.to(tl.int64) * 66
    store_half(start, 0, bits, real & (group == 0))
    start += 2 + 8 * group
    word = tl.where(some, number << 28, 0)
    for run in range(4):
        size, w, signs, twice_odd, energy = _run(
            values, importance, sigma, field, block, real, blocks_per_row, group * 32 + run * 8, BY_ENERGY
        )
        lift = tl.div_rn(energy, scale)
        best = tl.full([LANES], 0x7FFFFFFF, tl.int32)
        for p in range(LEFTS):
            first = tl.load(begins + p)
            end = tl.load(begins + p + 1)
            left_a, left_b, left_c = _half(grid + tl.load(order + first) * 8, size, w, 0)
            for at in range(first, end):
                g = tl.load(order + at)
                right_a, right_b, right_c = _half(grid + g * 8, size, w, 4)
                b2 = 2.0 * (left_b + right_b - twice_odd * tl.minimum(left_c, right_c))
                best = tl.minimum(best, _key(scale, left_a + right_a, b2, lift, g))
        g = best & 255
        # With an odd number of minus signs one element must carry the wrong one: the first of least cost.
        where = tl.zeros([LANES], tl.int32)
        least = tl.full([LANES], float("inf"), tl.float32)
        for j in tl.static_range(8):
            cost = w[j] * size[j] * tl.load(grid + g * 8 + j)
            better = cost < least
            least = tl.where(better, cost, least)
            where = tl.where(better, j, where)
        signs ^= tl.where(twice_odd > 0.0, 1 << where, 0)
        word |= tl.where(some, signs & 127, 0) << (7 * run)
        tl.store(start + run, tl.where(some, g, 0).to(tl.uint8), mask=real)
    for k in tl.static_range(4):
        tl.store(start + 4 + k, (word >> (8 * k) & 255).to(tl.uint8), mask=real)


def encode(values: torch.Tensor, importance: torch.Tensor, out: torch.Tensor, mse: bool) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from finite ``values`` float32 [R, row_len] and importance float32 [row_len]."""
    weights = relative(importance, 256)
    assert weights is not None
    rows = max(1, _PIECE_LEN // values.shape[1])
    for first in range(0, values.shape[0], rows):
        _encode_rows(values[first : first + rows], weights, out[first : first + rows], mse)


def _encode_rows(values: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, mse: bool) -> None:
    n = values.numel() // 256
    blocks_per_row = values.shape[1] // 256
    device = values.device
    fields, tops = empty(n, values, torch.int32), empty(8 * n, values, torch.int32)
    chosen, stored = empty(n, values, torch.int32), empty(n, values, torch.int32)
    sigma, lines, fitted = empty(n, values), empty(512 * n, values), empty(8 * n, values)
    grid, order, begins = table(_grid, device), table(_order, device), table(_begins, device)
    (programs,) = lanes_of(n, _LANES)
    # Of few blocks, all 32 runs (or the 8 groups, and idle lanes) lie in the lanes of one program.
    blocks = _SWEEP_LANES if n >= 4 * _SWEEP_LANES else _SWEEP_LANES // 32
    options = {"LANES": _LANES, "num_warps": 4, **STRICT}
    sweep = {**options, "LANES": _SWEEP_LANES, "BLOCKS": blocks, "BY_ENERGY": not mse, "LEFTS": _begins().size - 1}
    launch: Any = _survey[(programs,)]
    launch(values, fields, sigma, tops, n, **options)
    launch = _sample[(triton.cdiv(n, blocks), 32 * blocks // _SWEEP_LANES)]
    launch(
        values, weights, fields, sigma, tops, table(_multiples, device), grid, order, begins, lines, n, blocks_per_row,
        **sweep,
    )  # fmt: skip
    launch = _fit[(programs,)]
    launch(lines, fields, table(_ratios, device), fitted, chosen, stored, n, **options)
    launch = _write[(triton.cdiv(n, blocks), max(1, 8 * blocks // _SWEEP_LANES))]
    launch(
        values, weights, fields, sigma, chosen, stored, grid, order, begins, out, n, blocks_per_row, **sweep,
    )  # fmt: skip
