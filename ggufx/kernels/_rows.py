"""What rows look like, and how far two of them are apart, on the CPU."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import inline, kernel

__all__ = ["add_errors", "count_heads"]

_WIDTH = 8
_MAGNITUDE = np.int32(0x7FFFFFFF)
_QUARTER = np.int32(2 << 23)
"""What the bits of a quarter are less; of the smallest values, which have no exponent to lower, all count."""


@kernel
def count_heads(bits, size, counts):
    """Count of the first ``size`` values of every row: negative ones, changes of sign, and large ones. Counts: int64 [R, 3].

    ``bits`` are the values' as int32: integers have an order that does not keep a compiler from taking many at a time. Large
    is beyond a quarter of the largest magnitude.
    """
    for r in range(bits.shape[0]):
        row = bits[r, :size]
        top = np.int32(0)
        for i in range(row.shape[0]):
            magnitude = row[i] & _MAGNITUDE
            top = magnitude if magnitude > top else top
        least = np.int32(top - _QUARTER)
        negative, changes, large = np.int32(0), np.int32(0), np.int32(0)
        for i in range(row.shape[0]):
            negative += np.int32(row[i] < 0)
            large += np.int32((row[i] & _MAGNITUDE) > least)
        for i in range(1, row.shape[0]):
            changes += np.int32((row[i] ^ row[i - 1]) < 0)
        counts[r, 0] = negative
        counts[r, 1] = changes
        counts[r, 2] = large


@inline
def _weighed(v, off, weight, mean, power):
    total = weight * off * off
    if power == 0.5:
        total *= np.sqrt(mean + v * v)
    elif power == 1:
        total *= mean + v * v
    return total


@kernel
def add_errors(values, decoded, importance, factor, power, span, lanes, errors):
    """Add ``sum w (x - y)^2`` of every row of float32 ``values`` to ``errors``, float64 [R].

    ``w`` is ``importance`` [row_len], or 1 where that is empty, times ``(factor mean(x^2) + x^2)^power`` with means over
    ``span`` columns; ``power`` is 0, 0.5 or 1. ``lanes`` is float64 [8], for sums side by side.
    """
    weighted = importance.shape[0] > 0
    for r in range(values.shape[0]):
        for first in range(0, values.shape[1], span):
            x, y = values[r, first : first + span], decoded[r, first : first + span]
            whole = x.shape[0] // _WIDTH * _WIDTH
            mean, rest = np.float64(0), np.float64(0)
            if power > 0 and factor > 0:
                for i in range(x.shape[0]):
                    mean += np.float64(x[i]) * np.float64(x[i])
                mean *= factor / np.float64(x.shape[0])
            for u in range(_WIDTH):
                lanes[u] = 0
            for i in range(0, whole, _WIDTH):
                for u in range(_WIDTH):
                    v, weight = np.float64(x[i + u]), np.float64(1)
                    if weighted:
                        weight = np.float64(importance[first + i + u])
                    lanes[u] += _weighed(v, v - np.float64(y[i + u]), weight, mean, power)
            for i in range(whole, x.shape[0]):
                v, weight = np.float64(x[i]), np.float64(1)
                if weighted:
                    weight = np.float64(importance[first + i])
                rest += _weighed(v, v - np.float64(y[i]), weight, mean, power)
            for u in range(_WIDTH):
                rest += lanes[u]
            errors[r] += rest
