"""Importance matrices: which columns of a weight matter, measured by llama.cpp's ``llama-imatrix`` or taken from the weights.

Two formats are in use and their suffixes are not reliable, so the content is sniffed. Both keep, for every column of a
tensor, the squares of the activations that met it:

* GGUF: ``NAME.in_sum2``, float32 sums over tokens, and ``NAME.counts``, float32, the tokens, one number an expert.
* legacy ``.dat``: int32 n_entries, then per entry a name, ncall, nval and nval float32, which are means times ncall; then
  the number of chunks and the name of the data set. One ncall serves all experts of an entry: ``llama-imatrix`` writes
  experts that no token reached as mean 1, older tools as 0.

``importance = sums / counts`` in both. A matrix of a large model takes a gigabyte, so entries stay in the file until they
are asked for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ggufx import outputs
from ggufx.container import DEFAULT_ALIGNMENT, MAGIC, Value, ValueType, align_up, encode_header
from ggufx.errors import DiskError, GGUFError
from ggufx.file import open as open_gguf
from ggufx.transforms import ColumnEnergy

__all__ = [
    "ColumnEnergy",
    "Format",
    "ImportanceMatrix",
    "Place",
    "RowImportance",
    "energy",
    "load",
    "metadata",
    "save",
    "summary",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Format = Literal["gguf", "dat"]

_MAX_NAME_NBYTES: Final = 4096
_GGML_MAX_NAME: Final = 64
"""ggml's tensor names, the closing zero included; a loader refuses longer ones."""
_CHUNK_LEN: Final = 1 << 20
_DEFAULT_CHUNK_SIZE: Final = 512
"""Tokens a chunk in ``llama-imatrix`` unless told otherwise."""
_F32_ID: Final = 0
_INT32_MAX: Final = 2**31 - 1

_SAME_INPUT: Final[Mapping[str, tuple[str, ...]]] = {
    "attn_v_b": ("attn_kv_b",),
    "attn_kv_b": ("attn_v_b",),
    "ffn_gate": ("ffn_up",),
    "ffn_gate_shexp": ("ffn_up_shexp",),
    "ffn_gate_exps": ("ffn_up_exps", "ffn_gate_up_exps"),
    "ffn_up_exps": ("ffn_gate_up_exps",),
    "ffn_gate_up_exps": ("ffn_up_exps", "ffn_gate_exps"),
}
"""Tensors that see the very same activations, so that one's data serves the other where it has none of its own.

As ik_llama.cpp has it: its pull requests 250 (MLA; ``attn_k_b`` is transposed and sees others), 1419 (merged experts) and
1805 (the fused product records ``ffn_up`` only).
"""
LATENT: Final = re.compile(r"blk\.\d+\.attn_[kv]_b\.weight")
"""Products by head that ik_llama.cpp's files have as one matrix."""
_PART = re.compile(r"(blk\.\d+\.)([a-z_]+)(\.weight)")
_SPLIT_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d{1,6})\.weight")
"""One expert of files from before the experts of a layer were stacked in one tensor."""


class RowImportance(NamedTuple):
    """Weights of a tensor's columns, ready for an encoder.

    Attributes
    ----------
    values
        float32 [n_experts, row_len], or [1, row_len] when one row serves the whole tensor.
    missing
        Rows of ``values`` for which there is no data; they are all 1.
    """

    values: F32
    missing: int

    def average(self) -> F32:
        """Return the mean over the experts that have data (ones if none has), float32 [row_len]."""
        known = (self.values != 1).any(axis=1)
        rows = self.values[known] if known.any() else self.values
        mean: F32 = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


class Place(NamedTuple):
    """Where the weights of a matrix's columns lie: float32 [row_len] at a byte of a file, to be divided."""

    path: Path
    offset: int
    divisor: float


