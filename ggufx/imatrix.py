"""Importance matrices: which columns of a weight matter, measured by llama.cpp's ``llama-imatrix``.

Two formats are in use and their suffixes are not reliable, so the content is sniffed: the newer one is a GGUF with
``NAME.in_sum2`` and ``NAME.counts``; the legacy ``.dat`` is int32 n_entries, then per entry a name, ncall, nval and nval
float32, then the number of chunks and the name of the data set.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggufx.container import MAGIC
from ggufx.errors import GGUFError
from ggufx.file import open as open_gguf

__all__ = ["ImportanceMatrix", "load"]

F32 = npt.NDArray[np.float32]

_MAX_NAME_NBYTES = 4096


class ImportanceMatrix(Mapping[str, F32]):
    """Tensor name -> importance, float32 [n_experts, row_len] (one expert for a plain matrix).

    Attributes
    ----------
    path : Path
    datasets : tuple of str
        What the activations were recorded on.
    chunk_count : int
        Chunks of text that were run; 0 if the file does not say.
    """

    def __init__(self, path: Path, entries: dict[str, F32], datasets: tuple[str, ...], chunk_count: int) -> None:
        self.path = path
        self.datasets = datasets
        self.chunk_count = chunk_count
        self._entries = entries

    def __getitem__(self, name: str) -> F32:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def columns(self, name: str, shape: tuple[int, ...]) -> F32 | None:
        """Return the importance of a tensor's columns, or ``None`` when the file has none for it.

        Parameters
        ----------
        name
            Tensor name.
        shape
            Its shape, numpy order.

        Returns
        -------
        float32 [n_experts, row_len], where ``n_experts`` is 1 or the stacked experts of ``shape``

        Raises
        ------
        GGUFError
            The lengths do not fit.
        """
        found = self._entries.get(name)
        if found is None:
            return None
        row_len = shape[-1]
        experts = shape[0] if len(shape) == 3 else 1
        if found.size not in (row_len, experts * row_len):
            raise GGUFError(
                f"{self.path}: imatrix size {found.size} is different from tensor size {experts * row_len} for {name} "
                f"({experts} x {row_len})"
            )
        return found.reshape(-1, row_len)


def load(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix, GGUF or legacy, whatever its suffix.

    Values are mean squares of the activations: sums divided by their counts. Experts that no token was routed to have
    importance 0.

    Raises
    ------
    GGUFError
        The file is neither, or damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    return _load_gguf(path) if magic == MAGIC else _load_legacy(path)


def _load_gguf(path: Path) -> ImportanceMatrix:
    with open_gguf(path) as file:
        entries: dict[str, F32] = {}
        for name in file:
            if not name.endswith(".in_sum2"):
                continue
            base = name.removesuffix(".in_sum2")
            if f"{base}.counts" not in file:
                raise GGUFError(f"{path}: entry {base!r} has sums but no counts; the file is damaged")
            sums = file[name].numpy(np.float32)
            sums = sums.reshape(-1, sums.shape[-1])
            counts = file[f"{base}.counts"].numpy(np.float32).reshape(-1, 1)
            if counts.shape[0] != sums.shape[0]:
                raise GGUFError(f"{path}: entry {base!r} has {sums.shape[0]} rows of sums but {counts.shape[0]} counts")
            mean = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
            entries[base] = _checked(path, base, mean)
        if not entries:
            raise GGUFError(f"{path}: is a GGUF without *.in_sum2 tensors, so no importance matrix")
        datasets = file.metadata.get("imatrix.datasets", ())
        return ImportanceMatrix(path, entries, tuple(datasets), int(file.metadata.get("imatrix.chunk_count", 0)))


def _load_legacy(path: Path) -> ImportanceMatrix:
    data = path.read_bytes()
    position = 0

    def number(what: str) -> int:
        nonlocal position
        if position + 4 > len(data):
            raise GGUFError(
                f"{path}: failed reading {what} at byte {position} of {len(data)}: not an imatrix, or truncated"
            )
        (value,) = struct.unpack_from("<i", data, position)
        position += 4
        return int(value)

    count = number("the number of entries")
    if not 0 < count <= len(data) // 12:
        raise GGUFError(f"{path}: claims {count} entries in {len(data)} bytes: not an importance matrix")
    entries: dict[str, F32] = {}
    for entry in range(count):
        length = number(f"name for entry {entry}")
        if not 0 < length <= _MAX_NAME_NBYTES or position + length > len(data):
            raise GGUFError(f"{path}: failed reading name for entry {entry} (length {length})")
        name = data[position : position + length].decode("utf-8", "replace")
        position += length
        calls = number(f"calls of entry {entry}")
        size = number(f"size of entry {entry}")
        if size <= 0 or size * 4 > len(data) - position:
            raise GGUFError(f"{path}: failed reading data for entry {entry}, {name!r} ({size} values)")
        values = np.frombuffer(data, "<f4", size, position).astype(np.float32)
        position += size * 4
        entries[name] = _checked(path, name, (values / np.float32(max(calls, 1))).reshape(1, -1))
    chunks = 0
    dataset: tuple[str, ...] = ()
    if position + 8 <= len(data):
        chunks = number("the number of chunks")
        length = number("the length of the data set's name")
        if 0 < length <= len(data) - position:
            dataset = (data[position : position + length].decode("utf-8", "replace"),)
    return ImportanceMatrix(path, entries, dataset, chunks)


def _checked(path: Path, name: str, values: F32) -> F32:
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        raise GGUFError(f"{path}: entry {name!r} has {int(bad.sum())} values that are NaN, infinite or negative")
    return values
