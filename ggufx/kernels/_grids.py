"""The exact search of docs/formats.md, 7.1 for types whose codes are points of a grid, in one kernel for all of them.

For a slot, the elements that one point stands for, a point g at scale s has the error ``sum w x^2 - 2 s B + s^2 A`` with
``A = sum w g^2`` and ``B = sum w x g``, neither of which depends on s. A point is two halves, of which there are at most 81
each, and its error is the sum of theirs. So the best point is found by taking, for every left half, the least of the right
halves that the grid has beside it; what many left halves have in common is compared once. A wrong sign at element j, which
parity may force, costs ``4 s w_j x_j g_j``; it is in one half or the other.

The points that win at some scale of a sample are kept as lines (A, B). The block's scale, the sub-scales and then the points
are fitted on these few; a sweep of the whole grid at the scales found gives the final ones.

Words: 32 or 64 slots of a block lie side by side in the lanes. A *table* has A, 2 B and the cost of a wrong sign of the halves
of a grid for 32 slots. A *list* has lines of every slot; there are two where points of one kind, with a wrong sign or under
the other shift, exclude others elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from ggufx.kernels._jit import float_to_half, half_to_float, inline, kernel, larger, smaller, subroutine
from ggufx.kernels._lanes import GRID_LANES, GRID_RUN, grid_halves, grid_least, grid_slots, grid_sweep, peek
from ggufx.kernels._linear import down, exponent_of, floats, mean_square, scratch_of, up

__all__ = ["EITHER", "FREE", "PAIRS", "PARITY", "SAME", "Grid", "grid_of", "searcher"]

FREE = 0
"""Any point in any slot, any signs."""
PARITY = 1
"""The minus signs of every slot are even in number."""
PAIRS = 2
"""The minus signs of every two slots are even in number."""
SAME = 3
"""Signed points under one of two shifts, the same for all slots of a group."""
EITHER = 4
"""Signed points under one of two shifts, for every slot."""

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)
_INF = np.float32(np.inf)
_LOW = np.uint32(127)
_HALVES = 96
"""Halves that tables have room for."""
_KEYS = 192
"""Right halves, joined ones included, that there is room for."""
_COMMON = 4
"""Left halves that two right ones must share to be joined: taking the least once, and storing it, costs about three."""

_MAGIC = np.float32(12582912)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as rint does

_slots4, _slots8 = grid_slots(4), grid_slots(8)
_halves2, _halves4 = grid_halves(2), grid_halves(4)
_least_line = grid_least()
_sweep_free = grid_sweep(flips=False)
_sweep_flips = grid_sweep(flips=True)


class Grid(NamedTuple):
    """A grid as the kernel wants it.

    Attributes
    ----------
    halves
        float32 [shifts, 2, halves, elements of a half]: the left and the right ones.
    counts
        int64 [2]: how many there are.
    pairs, starts, members
        int64 [n, 2], [left + 1] and [m]: how to find the best partner of every left half, see :func:`grid_sweep`.
    numbers
        int16 [left, right]: a point's number in the grid.
    """

    halves: np.ndarray
    counts: np.ndarray
    pairs: np.ndarray
    starts: np.ndarray
    members: np.ndarray
    numbers: np.ndarray


def _joined(partners: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Join right halves that many left ones have in common, so that the least of the two is taken once.

    ``partners`` is int16 [left, right] of zeros and ones. Returns the pairs, and ``partners`` with a column for each.
    """
    n = partners.shape[1]
    partners = np.pad(partners, ((0, 0), (0, _KEYS - n)))
    common = np.stack([(partners * column[:, None]).sum(axis=0) for column in partners.T])
    np.fill_diagonal(common, 0)
    pairs: list[tuple[int, int]] = []
    while n < _KEYS:
        a, b = divmod(int(common.argmax()), _KEYS)
        if common[a, b] < _COMMON:
            break
        both = partners[:, a] & partners[:, b]
        partners[:, a] ^= both
        partners[:, b] ^= both
        partners[:, n] = both
        for k in (a, b, n):
            common[k] = (partners * partners[:, k, None]).sum(axis=0)
            common[k, k] = 0
            common[:, k] = common[k]
        pairs.append((a, b))
        n += 1
    return pairs, partners[:, :n]


