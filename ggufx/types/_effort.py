"""A row of a higher effort is never worse than that of a lower one: which rows are compared, and by which error."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx import kernels

F32 = npt.NDArray[np.float32]

__all__ = ["HEAD", "Weighting", "errors", "unlike_weights", "unusual"]

HEAD = 256
"""Columns of a row by which :func:`unusual` judges it."""


def unusual(values: F32) -> npt.NDArray[np.bool_]:
    """Return, by row of ``values`` [R, row_len], whether they look like something else than a model's weights.

    The first :data:`HEAD` columns are looked at, so that it takes no time.
    """
    size = min(HEAD, values.shape[1])
    counts = np.empty((len(values), 3), np.int64)
    kernels.load("_rows").count_heads(_locked(values).view(np.int32), size, counts)
    return unlike_weights(counts, size)


def unlike_weights(counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.bool_]:
    """Return, by row, whether ``counts`` of ``size`` values are unlike those of a model's weights.

    Searches are tuned for noise round zero. Neither more of one sign than 5 standard deviations of chance, nor neighbours that
    share their sign that often, nor a few values beside which the others are small (under 1 in 32 beyond a quarter of the
    largest) are that. These are counts, so that every device finds the same.

    Parameters
    ----------
    counts
        int64 [R, 3]: values that are negative, changes of sign between neighbours, values beyond a quarter of the largest; what
        ``count_heads`` of the kernels counts.
    """
    negative, changes, large = counts.T
    found: npt.NDArray[np.bool_] = _uneven(negative, size) | _uneven(changes, size - 1) | (32 * large < size)
    return found


def _uneven(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.bool_]:
    """Return whether counts are more than 5 standard deviations from half of ``total``."""
    found: npt.NDArray[np.bool_] = np.abs(2 * counts - total) > isqrt(25 * total)
    return found


class Weighting(NamedTuple):
    """Weights of the error under the objective ``reference``, of values x and importance m; by default m, or 1 without.

    Attributes
    ----------
    factor
        c in ``m sqrt(c mean(x^2) + x^2)``; ``None`` for m alone.
    plain_factor, plain_power
        f and p in ``(f mean(x^2) + x^2)^p``, the weights without importance; p is 0, 0.5 or 1.
    span
        Columns over which the mean is taken; 0 for the row.
    """

    factor: float | None = None
    plain_factor: float = 0.0
    plain_power: float = 0.0
    span: int = 256


def errors(
    values: F32, decoded: F32, importance: F32 | None, weighting: Weighting | None = None
) -> npt.NDArray[np.float64]:
    """Return the error of every row, float64 [R]: ``sum w (x - y)^2``.

    ``w`` is the importance [row_len], or 1 without; with ``weighting`` as that says.
    """
    weights = np.empty(0, np.float32) if importance is None else importance
    factor, power, span = 0.0, 0.0, 0
    if weighting is not None:
        span = weighting.span
        if importance is None:
            factor, power = weighting.plain_factor, weighting.plain_power
        elif weighting.factor is not None:
            factor, power = weighting.factor, 0.5
    found = np.zeros(len(values))
    arrays = (_locked(values), _locked(decoded), _locked(weights))
    kernels.load("_rows").add_errors(*arrays, factor, power, span or values.shape[1], np.empty(8), found)
    return found


def _locked(array: npt.NDArray[Any]) -> F32:
    """Return a read-only float32 view or copy, so that kernels are compiled for one kind of array."""
    view: F32 = np.require(array, np.float32, ("C_CONTIGUOUS", "ALIGNED")).view()
    view.flags.writeable = False
    return view
