"""Search of the codebook encoders: integer scales under one shared scale, codes into a table that may be shifted.

A *group* (a row, or 256 elements) shares one real scale ``D``; each of its sub-blocks has a legal integer scale ``s`` and,
where the table has a shifted twin, a flag that picks one of them. Three stages, candidates always in vector lanes:

1. per sub-block, real scales of both signs and both tables: sums ``S1 = sum w v x`` and ``S2 = sum w v v`` of the nearest
   codes. Such a pair is a parabola, the error under any other scale with these codes.
2. ``D`` from many values by the parabolas alone, no element is touched.
3. under that ``D``, exact sums for windows of legal scales round the optima. They are parabolas again, so choosing scales
   and refitting ``D`` alternate for free. ``D`` is rounded as stored before scales and codes are chosen for the last time.

Everything is done in float32 lanes whose order is fixed, so the bytes depend on neither CPU nor threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ggufx.kernels._books import Book
from ggufx.kernels._jit import (
    bits_to_float,
    float_to_bits,
    float_to_half,
    half_to_float,
    inline,
    kernel,
    larger,
    smaller,
)
from ggufx.kernels._lanes import best_of_kinds, lane_sums, model_cost, nearest_codes, pick_lane, survey, windows

__all__ = ["block_search", "codebook_search"]

_MAX_LANES = 128
DEAD = 1e-9
"""Importance of columns whose sub-block has none."""


@inline
def _total(terms, count):
    """Sum ``terms[:count]`` (a power of two) by halving, in place: in lanes, and the same on every CPU."""
    while count > 1:
        count //= 2
        for i in range(count):
            terms[i] += terms[count + i]
    return terms[0]


@inline
def _exponent_scale(bits):
    """Return the power of two that brings a float of these bits near 1, and its inverse."""
    field = smaller(larger(bits >> np.uint32(23), np.uint32(1)), np.uint32(253))
    return bits_to_float((np.uint32(254) - field) << np.uint32(23)), bits_to_float(field << np.uint32(23))


def _keeper(half: bool, ceiling: float, floor: float) -> Any:
    """Return ``stored(d, up, down)``: round D (in normalised units) as the file stores it, never to zero or infinity."""
    least, most, zero = np.float32(floor), np.float32(ceiling), np.float32(0)
    lowest = np.float32(2.0**-60)  # of a group near 1: keeps the way back from underflowing

    @inline
    def stored(d, up, down):
        value = (-lowest if d < zero else lowest) if abs(d) < lowest else d
        value *= up
        size = smaller(larger(abs(value), least), most)
        if half:
            size = half_to_float(float_to_half(size))
        return (-size if value < zero else size) * down

    return stored


def codebook_search(
    book: Book,
    *,
    shift: int,
    sub_len: int,
    low: int,
    step: int,
    count: int,
    whole_row: bool,
    half: bool,
    sigma: float,
    plain: float,
    starts: tuple[float, float],
    store: Any,
    root: bool = False,
) -> Any:
    """Return the search kernel of one type.

    Parameters
    ----------
    book, shift
        Codebook, and what its twin adds; 0 without a twin.
    sub_len, low, step, count
        Elements per scale; legal scales are ``low + step * i`` for ``i < count``.
    whole_row, half
        Whether ``D`` belongs to the row (else to 256 elements) and is stored as binary16 (else float32).
    sigma, plain
        Reference weights: ``m sqrt(sigma mean + x^2)``, or ``plain sigma mean + x^2`` (its square root if ``root``) without
        importance, where ``mean`` is the mean of ``x^2`` over 256 elements.
    starts
        Range of the table's units that the largest element of a sub-block may take.
    store
        ``store(row, group, d_bits, scales, flags, codes)`` writes the bytes of a group.
    """
    # Kinds of candidates: the signs, times two where there is a twin.
    kinds = 4 if shift else 2
    sums16, exact16, nearest = book.sums, book.exact, book.codes
    careful = exact16 is not sums16
    best16, best32, best64 = best_of_kinds(16, kinds), best_of_kinds(32, kinds), best_of_kinds(64, kinds)
    total_of = survey(sub_len)
    window_of, pick, model = windows(low, step, count, kinds), pick_lane(), model_cost(low, step, count, kinds)
    extreme = np.float32(max(abs(low), abs(low + step * (count - 1))))
    f_low, f_step, f_high = np.float32(low), np.float32(step), np.float32(low + step * (count - 1))
    symmetric = low == -(low + step * (count - 1))
    f_shift = np.float32(shift)
    sigma32, plain32 = np.float32(sigma), np.float32(plain * sigma)
    start_low, start_high = np.float32(starts[0]), np.float32(starts[1])
    nothing, dead = np.float32(sub_len * 1e-18), np.float32(DEAD)
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    huge = np.float32(3e38)
    stored = _keeper(half, 65504 if half else 3.4e38 / 127 / 127, 2.0**-24 if half else 2.0**-149)
    positive = book.positive
    zero_index = -low // step if step == 1 else count // 2

    @inline
    def weigh(values, offset, length, down, up, importance, mse, x, m, w, wx, terms):
        """Normalise a group, and fill its weights: those of the reference, or the importance."""
        for i in range(length):
            x[i] = values[offset + i] * down
        weighted = importance.shape[0] > 0
        if weighted:
            # As the reference: sub-blocks without importance or values count next to nothing, but evenly.
            for i in range(length):
                m[i] = importance[offset + i]
            for begin in range(0, length, sub_len):
                squares, _ = total_of(x, x, begin)
                if squares * up * up <= nothing:
                    for i in range(begin, begin + sub_len):
                        m[i] = dead
        for begin in range(0, length, 256):
            for i in range(256):
                terms[i] = x[begin + i] * x[begin + i]
            mean = _total(terms, 256) * np.float32(1 / 256)
            if weighted:
                if mse:
                    for i in range(begin, begin + 256):
                        w[i] = m[i]
                else:
                    level = sigma32 * mean + np.float32(1e-18)
                    for i in range(begin, begin + 256):
                        w[i] = m[i] * np.sqrt(level + x[i] * x[i])
            elif mse:
                for i in range(begin, begin + 256):
                    w[i] = one
            else:
                level = plain32 * mean + np.float32(1e-12)
                for i in range(begin, begin + 256):
                    weight = level + x[i] * x[i]
                    w[i] = np.sqrt(weight) if root else weight
        for i in range(length):
            wx[i] = w[i] * x[i]

    @inline
    def sums(x, wx, w, start, lanes, inverse, shifts, s1, s2, to):
        for at in range(0, lanes, 16):
            sums16(x, wx, w, start, sub_len, inverse, shifts, at, s1, s2, to + at)

    def search(values, out, importance, mse, n_starts, n_values, span_low, span_high, window, turns, tries):
        row_len = values.shape[1]
        length = row_len if whole_row else 256
        n_sub = length // sub_len
        width = smaller(4 * window // kinds, count * kinds // 4)
        lanes = kinds * width
        again = 1 if careful and tries > 1 else 0
        x, w, wx = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
        m, terms = np.empty(length, np.float32), np.empty(256, np.float32)
        inverse, units, shifts = (
            np.empty(_MAX_LANES, np.float32),
            np.empty(4 * n_starts, np.float32),
            np.empty(_MAX_LANES, np.float32),
        )
        sum1, sum2 = np.empty(_MAX_LANES * n_sub, np.float32), np.empty(_MAX_LANES * n_sub, np.float32)
        legals = np.empty(_MAX_LANES * n_sub, np.float32)
        shift_here = np.empty(16, np.float32)
        scale, curve = np.empty(4 * n_sub, np.float32), np.empty(4 * n_sub, np.float32)
        energy, total = np.empty(4 * n_sub, np.float32), np.empty(n_sub, np.float32)
        d_try, d_inverse = np.empty(n_values, np.float32), np.empty(n_values, np.float32)
        cost = np.empty(n_values, np.float32)
        scales, flags, codes = np.empty(n_sub, np.int32), np.empty(n_sub, np.uint8), np.empty(length, np.uint8)
        chosen, kept = np.empty(n_sub, np.float32), np.empty(n_sub, np.uint8)
        # Lanes are candidates x kinds: table, table under a negative scale, twin, twin under a negative scale.
        for lane in range(_MAX_LANES):
            shifts[lane] = f_shift if lane & 2 else zero
        for lane in range(4 * n_starts):
            t = start_low + (start_high - start_low) * np.float32(lane // kinds) / np.float32(4 * n_starts // kinds - 1)
            units[lane] = -t if lane & 1 else t
        for r in range(values.shape[0]):
            row = values[r]
            for g in range(row_len // length):
                offset = g * length
                top = np.uint32(0)
                for i in range(offset, offset + length):
                    magnitude = float_to_bits(row[i]) & np.uint32(0x7FFFFFFF)
                    top = magnitude if magnitude > top else top
                if top == np.uint32(0):
                    for k in range(n_sub):
                        scales[k], kept[k] = zero_index, 0
                    codes[:] = positive
                    store(out[r], g, np.uint32(0), scales, kept, codes)
                    continue
                down, up = _exponent_scale(top)
                weigh(row, offset, length, down, up, importance, mse, x, m, w, wx, terms)
                # 1: the best real scale of each kind.
                widest = zero
                for k in range(n_sub):
                    total[k], amax = total_of(x, wx, k * sub_len)
                    back = one / amax if amax > np.float32(1e-30) else zero
                    for lane in range(units.shape[0]):
                        inverse[lane] = units[lane] * back
                    sums(x, wx, w, k * sub_len, 4 * n_starts, inverse, shifts, sum1, sum2, 0)
                    if n_starts == 4:
                        best16(sum1, sum2, scale, curve, energy, kinds * k)
                    elif n_starts == 8:
                        best32(sum1, sum2, scale, curve, energy, kinds * k)
                    else:
                        best64(sum1, sum2, scale, curve, energy, kinds * k)
                    for p in range(kinds * k, kinds * k + kinds):
                        widest = larger(widest, abs(scale[p]))
                # 2: D by the model.
                base = larger(widest / extreme, np.float32(1e-30))
                spread = np.float32(span_high - span_low)
                for j in range(n_values):
                    if symmetric:
                        multiple = np.float32(span_low) + spread * np.float32(j) / np.float32(n_values - 1)
                    else:
                        multiple = np.float32(span_low) + spread * np.float32(j // 2) / np.float32(n_values // 2 - 1)
                        multiple = -multiple if j & 1 else multiple
                    d_try[j] = stored(base * multiple, up, down)
                for j in range(n_values):
                    d_inverse[j] = one / d_try[j]
                for j in range(0, n_values, 16):
                    model(scale, curve, energy, n_sub, d_try, d_inverse, cost, j)
                # 3: exact sums of legal scales near the optima, and D again.
                least, final = huge, one
                for _ in range(tries):
                    at = 0
                    for j in range(1, n_values):
                        if cost[j] < cost[at]:
                            at = j
                    d = d_try[at]
                    cost[at] = huge
                    n = lanes
                    for turn in range(turns + again):
                        n = 16 if turn == turns else lanes
                        for k in range(n_sub):
                            to = lanes * k
                            if turn == turns:  # again, exactly, round the best: the most flattered of many tries wins
                                lane = pick(legals, sum1, sum2, to, lanes, d, total[k])
                                flags[k] = 1 if kinds == 4 and lane & 2 else 0
                                s = legals[to + lane]
                                for c in range(n):
                                    legal = s + f_step * np.float32(c - 8)
                                    legal = smaller(larger(legal, f_low), f_high)
                                    legals[to + c] = legal
                                    inverse[c] = zero if legal == zero else one / (d * legal)
                                    shift_here[c] = f_shift if flags[k] else zero
                                exact16(x, wx, w, k * sub_len, sub_len, inverse, shift_here, 0, sum1, sum2, to)
                                continue
                            for c in range(0, lanes, 16):
                                window_of(scale, kinds * k, d, c // kinds, width, legals, inverse, to + c, c)
                            sums(x, wx, w, k * sub_len, lanes, inverse, shifts, sum1, sum2, to)
                        for _ in range(3):
                            top_sum, bottom_sum = zero, zero
                            for k in range(n_sub):
                                lane = lanes * k + pick(legals, sum1, sum2, lanes * k, n, d, total[k])
                                s = legals[lane]
                                top_sum += s * sum1[lane]
                                bottom_sum += s * s * sum2[lane]
                            if bottom_sum > zero:
                                d = stored(top_sum / bottom_sum, up, down)
                    error = zero
                    for k in range(n_sub):
                        lane = pick(legals, sum1, sum2, lanes * k, n, d, total[k])
                        if again == 0:
                            flags[k] = 1 if kinds == 4 and lane & 2 else 0
                        lane += lanes * k
                        chosen[k] = legals[lane]
                        step_ = d * chosen[k]
                        error += step_ * (step_ * sum2[lane] - two * sum1[lane])
                    if error < least:
                        least, final = error, d
                        for k in range(n_sub):
                            scales[k] = np.int32((chosen[k] - f_low) / f_step)
                            kept[k] = flags[k]
                if half and step > 1 and least > zero:  # the least binary16 is too much, and no scale is 0
                    final = zero
                for k in range(n_sub):
                    if final == zero:
                        scales[k], kept[k] = zero_index, 0
                    s = final * (f_low + f_step * np.float32(scales[k]))
                    back = zero if s == zero else one / s
                    nearest(x, w, k * sub_len, sub_len, back, f_shift if kept[k] else zero, codes)
                value = final * up
                bits = np.uint32(float_to_half(value)) if half else float_to_bits(value)
                store(out[r], g, bits, scales, kept, codes)

    key = repr(
        (book.key, shift, sub_len, low, step, count, whole_row, half, sigma, plain, starts, root, store.__module__)
    )
    return kernel(search, key)


def block_search(table: tuple[int, ...], *, length: int, sigma: float, starts: tuple[float, float], store: Any) -> Any:
    """Return the search kernel of a type whose blocks are a binary16 scale and codes into one table.

    ``length``, ``sigma``, ``starts`` and ``store`` are those of :func:`codebook_search`, for a block; plain weights are
    ``x^2``.
    """
    sums64, sums16 = lane_sums(table, 64, staged=True), lane_sums(table, 16, staged=True)
    best64, pick, total_of, nearest16 = best_of_kinds(64), pick_lane(), survey(length), nearest_codes(table)
    stored = _keeper(True, 65504, 2.0**-24)
    nothing, dead = np.float32(length * 1e-18), np.float32(DEAD)
    positive = sum(v < 0 for v in table)  # so that zeros come out without a sign
    start_low, start_high = np.float32(starts[0]), np.float32(starts[1])
    sigma32 = np.float32(sigma / length)
    zero, one = np.float32(0), np.float32(1)

    def search(values, out, importance, mse, n_starts, turns):
        n_lanes = 4 * n_starts
        x, w, wx = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
        m = np.empty(length, np.float32)
        units, inverse, shifts = (
            np.empty(n_lanes, np.float32),
            np.empty(n_lanes, np.float32),
            np.zeros(n_lanes, np.float32),
        )
        sum1, sum2 = np.empty(n_lanes, np.float32), np.empty(n_lanes, np.float32)
        n_groups = n_lanes // 64
        scale, curve = np.empty(4 * n_groups, np.float32), np.empty(4 * n_groups, np.float32)
        energy, tried = np.empty(4 * n_groups, np.float32), np.empty(16, np.float32)
        codes = np.empty(length, np.uint8)
        # Four kinds: two halves of the starts, both signs.
        for lane in range(n_lanes):
            position = 2 * (lane // 4) + (lane >> 1 & 1)
            t = start_low + (start_high - start_low) * np.float32(position) / np.float32(2 * n_starts - 1)
            units[lane] = -t if lane & 1 else t
        for r in range(values.shape[0]):
            row = values[r]
            for b in range(row.shape[0] // length):
                offset = b * length
                top = np.uint32(0)
                for i in range(offset, offset + length):
                    magnitude = float_to_bits(row[i]) & np.uint32(0x7FFFFFFF)
                    top = magnitude if magnitude > top else top
                if top == np.uint32(0):
                    codes[:] = positive
                    store(out[r], b, np.uint32(0), codes)
                    continue
                down, up = _exponent_scale(top)
                for i in range(length):
                    x[i] = row[offset + i] * down
                squares, amax = total_of(x, x, 0)
                if importance.shape[0] > 0:
                    empty = squares * up * up <= nothing
                    level = sigma32 * squares
                    for i in range(length):
                        m[i] = dead if empty else importance[offset + i]
                    for i in range(length):
                        w[i] = m[i] if mse else m[i] * np.sqrt(level + x[i] * x[i])
                else:
                    for i in range(length):
                        w[i] = one if mse else x[i] * x[i] + np.float32(1e-12)
                for i in range(length):
                    wx[i] = w[i] * x[i]
                total, _ = total_of(x, wx, 0)
                back = one / amax
                for lane in range(n_lanes):
                    inverse[lane] = units[lane] * back
                at = 0
                for group in range(n_groups):
                    sums64(x, wx, w, 0, length, inverse, shifts, 64 * group, sum1, sum2, 0)
                    best64(sum1, sum2, scale, curve, energy, 4 * group)
                # The best of each kind, and neighbours, as they would be stored.
                d = one
                for turn in range(turns):
                    for p in range(4):
                        best = p
                        for q in range(p, 4 * n_groups, 4):
                            if energy[q] > energy[best]:
                                best = q
                        for j in range(4):
                            centre = scale[best] if turn == 0 else d
                            spread = (np.float32(j) - np.float32(1.5)) * np.float32(0.004)
                            if turn > 0:
                                spread = (np.float32(4 * p + j) - np.float32(7.5)) * np.float32(0.0025)
                            tried[4 * p + j] = stored(centre * (one + spread), up, down)
                    for lane in range(16):
                        inverse[lane] = one / tried[lane]
                    sums16(x, wx, w, 0, length, inverse, shifts, 0, sum1, sum2, 0)
                    at = pick(tried, sum1, sum2, 0, 16, one, total)
                    d = stored(sum1[at] / sum2[at], up, down) if sum2[at] > zero else tried[at]
                if d * (d * sum2[at] - (sum1[at] + sum1[at])) < zero:
                    back = one / d
                    for i in range(0, length, 16):
                        nearest16(x, i, back, zero, codes, i)
                else:  # the least binary16 is too much
                    d = zero
                    codes[:] = positive
                store(out[r], b, np.uint32(float_to_half(d * up)), codes)

    return kernel(search, repr((table, length, sigma, starts, store.__module__)))
