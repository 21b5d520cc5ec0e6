"""Compare quant types on real tensors: error against bits per weight, as data and as a picture."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.distortion import Quality, quality
from ggufx.errors import GGUFError, UnsupportedType
from ggufx.factors import factor_of, is_applied
from ggufx.file import File, Tensor, open_parts
from ggufx.hybrid import ScaledTensor, open
from ggufx.imatrix import ImportanceMatrix, RowImportance
from ggufx.types import Codec, Effort, Objective

__all__ = ["Measurement", "check_plot", "measure", "plot", "summary"]


@dataclass(frozen=True)
class Measurement:
    """One type on one tensor; ``quality`` is ``None`` where there is none, and ``note`` says why.

    ``damaged`` is whether that is for values which are NaN or infinite.
    """

    tensor: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    effort: str
    quality: Quality | None
    note: str = ""
    damaged: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return one flat record of JSON data."""
        record: dict[str, Any] = {
            "tensor": self.tensor,
            "shape": list(self.shape),
            "source_type": self.source_type,
            "type": self.type,
            "effort": self.effort,
            "note": self.note,
            "damaged": self.damaged,
        }
        return record | ({} if self.quality is None else self.quality.to_json())


def measure(
    path: str | Path | File,
    type_names: Sequence[str],
    *,
    pattern: str | None = None,
    imatrix: ImportanceMatrix | None = None,
    effort: Effort = "normal",
    objective: Objective = "reference",
    max_rows: int | None = 4096,
    dialect: str | None = None,
    threads: int | None = None,
    progress: Any = None,
) -> list[Measurement]:
    """Encode the matrices of a GGUF, or of a hybrid, with each type and measure the error against the decoded original.

    Parameters
    ----------
    path
        The GGUF, or a hybrid's directory; or one of them opened, which stays open.
    type_names
        Types to compare.
    pattern
        Shell pattern of tensor names; default: every tensor of two or more axes.
    imatrix
        Importance; types that demand one are noted and left out where it has none for the tensor.
    effort, objective
        As in :meth:`ggufx.types.Codec.encode`.
    max_rows
        At most so many rows of each tensor, evenly spread; ``None`` for all.
    dialect
        As in :func:`ggufx.open`.
    progress
        Called with (weights encoded, weights in all).

    Returns
    -------
    list of Measurement
        For every tensor and type. A tensor with values that are NaN or infinite has no quality, and a note that says where.

    Raises
    ------
    GGUFError
        An unknown type, a file that cannot be read, or no tensor matches.
    """
    codecs = [types.get(name) for name in type_names]
    for codec in codecs:
        if not codec.can_encode or not codec.can_decode:
            raise UnsupportedType(f"{codec.name} cannot be measured: ggufx does not encode it")
    results: list[Measurement] = []
    with _opened(path, pattern, dialect) as file:
        chosen = _chosen(file, pattern)
        total = sum(_n_rows(t, max_rows) * t.shape[-1] for t in chosen) * len(codecs)
        done = 0
        for tensor in chosen:
            rows, numbers = _rows(tensor, max_rows)
            damage = _damage(tensor, rows, numbers)
            weights = None if imatrix is None else imatrix.rows(tensor.name, tensor.shape)
            for codec in codecs:
                done += rows.size
                if damage:
                    about = (tensor.name, tensor.shape, tensor.type, codec.name, effort)
                    results.append(Measurement(*about, None, damage, damaged=True))
                    continue
                # As quantizing the tensor would; stacked experts, which get one each, have one in common here.
                factor = factor_of(float(np.abs(rows).max())) if _has_factor(file, tensor, codec) else np.float32(1)
                found, note = _measure(rows, tensor, codec, weights, effort, objective, threads, float(factor))
                results.append(Measurement(tensor.name, tensor.shape, tensor.type, codec.name, effort, found, note))
                if progress is not None:
                    progress(done, total)
    return results


def _opened(path: str | Path | File, pattern: str | None, dialect: str | None) -> AbstractContextManager[File]:
    """Open a model; of a GGUF, members of a split without a tensor of the pattern need not be there."""
    if isinstance(path, File):
        return nullcontext(path)
    if pattern is None or Path(path).is_dir():
        return open(path, dialect=dialect)
    return open_parts(path, [pattern], dialect=dialect)


def _chosen(file: File, pattern: str | None) -> list[Tensor]:
    chosen = [
        t
        for t in file.tensors
        if t.ndim >= 2 and t.size and _decodable(t)
        if pattern is None or fnmatch.fnmatchcase(t.name, pattern)
    ]
    if not chosen:
        raise GGUFError(f"{file.path}: no float matrix matches {pattern or '*'!r}")
    return chosen


def _decodable(tensor: Tensor) -> bool:
    if isinstance(tensor, ScaledTensor):
        return True
    return tensor.codec is not None and tensor.codec.can_decode and tensor.dtype == np.float32


def _n_rows(tensor: Tensor, max_rows: int | None) -> int:
    n_rows = tensor.size // tensor.shape[-1]
    return n_rows if max_rows is None else min(n_rows, max_rows)


