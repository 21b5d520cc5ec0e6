"""Searches for the f16 scale of blocks of few levels: -1, 0, 1 (TQ1_0, TQ2_0), -1 to 2 (Q2_0), -1 and 1 (Q1_0).

Candidate scales lie side by side in the lanes and a block's elements follow one another: no reduction across lanes, so vector
width changes no bit. Values are scaled by powers of two as in ``_linear.py``.
"""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import kernel, larger, smaller, subroutine
from ggufx.kernels._lanes import planes
from ggufx.kernels._linear import among_subnormals, down, exponent_of, floats, scratch_of, store_half, up

_MAGIC = np.float32(12582912)
_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)

_store_pairs = planes(256, 2, 0, 32)


@subroutine
def _explain(x, w, inverse, low, high, s1, s2):
    """Per candidate: with levels ``l = clamp(rint(x * inverse))``, give ``s1 = sum w x l`` and ``s2 = sum w l l``."""
    n = inverse.shape[0]
    for i in range(n):
        s1[i] = _ZERO
        s2[i] = _ZERO
    for j in range(0, x.shape[0], 8):
        for i in range(n):
            v, a, b = inverse[i], s1[i], s2[i]
            for u in range(8):
                t = x[j + u] * v
                t = low if t < low else t
                t = high if t > high else t
                wl = w[j + u] * ((t + _MAGIC) - _MAGIC)
                a += wl * x[j + u]
                b += wl * ((t + _MAGIC) - _MAGIC)
            s1[i] = a
            s2[i] = b


@subroutine
def _pick(s1, s2):
    """Return the number of the candidate that explains most, and its least-squares scale."""
    best, chosen, scale = _ZERO, -1, _ZERO
    for i in range(s1.shape[0]):
        if s2[i] > _ZERO and s1[i] / s2[i] * s1[i] > best:
            scale = s1[i] / s2[i]
            best, chosen = scale * s1[i], i
    return chosen, scale


@subroutine
def _store_digits(codes, first, run, row, start):
    """Write ``run`` bytes at ``start``, whose five base-3 digits are every ``run``-th code from ``first`` on."""
    source, target = codes[first : first + 5 * run], row[start : start + run]
    for k in range(run):
        q = np.uint32(source[k])
        for n in range(1, 5):
            q = q * np.uint32(3) + np.uint32(source[k + n * run])
        # The byte is that fraction of 256, rounded up.
        target[k] = np.uint8((q * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@subroutine
def _pack(codes, ternary, row, start):
    """Write the codes of a block of TQ1_0 (``ternary`` 1), TQ2_0 (2) or Q2_0 (0); the f16 is written by the caller."""
    if ternary == 2:
        _store_pairs(codes, 0, row, start)
    elif ternary == 1:
        # Not literals: a subroutine is compiled again for each.
        for first, run, at in ((0, 32, 0), (160, 16, 32), (240, 4, 48)):
            _store_digits(codes, np.int64(first), np.int64(run), row, start + at)
    else:
        for k in range(16):
            i = 4 * k
            row[start + 2 + k] = codes[i] | codes[i + 1] << 2 | codes[i + 2] << 4 | codes[i + 3] << 6


def encode_levels(values, importance, out, ternary, block_len, block_nbytes, at_d, steps, narrower):
    """Encode TQ1_0 (``ternary`` 1), TQ2_0 (2) or Q2_0 (0).

    ``importance`` is [row_len], or empty for 1. ``steps`` are the levels, real numbers of either sign, that the largest
    magnitude of a block is tried as; after that the best of them times each of ``narrower``, if there are any. Without steps
    the scale is the largest magnitude and halves round away from zero: the C library's bytes.
    """
    n = max(1, len(steps), len(narrower))
    scratch = scratch_of(floats(block_len), floats(block_len, 1), *[floats(n)] * 3, (np.uint8, (block_len + 4,)))
    scratch[1].fill(1)
    # The last four bytes of TQ1_0 have four digits: zeros follow the codes.
    arrays = values.reshape(-1), importance, out.reshape(-1), scratch
    _encode_levels(*arrays, ternary, block_nbytes, at_d, steps, narrower)


@kernel
def _encode_levels(flat, importance, out, scratch, ternary, block_nbytes, at_d, steps, narrower):
    x, wt, inverses, sums1, sums2, codes = scratch
    xt, w = x.reshape(x.shape[0], 1), wt.reshape(x.shape[0])
    low, high = -_ONE, _ONE if ternary else np.float32(2)
    for b in range(flat.shape[0] // x.shape[0]):
        source = flat[b * x.shape[0] : (b + 1) * x.shape[0]]
        e = exponent_of(source)
        factor, f = up(e), down(e)
        top = _ZERO
        for i in range(x.shape[0]):
            x[i] = source[i] * f
        for i in range(x.shape[0]):
            top = larger(top, abs(x[i]))
        if importance.shape[0] > 0:
            first = b * x.shape[0] % importance.shape[0]
            m = importance[first : first + x.shape[0]]
            for i in range(x.shape[0]):
                w[i] = m[i]
        start = b * block_nbytes
        inverse = _ONE / top if top > _ZERO else _ZERO
        if steps.shape[0] == 0:
            store_half(top * factor, out, start + at_d)
            for i in range(x.shape[0]):
                t = x[i] * inverse
                code = np.uint8(2) if t >= _HALF else np.uint8(1)
                codes[i] = np.uint8(0) if t <= -_HALF else code
        else:
            n = steps.shape[0]
            for i in range(n):
                inverses[i] = steps[i] * inverse
            _explain(x, w, inverses[:n], low, high, sums1[:n], sums2[:n])
            chosen, scale = _pick(sums1[:n], sums2[:n])
            n = narrower.shape[0]
            if n > 0 and chosen >= 0:
                middle = inverses[chosen]
                for i in range(n):
                    inverses[i] = middle * narrower[i]
                _explain(x, w, inverses[:n], low, high, sums1[:n], sums2[:n])
                again, better = _pick(sums1[:n], sums2[:n])
                scale = better if again >= 0 else scale
            d = scale * factor
            if d != _ZERO and abs(d) < np.float32(2.0**-14):
                d = among_subnormals(xt, wt, 0, d, _ONE / factor, low, high)
            d = store_half(d, out, start + at_d) / factor
            inverse = _ONE / d if d != _ZERO else _ZERO
            for i in range(x.shape[0]):
                t = smaller(larger(x[i] * inverse, low), high)
                codes[i] = np.uint8(np.int32((t + _MAGIC) - _MAGIC + _ONE))
        _pack(codes, ternary, out, start)


@kernel
def encode_signs(flat, importance, out, block_len):
    """Encode Q1_0: signs, and the mean magnitude, weighted by ``importance`` (empty: as the C library does)."""
    for b in range(flat.shape[0] // block_len):
        x = flat[b * block_len : (b + 1) * block_len]
        f = np.float32(1)
        total, weight = _ZERO, np.float32(block_len)
        if importance.shape[0] > 0:
            e = exponent_of(x)
            f = down(e)
            first = b * block_len % importance.shape[0]
            m = importance[first : first + block_len]
            weight = _ZERO
            for i in range(x.shape[0]):
                total += m[i] * abs(x[i] * f)
                weight += m[i]
            total *= up(e)
        else:
            for i in range(x.shape[0]):
                total += abs(x[i])
        start = b * (block_len // 8 + 2)
        store_half(total / weight, out, start)
        for k in range(block_len // 8):
            byte = np.uint8(0)
            for i in range(8):
                byte |= np.uint8(x[8 * k + i] >= _ZERO) << np.uint8(i)
            out[start + 2 + k] = byte
