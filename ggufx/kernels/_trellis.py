"""Search of the trellis types IQ2_KT, IQ3_KT and IQ4_KT: the best of 2^15 or 2^16 points for every 8 (or 4) elements.

The points of the generator lie like noise, so their space is cut into cells, at quantiles of every coordinate, and a search
looks into the cells nearest to the values alone: some hundred points instead of all, of which the best is nearly always among
them. For weights w, values x and a point v the error under the scale d is ``sum w x^2 - 2 d B + d^2 A`` with ``A = sum w v^2``
and ``B = sum w x v``: cells are visited once for many scales.

Row by row: real scales of every 32 elements; the row's ``D`` whose legal multiples suit them; for every 32 elements the best of
the legal scales about its own, of either sign and either half of the generator where a type has these; ``D`` by least squares;
points again.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ggufx import tables
from ggufx.kernels._jit import float_to_bits, kernel, larger, smaller, subroutine
from ggufx.kernels._lanes import _BYTE, _INT, Frame
from ggufx.kernels._linear import down, exponent_of, floats, mean_square, scratch_of, up
from ggufx.kernels._vector import Vector

SLOT = 16
"""Points side by side; the last of a cell fills its last slot up."""
SUB = 32
_SLOTS = 1024
RUN = 16
"""Legal scales that are tried with one choice of cells, at most."""
_0, _1 = np.int64(0), np.int64(1)
"""For subroutines, which are compiled again for every literal argument."""
_ZERO = np.float32(0)
_ONE = np.float32(1)
_INF = np.float32(np.inf)


class Points(NamedTuple):
    """Points of a generator by cells.

    Attributes
    ----------
    values
        int8 [slots * group_len * SLOT]: by slot, then coordinate, then point.
    seeds
        int32 [slots * SLOT]: the index of every point.
    first
        int32 [halves * (cells + 1)]: the first slot of every cell; cells by coordinates, the first one fastest.
    edges
        float32 [levels - 1]: the cuts of every coordinate.
    spread
        Mean square of a coordinate.
    """

    values: npt.NDArray[np.int8]
    seeds: npt.NDArray[np.int32]
    first: npt.NDArray[np.int32]
    edges: npt.NDArray[np.float32]
    spread: np.float32


@cache
def points(group_len: int, n_bits: int, levels: int, magnitudes: bool, halves: int) -> Points:
    """Sort the generator's points, ``2^n_bits`` of ``group_len`` elements, into ``levels^group_len`` cells."""
    values, seeds, first = [], [], []
    edges = None
    spread, n_slots = 0.0, 0
    for half in range(halves):
        state = np.arange(1 << n_bits, dtype=np.uint32) + np.uint32(tables.TRELLIS_OFFSET + half * (1 << n_bits))
        found = np.empty((1 << n_bits, group_len), np.int16)
        for i in range(group_len):
            state = state * np.uint32(tables.TRELLIS_FACTOR)
            masked = (state & np.uint32(tables.TRELLIS_MASK))[:, None].view(np.uint8)
            found[:, i] = masked.sum(axis=1, dtype=np.int16) - 126
        if magnitudes:
            found = np.abs(found)
        if edges is None:
            # Between integers, so that no point lies on a cut.
            edges = np.floor(np.quantile(found, np.arange(1, levels) / levels)).astype(np.float32) + np.float32(0.5)
        spread += float((found.astype(np.float64) ** 2).mean()) / halves
        cell = (np.searchsorted(edges, found) * levels ** np.arange(group_len)).sum(axis=1)
        order = np.argsort(cell, kind="stable")
        counts = np.bincount(cell, minlength=levels**group_len)
        slots = -(-counts // SLOT)
        starts = np.concatenate([[0], np.cumsum(slots)])
        place = np.repeat(np.concatenate([[0], np.cumsum(counts)])[:-1], slots * SLOT)
        within = np.arange(starts[-1] * SLOT) - np.repeat(starts[:-1] * SLOT, slots * SLOT)
        sorted_seeds = order[place + np.minimum(within, np.repeat(counts, slots * SLOT) - 1)]
        seeds.append(sorted_seeds)
        values.append(found[sorted_seeds].astype(np.int8).reshape(-1, SLOT, group_len).swapaxes(1, 2))
        first.append(starts + n_slots)
        n_slots += int(starts[-1])
    assert edges is not None
    return Points(
        np.ascontiguousarray(np.concatenate(values)).reshape(-1),
        np.concatenate(seeds).astype(np.int32),
        np.concatenate(first).astype(np.int32),
        edges,
        np.float32(spread),
    )


def _slot_sums(group_len: int) -> Any:
    """Return an intrinsic: A and ``factor * B`` of the points of a slot, see the module.

    ``sums(values, slot, xw, start_w, start_wx, factor, ab, to_a, to_b)`` takes ``group_len`` weights and products from these
    places of ``xw`` and writes SLOT results to those of ``ab``. Sums run in order of elements, point by point.
    """

    @intrinsic
    def sums(typing_context, values, slot, xw, start_w, start_wx, factor, ab, to_a, to_b):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            first = builder.mul(args[1], ir.Constant(args[1].type, group_len * SLOT))
            sum_a = sum_b = None
            for j in range(group_len):
                pointer = f.pointer(0, builder.add(first, ir.Constant(first.type, j * SLOT)))
                codes = builder.load(builder.bitcast(pointer, ir.VectorType(_BYTE, SLOT).as_pointer()), align=1)
                v = Vector(builder, codes).extend(32).floats()
                w, wx = (f.spread_element(2, builder.add(at, ir.Constant(at.type, j))) for at in args[3:5])
                part_a, part_b = w * v * v, wx * v
                sum_a = part_a if sum_a is None else sum_a + part_a
                sum_b = part_b if sum_b is None else sum_b + part_b
            assert sum_a is not None
            assert sum_b is not None
            f.store(6, args[7], sum_a)
            f.store(6, args[8], sum_b * f.spread(args[5]))
            return context.get_dummy_value()

        places = (types.intp, types.intp)
        return types.void(values, types.intp, xw, *places, types.float32, ab, *places), codegen

    return sums


_sums8, _sums4 = _slot_sums(8), _slot_sums(4)


@intrinsic
def _least4(typing_context, ab, second, n, lanes, at, to):
    """Set ``lanes[to + k]``, for the four scales ``lanes[at + k]``, to the minimum of ``scale * a - b`` over ``n`` points.

    ``ab`` has a from its beginning and b from ``second`` on; n is a multiple of 16. All places count from an array's beginning.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        f = Frame(context, builder, signature, args)
        places, to = ([builder.add(at, ir.Constant(at.type, k)) for k in range(4)] for at in args[4:6])
        scale = [f.spread_element(3, place) for place in places]
        best = [f.variable(f.constant(np.inf)) for _ in places]
        step = ir.Constant(args[2].type, SLOT)
        with cgutils.for_range(builder, builder.udiv(args[2], step), intp=args[2].type) as loop:
            i = builder.mul(loop.index, step)
            part_a, part_b = f.load(0, i), f.load(0, builder.add(args[1], i))
            for k in range(4):
                f.write(best[k], f.smaller(scale[k] * part_a - part_b, f.read(best[k])))
        for k in range(4):
            vector = f.read(best[k])
            while vector.lanes > 1:
                half = vector.lanes // 2
                vector = f.smaller(vector.take(range(half)), vector.take(range(half, 2 * half)))
            builder.store(f.first(vector), f.pointer(3, to[k]))
        return context.get_dummy_value()

    return types.void(ab, types.intp, types.intp, lanes, types.intp, types.intp), codegen


@intrinsic
def _where_least(typing_context, ab, second, n, scale, lanes, to, where):
    """Write, for each of 16 lanes, the minimum of ``scale * a - b`` to ``lanes[to:]``, and its slot's number to ``where``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        f = Frame(context, builder, signature, args)
        spread = f.spread(args[3])
        best, slot = f.variable(f.constant(np.inf)), f.variable(f.constant(0, element=_INT))
        step = ir.Constant(args[2].type, SLOT)
        with cgutils.for_range(builder, builder.udiv(args[2], step), intp=args[2].type) as loop:
            i = builder.mul(loop.index, step)
            value = spread * f.load(0, i) - f.load(0, builder.add(args[1], i))
            better = f.greater(f.read(best), value)
            number = f.spread(builder.trunc(loop.index, _INT))
            f.write(slot, better.choose(number, f.read(slot)))
            f.write(best, better.choose(value, f.read(best)))
        f.store(4, args[5], f.read(best))
        f.store(6, ir.Constant(args[2].type, 0), f.read(slot))
        return context.get_dummy_value()

    return types.void(ab, types.intp, types.intp, types.float32, lanes, types.intp, where), codegen


def _combinations(levels: int, n: int) -> Any:
    """Return an intrinsic: sums of one cost of each of ``n`` elements, for every combination of their levels.

    ``combine(lists, first, to)`` takes ``levels`` costs of each element from ``first`` on and writes to ``to``; the first
    element's level counts fastest, and what is left of the last vector is infinite.
    """
    count = levels**n

    @intrinsic
    def combine(typing_context, lists, first, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            at_of = [builder.add(args[1], ir.Constant(args[1].type, i)) for i in range(levels * n)]
            spread = [f.spread_element(0, at) for at in at_of]
            for at in range(0, count, SLOT):
                total = f.constant([0.0 if at + i < count else np.inf for i in range(SLOT)])
                for j in range(n):
                    level = [(at + i) // levels**j % levels for i in range(SLOT)]
                    cost = spread[levels * j + level[0]]
                    for other in sorted(set(level) - {level[0]}):
                        mask = f.constant([int(here == other) for here in level], element=ir.IntType(1))
                        cost = mask.choose(spread[levels * j + other], cost)
                    total = total + cost
                f.store(0, builder.add(args[2], ir.Constant(args[2].type, at)), total)
            return context.get_dummy_value()

        return types.void(lists, types.intp, types.intp), codegen

    return combine


_combine3, _combine7 = _combinations(3, 4), _combinations(7, 2)


@subroutine
def _combine(lists, group_len, first, to):
    """Fill one half's list from the costs of its elements."""
    if group_len == 8:
        _combine3(lists, first, to)
    else:
        _combine7(lists, first, to)


@intrinsic
def _mask_within(typing_context, costs, at, limit):
    """Return 16 bits: which of the costs from ``at`` on are no more than ``limit``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        f = Frame(context, builder, signature, args)
        mask = builder.fcmp_ordered("<=", f.load(0, args[1]).value, f.spread(args[2]).value)
        return builder.zext(builder.bitcast(mask, ir.IntType(16)), _INT)

    return types.uint32(costs, types.intp, types.float32), codegen


@intrinsic
def _ones(typing_context, mask):
    """Return the number of bits that are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), codegen


@intrinsic
def _lowest(typing_context, mask):
    """Return the number of the lowest bit that is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.cttz(args[0], ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

    return types.int64(types.uint32), codegen


@subroutine
def _gather(lists, row, limit, cells):
    """Copy the costs of a row up to ``limit`` two rows on, and their numbers; return how many.

    Behind them is infinity up to whole vectors.
    """
    n, size = 0, lists.shape[1]
    for at in range(0, size, SLOT):
        mask = _mask_within(lists, row * size + at, limit)
        while mask:
            i = at + _lowest(mask)
            mask &= mask - np.uint32(1)
            lists[row + 2, n], cells[row + 1, n] = lists[row, i], i
            n += 1
    for i in range(n, (n + SLOT - 1) // SLOT * SLOT):
        lists[row + 2, i] = _INF
    return n


@subroutine
def _within(lists, n_left, n_right, limit):
    """Return how many sums of two gathered costs are no more than ``limit``."""
    total, right = 0, 3 * lists.shape[1]
    for i in range(n_left):
        rest = limit - lists[2, i]
        for to in range(right, right + n_right, SLOT):
            total += _ones(_mask_within(lists, to, rest))
    return total


@subroutine
def _choose(xw, start, group_len, inverse, far, edges, n, wide, memory, lists, cells):
    """Collect about ``n`` cells, those nearest to ``x * inverse``, from ``cells[0, 1]`` on; ``cells[0, 0]`` is their number.

    It is ``wide`` cells where a value beyond ``far`` has most of the weight. ``lists[4, memory]`` is the limit that served
    last, per weight: the next one begins with it. The other rows of ``lists`` are costs of the levels of a group's first and
    second half, and the least of each.
    """
    levels, size = edges.shape[0] + 1, lists.shape[1]
    total_w = _ZERO
    for j in range(start, start + group_len):
        total_w += xw[1, j]
    to = 3
    for j in range(start, start + group_len):
        z, weight = xw[0, j] * inverse, xw[1, j]
        if abs(z) > far and weight > np.float32(0.6) * total_w:
            # Cells say nothing about how near to such a value their points are.
            n, memory = wide, 2
        for level in range(levels):
            off = _ZERO
            if level > 0:
                off = larger(off, edges[level - 1] - z)
            if level < levels - 1:
                off = larger(off, z - edges[level])
            lists[4, to] = weight * off * off
            to += 1
    _combine(lists, group_len, 4 * size + 3, _0)
    _combine(lists, group_len, 4 * size + 3 + levels * (group_len // 2), size)
    limit = lists[4, memory] * total_w
    bound = -_ONE
    n_left = n_right = 0
    for _ in range(6):
        if limit > bound:
            bound = np.float32(1.5) * limit
            n_left, n_right = _gather(lists, _0, bound, cells), _gather(lists, _1, bound, cells)
        count = _within(lists, n_left, n_right, limit)
        if 5 * count >= 4 * n and 4 * count <= 5 * n:
            break
        # Counts grow with a higher power than the square root undoes.
        limit *= np.sqrt(np.float32(n) / np.float32(larger(count, 1)))
    limit = smaller(limit, bound)
    if total_w > _ZERO:
        lists[4, memory] = smaller(larger(limit / total_w, np.float32(1e-3)), np.float32(1e5))
    total = 0
    for i in range(n_left):
        rest = limit - lists[2, i]
        for at in range(0, n_right, SLOT):
            mask = _mask_within(lists, 3 * size + at, rest)
            while mask:
                if total < cells.shape[1] - 1:
                    total += 1
                    # 81 of 96 or 49 of 64 combinations.
                    cells[0, total] = cells[1, i] + cells[2, at + _lowest(mask)] * (size - 15)
                mask &= mask - np.uint32(1)
    cells[0, 0] = total


@subroutine
def _look(xw, start, group_len, inverse, far, edges, n, wide, memory, lists, cells, table, first, at, ab):
    """Fill ``ab`` with A and 2 B (the sign of ``inverse`` in it) of the points near ``x * inverse``; return their number.

    The points are those of the half of the generator that begins at ``first[at]``, in the slots ``cells[3]``. Another half's
    cells are used again if ``at`` is not 0 and ``n`` is.
    """
    if n > 0:
        _choose(xw, start, group_len, inverse, far, edges, n, wide, memory, lists, cells)
    total = 0
    for i in range(1, cells[0, 0] + 1):
        cell = at + cells[0, i]
        for slot in range(first[cell], first[cell + 1]):
            if total < cells.shape[1]:
                cells[3, total] = slot
                total += 1
    if total == 0:
        cells[3, 0] = first[at]
        total = 1
    factor = np.float32(2) if inverse > _ZERO else np.float32(-2)
    w, second = xw.shape[1] + start, ab.shape[1]
    wx = xw.shape[1] + w
    for k in range(total):
        if group_len == 8:
            _sums8(table, cells[3, k], xw, w, wx, factor, ab, k * SLOT, second + k * SLOT)
        else:
            _sums4(table, cells[3, k], xw, w, wx, factor, ab, k * SLOT, second + k * SLOT)
    return total * SLOT


@subroutine
def _pick(ab, n, scale, lanes, where):
    """Return the place of the point that is best under ``scale``, the first of equals in lanes."""
    _where_least(ab, ab.shape[1], n, scale, lanes, 2 * lanes.shape[1], where)
    lane = 0
    for i in range(1, SLOT):
        lane = i if lanes[2, i] < lanes[2, lane] else lane
    return where[lane] * SLOT + lane


@subroutine
def _add_costs(ab, n, n_scales, at, lanes):
    """Add the least cost among ``n`` points under each of the scales ``lanes[0]`` to ``lanes[1, at:]``."""
    for i in range(0, n_scales, 4):
        _least4(ab, ab.shape[1], n, lanes, i, 2 * lanes.shape[1] + i)
    for i in range(n_scales):
        lanes[1, at + i] += lanes[0, i] * lanes[2, i]


@subroutine
def _weigh(x, importance, mse, w, wx, lanes):
    """Fill the weights of a row: those of the reference, or the importance."""
    weighted = importance.shape[0] > 0
    for begin in range(0, x.shape[0], 256):
        part, to = x[begin : begin + 256], w[begin : begin + 256]
        if mse:
            for i in range(part.shape[0]):
                to[i] = _ONE
        else:
            level = np.float32(2) * mean_square(part, _ONE, lanes) + np.float32(1e-18)
            if weighted:
                for i in range(part.shape[0]):
                    to[i] = np.sqrt(level + part[i] * part[i])
            else:
                for i in range(part.shape[0]):
                    to[i] = np.float32(0.25) * level + part[i] * part[i]
    if weighted:
        for i in range(x.shape[0]):
            w[i] *= importance[i]
    for i in range(x.shape[0]):
        wx[i] = w[i] * x[i]


@subroutine
def _store(kind, row, bits, ints, picked, minus):
    """Write a row: the float32 of ``bits``, scale codes, halves of the generator, indices and signs; see the types."""
    codes, halves = ints[2], ints[3]
    for i in range(4):
        row[i] = np.uint8((bits >> np.uint32(8 * i)) & np.uint32(255))
    for b in range(codes.shape[0] // 8):
        if kind == 4:
            start = 4 + 128 * b
            for k in range(8):
                word = np.uint32(halves[8 * b + k]) | np.uint32(codes[8 * b + k]) << np.uint32(1)
                for q in range(8):
                    word |= np.uint32(picked[64 * b + 8 * k + q] >> 12) << np.uint32(8 + 3 * q)
                for i in range(4):
                    row[start + 4 * k + i] = np.uint8((word >> np.uint32(8 * i)) & np.uint32(255))
            for j in range(64):
                row[start + 32 + j] = np.uint8(picked[64 * b + j] & 255)
            for j in range(32):
                low, high = picked[64 * b + j] >> 8 & 15, picked[64 * b + j + 32] >> 8 & 15
                row[start + 96 + j] = np.uint8(low | high << 4)
        else:
            start = 4 + (68 if kind == 2 else 100) * b
            for k in range(4):
                row[start + k] = np.uint8(codes[8 * b + k] | codes[8 * b + k + 4] << 4)
            for j in range(32):
                row[start + 4 + 2 * j] = np.uint8(picked[32 * b + j] & 255)
                row[start + 5 + 2 * j] = np.uint8(picked[32 * b + j] >> 8)
            if kind == 3:
                for j in range(32):
                    byte = 0
                    for k in range(8):
                        byte |= np.int64(minus[256 * b + 32 * k + j]) << k
                    row[start + 68 + j] = np.uint8(byte)


@subroutine
def _own_scale(k, xw, group_len, root, far, edges, n_cells, wide, lists, cells, table, firsts, ab, lanes, subs):
    """Find the real scale that suits sub-block ``k`` best, what it explains, and how much that bends about it."""
    start, scales, cost = SUB * k, lanes[0], lanes[1]
    sum_w, total, top, best = _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(start, start + SUB):
        sum_w += xw[1, i]
        total += xw[2, i] * xw[0, i]
        top = larger(top, abs(xw[0, i]))
    rms = np.sqrt(total / sum_w) / root if sum_w > _ZERO else _ZERO
    real = rms
    for c in range(3):
        # The last one is for a value that is far larger than the others.
        centre = top / (np.float32(3) * root)
        if c < 2:
            centre = rms * (np.float32(0.8) if c == 0 else np.float32(1.08))
        elif centre > rms * np.float32(0.65) and centre < rms * np.float32(1.25):
            continue
        if centre < np.float32(1e-20):
            continue
        for i in range(8):
            scales[i] = centre * (np.float32(0.86) + np.float32(0.04) * np.float32(i))
            cost[i] = _ZERO
        for g in range(start, start + SUB, group_len):
            n = _look(
                xw, g, group_len, _ONE / centre, far, edges, n_cells, wide, _0, lists, cells, table, firsts, _0, ab
            )
            _add_costs(ab, n, np.int64(8), _0, lanes)
        for i in range(8):
            if cost[i] < best:
                best, real = cost[i], scales[i]
    subs[0, k], subs[1, k] = real, best
    subs[2, k] = -best / (real * real) if real > np.float32(1e-15) else _ZERO


@subroutine
def _losses(subs, union, base, loss):
    """Fill ``loss[j]`` with what rounding the real scales to legal multiples of the j-th ``D`` costs, by the parabolas."""
    for j in range(loss.shape[0]):
        step = base * (np.float32(0.6) + np.float32(0.0125) * np.float32(j))
        total = _ZERO
        for k in range(subs.shape[1]):
            near = _INF
            for i in range(union.shape[0]):
                near = smaller(near, abs(step * union[i] - subs[0, k]))
            total += subs[2, k] * near * near
        loss[j] = total


@subroutine
def _legal_scale(
    k, d, reach, has_zero, group_len, far, n_cells, wide, least_scale, xw, edges, lists, cells, table, firsts, ab, lanes, subs,
    legal, signs, n_halves, of_half, ints, picked, kept, seeds, where,
):  # fmt: skip
    """Choose the variant and scale of sub-block ``k`` under ``d``, and points for it."""
    start, scales, cost = SUB * k, lanes[0], lanes[1]
    # A scale of zero, where there is one, leaves the whole error.
    best, choice = _ZERO if has_zero else _INF, -1
    target = larger(subs[0, k], d * least_scale)
    for v in range(0, signs.shape[0], n_halves):
        at = 0
        while at < legal.shape[1]:
            m = legal[v, at]
            if d * m * reach < target and at < legal.shape[1] - 1 and d * legal[v, at + 1] <= target:
                at += 1
                continue
            if d * m > target * reach and at > 0 and d * legal[v, at - 1] >= target:
                break
            # A run of scales that one choice of cells is good for.
            n_scales = 0
            while at + n_scales < legal.shape[1] and n_scales < RUN and legal[v, at + n_scales] <= m * np.float32(1.22):
                scales[n_scales] = d * legal[v, at + n_scales]
                n_scales += 1
            for i in range(n_scales, n_scales + 3):
                scales[i] = scales[n_scales - 1]
            for i in range(cost.shape[0]):
                cost[i] = _ZERO
            inverse = np.float32(2 * signs[v]) / (scales[0] + scales[n_scales - 1])
            better = -1
            # Costs first; where they are better, the points behind them.
            for point in range(2):
                for g in range(start, start + SUB, group_len):
                    for half in range(n_halves):
                        if point > 0 and half != ints[0, k] - v:
                            continue
                        new = n_cells if half == 0 or point > 0 else 0
                        n = _look(
                            xw,
                            g,
                            group_len,
                            inverse,
                            far,
                            edges,
                            new,
                            wide,
                            _0,
                            lists,
                            cells,
                            table,
                            firsts,
                            half * of_half,
                            ab,
                        )
                        if point == 0:
                            _add_costs(ab, n, n_scales, half * RUN, lanes)
                            continue
                        i, q = _pick(ab, n, scales[better], lanes, where), g // group_len
                        picked[q] = seeds[cells[3, i // SLOT] * SLOT + i % SLOT]
                        kept[0, q], kept[1, q] = ab[0, i], ab[1, i]
                if point > 0:
                    break
                for half in range(n_halves):
                    for i in range(n_scales):
                        if cost[half * RUN + i] < best:
                            best, ints[0, k], choice, better = cost[half * RUN + i], v + half, at + i, i
                if better < 0:
                    break
            at += n_scales
    ints[1, k] = choice


@subroutine
def _fit(kept, legal, ints, d, ceiling):
    """Return the least-squares ``D`` of the points, no more than ``ceiling`` (``d`` where they say nothing), and the error."""
    top, bottom = _ZERO, _ZERO
    for q in range(kept.shape[1]):
        k = q * ints.shape[1] // kept.shape[1]
        if ints[1, k] >= 0:
            m = legal[ints[0, k], ints[1, k]]
            top += m * kept[1, q]
            bottom += m * m * kept[0, q]
    if bottom > _ZERO and top > _ZERO:
        d = smaller(np.float32(0.5) * top / bottom, ceiling)
    return d, d * (d * bottom - top)


def search(
    values,
    out,
    importance,
    mse,
    kind,
    found,
    legal,
    codes,
    signs,
    halves,
    blank,
    n_cells,
    final_cells,
    reach,
    turns,
    tries,
):
    """Encode IQ2_KT, IQ3_KT or IQ4_KT (``kind`` 2, 3, 4).

    ``found`` are the :func:`points`. A variant is a sign of the scale and a half of the generator, the halves side by side:
    ``signs`` and ``halves`` have them, ``legal`` float32 [variants, n] their scales' magnitudes, ascending, ``codes`` what is
    stored for these. ``blank`` is (code, index) of zeros. ``n_cells`` are the cells that a search looks into, ``final_cells``
    the last one, ``reach`` how far from its own real scale a sub-block tries legal ones, ``turns`` how often, under how many
    ``D``.
    """
    group_len = 4 if kind == 4 else 8
    n, n_sub = values.shape[1], values.shape[1] // SUB
    half_cells = (len(found.edges) + 1) ** (group_len // 2) + 15  # whole vectors
    scratch = scratch_of(
        floats(3, n), floats(5, half_cells), floats(2, SLOT * _SLOTS), floats(5, 64), floats(3, n_sub),
        floats(2, n // group_len), (np.int64, (4, _SLOTS)), (np.int32, (SLOT,)), (np.int64, (4, n_sub)),
        (np.int64, (n // group_len,)), (np.uint8, (n,)),
    )  # fmt: skip
    _search(
        values, out, importance, mse, kind, group_len, *found, legal, np.unique(legal), codes, signs, halves, *blank, n_cells,
        final_cells, np.float32(reach), turns, tries, scratch,
    )  # fmt: skip


@kernel
def _search(
    values, out, importance, mse, kind, group_len, table, seeds, firsts, edges, spread, legal, union, codes, signs, halves,
    blank_code, blank_point, n_cells, final_cells, reach, turns, tries, scratch,
):  # fmt: skip
    xw, lists, ab, lanes, subs, kept, cells, where, ints, picked, minus = scratch
    x, loss = xw[0], lanes[4]
    n_sub = subs.shape[1]
    has_zero = kind > 2
    of_half = (lists.shape[1] - 15) * (lists.shape[1] - 15) + 1
    n_halves = firsts.shape[0] // of_half
    root = np.sqrt(spread)
    far, wide = np.float32(2.5) * root, larger(np.int64(700), final_cells)
    # The largest float32 that no product overflows with.
    ceiling = np.float32(3.4e38 / 127 / 127)
    for r in range(values.shape[0]):
        row = values[r]
        e = exponent_of(row)
        f, back = down(e), up(e)
        filled = False
        for i in range(x.shape[0]):
            x[i] = row[i] * f
            minus[i] = np.uint8(x[i] < _ZERO)
            x[i] = abs(x[i]) if kind == 3 else x[i]
            filled |= x[i] != _ZERO
        if not filled:
            for k in range(n_sub):
                ints[2, k], ints[3, k] = blank_code, 0
            for q in range(picked.shape[0]):
                picked[q] = blank_point
            _store(kind, out[r], np.uint32(0), ints, picked, minus)
            continue
        for i in range(3):
            lists[4, i] = np.float32(0.05) * spread
        _weigh(x, importance, mse, xw[1], xw[2], lanes[3])
        widest, most, total = _ZERO, _ZERO, _ZERO
        for k in range(n_sub):
            _own_scale(k, xw, group_len, root, far, edges, n_cells, wide, lists, cells, table, firsts, ab, lanes, subs)
            widest = larger(widest, subs[0, k])
            most = larger(most, -subs[1, k])
            total -= subs[1, k]
        base = larger(widest, np.float32(1e-25)) / union[union.shape[0] - 1]
        _losses(subs, union, base, loss)
        lowest = _INF
        # Where few sub-blocks have nearly all the weight, their errors are no smooth function of D.
        for attempt in range(tries if kind == 4 or total >= np.float32(5) * most else larger(tries, 3)):
            at = 0
            for j in range(1, loss.shape[0]):
                at = j if loss[j] < loss[at] else at
            d = base * (np.float32(0.6) + np.float32(0.0125) * np.float32(at))
            for j in range(larger(at - 2, 0), smaller(at + 3, loss.shape[0])):
                loss[j] = _INF
            for _ in range(turns):
                for k in range(n_sub):
                    _legal_scale(
                        k, d, reach, has_zero, group_len, far, n_cells, wide, union[0], xw, edges, lists, cells, table, firsts,
                        ab, lanes, subs, legal, signs, n_halves, of_half, ints, picked, kept, seeds, where,
                    )  # fmt: skip
                d, _ = _fit(kept, legal, ints, d, ceiling / back)
            # More cells at the very scales; D once more.
            for q in range(picked.shape[0]):
                k = q * group_len // SUB
                v = ints[0, k]
                if ints[1, k] < 0:
                    ints[2, k], ints[3, k], picked[q] = blank_code, 0, blank_point
                    continue
                ints[2, k], ints[3, k] = codes[v, ints[1, k]], halves[v]
                scale = d * legal[v, ints[1, k]]
                inverse, at = np.float32(signs[v]) / scale, halves[v] * of_half
                g = q * group_len
                n = _look(
                    xw, g, group_len, inverse, far, edges, final_cells, wide, _1, lists, cells, table, firsts, at, ab
                )
                i = _pick(ab, n, scale, lanes, where)
                if scale * ab[0, i] - ab[1, i] < scale * kept[0, q] - kept[1, q]:
                    picked[q] = seeds[cells[3, i // SLOT] * SLOT + i % SLOT]
                    kept[0, q], kept[1, q] = ab[0, i], ab[1, i]
            d, error = _fit(kept, legal, ints, d, ceiling / back)
            if error < lowest or attempt == 0:
                lowest = error
                _store(kind, out[r], float_to_bits(smaller(d * back, ceiling)), ints, picked, minus)