def _rows(tensor: Tensor, max_rows: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return rows, and their numbers."""
    n_rows = tensor.size // tensor.shape[-1]
    if max_rows is None or n_rows <= max_rows:
        return tensor.numpy().reshape(n_rows, -1), np.arange(n_rows)
    numbers = np.linspace(0, n_rows - 1, max_rows).astype(np.int64)
    return tensor.rows_at(numbers), numbers


def _damage(tensor: Tensor, rows: npt.NDArray[np.float32], numbers: npt.NDArray[np.int64]) -> str:
    """Return where the first value is that is NaN or infinite, or nothing."""
    unsound = ~np.isfinite(rows)
    if not unsound.any():
        return ""
    row, column = (int(n) for n in np.argwhere(unsound)[0])
    place = f"row {numbers[row]}"
    if tensor.ndim == 3:
        place = f"expert {numbers[row] // tensor.shape[1]}, row {numbers[row] % tensor.shape[1]}"
    count = int(np.count_nonzero(unsound))
    more = f" (and {count - 1} more in the rows that were read)" if count > 1 else ""
    return f"{tensor.name}: found {rows[row, column]} at {place}, column {column}{more}"


def _measure(
    rows: npt.NDArray[np.float32],
    tensor: Tensor,
    codec: Codec,
    weights: RowImportance | None,
    effort: Effort,
    objective: Objective,
    threads: int | None,
    factor: float,
) -> tuple[Quality | None, str]:
    row_len = rows.shape[1]
    if tensor.type == codec.name:
        return None, "the source has this type already; its values are what would be measured against"
    if row_len % codec.layout.block_len:
        return None, f"rows of {row_len} are not divisible by {codec.layout.block_len}"
    # Stacked experts have a row of weights each; their mean stands for all, as the rows are sampled across experts.
    importance = None if weights is None else weights.average()
    if importance is None and codec.needs_importance:
        return None, "needs importance weights (--imatrix)"
    chosen: Effort = effort if effort != "reference" or codec.reproduces else "normal"
    return quality(rows, codec, importance, effort=chosen, objective=objective, threads=threads, factor=factor), ""


def _has_factor(file: File, tensor: Tensor, codec: Codec) -> bool:
    return codec.name == "NVFP4" and is_applied(tensor.name, codec.name, "llama.cpp", file.architecture)


def summary(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """Add up by type: bits per weight and relative errors over all tensors, each weighted by its energy.

    ``mean_sqnr`` is the mean over the tensors that have an error at all; infinite where none has.
    """
    groups: dict[str, list[Measurement]] = {}
    for item in measurements:
        groups.setdefault(item.type, []).append(item)
    lines = []
    for name, items in groups.items():
        found = [item.quality for item in items if item.quality is not None]
        count = sum(q.n_weights for q in found)
        if not count:
            lines.append({"type": name, "tensors": 0, "left_out": len(items)})
            continue
        ratios = [q.sqnr for q in found if np.isfinite(q.sqnr)]
        error2 = sum(q.rmse**2 * q.n_weights for q in found)
        energy = sum((q.rmse / q.relative_rmse) ** 2 * q.n_weights if q.relative_rmse else 0.0 for q in found)
        lines.append(
            {
                "type": name,
                "tensors": len(found),
                "left_out": len(items) - len(found),
                "bits_per_weight": sum(q.bits_per_weight * q.n_weights for q in found) / count,
                "relative_rmse": float(np.sqrt(error2 / energy)) if energy else 0.0,
                "max_error": max(q.max_error for q in found),
                "mean_sqnr": float(np.mean(ratios)) if ratios else float("inf"),
            }
        )
    return lines


def check_plot(path: str | Path) -> None:
    """Find out before a long measurement whether :func:`plot` can draw to a path.

    Raises
    ------
    GGUFError
        matplotlib is not installed, it knows no format of that suffix, or the folder does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GGUFError("drawing needs matplotlib; install it with: pip install matplotlib") from None
    path = Path(path)
    formats = Figure().canvas.get_supported_filetypes()
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in formats:
        raise GGUFError(f"{path}: matplotlib draws no files of that suffix; it does: {', '.join(sorted(formats))}")
    if path.is_dir() or not path.parent.is_dir():
        raise GGUFError(f"{path}: {'is a folder' if path.is_dir() else f'the folder {path.parent} does not exist'}")


def plot(measurements: Iterable[Measurement], path: str | Path) -> None:
    """Draw relative error against bits per weight, a point a type, to an image file; needs matplotlib.

    Raises
    ------
    GGUFError
        As :func:`check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    lines = [line for line in summary(measurements) if line["tensors"]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.1)
    axes.grid(visible=True, which="both", alpha=0.3)
    for line in sorted(lines, key=lambda line: line["bits_per_weight"]):
        axes.plot(line["bits_per_weight"], line["relative_rmse"], "o")
        axes.annotate(
            line["type"], (line["bits_per_weight"], line["relative_rmse"]), textcoords="offset points", xytext=(5, 4)
        )
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("relative RMS error")
    figure.savefig(path)
