"""Searches for the scale of evenly spaced codes: what the encoders of Q4_0, Q5_0, Q6_0 and the K types share.

Blocks lie side by side in the lanes (``xt[j, lane]`` is element j of a block), and every sum runs over j in order: no
reduction across lanes, so vector width and thread count change no bit. Values are scaled by powers of two so that the
largest of a block is near 1; sums then neither overflow nor vanish, whatever the rows hold.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from ggufx.kernels._jit import (
    bits_to_float,
    float_to_bits,
    float_to_half,
    half_to_float,
    inline,
    kernel,
    larger,
    smaller,
    subroutine,
)

LANES = 64
_MAGIC = np.float32(12582912)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as rint does
_ZERO = np.float32(0)
_ONE = np.float32(1)


@inline
def exponent_of(x):
    """Return the float32 exponent field of the largest magnitude, within 1..253."""
    top = np.uint32(0)
    for i in range(x.shape[0]):
        top = larger(top, np.uint32(float_to_bits(x[i]) & np.uint32(0x7FFFFFFF)))
    return smaller(larger(np.int32(top >> np.uint32(23)), np.int32(1)), np.int32(253))


@inline
def down(exponent):
    """Return ``2^(127 - exponent)``: brings values of that exponent field to 1..2."""
    return bits_to_float(np.uint32(254 - exponent) << np.uint32(23))


@inline
def up(exponent):
    """Return ``2^(exponent - 127)``."""
    return bits_to_float(np.uint32(exponent) << np.uint32(23))


@inline
def store_half(value, row, at):
    """Store ``value`` as the nearest finite half at byte ``at`` of ``row``; return what was stored."""
    bits = float_to_half(value)
    if (bits & np.uint16(0x7FFF)) >= np.uint16(0x7C00):
        bits = (bits & np.uint16(0x8000)) | np.uint16(0x7BFF)
    row[at] = np.uint8(bits & np.uint16(0xFF))
    row[at + 1] = np.uint8(bits >> np.uint16(8))
    return half_to_float(bits)


@subroutine
def mean_square(x, factor, lanes):
    """Return the mean of ``(x * factor)^2``, summed in a fixed order that vectorises."""
    n = lanes.shape[0]
    for i in range(n):
        lanes[i] = _ZERO
    whole = x.shape[0] // n * n
    for start in range(0, whole, n):
        part = x[start : start + n]
        for i in range(n):
            v = part[i] * factor
            lanes[i] += v * v
    total = _ZERO
    for i in range(whole, x.shape[0]):
        v = x[i] * factor
        total += v * v
    for i in range(n):
        total += lanes[i]
    return total / np.float32(x.shape[0])


@subroutine
def explain(xt, wxt, wt, inverse, low, high, s1, s2):
    """Per lane: with codes ``l = clamp(rint(x * inverse))``, give ``s1 = sum w x l`` and ``s2 = sum w l l``."""
    n = inverse.shape[0]
    for i in range(n):
        s1[i] = _ZERO
        s2[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            v, a, b = inverse[i], s1[i], s2[i]
            for u in range(8):
                t = xt[j + u, i] * v
                t = low if t < low else t
                t = high if t > high else t
                level = (t + _MAGIC) - _MAGIC
                a += wxt[j + u, i] * level
                b += wt[j + u, i] * level * level
            s1[i] = a
            s2[i] = b


@subroutine
def keep_best(s1, s2, inverse, best, best_inverse, best_scale):
    """Per lane: where the explained energy ``s1^2 / s2`` is above ``best``, take it, its inverse and its scale."""
    for i in range(s1.shape[0]):
        a, b = s1[i], s2[i]
        scale = a / b if b > _ZERO else _ZERO
        energy = scale * a
        better = energy > best[i]
        best[i] = energy if better else best[i]
        best_inverse[i] = inverse[i] if better else best_inverse[i]
        best_scale[i] = scale if better else best_scale[i]


@subroutine
def error_plain(xt, wt, scale, low, high, error):
    """Per lane: ``sum w (x - y)^2`` for ``y = scale l`` with the nearest levels."""
    n = scale.shape[0]
    for i in range(n):
        error[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            s, total = scale[i], error[i]
            inverse = _ONE / s if s != _ZERO else _ZERO
            for u in range(8):
                x = xt[j + u, i]
                t = x * inverse
                t = low if t < low else t
                t = high if t > high else t
                off = x - s * ((t + _MAGIC) - _MAGIC)
                total += wt[j + u, i] * off * off
            error[i] = total


@inline
def to_half_digits(values):
    """Round to the 11 significant bits of a half (not subnormal), to nearest, ties to even."""
    for i in range(values.shape[0]):
        bits = np.uint32(float_to_bits(values[i]))
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        values[i] = bits_to_float(np.uint32(bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))


@subroutine
def code(xt, inverse, low, high, codes):
    """Per lane: ``codes[j] = clamp(rint(x * inverse)) - low`` as bytes."""
    n = inverse.shape[0]
    for j in range(xt.shape[0]):
        x, c = xt[j], codes[j]
        for i in range(n):
            t = x[i] * inverse[i]
            t = low if t < low else t
            t = high if t > high else t
            c[i] = np.uint8(np.int32((t + _MAGIC) - _MAGIC - low))


@subroutine
def among_subnormals(xt, wt, lane, d, factor, low, high):
    """Return the best of the half subnormals round ``d``: their step is coarse, so rounding to the nearest is not best."""
    best, best_d = np.float32(np.inf), d
    middle = np.rint(d * np.float32(2.0**24))
    for k in range(-4, 5):
        candidate = (middle + np.float32(k)) * np.float32(2.0**-24)
        scale = candidate * factor
        inverse = _ONE / scale if scale != _ZERO else _ZERO
        error = _ZERO
        for j in range(xt.shape[0]):
            level = np.rint(smaller(larger(xt[j, lane] * inverse, low), high))
            difference = xt[j, lane] - scale * level
            error += wt[j, lane] * difference * difference
        if error < best:
            best, best_d = error, candidate
    return best_d


@subroutine
def pack_block(codes, nibbles, lane, bits, row, at):
    """Write the codes of one block of 32 behind its scale: Q4_0's, Q5_0's or Q6_0's layout, by ``bits``."""
    if bits == 5:
        high = np.uint32(0)
        for j in range(32):
            high |= np.uint32(codes[j, lane] >> np.uint8(4)) << np.uint32(j)
        for k in range(4):
            row[at + 2 + k] = np.uint8((high >> np.uint32(8 * k)) & np.uint32(0xFF))
        at += 4
    elif bits == 6:
        for k in range(8):
            row[at + 2 + k] = (
                (codes[k, lane] >> np.uint8(4))
                | (codes[k + 16, lane] >> np.uint8(4)) << np.uint8(2)
                | (codes[k + 8, lane] >> np.uint8(4)) << np.uint8(4)
                | (codes[k + 24, lane] >> np.uint8(4)) << np.uint8(6)
            )
        at += 8
    for j in range(16):
        row[at + 2 + j] = nibbles[j, lane]