def grid_of(points: np.ndarray, flips: bool, shifts: tuple[int, ...] = (0,), factor: int = 1) -> Grid:
    """Take the halves of ``points`` [N, 4 or 8], times ``factor``, under each of ``shifts``, apart."""
    n = points.shape[1] // 2
    left, left_of = np.unique(points[:, :n], axis=0, return_inverse=True)
    right, right_of = np.unique(points[:, n:], axis=0, return_inverse=True)
    left_of, right_of = left_of.reshape(-1), right_of.reshape(-1)
    partners = np.zeros((len(left), len(right)), np.int16)
    partners[left_of, right_of] = 1
    pairs, partners = _joined(partners)
    # Left halves with many partners first: loops of like lengths follow each other, which a CPU predicts.
    order = np.argsort(-partners.sum(axis=1), kind="stable")
    left, left_of = left[order], np.argsort(order)[left_of]
    halves = np.zeros((len(shifts), 2, _HALVES, n), np.float32)
    for k, shift in enumerate(shifts):
        halves[k, 0, : len(left)] = factor * left.astype(np.float32) + np.float32(shift)
        halves[k, 1, : len(right)] = factor * right.astype(np.float32) + np.float32(shift)
    numbers = np.zeros((_HALVES, _HALVES), np.int16)
    numbers[left_of, right_of] = np.arange(len(points))
    found = [np.flatnonzero(row) for row in partners[order]]
    members = [np.pad(row, (0, -len(row) % GRID_RUN), "edge") for row in found]
    starts = np.cumsum([0, *(len(row) for row in members)])
    stride = GRID_LANES * (2 if flips else 1)
    joined = stride * np.array(pairs, np.int64).reshape(-1, 2)
    return Grid(halves, np.array([len(left), len(right)]), joined, starts, stride * np.concatenate(members), numbers)


@subroutine
def _fill(grid, xs, ws, odd, tables, shifted):
    """Fill the tables."""
    halves, counts, _, _, _, _ = grid
    n, room, lanes = halves.shape[3], tables.shape[3], tables.shape[4]
    for t in range(tables.shape[0]):
        chunk, shift = (0, t) if shifted else (t, 0)
        points, x, w, table = halves[shift], xs[chunk], ws[chunk], tables[t]
        for half in range(2):
            if n == 4:
                _halves4(points[half], counts[half], x, w, 4 * half, odd, chunk * lanes, table, room, half)
            else:
                _halves2(points[half], counts[half], x, w, 2 * half, odd, chunk * lanes, table, room, half)


