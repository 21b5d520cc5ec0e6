"""Compare two GGUFs or hybrids: keys, names, order, shapes, types and decoded values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufx import execute
from ggufx.execute import Progress
from ggufx.file import Tensor
from ggufx.hybrid import HybridFile, ScaledTensor, open
from ggufx.values import Value, ValueType, as_unicode

__all__ = ["Difference", "TensorDifference", "diff"]

_CHUNK_LEN = 1 << 20
_CHUNK_NBYTES = 1 << 22


@dataclass
class TensorDifference:
    """How a tensor of the second file differs from the first's of the same name.

    Attributes
    ----------
    differing
        Number of values that differ.
    max_error, rms_error
        Absolute, of decoded values.
    relative_rms
        The root of the sum of squared errors over the sum of the first file's squared values: the figure of
        :func:`ggufx.verify.verify` where the first file is the source.
    """

    name: str
    types: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    differing: int = 0
    max_error: float = 0.0
    rms_error: float = 0.0
    relative_rms: float = 0.0
    note: str = ""


@dataclass
class Difference:
    """Result of :func:`diff`; :attr:`same` when the files say the same, whatever their packing order."""

    paths: tuple[str, str]
    keys: list[str] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    reordered: bool = False
    tensors: list[TensorDifference] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return whether the files are the same, and how many differences there are of each kind."""
        found = (
            "the same"
            if self.same
            else (
                f"{len(self.keys)} keys, {len(self.tensors)} tensors, {len(self.only_first)} only in the first, "
                f"{len(self.only_second)} only in the second"
            )
        )
        return f"<Difference of {self.paths[0]!r} and {self.paths[1]!r}: {found}>"

    @property
    def same(self) -> bool:
        """Whether keys, names, shapes, types and values are all equal."""
        return not (self.keys or self.only_first or self.only_second or self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain JSON data."""
        return {"same": self.same, **asdict(self)}


def diff(
    first: str | Path, second: str | Path, *, dialect: str | None = None, progress: Progress | None = None
) -> Difference:
    """Compare two GGUF files, or directories of hybrids.

    Parameters
    ----------
    first, second
        The files; any members of splits; or hybrids, which have no keys: those of the other one are not compared.
    dialect
        As in :func:`ggufx.open`, for both.
    progress
        Told about the bytes of the first file done.

    Returns
    -------
    Difference
        Tensors of equal type are compared by bytes first; those that differ, and those of different types, by value.
    """
    with open(first, dialect=dialect) as a, open(second, dialect=dialect) as b, execute.open_files():
        result = Difference((str(first), str(second)))
        if isinstance(a, HybridFile) == isinstance(b, HybridFile):
            result.keys = _keys(a.metadata.typed(), b.metadata.typed())
        result.only_first = [name for name in a if name not in b]
        result.only_second = [name for name in b if name not in a]
        common = [name for name in a if name in b]
        result.reordered = common != [name for name in b if name in a]
        total, done = a.data_nbytes, 0
        for name in common:
            found = _tensor(a[name], b[name])
            if found is not None:
                result.tensors.append(found)
            done += a[name].nbytes
            if progress is not None:
                progress(done, total)
    return result


def _keys(a: dict[str, Value], b: dict[str, Value]) -> list[str]:
    lines = [f"- {as_unicode(key)} = {_text(a[key])}" for key in a if key not in b and not key.startswith("split.")]
    lines += [f"+ {as_unicode(key)} = {_text(b[key])}" for key in b if key not in a and not key.startswith("split.")]
    lines += [
        f"~ {as_unicode(key)}: {_text(a[key])} -> {_text(b[key])}"
        for key in a
        if key in b and not key.startswith("split.") and not a[key].same(b[key])
    ]
    return lines


def _text(value: Value) -> str:
    if value.type is ValueType.ARRAY:
        assert value.element is not None
        return f"{value.element.name} array of {len(value.data)}"
    text = f"{value.type.name} {value.data!r}"
    return text if len(text) <= 80 else text[:77] + "..."


def _tensor(a: Tensor, b: Tensor) -> TensorDifference | None:
    result = TensorDifference(a.name, (a.type, b.type), (a.shape, b.shape))
    if a.shape != b.shape:
        return result
    if a.type == b.type and _same_bytes(a, b):
        return None
    if not (_decodable(a) and _decodable(b)):
        result.note = "the bytes differ and the type cannot be decoded here"
        return result
    _values(a, b, result)
    if result.differing or a.type != b.type:
        return result
    result.note = "the bytes differ, the values do not"
    return result


def _read(tensor: Tensor, slot: str, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Read into memory that is used again: a model's mapped pages would all count as this process's memory."""
    buffer = execute.scratch(slot, nbytes)
    execute.read_into(str(tensor.path), tensor.file_offset + start, buffer)
    return buffer


def _decodable(tensor: Tensor) -> bool:
    return isinstance(tensor, ScaledTensor) or (tensor.codec is not None and tensor.codec.can_decode)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.nbytes != b.nbytes:
        return False
    nbytes = a.nbytes
    if isinstance(a, ScaledTensor) and isinstance(b, ScaledTensor):
        if a.scales.tobytes() != b.scales.tobytes():
            return False
        nbytes = a.size  # the scales lie elsewhere
    parts = ((start, min(_CHUNK_NBYTES, nbytes - start)) for start in range(0, nbytes, _CHUNK_NBYTES))
    return all(np.array_equal(_read(a, "a", *part), _read(b, "b", *part)) for part in parts)


def _rows(tensor: Tensor, slot: str, start: int, count: int, row_len: int, *, scaled: bool) -> npt.NDArray[np.float64]:
    if isinstance(tensor, ScaledTensor):
        codes = _read(tensor, slot, start * row_len, count * row_len).reshape(count, row_len)
        return tensor.decode_rows(codes, start).astype(np.float64)
    assert tensor.codec is not None
    width = tensor.codec.layout.row_nbytes(row_len)
    packed = _read(tensor, slot, start * width, count * width).reshape(count, width)
    decoded: npt.NDArray[np.float64] = tensor.codec.decode(packed, dtype=np.float64)
    factors = tensor.row_factors(np.arange(start, start + count)) if scaled else None
    return decoded if factors is None else decoded * factors


def _values(a: Tensor, b: Tensor, result: TensorDifference) -> None:
    row_len = a.shape[-1] if a.shape else 1
    n_rows = a.size // max(1, row_len)
    step = max(1, _CHUNK_LEN // max(1, row_len))
    squares = energy = 0.0
    # Equal factors are compared as the tensors that they are, and do not enter into rounding here.
    factors = [np.ones(1, np.float32) if tensor.scale is None else tensor.scale for tensor in (a, b)]
    scaled = not np.array_equal(factors[0], factors[1])
    for start in range(0, n_rows, step):
        count = min(step, n_rows - start)
        x = _rows(a, "a", start, count, row_len, scaled=scaled)
        y = _rows(b, "b", start, count, row_len, scaled=scaled)
        unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
        energy += float(np.square(x).sum())
        differing = int(np.count_nonzero(unequal))
        if not differing:
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.where(unequal, np.abs(x - y), 0.0)
        result.differing += differing
        result.max_error = max(result.max_error, float(np.nan_to_num(error, nan=np.inf).max()))
        squares += float(np.square(error).sum())
    size = max(1, a.size)
    result.rms_error = float(np.sqrt(squares / size))
    result.relative_rms = float(np.sqrt(squares / energy)) if energy else 0.0
