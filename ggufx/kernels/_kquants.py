"""Searches of the K types: sub-blocks with integer scales (and minima) under the f16 scales of a block of 256.

Three stages. Sub-blocks lie side by side in the lanes. 1: every sub-block's best real scale (and minimum), from a list of
inverse scales with least-squares refits. 2: the f16 scales, among many, that suit these best in a quadratic model. 3: legal
scales near the optimum, each with its exact error; the f16 scales are refitted, rounded as stored, and this is repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ggufx.kernels._jit import kernel, larger, smaller, subroutine
from ggufx.kernels._lanes import planes
from ggufx.kernels._linear import (
    LANES,
    down,
    error_plain,
    explain,
    exponent_of,
    floats,
    keep_best,
    mean_square,
    scratch_of,
    store_half,
    up,
)

_MAGIC = np.float32(12582912)
_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)
_INF = np.float32(np.inf)
_RATIOS = 64
_COARSE = np.float32(2.0**-18)
"""Under this a half (a subnormal) has steps of more than 1.5 %."""


@subroutine
def _fill_lanes(values, importance, by_energy, start, n, sub, xt, wt, wxt, factors, w, buffer):
    """Lay ``n`` blocks of 256 from number ``start`` into the lanes, scaled by a power of two; the others are zero."""
    blocks = values.shape[1] // 256
    weighted = importance.shape[0] > 0
    per_block = 256 // sub
    for block in range(n):
        r, b = divmod(start + block, blocks)
        x = values[r, b * 256 : b * 256 + 256]
        e = exponent_of(x)
        f = down(e)
        factors[block] = up(e)
        if by_energy:
            sigma2 = mean_square(x, f, buffer)
            for i in range(x.shape[0]):
                v = x[i] * f
                w[i] = np.sqrt(sigma2 + v * v)
        else:
            for i in range(x.shape[0]):
                w[i] = _ONE
        if weighted:
            m = importance[b * 256 : b * 256 + 256]
            for i in range(x.shape[0]):
                w[i] *= m[i]
        for k in range(per_block):
            lane = block * per_block + k
            for j in range(sub):
                xt[j, lane] = x[k * sub + j] * f
                wt[j, lane] = w[k * sub + j]
    for j in range(sub):
        x, y, z = xt[j], wt[j], wxt[j]
        for i in range(x.shape[0]):
            z[i] = x[i] * y[i]


@subroutine
def _explain_affine(xt, wxt, wt, inverse, shift, top, sq, sqq, sxq):
    """Per lane, with codes ``q = clamp(rint((x + shift) * inverse), 0, top)``: sums of w q, w q q and w x q."""
    n = inverse.shape[0]
    for i in range(n):
        sq[i] = _ZERO
        sqq[i] = _ZERO
        sxq[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            v, s, a, b, c = inverse[i], shift[i], sq[i], sqq[i], sxq[i]
            for u in range(8):
                t = (xt[j + u, i] + s) * v
                t = _ZERO if t < _ZERO else t
                t = top if t > top else t
                q = (t + _MAGIC) - _MAGIC
                wq = wt[j + u, i] * q
                a += wq
                b += wq * q
                c += wxt[j + u, i] * q
            sq[i] = a
            sqq[i] = b
            sxq[i] = c


@subroutine
def _error_affine(xt, wt, scale, shift, top, error):
    """Per lane: ``sum w (x - y)^2`` for ``y = scale q - shift`` with the nearest codes."""
    n = scale.shape[0]
    for i in range(n):
        error[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            s, m, total = scale[i], shift[i], error[i]
            inverse = _ONE / s if s != _ZERO else _ZERO
            for u in range(8):
                x = xt[j + u, i] + m
                t = x * inverse
                t = _ZERO if t < _ZERO else t
                t = top if t > top else t
                off = x - s * ((t + _MAGIC) - _MAGIC)
                total += wt[j + u, i] * off * off
            error[i] = total


@subroutine
def _solve(sw, sx, sq, sqq, sxq, best, scale, shift, gain_q, gain_qq):
    """Per lane: least-squares scale >= 0 and shift >= 0 of the codes behind the sums; keep them if they explain more."""
    for i in range(sw.shape[0]):
        a, b, c = sq[i], sqq[i], sxq[i]
        det = sw[i] * b - a * a
        sound = det > np.float32(1e-6) * sw[i] * b
        inverse = _ONE / det if sound else _ZERO
        s = (sw[i] * c - sx[i] * a) * inverse
        m = (a * c - b * sx[i]) * inverse
        alone = c / b if b > _ZERO else _ZERO
        bad = not sound or m < _ZERO or s <= _ZERO
        s = alone if bad else s
        m = _ZERO if bad else m
        level = -sx[i] / sw[i] if sw[i] > _ZERO else _ZERO
        flat = s <= _ZERO
        s = _ZERO if flat else s
        m = (level if level > _ZERO else _ZERO) if flat else m
        explained = _TWO * (s * c - m * sx[i] + s * m * a) - s * s * b - m * m * sw[i]
        better = explained > best[i]
        best[i] = explained if better else best[i]
        scale[i] = s if better else scale[i]
        shift[i] = m if better else shift[i]
        gain_q[i] = a if better else gain_q[i]
        gain_qq[i] = b if better else gain_qq[i]


@subroutine
def _rank(targets, weights, first, n, unit, top, low, cost):
    """Return the best of ``unit`` times 64 ratios as a common step of ``targets``, each a multiple from ``low`` to ``top``."""
    for k in range(cost.shape[0]):
        cost[k] = _ZERO
    for i in range(first, first + n):
        target, weight = targets[i], weights[i]
        for k in range(cost.shape[0]):
            step = unit * (np.float32(0.72) + np.float32(0.01) * np.float32(k))
            t = target / step
            t = low if t < low else t
            t = top if t > top else t
            off = target - step * ((t + _MAGIC) - _MAGIC)
            cost[k] += weight * off * off
    k = 0
    for i in range(1, cost.shape[0]):
        k = i if cost[i] < cost[k] else k
    return unit * (np.float32(0.72) + np.float32(0.01) * np.float32(k)), cost[k]


@subroutine
def _settle(targets, weights, first, n, step, factor, top, low):
    """Return ``step``, or where ``step * factor`` is a half of few digits, the better of its neighbours but 0."""
    real = step * factor
    if step == _ZERO or abs(real) >= _COARSE:
        return step
    least, chosen = _INF, step
    below = np.floor(abs(real) * np.float32(2.0**24))
    for k in range(3):
        unit = larger(below + np.float32(k), _ONE) * np.float32(2.0**-24)
        unit = (-unit if real < _ZERO else unit) / factor
        cost = _ZERO
        for i in range(first, first + n):
            off = targets[i] - unit * smaller(larger(np.rint(targets[i] / unit), low), top)
            cost += weights[i] * off * off
        if cost < least:
            least, chosen = cost, unit
    return chosen


_store_nibbles = planes(256, 4, 0, 32)
_store_far_nibbles = planes(256, 4, 0, 64)
_store_pairs = planes(256, 2, 0, 32)
_store_high_pairs = planes(256, 2, 4, 32)
_store_third_bits = planes(256, 1, 2, 32)
_store_fifth_bits = planes(256, 1, 4, 32)


@subroutine
def _pack_affine(bits, codes, scales, minima, row, start):
    """Write codes [256], scales and minima of Q2_K, Q4_K or Q5_K; the f16 are written by the caller."""
    if bits == 2:
        for k in range(16):
            row[start + k] = np.uint8(scales[k] | minima[k] << 4)
        _store_pairs(codes, 0, row, start + 16)
        return
    for k in range(4):
        row[start + 4 + k] = np.uint8(scales[k] | (scales[k + 4] >> 4) << 6)
        row[start + 8 + k] = np.uint8(minima[k] | (minima[k + 4] >> 4) << 6)
        row[start + 12 + k] = np.uint8((scales[k + 4] & 15) | (minima[k + 4] & 15) << 4)
    at = start + 16
    if bits == 5:
        _store_fifth_bits(codes, 0, row, at)
        at += 32
    _store_nibbles(codes, 0, row, at)


@subroutine
def _pack_plain(bits, codes, scales, row, start):
    """Write codes [256] and signed scales of Q3_K or Q6_K."""
    if bits == 3:
        _store_third_bits(codes, 0, row, start)
        _store_pairs(codes, 0, row, start + 32)
        for k in range(8):
            row[start + 96 + k] = np.uint8(((scales[k] + 32) & 15) | ((scales[k + 8] + 32) & 15) << 4)
        for k in range(4):
            byte = 0
            for part in range(4):
                byte |= ((scales[4 * part + k] + 32) >> 4) << (2 * part)
            row[start + 104 + k] = np.uint8(byte)
        return
    _store_far_nibbles(codes, 0, row, start)
    _store_high_pairs(codes, 0, row, start + 128)
    for k in range(16):
        row[start + 192 + k] = np.uint8(scales[k] & 255)


def _scratch(sub: int, n_rows: int, n_blocks: int) -> tuple[Any, ...]:
    """Return what both searches work in: values, weights and products in lanes; lanes; cost, w, buffer, factors; codes."""
    return scratch_of(
        *[floats(sub, LANES)] * 3,
        floats(n_rows, LANES),
        *(floats(n) for n in (_RATIOS, 256, 64, n_blocks)),
        (np.uint8, (256,)),
        *[(np.int64, (16,))] * 2,
    )


def encode_affine(values, importance, out, bits, block_nbytes, by_energy, steps, window, near, passes):
    """Encode Q2_K, Q4_K or Q5_K (by ``bits``).

    ``steps``: levels, real numbers, that the span of a sub-block is tried as. ``window``: sub-scales tried to either side of
    the nearest, each with ``near`` minima to either side of the one that suits it. ``passes``: rounds of stage 3.

    A minimum is subtracted, and none is negative. A block with sub-blocks above zero is searched a second time with its values
    negated; where that leaves less error, both f16 are stored negative.
    """
    sub = 16 if bits == 2 else 32
    scratch = _scratch(sub, 31, LANES * sub // 256)
    _encode_affine(values, importance, out, scratch, sub, bits, block_nbytes, by_energy, steps, window, near, passes)


@kernel
def _encode_affine(values, importance, out, scratch, sub, bits, block_nbytes, by_energy, steps, window, near, passes):
    per_block = 256 // sub
    n_blocks = LANES // per_block
    top, limit = np.float32((1 << bits) - 1), np.float32(15 if bits == 2 else 63)
    at_d = start_min = 0
    if bits == 2:
        at_d, start_min = 80, 82
    else:
        at_d, start_min = 0, 2
    blocks = values.shape[1] // 256
    count = values.shape[0] * blocks
    xt, wt, wxt, lanes, cost, w, buffer, factors, codes, scales, minima = scratch
    sw, sx, low, high, sq, sqq, sxq = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    best, scale, shift, gain_q, gain_qq = lanes[7], lanes[8], lanes[9], lanes[10], lanes[11]
    inverse, offset, d, dmin, first_s = lanes[12], lanes[13], lanes[14], lanes[15], lanes[16]
    error, least, try_s, try_m, real_s, real_m = lanes[18], lanes[19], lanes[20], lanes[21], lanes[22], lanes[23]
    stiff, slope, target, chosen_m = lanes[24], lanes[25], lanes[26], lanes[17]
    leaning, kept, kept_d, kept_min = lanes[27], lanes[28], lanes[29], lanes[30]
    for start in range(0, count, n_blocks):
        n = smaller(n_blocks, count - start)
        _fill_lanes(values, importance, by_energy, start, n, sub, xt, wt, wxt, factors, w, buffer)
        for i in range(LANES):
            leaning[i] = _ONE
        for j in range(sub):
            x = xt[j]
            for i in range(LANES):
                leaning[i] = _ZERO if x[i] <= _ZERO else leaning[i]
        mirrors = False
        for i in range(LANES):
            mirrors = mirrors or leaning[i] > _ZERO
        for mirrored in range(2 if mirrors else 1):
            if mirrored:
                for j in range(sub):
                    x, z = xt[j], wxt[j]
                    for i in range(LANES):
                        x[i] = -x[i]
                        z[i] = -z[i]
                for block in range(n):
                    factors[block] = -factors[block]
            for i in range(LANES):
                sw[i] = _ZERO
                sx[i] = _ZERO
                low[i] = _ZERO
                high[i] = xt[0, i]
                best[i] = -_INF
                scale[i] = _ZERO
                shift[i] = _ZERO
            for j in range(sub):
                x, y, z = xt[j], wt[j], wxt[j]
                for i in range(LANES):
                    sw[i] += y[i]
                    sx[i] += z[i]
                    low[i] = x[i] if x[i] < low[i] else low[i]
                    high[i] = x[i] if x[i] > high[i] else high[i]
            # Stage 1.
            for k in range(steps.shape[0]):
                for i in range(LANES):
                    span = high[i] - low[i]
                    inverse[i] = steps[k] / span if span > np.float32(1e-20) else _ZERO
                    offset[i] = -low[i]
                _explain_affine(xt, wxt, wt, inverse, offset, top, sq, sqq, sxq)
                _solve(sw, sx, sq, sqq, sxq, best, scale, shift, gain_q, gain_qq)
            for _ in range(2):
                for i in range(LANES):
                    inverse[i] = _ONE / scale[i] if scale[i] > np.float32(1e-20) else _ZERO
                    offset[i] = shift[i]
                _explain_affine(xt, wxt, wt, inverse, offset, top, sq, sqq, sxq)
                _solve(sw, sx, sq, sqq, sxq, best, scale, shift, gain_q, gain_qq)
            for i in range(LANES):
                slope[i] = gain_q[i] / sw[i] if sw[i] > _ZERO else _ZERO
                # A minimum of 0 gives way to one side only: the scale alone is then what holds the values.
                stiff[i] = gain_qq[i] - gain_q[i] * slope[i] if shift[i] > _ZERO else gain_qq[i]
                stiff[i] = stiff[i] if scale[i] > _ZERO and stiff[i] > _ZERO else _ZERO
            # Stage 2: the scales first, then the minima that suit the rounded scales.
            for block in range(n):
                r, b = divmod(start + block, blocks)
                at, first = b * block_nbytes, block * per_block
                largest, deepest = _ZERO, _ZERO
                for i in range(first, first + per_block):
                    largest = larger(largest, scale[i])
                step = largest / limit
                if step > _ZERO:
                    step, _ = _rank(scale, stiff, first, per_block, step, limit, _ZERO, cost)
                    step = _settle(scale, stiff, first, per_block, step, factors[block], limit, _ZERO)
                step = store_half(step * factors[block], out[r], at + at_d) / factors[block]
                for i in range(first, first + per_block):
                    d[i] = step
                    first_s[i] = smaller(np.rint(scale[i] / step), limit) if step > _ZERO else _ZERO
                    target[i] = larger(shift[i] + slope[i] * (step * first_s[i] - scale[i]), _ZERO)
                    deepest = larger(deepest, target[i])
                step = deepest / limit
                if step > _ZERO:
                    step, _ = _rank(target, sw, first, per_block, step, limit, _ZERO, cost)
                    step = _settle(target, sw, first, per_block, step, factors[block], limit, _ZERO)
                step = store_half(step * factors[block], out[r], at + start_min) / factors[block]
                for i in range(first, first + per_block):
                    dmin[i] = step
            # Stage 3.
            for turn in range(passes):
                for i in range(LANES):
                    least[i] = _INF
                for k in range(-window, window + 1):
                    for i in range(LANES):
                        s = first_s[i] + np.float32(k)
                        s = _ZERO if s < _ZERO else s
                        s = limit if s > limit else s
                        try_s[i] = s
                        real_s[i] = s * d[i]
                        t = shift[i] + slope[i] * (real_s[i] - scale[i])
                        t = t / dmin[i] if dmin[i] > _ZERO else _ZERO
                        t = _ZERO if t < _ZERO else t
                        t = limit if t > limit else t
                        target[i] = (t + _MAGIC) - _MAGIC
                    for c in range(-near, near + 1):
                        for i in range(LANES):
                            m = target[i] + np.float32(c)
                            m = _ZERO if m < _ZERO else m
                            m = limit if m > limit else m
                            try_m[i] = m
                            real_m[i] = m * dmin[i]
                        _error_affine(xt, wt, real_s, real_m, top, error)
                        for i in range(LANES):
                            better = error[i] < least[i]
                            least[i] = error[i] if better else least[i]
                            high[i] = try_s[i] if better else high[i]
                            chosen_m[i] = try_m[i] if better else chosen_m[i]
                for i in range(LANES):
                    first_s[i] = high[i]
                    real_s[i] = first_s[i] * d[i]
                    offset[i] = chosen_m[i] * dmin[i]
                    inverse[i] = _ONE / real_s[i] if real_s[i] > _ZERO else _ZERO
                if turn == passes - 1:
                    continue
                _explain_affine(xt, wxt, wt, inverse, offset, top, sq, sqq, sxq)
                for block in range(n):
                    r, b = divmod(start + block, blocks)
                    at, first = b * block_nbytes, block * per_block
                    aa, ab, bb, ax, bx = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
                    for i in range(first, first + per_block):
                        s, m = first_s[i], chosen_m[i]
                        aa += s * s * sqq[i]
                        ab += s * m * sq[i]
                        bb += m * m * sw[i]
                        ax += s * sxq[i]
                        bx += m * sx[i]
                    det = aa * bb - ab * ab
                    new_d, new_min = d[first], dmin[first]
                    if det > np.float32(1e-5) * aa * bb:
                        new_d, new_min = (ax * bb - bx * ab) / det, (ax * ab - aa * bx) / det
                    if not new_min * abs(factors[block]) >= _COARSE:
                        new_min = dmin[first]
                        new_d = (ax + new_min * ab) / aa if aa > _ZERO else _ZERO
                    # Coarse halves are settled above: rounding to the nearest would undo it.
                    if new_d * abs(factors[block]) >= _COARSE:
                        new_d = store_half(new_d * factors[block], out[r], at + at_d) / factors[block]
                        new_min = store_half(new_min * factors[block], out[r], at + start_min) / factors[block]
                        for i in range(first, first + per_block):
                            d[i] = new_d
                            dmin[i] = new_min
            for block in range(n):
                r, b = divmod(start + block, blocks)
                first = block * per_block
                total, leans = _ZERO, False
                for i in range(first, first + per_block):
                    total += least[i]
                    leans = leans or leaning[i] > _ZERO
                if mirrored and not (leans and total < kept[first]):
                    store_half(-kept_d[first] * factors[block], out[r], b * block_nbytes + at_d)
                    store_half(-kept_min[first] * factors[block], out[r], b * block_nbytes + start_min)
                    continue
                kept[first], kept_d[first], kept_min[first] = total, d[first], dmin[first]
                for k in range(per_block):
                    i = first + k
                    scales[k], minima[k] = np.int64(first_s[i]), np.int64(chosen_m[i])
                    for j in range(sub):
                        t = smaller(larger((xt[j, i] + offset[i]) * inverse[i], _ZERO), top)
                        codes[k * sub + j] = np.uint8(np.int32((t + _MAGIC) - _MAGIC))
                _pack_affine(bits, codes, scales, minima, out[r], b * block_nbytes)


def encode_plain(values, importance, out, bits, block_nbytes, by_energy, steps, window, passes):
    """Encode Q3_K or Q6_K (by ``bits``); ``steps``: levels that the largest element of a sub-block is tried at."""
    scratch = _scratch(16, 17, LANES // 16)
    _encode_plain(values, importance, out, scratch, bits, block_nbytes, by_energy, steps, window, passes)


@kernel
def _encode_plain(values, importance, out, scratch, bits, block_nbytes, by_energy, steps, window, passes):
    sub, per_block = 16, 16
    n_blocks = LANES // per_block
    low, high = -np.float32(1 << (bits - 1)), np.float32((1 << (bits - 1)) - 1)
    limit = np.float32(31 if bits == 3 else 127)
    bottom = -limit - _ONE
    at_d = 108 if bits == 3 else 208
    blocks = values.shape[1] // 256
    count = values.shape[0] * blocks
    xt, wt, wxt, lanes, cost, w, buffer, factors, codes, scales, _ = scratch
    extreme, inverse, s1, s2, best, best_inverse, scale = (
        lanes[0],
        lanes[1],
        lanes[2],
        lanes[3],
        lanes[4],
        lanes[5],
        lanes[6],
    )
    d, first_s, error, least, try_s, real_s, chosen, stiff = (
        lanes[7],
        lanes[8],
        lanes[9],
        lanes[10],
        lanes[11],
        lanes[12],
        lanes[13],
        lanes[14],
    )
    for start in range(0, count, n_blocks):
        n = smaller(n_blocks, count - start)
        _fill_lanes(values, importance, by_energy, start, n, sub, xt, wt, wxt, factors, w, buffer)
        for i in range(LANES):
            extreme[i] = _ZERO
            best[i] = -_ONE
            scale[i] = _ZERO
        for j in range(sub):
            x = xt[j]
            for i in range(LANES):
                extreme[i] = x[i] if abs(x[i]) > abs(extreme[i]) else extreme[i]
        for k in range(steps.shape[0]):
            for i in range(LANES):
                inverse[i] = steps[k] / extreme[i] if abs(extreme[i]) > np.float32(1e-20) else _ZERO
            explain(xt, wxt, wt, inverse, low, high, s1, s2)
            keep_best(s1, s2, inverse, best, best_inverse, scale)
        for i in range(LANES):
            inverse[i] = _ONE / scale[i] if abs(scale[i]) > np.float32(1e-20) else _ZERO
        explain(xt, wxt, wt, inverse, low, high, s1, s2)
        keep_best(s1, s2, inverse, best, best_inverse, scale)
        for i in range(LANES):
            inverse[i] = _ONE / scale[i] if abs(scale[i]) > np.float32(1e-20) else _ZERO
        explain(xt, wxt, wt, inverse, low, high, s1, stiff)
        for block in range(n):
            r, b = divmod(start + block, blocks)
            first = block * per_block
            largest = _ZERO
            for i in range(first, first + per_block):
                largest = scale[i] if abs(scale[i]) > abs(largest) else largest
            step = _ZERO
            if largest != _ZERO:
                # Either sign: the lowest multiple is one further out than the highest.
                step, off = _rank(scale, stiff, first, per_block, largest / bottom, limit, bottom, cost)
                other, other_off = _rank(scale, stiff, first, per_block, largest / limit, limit, bottom, cost)
                step = other if other_off < off else step
                step = _settle(scale, stiff, first, per_block, step, factors[block], limit, bottom)
            step = store_half(step * factors[block], out[r], b * block_nbytes + at_d) / factors[block]
            for i in range(first, first + per_block):
                d[i] = step
                t = np.rint(scale[i] / step) if step != _ZERO else _ZERO
                first_s[i] = smaller(larger(t, bottom), limit)
        for turn in range(passes):
            for i in range(LANES):
                least[i] = _INF
            for k in range(-window, window + 1):
                for i in range(LANES):
                    s = first_s[i] + np.float32(k)
                    s = bottom if s < bottom else s
                    s = limit if s > limit else s
                    try_s[i] = s
                    real_s[i] = s * d[i]
                error_plain(xt, wt, real_s, low, high, error)
                for i in range(LANES):
                    better = error[i] < least[i]
                    least[i] = error[i] if better else least[i]
                    chosen[i] = try_s[i] if better else chosen[i]
            for i in range(LANES):
                first_s[i] = chosen[i]
                real_s[i] = first_s[i] * d[i]
                inverse[i] = _ONE / real_s[i] if real_s[i] != _ZERO else _ZERO
            if turn == passes - 1:
                continue
            explain(xt, wxt, wt, inverse, low, high, s1, s2)
            for block in range(n):
                r, b = divmod(start + block, blocks)
                first = block * per_block
                numerator, denominator = _ZERO, _ZERO
                for i in range(first, first + per_block):
                    numerator += first_s[i] * s1[i]
                    denominator += first_s[i] * first_s[i] * s2[i]
                step = numerator / denominator * factors[block] if denominator > _ZERO else _ZERO
                # Coarse halves are settled above: rounding to the nearest would undo it.
                if abs(step) >= _COARSE:
                    step = store_half(step, out[r], b * block_nbytes + at_d) / factors[block]
                    for i in range(first, first + per_block):
                        d[i] = step
        for block in range(n):
            r, b = divmod(start + block, blocks)
            for k in range(per_block):
                i = block * per_block + k
                scales[k] = np.int64(first_s[i])
                for j in range(sub):
                    t = smaller(larger(xt[j, i] * inverse[i], low), high)
                    codes[k * sub + j] = np.uint8(np.int32((t + _MAGIC) - _MAGIC - low))
            _pack_plain(bits, codes, scales, out[r], b * block_nbytes)
