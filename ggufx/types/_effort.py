"""A row of a higher effort is never worse than that of a lower one: which rows are compared, and by which error."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

__all__ = ["HEAD", "Weighting", "errors", "unusual"]

HEAD = 256
"""Columns of a row by which :func:`unusual` judges it."""


def unusual(values: F32) -> npt.NDArray[np.bool_]:
    """Return, by row of ``values`` [R, row_len], whether its values look like something else than a model's weights.

    Searches are tuned for noise round zero. Neither more of one sign than 5 standard deviations of chance, nor neighbours that
    share their sign that often, nor a few values beside which the others are small (under 1 in 32 beyond a quarter of the
    largest) are that. The first :data:`HEAD` columns are looked at, so that it takes no time. All are counts, so that every
    device finds the same.
    """
    head = values[:, :HEAD]
    size = head.shape[1]
    signs = np.packbits(head < 0, axis=1)
    negative = _ones(signs)
    # Neighbours within groups of eight.
    changes = _ones((signs ^ (signs >> 1)) & np.uint8(0x7F))
    pairs = signs.shape[1] * 7
    magnitudes = np.abs(head)
    large = _ones(np.packbits(magnitudes > magnitudes.max(axis=1, keepdims=True) * np.float32(0.25), axis=1))
    found: npt.NDArray[np.bool_] = (
        ((2 * negative - size) ** 2 > 25 * size) | ((2 * changes - pairs) ** 2 > 25 * pairs) | (32 * large < size)
    )
    return found


def _ones(packed: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Count the bits that are set, by row."""
    words = packed.view(np.uint64) if packed.shape[1] % 8 == 0 else packed
    found: npt.NDArray[np.int64] = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return found


class Weighting(NamedTuple):
    """Weights of the error under the objective ``reference``, of values x and importance m; by default m, or 1 without.

    Attributes
    ----------
    factor
        c in ``m sqrt(c mean(x^2) + x^2)``; ``None`` for m alone.
    plain_factor, plain_power
        f and p in ``(f mean(x^2) + x^2)^p``, the weights without importance.
    span
        Columns over which the mean is taken; 0 for the row.
    """

    factor: float | None = None
    plain_factor: float = 0.0
    plain_power: float = 0.0
    span: int = 256


def errors(
    values: F32, decoded: npt.NDArray[Any], importance: F32 | None, weighting: Weighting | None = None
) -> npt.NDArray[np.float64]:
    """Return the error of every row, float64 [R]: ``sum w (x - y)^2``.

    ``w`` is the importance [row_len], or 1 without; with ``weighting`` as that says.
    """
    exact = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (decoded.astype(np.float64) - exact) ** 2
        if importance is not None:
            squares *= importance.astype(np.float64)
        if weighting is not None:
            weighted = importance is not None and weighting.factor is not None
            power = 0.5 if weighted else 0.0 if importance is not None else weighting.plain_power
            if power:
                energy = (exact**2).reshape(len(exact), -1, weighting.span or exact.shape[1])
                factor = weighting.factor if weighted else weighting.plain_factor
                squares *= ((factor * energy.mean(axis=2, keepdims=True) + energy) ** power).reshape(squares.shape)
        found: npt.NDArray[np.float64] = squares.sum(axis=1)
    return found