Part = tuple[type[np.generic], tuple[int, ...]]


def floats(*shape: int) -> Part:
    """Name a part of :func:`scratch_of`: float32 of ``shape``."""
    return np.float32, shape


def scratch_of(*parts: Part) -> tuple[Any, ...]:
    """Return zeroed arrays of these dtypes and shapes for a kernel to work in, each at the start of a cache line.

    Allocating in kernels costs a tenth of a second of compiling per kind of array; vectors across cache lines a fifth of the
    speed.
    """
    nbytes = [-(-prod(shape) * np.dtype(dtype).itemsize // 64) * 64 for dtype, shape in parts]
    memory = np.zeros(sum(nbytes) + 64, np.uint8)
    starts = accumulate(nbytes, initial=-memory.__array_interface__["data"][0] % 64)
    return tuple(np.ndarray(shape, dtype, memory, start) for (dtype, shape), start in zip(parts, starts, strict=False))


def encode_block32(values, importance, out, bits, block_nbytes, by_energy, steps, ends, refits):
    """Search the f16 scale of every block of 32 codes of ``bits`` bits around zero.

    ``importance`` is [row_len], or empty for 1. With ``by_energy`` the weights are ``m sqrt(sigma2 + x^2)``, sigma2 the mean
    of x^2 over the row, else m. ``steps`` are the levels, real numbers, that the largest element is tried at, in groups
    that end at ``ends``. The best of each group by explained energy is refitted ``refits`` times; the best of these by its
    error as stored (beside a spike, energy tells nothing about the others) makes the codes.
    """
    scratch = scratch_of(
        *[floats(32, LANES)] * 3, floats(12, LANES), floats(32), (np.uint8, (32, LANES)), (np.uint8, (16, LANES))
    )
    scratch[4].fill(1)  # the weights, where there is no importance
    arrays = values, values.reshape(-1), importance, out.reshape(-1), scratch
    _encode_block32(*arrays, bits, block_nbytes, by_energy, steps, ends, refits)


@kernel
def _encode_block32(values, flat, importance, flat_out, scratch, bits, block_nbytes, by_energy, steps, ends, refits):
    blocks = values.shape[1] // 32
    count = values.shape[0] * blocks
    low, high = -np.float32(1 << (bits - 1)), np.float32((1 << (bits - 1)) - 1)
    weighted = importance.shape[0] > 0
    xt, wt, wxt, lanes, w, codes, nibbles = scratch
    extreme, inverse, s1, s2 = lanes[0], lanes[1], lanes[2], lanes[3]
    best, best_inverse, best_scale, factor, turned = lanes[4], lanes[5], lanes[6], lanes[7], lanes[8]
    error, least, chosen = lanes[9], lanes[10], lanes[11]
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
                sigma2 = mean_square(values[r], row_factor, turned)
            at = (first + lane) * 32
            top = np.uint32(0)
            for j in range(w.shape[0]):
                top = larger(top, np.uint32(float_to_bits(flat[at + j]) & np.uint32(0x7FFFFFFF)))
            e = smaller(larger(np.int32(top >> np.uint32(23)), np.int32(1)), np.int32(253))
            f = down(e)
            factor[lane] = up(e)
            if weighted and by_energy:
                for j in range(w.shape[0]):
                    v = flat[at + j] * row_factor
                    w[j] = importance[b * 32 + j] * np.sqrt(sigma2 + v * v)
            elif weighted:
                for j in range(w.shape[0]):
                    w[j] = importance[b * 32 + j]
            for j in range(w.shape[0]):
                xt[j, lane] = flat[at + j] * f
                wt[j, lane] = w[j]
        for i in range(LANES):
            extreme[i] = _ZERO
            least[i] = np.float32(np.inf)
        for j in range(32):
            x, y, z = xt[j], wt[j], wxt[j]
            for i in range(LANES):
                extreme[i] = x[i] if abs(x[i]) > abs(extreme[i]) else extreme[i]
                z[i] = x[i] * y[i]
        for i in range(LANES):
            turned[i] = _ONE / extreme[i] if extreme[i] != _ZERO else _ZERO
        for group in range(ends.shape[0]):
            for i in range(LANES):
                best[i] = -_ONE
                best_scale[i] = _ZERO
            for k in range(ends[group - 1] if group else 0, ends[group]):
                for i in range(LANES):
                    inverse[i] = steps[k] * turned[i]
                explain(xt, wxt, wt, inverse, low, high, s1, s2)
                keep_best(s1, s2, inverse, best, best_inverse, best_scale)
            for _ in range(refits):
                for i in range(LANES):
                    inverse[i] = _ONE / best_scale[i] if best_scale[i] != _ZERO else _ZERO
                explain(xt, wxt, wt, inverse, low, high, s1, s2)
                keep_best(s1, s2, inverse, best, best_inverse, best_scale)
            to_half_digits(best_scale)
            error_plain(xt, wt, best_scale, low, high, error)
            for i in range(LANES):
                better = error[i] < least[i]
                least[i] = error[i] if better else least[i]
                chosen[i] = best_scale[i] if better else chosen[i]
        for lane in range(n):
            d = chosen[lane] * factor[lane]
            if d != _ZERO and abs(d) < np.float32(2.0**-14):
                d = among_subnormals(xt, wt, lane, d, _ONE / factor[lane], low, high)
            d = store_half(d, flat_out, (first + lane) * block_nbytes) / factor[lane]
            inverse[lane] = _ONE / d if d != _ZERO else _ZERO
        code(xt, inverse, low, high, codes)
        for j in range(16):
            left, right, to = codes[j], codes[j + 16], nibbles[j]
            for i in range(LANES):
                to[i] = (left[i] & np.uint8(15)) | (right[i] << np.uint8(4))
        for lane in range(n):
            pack_block(codes, nibbles, lane, bits, flat_out, (first + lane) * block_nbytes)


def encode_block32_reference(values, importance, out):
    """Q4_0's bytes as the C library makes them (docs/formats.md, 6.2): plain rounding, or 19 scales by explained energy."""
    scratch = scratch_of(*[floats(32, LANES)] * 3, floats(7, LANES), (np.uint8, (32, LANES)))
    _encode_block32_reference(values, importance, out, scratch)


@kernel
def _encode_block32_reference(values, importance, out, scratch):
    low, high = np.float32(-8), np.float32(7)
    xt, wt, wxt, lanes, codes = scratch
    extreme, inverse, s1, s2 = lanes[0], lanes[1], lanes[2], lanes[3]
    best, best_inverse, best_scale = lanes[4], lanes[5], lanes[6]
    blocks = values.shape[1] // 32
    count = values.shape[0] * blocks
    sigma2 = _ZERO
    weighted = importance.shape[0] > 0
    for first in range(0, count, LANES):
        n = smaller(LANES, count - first)
        for lane in range(n):
            r, b = divmod(first + lane, blocks)
            if weighted and (b == 0 or lane == 0):
                sigma2 = _ZERO
                for v in values[r]:
                    sigma2 += v * v
                sigma2 = sigma2 / np.float32(values.shape[1])
            x = values[r, b * 32 : b * 32 + 32]
            for j in range(x.shape[0]):
                xt[j, lane] = x[j]
            if weighted:
                m = importance[b * 32 : b * 32 + 32]
                for j in range(x.shape[0]):
                    wt[j, lane] = m[j] * np.sqrt(sigma2 + x[j] * x[j])
        for i in range(LANES):
            extreme[i] = _ZERO
        for j in range(32):
            x, y, z = xt[j], wt[j], wxt[j]
            for i in range(LANES):
                extreme[i] = x[i] if abs(x[i]) > abs(extreme[i]) else extreme[i]
                z[i] = x[i] * y[i]
        if weighted:
            for step in range(19):
                k = step - 10 if 0 < step < 10 else step - 9 if step else 0
                numerator = -(np.float32(8) + np.float32(0.1) * np.float32(k))
                for i in range(LANES):
                    inverse[i] = numerator / extreme[i] if extreme[i] != _ZERO else _ZERO
                explain(xt, wxt, wt, inverse, low, high, s1, s2)
                for i in range(LANES):
                    a, c = s1[i], s2[i]
                    better = k == 0 or (c > _ZERO and a * a > best[i] * c)
                    scale = a / c if c > _ZERO else _ZERO
                    best[i] = scale * a if better else best[i]
                    best_scale[i] = scale if better else best_scale[i]
                    best_inverse[i] = inverse[i] if better else best_inverse[i]
            for i in range(LANES):
                tiny = abs(extreme[i]) < np.float32(1e-15)
                best_scale[i] = _ZERO if tiny else best_scale[i]
                best_inverse[i] = best_inverse[i]
            code(xt, best_inverse, low, high, codes)
            for i in range(LANES):
                if abs(extreme[i]) < np.float32(1e-15):
                    for j in range(32):
                        codes[j, i] = np.uint8(0)
        else:
            for i in range(LANES):
                d = extreme[i] / np.float32(-8)
                best_scale[i] = d
                inverse[i] = _ONE / d if d != _ZERO else _ZERO
            for j in range(32):
                x, c = xt[j], codes[j]
                for i in range(LANES):
                    t = x[i] * inverse[i] + np.float32(8.5)
                    t = t if t == t else _ZERO  # noqa: PLR0124
                    t = _ZERO if t < _ZERO else t
                    t = np.float32(15) if t > np.float32(15) else t
                    c[i] = np.uint8(np.int32(t))
        for lane in range(n):
            r, b = divmod(first + lane, blocks)
            store_half(best_scale[lane], out[r], b * 18)
            for j in range(16):
                out[r, b * 18 + 2 + j] = (codes[j, lane] & np.uint8(15)) | (codes[j + 16, lane] << np.uint8(4))