@subroutine
def _sweep(rule, grid, tables, energy, scale, work, code):
    """Best points at ``scale`` [slots]: ``code`` uint32 [list, slots], ``128 p + q``, plus 2^14 for the second shift."""
    _, counts, pairs, starts, members, _ = grid
    keys, value, found, least = work
    slots, lanes = scale.shape[0], found.shape[1]
    lefts, rights, room, joined = counts[0], counts[1], tables.shape[3], pairs.shape[0]
    shifts = 2 if rule >= SAME else 1
    for at in range(0, slots, lanes):
        for shift in range(shifts):
            table = tables[at // lanes + shift]
            if FREE < rule < SAME:
                _sweep_flips(
                    table,
                    room,
                    lefts,
                    rights,
                    scale,
                    energy,
                    slots,
                    at,
                    pairs,
                    joined,
                    starts,
                    members,
                    keys,
                    value,
                    found,
                )
            else:
                _sweep_free(
                    table,
                    room,
                    lefts,
                    rights,
                    scale,
                    energy,
                    slots,
                    at,
                    pairs,
                    joined,
                    starts,
                    members,
                    keys,
                    value,
                    found,
                )
            for i in range(lanes):
                g, other = found[0, i], found[1, i]
                if rule == PARITY:
                    code[0, at + i] = other
                elif rule == PAIRS:
                    code[0, at + i], code[1, at + i] = g, other
                elif rule == SAME:
                    code[shift, at + i] = g | np.uint32(shift << 14)
                elif shift == 0 or value[0, i] < least[i]:
                    least[i] = value[0, i]
                    code[0, at + i] = g | np.uint32(shift << 14)


@subroutine
def _keep(rule, tables, code, n, line_a, line_b, line_code):
    """Make the points of ``code`` line n of every list."""
    plane, lanes = tables.shape[3] * tables.shape[4], tables.shape[4]
    for part in range(code.shape[0]):
        flipped = rule == PARITY or (rule == PAIRS and part == 1)
        a, b, codes, found = line_a[part, n], line_b[part, n], line_code[part, n], code[part]
        for slot in range(found.shape[0]):
            g = found[slot]
            codes[slot] = g
            table = 6 * plane * (slot // lanes + np.int64(g >> np.uint32(14))) + slot % lanes
            left = table + lanes * np.int64((g >> np.uint32(7)) & _LOW)
            right = table + lanes * np.int64(g & _LOW) + 3 * plane
            a[slot] = peek(tables, left) + peek(tables, right)
            twice = peek(tables, left + plane) + peek(tables, right + plane)
            if flipped:
                twice -= smaller(peek(tables, left + 2 * plane), peek(tables, right + 2 * plane))
            b[slot] = twice


@subroutine
def _least(scale, line_a, line_b, most, picked):
    """Per list and slot: the line of least error at ``scale``; errors are without ``sum w x^2``."""
    best, best_a, best_b = picked
    slots = scale.shape[0]
    for part in range(best.shape[0]):
        for at in range(0, slots, GRID_LANES):
            _least_line(scale, line_a, line_b, line_a.shape[1], most, slots, at, part, best, best_a, best_b)


@subroutine
def _model(d0, unit, last, scales, curvature, tried, model):
    """Fill ``tried`` with values of d around d0 and ``model`` with what rounding the groups' scales to each would cost."""
    for k in range(tried.shape[0]):
        tried[k] = d0 * (np.float32(0.72) + np.float32(0.01) * np.float32(k))
        model[k] = _ZERO
    for group in range(scales.shape[0]):
        scale, curve = scales[group], curvature[group]
        for k in range(tried.shape[0]):
            step = tried[k] * unit
            a = (scale / step - _ONE) * np.float32(0.5)
            a = a if a > _ZERO else _ZERO
            a = a if a < last else last
            a = (a + _MAGIC) - _MAGIC
            off = step * (_TWO * a + _ONE) - scale
            model[k] += curve * off * off


@inline
def _first_wrong(best, slots, slot):
    """Whether the wrong sign of the pair of slots from ``slot`` is better off in the first."""
    here, there = peek(best, slots + slot) + peek(best, slot + 1), peek(best, slot) + peek(best, slots + slot + 1)
    return here <= there


@subroutine
def _groups(rule, odd, picked, sums):
    """Fill ``sums`` [error, A, 2 B] of every group with those of its best choice of lines."""
    best, best_a, best_b = picked
    slots, groups = odd.shape[0], sums.shape[1]
    each = slots // groups
    for g in range(groups):
        error, sum_a, sum_b = _ZERO, _ZERO, _ZERO
        at = g * each
        if rule == PAIRS:
            for i in range(at, at + each, 2):
                first, second = i, i + 1
                if peek(odd, i) > _ZERO:
                    if _first_wrong(best, slots, i):
                        first += slots
                    else:
                        second += slots
                error += peek(best, first) + peek(best, second)
                sum_a += peek(best_a, first) + peek(best_a, second)
                sum_b += peek(best_b, first) + peek(best_b, second)
        else:
            for i in range(at, at + each):
                error += peek(best, i)
                sum_a += peek(best_a, i)
                sum_b += peek(best_b, i)
        if rule == SAME:
            other, other_a, other_b = _ZERO, _ZERO, _ZERO
            for i in range(slots + at, slots + at + each):
                other += peek(best, i)
                other_a += peek(best_a, i)
                other_b += peek(best_b, i)
            if other < error:
                error, sum_a, sum_b = other, other_a, other_b
        sums[0, g], sums[1, g], sums[2, g] = error, sum_a, sum_b


@subroutine
def _evaluate(fixed, d, most, space):
    """Best sub-scales within the window of the nearest and best lines for d: error, ``sum u B`` and ``sum u^2 A``."""
    rule, unit, last, window = fixed
    scales, line_a, line_b, odd, slot_scale, picked, chosen, sums, least = space
    groups = scales.shape[0]
    each = slot_scale.shape[0] // groups
    step = d * unit
    for g in range(groups):
        least[0, g] = _INF
    for shift in range(-window, window + 1):
        for g in range(groups):
            a = smaller(larger(np.rint((scales[g] / step - _ONE) * np.float32(0.5)), _ZERO), np.float32(last))
            a = smaller(larger(a + np.float32(shift), _ZERO), np.float32(last))
            sums[3, g] = a
            for i in range(g * each, g * each + each):
                slot_scale[i] = step * (_TWO * a + _ONE)
        _least(slot_scale, line_a, line_b, most, picked)
        _groups(rule, odd, picked, sums)
        for g in range(groups):
            if sums[0, g] < least[0, g]:
                u = unit * (_TWO * sums[3, g] + _ONE)
                least[0, g], least[1, g], least[2, g] = sums[0, g], u * sums[2, g], u * u * sums[1, g]
                chosen[g] = np.int64(sums[3, g])
    total, ub, uua = _ZERO, _ZERO, _ZERO
    for g in range(groups):
        total += least[0, g]
        ub += least[1, g]
        uua += least[2, g]
    return total, ub * np.float32(0.5), uua


@subroutine
def _load(x, w, f, rule, length, xs, ws, energy, odd, signs, tops):
    """Lay a block out: magnitudes and weights of every slot, signs, energies of halves; largest and summed magnitudes."""
    slots = odd.shape[0]
    for at in range(0, slots, GRID_LANES):
        if length == 4:
            _slots4(x, w, at, f, rule >= SAME, xs, ws, energy, slots, tops, signs)
        else:
            _slots8(x, w, at, f, rule >= SAME, xs, ws, energy, slots, tops, signs)
    for half in range(2):
        for slot in range(slots):
            # Slightly more, so that no error is negative.
            energy[half, slot] = energy[half, slot] * np.float32(1.001) + np.float32(1e-30)
    for octet in range(32):
        bits = np.int64(signs[octet])
        parity = bits ^ (bits >> 4)
        parity ^= parity >> 2
        parity ^= parity >> 1
        wrong = np.float32(4) if parity & 1 and FREE < rule < SAME else _ZERO
        for slot in range(octet * slots // 32, (octet + 1) * slots // 32):
            odd[slot] = wrong


def searcher(
    points: np.ndarray, rule: int, groups: int, unit: float, last: int, shifts: tuple[int, ...] = (0,), factor: int = 1
) -> Callable[..., None]:
    """Return the search of a type with ``groups`` sub-scales a block; values are ``d unit (2 a + 1)`` times a point's.

    ``search(values, importance, outputs, weights, multiples, effort)``

    - ``outputs``, for every block: uint16 [blocks] d as binary16, uint8 [blocks, groups] sub-scales a, at most ``last``, uint16
      [blocks, slots] numbers of points, with 2^15 for the second shift, uint8 [blocks, 32] signs.
    - ``weights`` (c, f, p): w is ``m sqrt(c mean(x^2) + x^2)`` with importance, ``f mean(x^2) + p x^2`` without; if c < 0, m
      or 1.
    - ``multiples``: sampled scales of a group, in units of its largest magnitude over the grid's, of points under a shift in
      units of ``sum w x^2 / sum w |x|``.
    - ``effort``: sub-scales tried to either side of the nearest one; values of d, of 64 ranked by a quadratic model, that are
      tried in earnest; refits of each; further rounds with sweeps at the sub-scales found and beside them.
    """
    grid = cache(lambda: grid_of(points, FREE < rule < SAME, shifts, factor))
    length = points.shape[1]
    slots = 256 // length
    tables = slots // GRID_LANES * len(shifts)
    lists = 2 if rule in (PAIRS, SAME) else 1
    uint = np.uint32

    def search(
        values: np.ndarray,
        importance: np.ndarray,
        outputs: tuple[np.ndarray, ...],
        weights: tuple[float, float, float],
        multiples: np.ndarray,
        effort: tuple[int, int, int, int],
    ) -> None:
        samples = multiples.shape[0]
        room = samples + 3 * effort[3] + 1
        layout = scratch_of(
            *[floats(slots // GRID_LANES, length, GRID_LANES)] * 2,
            *(floats(2, slots), floats(slots), (np.uint8, (32,)), floats(2, slots), floats(256), floats(64)),
            *(floats(tables, 2, 3, _HALVES, GRID_LANES), floats(samples + 1, slots)),
            *((uint, (lists, slots)),),
            *(floats(lists, room, slots), floats(lists, room, slots), (uint, (lists, room, slots))),
        )
        fit = scratch_of(
            *(
                floats(groups),
                floats(groups),
                floats(2, 64),
                (np.int64, (groups,)),
                (np.int64, (groups,)),
                floats(4, groups),
                floats(3, groups),
            )
        )
        work = scratch_of(
            (uint, (_KEYS, 2, GRID_LANES)), floats(2, GRID_LANES), (uint, (2, GRID_LANES)), floats(GRID_LANES)
        )
        picked = scratch_of(*[floats(lists, slots)] * 3)
        constants = rule, np.float32(unit), last, tuple(np.float32(v) for v in weights)
        _search(values, importance, outputs, tuple(grid()), layout, fit, work, picked, *constants, multiples, effort)

    return search


@subroutine
def _sample(rule, groups, tops, energy, largest_point, multiples, scale):
    """Fill ``scale`` [samples, slots] with multiples of every group's typical scale."""
    slots = energy.shape[1]
    each = slots // groups
    for group in range(groups):
        top, squares, total = np.float32(1e-12), _ZERO, _ZERO
        for i in range(group * each, group * each + each):
            top = larger(top, peek(tops, i))
            squares += peek(energy, i) + peek(energy, slots + i)
            total += peek(tops, slots + i)
        typical = top / largest_point
        if rule >= SAME and total > _ZERO:
            # Three values clip the largest ones anyway.
            typical = larger(smaller(squares / total, top), np.float32(1e-12))
        for k in range(multiples.shape[0]):
            for i in range(group * each, group * each + each):
                scale[k, i] = multiples[k] * typical


@kernel
def _search(values, importance, outputs, grid, layout, fit, work, picked, rule, unit, last, weights, multiples, effort):
    out_d, out_a, out_points, out_signs = outputs
    halves, counts, _, _, _, numbers = grid
    xs, ws, energy, odd, signs, tops, w, buffer, tables, scale = layout[:10]
    code, line_a, line_b, line_code = layout[10:]
    scales, curvature, model, chosen, kept, sums, least = fit
    best, best_a, best_b = picked
    by_energy, floor, square = weights
    window, starts, passes, rounds = effort
    samples = multiples.shape[0]
    slots, groups = odd.shape[0], scales.shape[0]
    each = slots // groups
    lanes = xs.shape[2]
    length = xs.shape[1]
    weighted = importance.shape[0] > 0
    largest_point = _ZERO
    for half in range(2):
        for p in range(counts[half]):
            for j in range(length // 2):
                largest_point = larger(largest_point, halves[0, half, p, j])
    row_blocks = values.shape[1] // 256
    slot_scale = scale[samples]
    fixed = rule, unit, last, window
    space = scales, line_a, line_b, odd, slot_scale, picked, chosen, sums, least
    for block in range(values.shape[0] * row_blocks):
        r, b = divmod(block, row_blocks)
        x = values[r, b * 256 : b * 256 + 256]
        exponent = exponent_of(x)
        f, factor = down(exponent), up(exponent)
        mean = mean_square(x, f, buffer)
        for i in range(256):
            v = x[i] * f
            if weighted:
                m = importance[b * 256 + i]
                w[i] = m * np.sqrt(by_energy * mean + v * v) if by_energy >= _ZERO else m
            else:
                w[i] = floor * mean + square * v * v if by_energy >= _ZERO else _ONE
        _load(x, w, f, rule, length, xs, ws, energy, odd, signs, tops)
        _fill(grid, xs, ws, odd, tables, rule >= SAME)
        _sample(rule, groups, tops, energy, largest_point, multiples, scale)
        for k in range(samples):
            _sweep(rule, grid, tables, energy, scale[k], work, code)
            _keep(rule, tables, code, k, line_a, line_b, line_code)
        most = samples
        # The best of the sampled scales of every group, by the energy that its lines explain at their own best scale.
        for group in range(groups):
            least[0, group], scales[group], curvature[group] = _ZERO, _ZERO, _ZERO
        for k in range(samples):
            _least(scale[k], line_a, line_b, most, picked)
            _groups(rule, odd, picked, sums)
            for group in range(groups):
                sum_a, sum_b = sums[1, group], sums[2, group] * np.float32(0.5)
                if sum_a > _ZERO and sum_b > _ZERO and sum_b * (sum_b / sum_a) > least[0, group]:
                    least[0, group] = sum_b * (sum_b / sum_a)
                    scales[group], curvature[group] = sum_b / sum_a, sum_a
        largest = _ZERO
        for group in range(groups):
            largest = larger(largest, scales[group])
        d0 = largest / (unit * np.float32(2 * last + 1))
        stored = _ZERO
        for turn in range(rounds + 1 if d0 > _ZERO else 0):
            if turn > 0 and stored <= _ZERO:
                break
            if turn == 0:
                _model(d0, unit, np.float32(last), scales, curvature, model[0], model[1])
            else:
                for shift in range(-1, 2):
                    for group in range(groups):
                        a = smaller(larger(kept[group] + shift, 0), last)
                        for i in range(group * each, group * each + each):
                            slot_scale[i] = larger(stored * unit * np.float32(2 * a + 1), np.float32(1e-12))
                    _sweep(rule, grid, tables, energy, slot_scale, work, code)
                    _keep(rule, tables, code, most, line_a, line_b, line_code)
                    most += 1
            # Errors are without sum w x^2: 0 is what zeros cost.
            error_kept, before = _ZERO, stored
            for _ in range(starts if turn == 0 else 1):
                d = before
                if turn == 0:
                    k = 0
                    for near in range(1, 64):
                        k = near if model[1, near] < model[1, k] else k
                    d = model[0, k]
                    for near in range(larger(k - 2, 0), smaller(k + 3, 64)):
                        model[1, near] = _INF
                for _ in range(passes):
                    _, ub, uua = _evaluate(fixed, d, most, space)
                    d = ub / uua if uua > _ZERO and ub > _ZERO else d
                bits = smaller(float_to_half(d * factor), np.uint16(0x7BFF))
                # Half subnormals are far apart: the nearest one need not be the best.
                reach = 3 if bits < np.uint16(0x0400) else 0
                for shift in range(-reach, reach + 1):
                    if np.int64(bits) + shift > 0:
                        d = half_to_float(np.uint16(np.int64(bits) + shift)) / factor
                        error, _, _ = _evaluate(fixed, d, most, space)
                        if error < error_kept:
                            error_kept, stored = error, d
                            for group in range(groups):
                                kept[group] = chosen[group]
        if stored <= _ZERO:
            out_d[block] = np.uint16(0)
            for group in range(groups):
                out_a[block, group] = np.uint8(0)
            for slot in range(slots):
                out_points[block, slot] = np.uint16(0)
            for k in range(32):
                out_signs[block, k] = np.uint8(0)
            continue
        out_d[block] = float_to_half(stored * factor)
        for group in range(groups):
            out_a[block, group] = np.uint8(kept[group])
            for i in range(group * each, group * each + each):
                slot_scale[i] = larger(stored * unit * np.float32(2 * kept[group] + 1), np.float32(1e-12))
        _sweep(rule, grid, tables, energy, slot_scale, work, code)
        _keep(rule, tables, code, most, line_a, line_b, line_code)
        most += 1
        _least(slot_scale, line_a, line_b, most, picked)
        for k in range(32):
            out_signs[block, k] = signs[k] if rule < SAME else np.uint8(0)
        for slot in range(slots):
            group = slot // each
            part = 0
            if rule == PAIRS and odd[slot] > _ZERO:
                part = 1 if _first_wrong(best, slots, slot - slot % 2) == (slot % 2 == 0) else 0
            if rule == SAME:
                first, second = _ZERO, _ZERO
                for i in range(group * each, group * each + each):
                    first += best[0, i]
                    second += best[1, i]
                part = 1 if second < first else 0
            n = 0
            while n + 1 < most and not (
                line_a[part, n, slot] == best_a[part, slot] and line_b[part, n, slot] == best_b[part, slot]
            ):
                n += 1
            g = line_code[part, n, slot]
            p, q = np.int64((g >> np.uint32(7)) & _LOW), np.int64(g & _LOW)
            shift = np.int64(g >> np.uint32(14))
            out_points[block, slot] = np.uint16(numbers[p, q]) | np.uint16(shift << 15)
            if odd[slot] > _ZERO and (rule == PARITY or part == 1):
                chunk, lane = slot // lanes, slot % lanes
                where, lowest = 0, _INF
                for j in range(length):
                    point = halves[0, j // (length // 2), p if j < length // 2 else q, j % (length // 2)]
                    cost = ws[chunk, j, lane] * xs[chunk, j, lane] * point
                    if cost < lowest:
                        where, lowest = j, cost
                bit = (slot * length + where) % 8
                out_signs[block, slot * length // 8] ^= np.uint8(1 << bit)
