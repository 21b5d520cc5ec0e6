"""Searches for a scale and a minimum, both f16, of every 32 evenly spaced codes: Q4_1 and Q5_1.

Blocks lie side by side in the lanes as in ``_linear.py``, scaled by powers of two, and about their weighted mean: what codes
explain is then the spread of the values, however far from zero they are.
"""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import float_to_half, half_to_float, kernel, larger, smaller, subroutine
from ggufx.kernels._linear import (
    LANES,
    code,
    down,
    exponent_of,
    floats,
    mean_square,
    pack_block,
    scratch_of,
    store_half,
    to_half_digits,
    up,
)

_MAGIC = np.float32(12582912)
_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)


@subroutine
def _explain(xt, wxt, wt, inverse, bottom, top, sq, sqq, sxq):
    """Per lane, with codes ``q = clamp(rint((x - bottom) * inverse), 0, top)``: sums of w q, w q q and w x q."""
    n = inverse.shape[0]
    for i in range(n):
        sq[i] = _ZERO
        sqq[i] = _ZERO
        sxq[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            v, s, a, b, c = inverse[i], bottom[i], sq[i], sqq[i], sxq[i]
            for u in range(8):
                t = (xt[j + u, i] - s) * v
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
def _solve(sw, sx, sq, sqq, sxq, best, scale, minimum):
    """Per lane: least-squares scale and minimum of the codes behind the sums; keep them if they explain more."""
    for i in range(sw.shape[0]):
        mean = sq[i] / sw[i] if sw[i] > _ZERO else _ZERO
        spread = sqq[i] - sq[i] * mean
        gain = sxq[i] - sx[i] * mean
        # The codes are all alike, or rounding of the sums is all that tells them apart.
        s = gain / spread if spread > np.float32(1e-5) * sqq[i] else _ZERO
        s = s if s > _ZERO else _ZERO
        better = s * gain > best[i]
        best[i] = s * gain if better else best[i]
        scale[i] = s if better else scale[i]
        minimum[i] = (sx[i] / sw[i] if sw[i] > _ZERO else _ZERO) - s * mean if better else minimum[i]


@subroutine
def _error(xt, wt, scale, minimum, top, error):
    """Per lane: ``sum w (x - y)^2`` for ``y = scale q + minimum`` with the nearest codes."""
    n = scale.shape[0]
    for i in range(n):
        error[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            s, m, total = scale[i], minimum[i], error[i]
            inverse = _ONE / s if s != _ZERO else _ZERO
            for u in range(8):
                x = xt[j + u, i] - m
                t = x * inverse
                t = _ZERO if t < _ZERO else t
                t = top if t > top else t
                off = x - s * ((t + _MAGIC) - _MAGIC)
                total += wt[j + u, i] * off * off
            error[i] = total


@subroutine
def _half(value):
    """Round to the nearest finite half."""
    limit = np.float32(65504)
    return half_to_float(float_to_half(smaller(larger(value, -limit), limit)))


@subroutine
def _among_coarse(xt, wt, lane, scale, minimum, mean, factor, top):
    """Return the best of the halves round ``scale``, a subnormal, and the minimum that suits it, both as stored."""
    best, best_d, best_m = np.float32(np.inf), _ZERO, _ZERO
    below = np.floor(scale * np.float32(2.0**24))
    for k in range(-3, 5):
        d = larger(below + np.float32(k), _ZERO) * np.float32(2.0**-24)
        step = d / factor
        inverse = _ONE / step if step > _ZERO else _ZERO
        m = minimum
        for _ in range(3):
            sw, rest, error = _ZERO, _ZERO, _ZERO
            stored = _half((m + mean) * factor)
            m = stored / factor - mean
            for j in range(xt.shape[0]):
                q = np.rint(smaller(larger((xt[j, lane] - m) * inverse, _ZERO), top))
                off = xt[j, lane] - m - q * step
                sw += wt[j, lane]
                rest += wt[j, lane] * off
                error += wt[j, lane] * off * off
            if error < best:
                best, best_d, best_m = error, d, stored
            m += rest / sw if sw > _ZERO else _ZERO
    return best_d, best_m


def encode_affine32(values, importance, out, bits, block_nbytes, by_energy, steps, places, ends, refits):
    """Search scale and minimum of every block of 32 codes of ``bits`` bits.

    ``importance`` is [row_len], or empty for 1. With ``by_energy`` the weights are ``m sqrt(sigma2 + x^2)``, sigma2 the mean
    of x^2 over the row, else m. ``steps`` are the levels, real numbers, that the span of a block is tried as, and ``places``
    the share, of what the codes then miss or have too many, that is at the lower end; in groups that end at ``ends``. The best
    of each group by explained energy is refitted ``refits`` times; the best of these by its error as stored (beside a spike,
    energy tells nothing about the others) makes the codes.
    """
    scratch = scratch_of(
        *[floats(32, LANES)] * 3, floats(19, LANES), floats(32), (np.uint8, (32, LANES)), (np.uint8, (16, LANES))
    )
    scratch[4].fill(1)  # the weights, where there is no importance
    arrays = values, values.reshape(-1), importance, out.reshape(-1), scratch
    _encode_affine32(*arrays, bits, block_nbytes, by_energy, steps, places, ends, refits)


@kernel
def _encode_affine32(
    values, flat, importance, flat_out, scratch, bits, block_nbytes, by_energy, steps, places, ends, refits
):
    blocks = values.shape[1] // 32
    count = values.shape[0] * blocks
    top = np.float32((1 << bits) - 1)
    weighted = importance.shape[0] > 0
    xt, wt, wxt, lanes, w, codes, nibbles = scratch
    low, high, sw, sx, sq, sqq, sxq = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    best, scale, minimum, inverse, bottom = lanes[7], lanes[8], lanes[9], lanes[10], lanes[11]
    factor, mean, buffer = lanes[12], lanes[13], lanes[14]
    error, least, chosen, chosen_m = lanes[15], lanes[16], lanes[17], lanes[18]
    row_factor, sigma2 = _ONE, _ZERO
    r, b = 0, -1
    for first in range(0, count, LANES):
        n = smaller(LANES, count - first)
        for lane in range(n):
            b += 1
            if b == blocks:
                r, b = r + 1, 0
            if weighted and by_energy and (b == 0 or lane == 0):
                row_factor = down(exponent_of(values[r]))
                sigma2 = mean_square(values[r], row_factor, buffer)
            at = (first + lane) * 32
            x = flat[at : at + 32]
            e = exponent_of(x)
            f = down(e)
            factor[lane] = up(e)
            if weighted and by_energy:
                for j in range(w.shape[0]):
                    v = x[j] * row_factor
                    w[j] = importance[b * 32 + j] * np.sqrt(sigma2 + v * v)
            elif weighted:
                for j in range(w.shape[0]):
                    w[j] = importance[b * 32 + j]
            for j in range(w.shape[0]):
                xt[j, lane] = x[j] * f
                wt[j, lane] = w[j]
        for i in range(LANES):
            sw[i] = _ZERO
            sx[i] = _ZERO
            low[i] = xt[0, i]
            high[i] = xt[0, i]
        for j in range(32):
            x, y = xt[j], wt[j]
            for i in range(LANES):
                sw[i] += y[i]
                sx[i] += y[i] * x[i]
                low[i] = x[i] if x[i] < low[i] else low[i]
                high[i] = x[i] if x[i] > high[i] else high[i]
        for i in range(LANES):
            mean[i] = sx[i] / sw[i] if sw[i] > _ZERO else _ZERO
            low[i] -= mean[i]
            high[i] -= mean[i]
            sx[i] = _ZERO
            least[i] = np.float32(np.inf)
        for j in range(32):
            x, y, z = xt[j], wt[j], wxt[j]
            for i in range(LANES):
                x[i] -= mean[i]
                z[i] = x[i] * y[i]
                sx[i] += z[i]
        for group in range(ends.shape[0]):
            for i in range(LANES):
                best[i] = _ZERO
                scale[i] = _ZERO
                minimum[i] = sx[i] / sw[i] if sw[i] > _ZERO else _ZERO
            for k in range(ends[group - 1] if group else 0, ends[group]):
                for i in range(LANES):
                    span = high[i] - low[i]
                    inverse[i] = steps[k] / span if span > np.float32(1e-20) else _ZERO
                    bottom[i] = low[i] + span * (_ONE - top / steps[k]) * places[k]
                _explain(xt, wxt, wt, inverse, bottom, top, sq, sqq, sxq)
                _solve(sw, sx, sq, sqq, sxq, best, scale, minimum)
            for _ in range(refits):
                for i in range(LANES):
                    inverse[i] = _ONE / scale[i] if scale[i] > _ZERO else _ZERO
                _explain(xt, wxt, wt, inverse, minimum, top, sq, sqq, sxq)
                _solve(sw, sx, sq, sqq, sxq, best, scale, minimum)
            # Both as stored, the minimum for the scale as stored.
            to_half_digits(scale)
            for i in range(LANES):
                inverse[i] = _ONE / scale[i] if scale[i] > _ZERO else _ZERO
            _explain(xt, wxt, wt, inverse, minimum, top, sq, sqq, sxq)
            for i in range(LANES):
                minimum[i] = ((sx[i] - scale[i] * sq[i]) / sw[i] if sw[i] > _ZERO else _ZERO) + mean[i]
            to_half_digits(minimum)
            for i in range(LANES):
                minimum[i] -= mean[i]
            _error(xt, wt, scale, minimum, top, error)
            for i in range(LANES):
                better = error[i] < least[i]
                least[i] = error[i] if better else least[i]
                chosen[i] = scale[i] if better else chosen[i]
                chosen_m[i] = minimum[i] if better else chosen_m[i]
        for lane in range(n):
            at = (first + lane) * block_nbytes
            d, m = chosen[lane] * factor[lane], (chosen_m[lane] + mean[lane]) * factor[lane]
            if d != _ZERO and d < np.float32(2.0**-14):
                d, m = _among_coarse(xt, wt, lane, d, chosen_m[lane], mean[lane], factor[lane], top)
            d = store_half(d, flat_out, at) / factor[lane]
            bottom[lane] = store_half(m, flat_out, at + 2) / factor[lane] - mean[lane]
            inverse[lane] = _ONE / d if d > _ZERO else _ZERO
        for j in range(32):
            x = xt[j]
            for i in range(LANES):
                x[i] -= bottom[i]
        code(xt, inverse, _ZERO, top, codes)
        for j in range(16):
            left, right, to = codes[j], codes[j + 16], nibbles[j]
            for i in range(LANES):
                to[i] = (left[i] & np.uint8(15)) | (right[i] << np.uint8(4))
        for lane in range(n):
            pack_block(codes, nibbles, lane, bits, flat_out, (first + lane) * block_nbytes + 2)


@subroutine
def _try_reference(xt, wt, low, inverse, top, sw, sx, least, scale, minimum, code_inverse, code_low, plain):
    """Per lane: the codes at ``inverse``, their least-squares fit (or, if ``plain``, 1 / inverse) and its error; keep the best.

    Every sum runs, and every product is rounded, as in ``make_qkx3_quants`` of llama.cpp.
    """
    for i in range(inverse.shape[0]):
        v, bottom = inverse[i], low[i]
        sq, sqq, sxq = _ZERO, _ZERO, _ZERO
        for j in range(xt.shape[0]):
            t = v * (xt[j, i] - bottom)
            t = t if t > _ZERO else _ZERO
            t = top if t > top else t
            q = (t + _MAGIC) - _MAGIC
            wq = wt[j, i] * q
            sq += wq
            sqq += wq * q
            sxq += wq * xt[j, i]
        det = sw[i] * sqq - sq * sq
        s, m = _ONE / v, bottom
        if not plain:
            s, m = (sw[i] * sxq - sx[i] * sq) / det, (sqq * sx[i] - sq * sxq) / det
            if m > _ZERO:
                s, m = sxq / sqq, _ZERO
        error = _ZERO
        for j in range(xt.shape[0]):
            t = v * (xt[j, i] - bottom)
            t = t if t > _ZERO else _ZERO
            t = top if t > top else t
            off = s * ((t + _MAGIC) - _MAGIC) + m - xt[j, i]
            error += wt[j, i] * (off * off)
        if plain or (det > _ZERO and error < least[i]):
            least[i] = error
            scale[i] = s
            minimum[i] = m
            code_inverse[i] = v
            code_low[i] = bottom


def encode_reference(values, importance, out, bits, block_nbytes):
    """Give the C library's bytes: plain rounding, or with importance the best fit of 38 inverse scales by weighted error."""
    scratch = scratch_of(*[floats(32, LANES)] * 2, floats(10, LANES), (np.uint8, (32, LANES)), (np.uint8, (16, LANES)))
    _encode_reference(values, values.reshape(-1), importance, out.reshape(-1), scratch, bits, block_nbytes)


@kernel
def _encode_reference(values, flat, importance, out, scratch, bits, block_nbytes):
    blocks = values.shape[1] // 32
    top = np.float32((1 << bits) - 1)
    weighted = importance.shape[0] > 0
    xt, wt, lanes, codes, nibbles = scratch
    low, high, sw, sx, least, scale, minimum = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    inverse, code_inverse, code_low = lanes[7], lanes[8], lanes[9]
    sigma2 = _ZERO
    count = values.shape[0] * blocks
    for first in range(0, count, LANES):
        n = smaller(LANES, count - first)
        for lane in range(n):
            x = flat[(first + lane) * 32 : (first + lane) * 32 + 32]
            for j in range(x.shape[0]):
                xt[j, lane] = x[j]
            if weighted:
                r, b = divmod(first + lane, blocks)
                if b == 0 or lane == 0:
                    sigma2 = _ZERO
                    for v in values[r]:
                        sigma2 += v * v
                    sigma2 = sigma2 / np.float32(values.shape[1])
                m = importance[b * 32 : b * 32 + 32]
                for j in range(x.shape[0]):
                    wt[j, lane] = m[j] * np.sqrt(sigma2 + x[j] * x[j])
        for i in range(LANES):
            low[i] = xt[0, i]
            high[i] = xt[0, i]
            sw[i] = _ZERO
            sx[i] = _ZERO
        for j in range(32):
            x = xt[j]
            for i in range(LANES):
                low[i] = x[i] if x[i] < low[i] else low[i]
                high[i] = x[i] if x[i] > high[i] else high[i]
        if weighted:
            for j in range(32):
                x, y = xt[j], wt[j]
                for i in range(LANES):
                    sw[i] += y[i]
                    sx[i] += y[i] * x[i]
            for i in range(LANES):
                low[i] = _ZERO if low[i] > _ZERO else low[i]
                inverse[i] = top / (high[i] - low[i])
            _try_reference(xt, wt, low, inverse, top, sw, sx, least, scale, minimum, code_inverse, code_low, True)
            for k in range(37):
                for i in range(LANES):
                    low[i] = minimum[i]
                    inverse[i] = (np.float32(-0.9) + np.float32(0.05) * np.float32(k) + top) / (high[i] - low[i])
                _try_reference(xt, wt, low, inverse, top, sw, sx, least, scale, minimum, code_inverse, code_low, False)
            for i in range(LANES):
                low[i] = smaller(xt[0, i], _ZERO)
                for j in range(32):
                    low[i] = smaller(low[i], xt[j, i])
                if high[i] <= low[i]:
                    scale[i], minimum[i], code_inverse[i] = _ZERO, low[i], _ZERO
            for j in range(32):
                x, c = xt[j], codes[j]
                for i in range(LANES):
                    t = code_inverse[i] * (x[i] - code_low[i])
                    t = t if t > _ZERO else _ZERO
                    c[i] = np.uint8(np.int32((smaller(t, top) + _MAGIC) - _MAGIC))
        else:
            for i in range(LANES):
                scale[i] = (high[i] - low[i]) / top
                inverse[i] = _ONE / scale[i] if scale[i] != _ZERO else _ZERO
            for j in range(32):
                x, c = xt[j], codes[j]
                for i in range(LANES):
                    t = (x[i] - low[i]) * inverse[i] + _HALF
                    t = t if t > _ZERO else _ZERO
                    c[i] = np.uint8(np.int32(smaller(t, top)))
            for i in range(LANES):
                minimum[i] = low[i]
        for j in range(16):
            left, right, to = codes[j], codes[j + 16], nibbles[j]
            for i in range(LANES):
                to[i] = (left[i] & np.uint8(15)) | (right[i] << np.uint8(4))
        for lane in range(n):
            at = (first + lane) * block_nbytes
            store_half(scale[lane], out, at)
            store_half(minimum[lane], out, at + 2)
            # What pack_block does, but written here: LLVM makes twice as fast code of it than of any call.
            at += 4
            if bits == 5:
                high_bits = np.uint32(0)
                for j in range(32):
                    high_bits |= np.uint32(codes[j, lane] >> np.uint8(4)) << np.uint32(j)
                for k in range(4):
                    out[at + k] = np.uint8((high_bits >> np.uint32(8 * k)) & np.uint32(0xFF))
                at += 4
            for j in range(16):
                out[at + j] = nibbles[j, lane]
