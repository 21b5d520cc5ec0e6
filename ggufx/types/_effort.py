"""A row of a higher effort is never worse than that of a lower one: which rows are compared, and by which error."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

__all__ = ["HEAD", "errors", "unusual"]

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


def errors(values: F32, decoded: F32, importance: F32 | None, *, by_energy: bool) -> npt.NDArray[np.float64]:
    """Return the error of every row, float64 [R]: ``sum w (x - y)^2``.

    ``w`` is the importance [row_len], or 1 without; ``by_energy`` multiplies it with ``sqrt(mean(x^2) + x^2)``, what the
    reference encoders' weights are alike in.
    """
    exact = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (decoded.astype(np.float64) - exact) ** 2
        if importance is not None:
            squares *= importance.astype(np.float64)
        if by_energy:
            energy = exact**2
            squares *= np.sqrt(energy.mean(axis=1, keepdims=True) + energy)
        found: npt.NDArray[np.float64] = squares.sum(axis=1)
    return found