class _Entry(NamedTuple):
    """Where an entry's sums lie, and its counts."""

    path: Path
    offset: int
    length: int
    """Of the sums, all experts."""
    counts: F64
    """Float64 [n_rows], whole numbers: tokens (GGUF) or calls (legacy), so many rows the sums are cut into."""


class _Identity(NamedTuple):
    """What tells that a file is still the one that was loaded."""

    inode: int
    nbytes: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> _Identity:
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class ImportanceMatrix(Mapping[str, F32]):
    """Tensor name -> importance, float32 [n_rows, length], read when asked for; rows without data are 0.

    ``n_rows`` is the number of counts that the file has for the entry: the experts of a stacked tensor in the GGUF format,
    always 1 in the legacy one. :meth:`rows` cuts by a tensor's shape instead and is what a quantizer wants.

    Attributes
    ----------
    path : Path
    format : "gguf" or "dat"
    datasets : tuple of str
        What the activations were recorded on.
    chunk_count : int
        Chunks of text that were run; 0 if the file does not say.
    chunk_size : int
        Tokens a chunk; 0 if the file does not say (the legacy format never does).
    """

    def __init__(
        self,
        path: Path,
        entries: dict[str, _Entry],
        *,
        format: Format,
        datasets: tuple[str, ...],
        chunk_count: int,
        chunk_size: int,
    ) -> None:
        self.path = path
        self.format: Format = format
        self.datasets = datasets
        self.chunk_count = chunk_count
        self.chunk_size = chunk_size
        self._entries = entries
        self._identities = {member: _Identity.of(member) for member in {entry.path for entry in entries.values()}}
        self._split: dict[str, dict[int, str]] = {}
        for name in entries:
            if match := _SPLIT_EXPERT.fullmatch(name):
                self._split.setdefault(f"{match[1]}_exps.weight", {})[int(match[2])] = name
        for name, entry in entries.items():
            for start in range(0, entry.length, _CHUNK_LEN):
                _check(path, name, self._read(entry, start, min(_CHUNK_LEN, entry.length - start)))

    def __getitem__(self, name: str) -> F32:
        return _mean(self.sums(name), self.counts(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the entry

    def length(self, name: str) -> int:
        """Return how many values an entry has."""
        return self._entries[name].length

    def sums(self, name: str) -> F32:
        """Return an entry's sums as the file has them (legacy: means times calls), float32 [n_rows, length]."""
        entry = self._entries[name]
        return self._read(entry, 0, entry.length).reshape(entry.counts.size, -1)

    def counts(self, name: str) -> F64:
        """Return the tokens (legacy: calls) behind an entry's rows, float64 [n_rows], whole numbers; 0 is no data."""
        return self._entries[name].counts.copy()

    def parts(self, name: str) -> Iterator[F32]:
        """Read an entry's sums a few megabytes at a time, float32 [n] each; no part crosses a row."""
        entry = self._entries[name]
        row_len = entry.length // entry.counts.size
        for start in range(0, entry.length, row_len):
            for at in range(start, start + row_len, _CHUNK_LEN):
                yield self._read(entry, at, min(_CHUNK_LEN, start + row_len - at))

    def _read(self, entry: _Entry, start: int, length: int) -> F32:
        # Opened anew each time: nothing to close, and a matrix may travel to another process.
        if _Identity.of(entry.path) != self._identities[entry.path]:
            raise GGUFError(f"{entry.path}: changed since it was loaded; start again")
        return np.fromfile(entry.path, "<f4", length, offset=entry.offset + 4 * start).astype(np.float32, copy=False)

    def rows(self, name: str, shape: tuple[int, ...]) -> RowImportance | None:
        """Return the weights of a tensor's columns, or ``None`` when the file has none for it.

        Parameters
        ----------
        name
            Tensor name, as llama.cpp has it. Entries of single experts (``blk.0.ffn_up.7.weight``) are joined to the
            stack; a tensor without an entry takes that of one that sees the same activations (``ffn_gate_exps`` of
            ``ffn_up_exps``, ``attn_v_b`` of ``attn_kv_b``) if its length fits.
        shape
            Its shape, numpy order; three axes are stacked experts. So are the heads of ``attn_k_b`` and ``attn_v_b``, which lie
            below each other in ik_llama.cpp's files: recorded are weights for each, or for all.

        Raises
        ------
        GGUFError
            The lengths do not fit, or the file is not the one that was loaded.

        Notes
        -----
        Rows without data, all zero or of count 0, become 1 and are counted. So are, in the stacks of a legacy file, rows
        that are 1 throughout: ``llama-imatrix`` writes so for experts that no token was routed to.
        """
        places = self.places(name, shape)
        if places is None:
            return None
        values = np.ones((len(places), shape[-1]), np.float32)
        for row, place in zip(values, places, strict=True):
            if place is not None:
                row[:] = self._at(place, shape[-1])
        return RowImportance(values, sum(place is None for place in places))

    def places(self, name: str, shape: tuple[int, ...]) -> tuple[Place | None, ...] | None:
        """Return where each row of :meth:`rows` lies, ``None`` for rows without data; ``None`` for no entry at all.

        For who reads the weights later, or on another machine. Parameters and errors as in :meth:`rows`.
        """
        experts = shape[0] if len(shape) == 3 else self._heads(name, shape)
        row_len = shape[-1]
        found = self._joined(name, experts, row_len)
        if found is None:
            for other in _same_input(name):
                if other in self._entries and self._fits(other, experts, row_len):
                    found = self._joined(other, experts, row_len)
                    break
        if found is None:
            return None
        return tuple(self._with_data(place, row_len, stacked=len(found) > 1) for place in found)

    def _heads(self, name: str, shape: tuple[int, ...]) -> int:
        """Return how many heads of a matrix have weights of their own: 1 but for latent projections."""
        entry = self._entries.get(name)
        if entry is None or len(shape) != 2 or not LATENT.fullmatch(name):
            return 1
        heads, rest = divmod(entry.length, shape[1])
        return heads if heads and not rest and shape[0] % heads == 0 else 1

    def _with_data(self, place: Place | None, row_len: int, *, stacked: bool) -> Place | None:
        if place is None:
            return None
        values = self._at(place, row_len)
        unreached = self.format == "dat" and stacked and bool((values == 1).all())
        return None if unreached or not values.any() else place

    def _at(self, place: Place, row_len: int) -> F32:
        """Divide as llama.cpp does, in float32."""
        if _Identity.of(place.path) != self._identities[place.path]:
            raise GGUFError(f"{place.path}: changed since it was loaded; start again")
        values = np.fromfile(place.path, "<f4", row_len, offset=place.offset).astype(np.float32, copy=False)
        return values / np.float32(place.divisor)

    def _joined(self, name: str, experts: int, row_len: int) -> list[Place | None] | None:
        """Return where the rows for a tensor lie, from its own entry or its experts': one, or one an expert."""
        if name in self._entries:
            if not self._fits(name, experts, row_len):
                raise self._misfit(name, name, experts, row_len)
            return self._rows_of(name, row_len)
        single = self._split.get(name)
        if single is None:
            return None
        places: list[Place | None] = [None] * experts
        for expert, entry in single.items():
            if expert >= experts:
                raise GGUFError(f"{self.path}: has {entry!r}, but {name} has {experts} experts")
            if not self._fits(entry, 1, row_len):
                raise self._misfit(entry, name, 1, row_len)
            (places[expert],) = self._rows_of(entry, row_len)
        return places

    def _rows_of(self, name: str, row_len: int) -> list[Place | None]:
        entry = self._entries[name]
        count = entry.length // row_len
        divisors = np.broadcast_to(entry.counts, count) if entry.counts.size == 1 else entry.counts
        return [
            Place(entry.path, entry.offset + 4 * row_len * row, float(divisor)) if divisor > 0 else None
            for row, divisor in enumerate(divisors)
        ]

    def _fits(self, name: str, experts: int, row_len: int) -> bool:
        entry = self._entries[name]
        return entry.length in (row_len, experts * row_len) and entry.counts.size in (1, entry.length // row_len)

    def _misfit(self, entry: str, name: str, experts: int, row_len: int) -> GGUFError:
        length, n_rows = self._entries[entry].length, self._entries[entry].counts.size
        where = name if entry == name else f"{name}, of which {entry} is an expert"
        if length in (row_len, experts * row_len):
            return GGUFError(f"{self.path}: imatrix has {n_rows} counts for the {experts} experts of {where}")
        return GGUFError(
            f"{self.path}: imatrix size {length} is different from tensor size {experts * row_len} for {where} "
            f"({experts} x {row_len}); it was made from another model"
        )


def _same_input(name: str) -> Iterator[str]:
    if match := _PART.fullmatch(name):
        yield from (f"{match[1]}{other}{match[3]}" for other in _SAME_INPUT.get(match[2], ()))


def _mean(sums: F32, counts: F64) -> F32:
    """Divide as llama.cpp does, in float32; float32 [n_rows, length], 0 where the count is."""
    divisors = counts.astype(np.float32).reshape(-1, 1)
    return np.divide(sums, divisors, out=np.zeros_like(sums), where=divisors > 0)


def _check(path: Path, name: str, values: F32) -> None:
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        raise GGUFError(f"{path}: entry {name!r} has {int(bad.sum())} values that are NaN, infinite or negative")


# Reading --------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> ImportanceMatrix:
    """Open an importance matrix, GGUF or legacy, whatever its suffix.

    Every value is looked at once, in small pieces; none is kept. The file must stay as it is while the matrix is used.

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
        entries: dict[str, _Entry] = {}
        for tensor in file.tensors:
            base, _, kind = tensor.name.rpartition(".")
            if kind not in ("in_sum2", "counts"):
                continue
            other = f"{base}.{'counts' if kind == 'in_sum2' else 'in_sum2'}"
            if other not in file:
                there, missing = ("sums", "counts") if kind == "in_sum2" else ("counts", "sums")
                raise GGUFError(f"{path}: entry {base!r} has {there} but no {missing}; the file is damaged")
            if tensor.type != "F32":
                raise GGUFError(f"{path}: {tensor.name!r} is of type {tensor.type}; sums and counts must be F32")
            if kind == "counts":
                continue
            n_rows = file[other].size
            if not tensor.size or not n_rows or tensor.size % n_rows:
                raise GGUFError(f"{path}: entry {base!r} has {tensor.size} sums for {n_rows} counts; they do not fit")
            if file[other].type != "F32":
                raise GGUFError(f"{path}: {other!r} is of type {file[other].type}; sums and counts must be F32")
            counts = file[other].numpy(np.float32).reshape(-1)
            _check(path, f"{base}.counts", counts)
            # llama.cpp rounds to whole numbers, halves up.
            whole = np.floor(counts.astype(np.float64) + 0.5)
            entries[base] = _Entry(tensor.path, tensor.file_offset, tensor.size, whole)
        if not entries:
            raise GGUFError(f"{path}: is a GGUF without *.in_sum2 tensors, so no importance matrix")
        return ImportanceMatrix(
            path,
            entries,
            format="gguf",
            datasets=tuple(file.facts.texts("imatrix.datasets", ())),
            chunk_count=file.facts.integer("imatrix.chunk_count", 0),
            chunk_size=file.facts.integer("imatrix.chunk_size", 0),
        )


def _load_legacy(path: Path) -> ImportanceMatrix:
    total = path.stat().st_size
    with path.open("rb") as file:

        def left() -> int:
            return total - file.tell()

        def take(nbytes: int, what: str) -> bytes:
            at = file.tell()
            data = file.read(nbytes) if nbytes <= total - at else b""
            if len(data) != nbytes:
                raise GGUFError(f"{path}: failed reading {what} at byte {at} of {total}: not an imatrix, or truncated")
            return data

        def number(what: str) -> int:
            return int(struct.unpack("<i", take(4, what))[0])

        def text(length: int, what: str) -> str:
            try:
                return take(length, what).decode("utf-8")
            except UnicodeDecodeError as error:
                raise GGUFError(f"{path}: failed reading {what}: not UTF-8 ({error.reason})") from None

        count = number("the number of entries")
        if not 0 < count <= total // 12:
            raise GGUFError(f"{path}: claims {count} entries in {total} bytes: not an importance matrix")
        entries: dict[str, _Entry] = {}
        for entry in range(count):
            length = number(f"name for entry {entry}")
            if not 0 < length <= _MAX_NAME_NBYTES:
                raise GGUFError(f"{path}: failed reading name for entry {entry} (length {length})")
            name = text(length, f"name for entry {entry}")
            if name in entries:
                raise GGUFError(f"{path}: entry {name!r} occurs twice")
            calls = number(f"calls of entry {entry}")
            size = number(f"size of entry {entry}")
            if size <= 0 or size * 4 > left():
                raise GGUFError(f"{path}: failed reading data for entry {entry}, {name!r} ({size} values)")
            # llama.cpp takes the values as they are where there was no call.
            entries[name] = _Entry(path, file.tell(), size, np.array([max(calls, 1)], np.float64))
            file.seek(size * 4, 1)
        chunks = 0
        datasets: tuple[str, ...] = ()
        # Files of early 2024 end here, or after the number of chunks.
        if left():
            chunks = number("the number of chunks")
            if chunks < 0:
                raise GGUFError(f"{path}: claims {chunks} chunks: damaged")
        if left():
            length = number("the length of the data set's name")
            if length < 0:
                raise GGUFError(f"{path}: failed reading the name of the data set (length {length})")
            datasets = (text(length, "the name of the data set"),) if length else ()
        if left():
            raise GGUFError(
                f"{path}: {left()} bytes follow the last field: damaged (some converters write the number of experts "
                "where the number of values belongs; convert again from the GGUF)"
            )
    return ImportanceMatrix(path, entries, format="dat", datasets=datasets, chunk_count=chunks, chunk_size=0)


# Writing --------------------------------------------------------------------------------------------------------------


def save(matrix: ImportanceMatrix, path: str | Path, format: Format = "gguf", *, overwrite: bool = False) -> list[str]:
    """Write an importance matrix in either format, as ``llama-imatrix`` would; one row at a time in memory.

    Between files of one format all is kept, and from legacy to GGUF too (sums and counts times the tokens of a chunk, a
    power of two, so that the way back gives the same bytes: entries keep their order). The legacy format has one count for
    all experts.

    Parameters
    ----------
    matrix
        From :func:`load`.
    path
        Output; grows under a name that nobody can guess.
    format
        ``"gguf"`` or ``"dat"``.
    overwrite
        Replace an existing output.

    Returns
    -------
    list of str
        Sentences on what the format cannot hold, or what had to be assumed.

    Raises
    ------
    OutputExists, DiskError, GGUFError
        The output exists; writing failed; names or values that the format cannot hold.
    """
    path = Path(path)
    if format not in get_args(Format):
        raise GGUFError(f"{format!r} is no format of importance matrices; choose gguf or dat")
    try:
        with outputs.replacing(path, overwrite=overwrite) as file:
            return (_write_gguf if format == "gguf" else _write_legacy)(matrix, file)
    except OSError as error:
        raise DiskError(f"{error.filename or path}: {error.strerror or error}; nothing was written") from error


def _write_gguf(matrix: ImportanceMatrix, file: BinaryIO) -> list[str]:
    chunk_size = matrix.chunk_size or _DEFAULT_CHUNK_SIZE
    # A legacy call is a chunk; upstream's own reader of legacy files scales the same way.
    scale = np.float32(chunk_size if matrix.format == "dat" else 1)
    keys = {
        "general.type": Value.string("imatrix"),
        "imatrix.datasets": Value.array(ValueType.STRING, matrix.datasets),
        "imatrix.chunk_count": Value.u32(matrix.chunk_count),
        "imatrix.chunk_size": Value.u32(chunk_size),
    }
    names = list(matrix)
    directory: list[tuple[str, tuple[int, ...], int, int]] = []
    offset = 0
    for name in names:
        if len(f"{name}.in_sum2".encode()) >= _GGML_MAX_NAME:
            raise GGUFError(
                f"{matrix.path}: entry {name!r} needs a tensor name of {_GGML_MAX_NAME} bytes or more, which llama.cpp does "
                "not load; write --format dat"
            )
        n_rows = matrix.counts(name).size
        for kind, shape in (("in_sum2", (n_rows, matrix.length(name) // n_rows)), ("counts", (n_rows, 1))):
            directory.append((f"{name}.{kind}", shape, _F32_ID, offset))
            offset += align_up(4 * shape[0] * shape[1], DEFAULT_ALIGNMENT)
    file.write(encode_header(keys, directory, DEFAULT_ALIGNMENT))
    inexact = 0
    for name in names:
        exact = matrix.counts(name) * scale
        counts = exact.astype("<f4")
        inexact += bool((counts != exact).any())
        for part in matrix.parts(name):
            with np.errstate(over="ignore"):
                file.write(_finite(matrix, name, part * scale))
        _pad(file, 4 * matrix.length(name))
        file.write(counts.tobytes())
        _pad(file, counts.nbytes)
    notes = []
    if not matrix.chunk_size:
        notes.append(f"the source does not say how many tokens a chunk has: {chunk_size} assumed")
    if inexact:
        notes.append(f"{inexact} entries have counts that float32 rounds")
    return notes


def _pad(file: BinaryIO, nbytes: int) -> None:
    file.write(bytes(align_up(nbytes, DEFAULT_ALIGNMENT) - nbytes))


def _write_legacy(matrix: ImportanceMatrix, file: BinaryIO) -> list[str]:
    chunk_size = 1 if matrix.format == "dat" else matrix.chunk_size or _DEFAULT_CHUNK_SIZE
    names = [name for name in matrix if matrix.counts(name).any()]
    empty = rounded = unequal = 0
    if not names:
        raise GGUFError(f"{matrix.path}: no entry has data; a legacy file cannot be empty")
    file.write(struct.pack("<i", len(names)))
    for name in names:
        counts = matrix.counts(name)
        # Rounded up, as upstream does: a file with 0 calls would lose its scale.
        calls = int(-(-counts.max() // chunk_size))
        if calls > _INT32_MAX or matrix.length(name) > _INT32_MAX:
            raise GGUFError(f"{matrix.path}: entry {name!r} has more calls or values than a legacy file can say")
        empty += int((counts == 0).sum())
        unequal += bool((counts != counts[0]).any())
        rounded += bool((counts != calls * chunk_size).any())
        data = name.encode()
        file.write(struct.pack("<i", len(data)) + data + struct.pack("<ii", calls, matrix.length(name)))
        row_len = matrix.length(name) // counts.size
        at = 0
        for part in matrix.parts(name):
            count = counts[at // row_len]
            at += part.size
            # In float64, so that a count of whole chunks divides without a rounding: the way back is then exact.
            mean = part * np.float64(calls) / count if count else np.full(part.size, calls, np.float64)
            with np.errstate(over="ignore"):
                file.write(_finite(matrix, name, mean.astype(np.float32)))
    dataset = matrix.datasets[-1].encode() if matrix.datasets else b""
    chunks = min(matrix.chunk_count, _INT32_MAX)
    file.write(struct.pack("<ii", chunks, len(dataset)) + dataset)
    notes = []
    if len(names) < len(matrix):
        notes.append(f"{len(matrix) - len(names)} entries without any data are left out")
    if empty:
        notes.append(f"{empty} experts without data become weight 1, as llama-imatrix writes them")
    if unequal:
        notes.append(f"{unequal} entries lose the counts of their experts: a legacy entry has one for all")
    if rounded:
        notes.append(f"{rounded} entries keep their means, but their counts are rounded up to whole chunks")
    if len(matrix.datasets) > 1:
        notes.append(f"of {len(matrix.datasets)} data sets the last is named")
    if matrix.format == "gguf":
        notes.append(f"the tokens of a chunk ({chunk_size}) are not recorded")
    return notes


def _finite(matrix: ImportanceMatrix, name: str, values: F32) -> bytes:
    if not np.isfinite(values).all():
        raise GGUFError(f"{matrix.path}: entry {name!r} has values too large for the other format")
    return values.astype("<f4").tobytes()


# Looking --------------------------------------------------------------------------------------------------------------


def summary(matrix: ImportanceMatrix) -> dict[str, Any]:
    """Return what a matrix holds, as JSON data: the file, and per entry its length, counts, means and experts without data.

    ``rows`` is 1 for every entry of a legacy file, which does not say where experts begin; so its ``without_data`` is
    known only for whole entries.
    """
    entries: list[dict[str, Any]] = []
    for name in matrix:
        counts = matrix.counts(name)
        row_len = matrix.length(name) // counts.size
        nonzero = np.zeros(counts.size, bool)
        low, high, total = np.inf, 0.0, 0.0
        at = 0
        for part in matrix.parts(name):
            row = at // row_len
            at += part.size
            nonzero[row] |= bool(part.any())
            if counts[row]:
                mean = part / np.float32(counts[row])
                low, high = min(low, float(mean.min())), max(high, float(mean.max()))
                total += float(mean.sum(dtype=np.float64))
        known = int((counts > 0).sum()) * row_len
        entries.append(
            {
                "name": name,
                "length": matrix.length(name),
                "rows": int(counts.size),
                "row_len": row_len,
                "min_count": int(counts.min()),
                "max_count": int(counts.max()),
                "without_data": np.flatnonzero(~(nonzero & (counts > 0))).tolist(),
                "min": low if known else None,
                "mean": total / known if known else None,
                "max": high if known else None,
            }
        )
    return {
        "path": str(matrix.path),
        "format": matrix.format,
        "datasets": list(matrix.datasets),
        "chunk_count": matrix.chunk_count,
        "chunk_size": matrix.chunk_size,
        "n_entries": len(entries),
        "n_values": sum(entry["length"] for entry in entries),
        "n_without_data": sum(len(entry["without_data"]) for entry in entries),
        "entries": entries,
    }


def metadata(matrix: ImportanceMatrix) -> dict[str, Value]:
    """Return the ``quantize.imatrix.*`` keys of a model that was quantized with a matrix.

    Names, types and order are those of ``llama-quantize``: numbers are u32 (older versions wrote i32), of several data sets
    the first is named, and unknown ones are left out.
    """
    keys = {"quantize.imatrix.file": Value.string(str(matrix.path))}
    if matrix.datasets:
        keys["quantize.imatrix.dataset"] = Value.string(matrix.datasets[0])
    keys["quantize.imatrix.entries_count"] = Value.u32(len(matrix))
    if matrix.chunk_count:
        keys["quantize.imatrix.chunks_count"] = Value.u32(matrix.chunk_count)
    return keys


# Importance from the weights themselves -------------------------------------------------------------------------------


def energy(chunks: Iterable[F32]) -> F32:
    """Return the mean square of a matrix's columns, float32 [row_len], from its rows in chunks, float32 [n, row_len].

    See :class:`ColumnEnergy`.
    """
    columns = ColumnEnergy()
    for rows in chunks:
        columns.add(rows)
    return columns.result()
