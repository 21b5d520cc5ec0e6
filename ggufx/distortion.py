"""How far an encoding is from the values it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf, log10, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.errors import CodecError
from ggufx.types import Codec, Effort, Objective

__all__ = ["Quality", "quality"]

_CHUNK_LEN = 1 << 21


@dataclass(frozen=True)
class Quality:
    """Errors of ``y``, what decoding gives, against ``x``, the values. Sums are in float64.

    Attributes
    ----------
    rmse
        ``sqrt(mean (x - y)^2)``, in the unit of the values.
    relative_rmse
        ``rmse / sqrt(mean x^2)``.
    weighted_rmse
        ``sqrt(sum w (x - y)^2 / sum w)`` with the importance ``w`` of the columns; equal to ``rmse`` without one.
    max_error
        ``max |x - y|``.
    sqnr
        ``10 log10(sum x^2 / sum (x - y)^2)``, in dB; infinite when exact.
    cosine
        ``sum x y / sqrt(sum x^2 sum y^2)``.
    bits_per_weight
        Row headers included.
    n_weights
        Number of values.
    """

    rmse: float
    relative_rmse: float
    weighted_rmse: float
    max_error: float
    sqnr: float
    cosine: float
    bits_per_weight: float
    n_weights: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; an infinite SQNR becomes ``None``."""
        data = asdict(self)
        data["sqnr"] = None if self.sqnr == inf else self.sqnr
        return data


def quality(
    values: npt.ArrayLike,
    codec: Codec | str,
    importance: npt.ArrayLike | None = None,
    *,
    effort: Effort = "normal",
    objective: Objective = "reference",
    threads: int | None = None,
    factor: float = 1.0,
) -> Quality:
    """Encode, decode and measure.

    Parameters
    ----------
    values
        Floats [..., row_len].
    codec
        A codec or a type's name.
    importance
        Weights [row_len]; they go into the encoding and into ``weighted_rmse``.
    effort, objective, threads
        As in :meth:`ggufx.types.Codec.encode`.
    factor
        What the values are divided by before they are encoded, and the decoded ones multiplied by: see :mod:`ggufx.factors`.

    Raises
    ------
    CodecError, UnsupportedType
        As from encode and decode.
    """
    chosen = types.get(codec) if isinstance(codec, str) else codec
    array = np.asarray(values)
    if array.ndim == 0 or array.size == 0:
        raise CodecError(f"nothing to measure in an array of shape {list(array.shape)}")
    rows = array.reshape(-1, array.shape[-1])
    row_len = rows.shape[1]
    weights = np.ones(row_len) if importance is None else np.asarray(importance, np.float64)
    error2 = energy = cross = decoded2 = weighted = largest = 0.0
    for part in _chunks(rows):
        scaled = part if factor == 1 else part / np.float32(factor)
        packed = chosen.encode(scaled, importance, effort=effort, objective=objective, threads=threads)
        x = part.astype(np.float64)
        y = chosen.decode(packed, dtype=np.float64, threads=threads) * float(factor)
        error = x - y
        squares = np.square(error)
        error2 += float(squares.sum())
        weighted += float((squares * weights).sum())
        energy += float(np.square(x).sum())
        decoded2 += float(np.square(y).sum())
        cross += float((x * y).sum())
        largest = max(largest, float(np.abs(error).max()))
    count = rows.shape[0] * row_len
    total_weight = float(weights.sum()) * rows.shape[0]
    return Quality(
        rmse=sqrt(error2 / count),
        relative_rmse=sqrt(error2 / energy) if energy else 0.0,
        weighted_rmse=sqrt(weighted / total_weight) if total_weight else 0.0,
        max_error=largest,
        sqnr=10 * log10(energy / error2) if error2 and energy else inf,
        cosine=cross / sqrt(energy * decoded2) if energy and decoded2 else 1.0,
        bits_per_weight=chosen.layout.bits_per_weight(row_len),
        n_weights=count,
    )


def _chunks(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _CHUNK_LEN // rows.shape[1])
    return (rows[start : start + step] for start in range(0, rows.shape[0], step))
