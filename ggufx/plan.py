"""Plans: pure data that says what will be written, from what, in which order, at which offset.

A command builds a :class:`Plan` and hands it to :func:`ggufx.execute.execute`. Nothing here reads a tensor's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ggufx import container, types
from ggufx.checkpoint import read_shard
from ggufx.container import Value, ValueType, align_up, encode_header, read_container
from ggufx.errors import PlanError
from ggufx.values import as_unicode
from ggufx.version import __version__

__all__ = [
    "Matrix",
    "Plan",
    "PlannedFile",
    "PlannedShard",
    "PlannedTensor",
    "PlannedText",
    "Span",
    "Tile",
    "Transform",
    "Weights",
    "build",
    "copy_tensor",
    "placed_in_shard",
    "plan_tensor",
    "plan_unpacked",
]

QUANTIZATION_VERSION: Final = 2
"""Value of ``general.quantization_version``: ggml.h's GGML_QNT_VERSION."""
TILE_LEN = 1 << 21
"""Elements of a tile, about: big enough to hide the cost of a task, small enough for the processor's cache."""
DEVICE_TILE_LEN = 1 << 23
"""The same for tiles that a GPU encodes, which has more lanes to fill: an expert of a large model."""

SOURCE_BITS: Mapping[str, int] = {
    "FP8": 8, "FP8_F32": 8, "FP8_BF16": 8, "FP8_F16": 8, "FP4": 4, "BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64
}  # fmt: skip
"""Bits per element of the kinds of checkpoint tensors; FP8 and FP4 carry E8M0 scales beside them, FP8_F32 float32 ones ..."""
FLOAT_SCALES: Final[Mapping[str, str]] = {"FP8_F32": "F32", "FP8_BF16": "BF16", "FP8_F16": "F16"}
"""Safetensors' dtype of the scales, by the kinds of FP8 whose scales need not be powers of two."""
FP8_KINDS: Final = ("FP8", *FLOAT_SCALES)
_SCALE_NBYTES: Final[Mapping[str, int]] = {"FP8_F32": 4, "FP8_BF16": 2, "FP8_F16": 2}


class Span(NamedTuple):
    """A byte range of a source file."""

    file: int
    """Index into :attr:`Plan.source_files`."""
    offset: int
    nbytes: int


class Matrix(NamedTuple):
    """A source tensor seen as rows, or some of its rows, with its scales if it has any.

    ``rows_per_scale`` x ``len_per_scale`` elements share one scale; scales are row-major
    [ceil(rows / rows_per_scale), ceil(row_len / len_per_scale)]. Both spans start where the first row's bytes do.
    """

    name: str
    kind: str
    """A key of :data:`SOURCE_BITS`, or the name of a codec for rows that are packed already."""
    rows: int
    row_len: int
    codes: Span
    scale_name: str | None = None
    scales: Span | None = None
    rows_per_scale: int = 1
    len_per_scale: int = 1
    phase: int = 0
    """Rows of the first row of scales that lie before the first row."""
    step: int = 1
    """Every ``step``-th row is meant; only of rows that share no scales."""
    transposed: bool = False
    """The rows become columns: the output has ``row_len`` rows of ``rows``."""

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row of codes."""
        if self.kind in SOURCE_BITS:
            return self.row_len * SOURCE_BITS[self.kind] // 8
        return types.get(self.kind).layout.row_nbytes(self.row_len)

    @property
    def scales_nbytes(self) -> int:
        """Bytes of a row of scales."""
        return -(-self.row_len // self.len_per_scale) * _SCALE_NBYTES.get(self.kind, 1)

    def take(self, start: int, rows: int, step: int = 1, *, transposed: bool = False) -> Matrix:
        """Return some rows: those from ``start``, every ``step``-th, ``rows`` of them.

        Raises
        ------
        PlanError
            Rows that share scales cannot be taken with gaps.
        """
        if step > 1 and self.rows_per_scale > 1:
            raise PlanError(
                f"tensor {self.name!r}: every {step}th row of rows that share scales; this is a bug in ggufx"
            )
        part = self._replace(rows=rows, step=step, transposed=transposed, phase=start % self.rows_per_scale)
        codes = Span(
            self.codes.file, self.codes.offset + start * self.row_nbytes, ((rows - 1) * step + 1) * self.row_nbytes
        )
        if self.scales is None:
            return part._replace(codes=codes)
        first, end = start // self.rows_per_scale, -(-(start + (rows - 1) * step + 1) // self.rows_per_scale)
        offset = self.scales.offset + first * self.scales_nbytes
        return part._replace(codes=codes, scales=Span(self.scales.file, offset, (end - first) * self.scales_nbytes))

    def cut(self, start: int, stop: int) -> tuple[Span, ...]:
        """Return the spans of rows ``start`` to ``stop``."""
        begin, count = start * self.step, (stop - start - 1) * self.step + 1
        width = self.row_nbytes
        codes = Span(self.codes.file, self.codes.offset + begin * width, count * width)
        if self.scales is None:
            return (codes,)
        first = (self.phase + begin) // self.rows_per_scale
        end = -(-(self.phase + begin + count) // self.rows_per_scale)
        width = self.scales_nbytes
        return codes, Span(self.scales.file, self.scales.offset + first * width, (end - first) * width)


class Transform(NamedTuple):
    """How a tile's source bytes become its output bytes (see :mod:`ggufx.transforms`).

    Attributes
    ----------
    op
        ``copy`` bytes as they are; ``pack`` native codes and scales, exactly; ``cast`` one number type to another that
        holds it, exactly; ``encode`` decode to float32 and quantize; ``codes`` and ``scales`` take the one or the other out
        of rows that ``pack`` made, exactly; ``factor`` make the factor of a matrix (:mod:`ggufx.factors`), one float32.
    kind, target
        Source kind (see :class:`Matrix`) and codec name.
    parts
        Row length of each source that is concatenated along the row; usually one.
    rows_per_scale
        As in :class:`Matrix`.
    exact
        ``encode`` must not lose a bit (a test of every value); else it is an error.
    strict
        Refuse codes that consumers disagree on (E4M3 NaN, E8M0 255).
    limit
        ``cast`` to an integer type: values must lie in [0, limit).
    step
        The spans hold the rows between, too: every ``step``-th is meant.
    transposed
        The spans hold the columns: ``parts[0]`` source rows of as many elements as the tile has rows.
    effort, objective
        ``encode``: as in :meth:`ggufx.types.Codec.encode`. No effort: the C library's bytes where the type promises them,
        else ``normal``.
    importance
        ``encode``: what weighs the columns. ``matrix``: the tile's :class:`Weights`, ones where it has none; ``energy``: the
        mean squares of the columns of the tile's whole matrix, which :attr:`Tile.matrix` locates; nothing: nothing.
    factor
        ``encode``: quantize the values divided by the factor of the tile's whole matrix, which :attr:`Tile.matrix` locates.
    measure
        ``encode``: sum up the squares of the values and of the errors.
    device
        ``encode``: torch's name of the GPU to do it on; nothing is the CPU.
    """

    op: Literal["copy", "pack", "cast", "encode", "codes", "scales", "factor"]
    kind: str
    target: str
    parts: tuple[int, ...]
    rows_per_scale: int = 1
    exact: bool = False
    strict: bool = True
    limit: int | None = None
    step: int = 1
    transposed: bool = False
    effort: Literal["", "fast", "normal", "high", "reference"] = ""
    objective: Literal["reference", "mse"] = "reference"
    importance: Literal["", "matrix", "energy"] = ""
    factor: bool = False
    measure: bool = False
    device: str = ""


class Weights(NamedTuple):
    """Importance of a matrix's columns, as it lies in an importance matrix file: float32 [row_len] over a divisor."""

    span: Span
    divisor: float = 1.0


class Tile(NamedTuple):
    """A run of rows of one output tensor: independent of every other tile, and picklable."""

    item: int
    """Which of the stacked matrices (an expert, say)."""
    rows: int
    offset: int
    """Byte offset within the tensor."""
    nbytes: int
    spans: tuple[Span, ...]
    phase: int = 0
    """Rows of the first row of scales that lie before the tile."""
    weights: Weights | None = None
    matrix: tuple[tuple[int, tuple[Span, ...]], ...] = ()
    """(rows, spans) of all tiles of the matrix that the rows are of, for importance or a factor that all of it decides."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes
    ----------
    name, shape, type, type_id, nbytes
        As they will be in the file; the shape in numpy order.
    transform
        Shared by all tiles.
    tiles
        Cover the tensor's bytes exactly, in order.
    sources
        Names of the checkpoint tensors it is made of, scales included.
    items
        Names of the sources of each stacked matrix (codes and scales).
    offset
        Within the data section of its file; set by :func:`build`.
    stored
        dtype and shape in a safetensors file where they are not :attr:`type` and :attr:`shape`: a quant type's blocks are
        bytes there.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    type_id: int
    nbytes: int
    transform: Transform
    tiles: tuple[Tile, ...]
    items: tuple[tuple[str, ...], ...]
    offset: int = 0
    stored: tuple[str, tuple[int, ...]] | None = None

    @property
    def sources(self) -> list[str]:
        """All sources, in order, each once."""
        return list(dict.fromkeys(name for item in self.items for name in item))

    @property
    def lossless(self) -> bool:
        """Whether every value of the source survives."""
        return self.transform.op != "encode" or self.transform.exact


def plan_tensor(
    name: str,
    shape: tuple[int, ...],
    target: str,
    type_id: int,
    transform: Transform,
    stack: Sequence[Sequence[Matrix]],
    weights: Sequence[Weights | None] = (),
) -> PlannedTensor:
    """Cut a tensor into tiles.

    Parameters
    ----------
    name, shape, target, type_id
        Of the output tensor.
    transform
        What every tile does.
    stack
        Source matrices: the outer sequence is stacked (experts), the inner one concatenated along the row. A transposed
        matrix is one tile, so it has to be small.
    weights
        Importance of each matrix of the stack, for a transform that wants ``matrix`` importance.

    Raises
    ------
    PlanError
        The sources do not add up to the shape.
    """
    layout = types.get(target).layout
    row_len = shape[-1] if shape else 1
    if layout.block_len == 1 and stack and stack[0][0].row_len == 1:
        row_len = 1  # elements from here and there; a type without blocks does not care where a row ends
    row_nbytes = layout.row_nbytes(row_len)
    tiles = []
    offset = 0
    seen = transform.importance == "energy" or transform.factor
    tile_len = DEVICE_TILE_LEN if transform.device else TILE_LEN
    for item, parts in enumerate(stack):
        first = parts[0]
        if first.transposed:
            if len(parts) > 1 or first.rows != row_len:
                raise PlanError(f"tensor {name!r} {list(shape)}: its sources do not add up to rows of {row_len}")
            nbytes = first.row_len * row_nbytes
            spans = first.cut(0, first.rows)
            turned = ((first.row_len, spans),) if seen else ()
            weight = weights[item] if weights else None
            tiles.append(Tile(item, first.row_len, offset, nbytes, spans, first.phase, weight, turned))
            offset += nbytes
            continue
        rows = first.rows
        if sum(part.row_len for part in parts) != row_len or any(part.rows != rows for part in parts):
            raise PlanError(f"tensor {name!r} {list(shape)}: its sources do not add up to rows of {row_len}")
        # Tiles start on a row of scales, so that no scale row is read for two tiles' sake by halves.
        grain = max(part.rows_per_scale for part in parts)
        step = max(grain, tile_len // max(1, row_len) // grain * grain)
        edges = [(start, min(rows, start + step)) for start in range(0, rows, step)]
        cuts = tuple((b - a, tuple(span for part in parts for span in part.cut(a, b))) for a, b in edges)
        whole = cuts if seen else ()
        for count, spans in cuts:
            nbytes = count * row_nbytes
            tiles.append(
                Tile(item, count, offset, nbytes, spans, first.phase, weights[item] if weights else None, whole)
            )
            offset += nbytes
    nbytes = layout.nbytes(shape)
    if offset != nbytes:
        raise PlanError(f"tensor {name!r} {list(shape)} takes {nbytes} bytes, its sources give {offset}")
    items = tuple(tuple(n for part in parts for n in (part.name, part.scale_name) if n is not None) for parts in stack)
    return PlannedTensor(name, shape, target, type_id, nbytes, transform, tuple(tiles), items)


def plan_factors(name: str, type_id: int, weight: PlannedTensor) -> PlannedTensor:
    """Plan the factors beside a weight whose transform divides by them: F32 [1], or one for each of its stacked matrices.

    Parameters
    ----------
    name, type_id
        Of the output tensor; the number is that of F32.
    weight
        As :func:`plan_tensor` planned it.
    """
    wholes = {tile.item: tile for tile in weight.tiles}
    tiles = tuple(
        Tile(item, 1, item * 4, 4, (), tile.phase, matrix=tile.matrix) for item, tile in sorted(wholes.items())
    )
    transform = weight.transform._replace(op="factor", target="F32", effort="", importance="", measure=False, device="")
    return PlannedTensor(name, (len(tiles),), "F32", type_id, 4 * len(tiles), transform, tiles, weight.items)


def plan_unpacked(name: str, dtype: str, transform: Transform, source: Matrix, row_nbytes: int) -> PlannedTensor:
    """Plan the native codes, or the scales, of packed rows as a tensor of a checkpoint.

    Parameters
    ----------
    name, dtype
        Of the output tensor; the dtype as safetensors spells it, one byte an element.
    transform
        ``codes`` or ``scales``. Scales have a row for each :attr:`Transform.rows_per_scale` of the source's.
    source
        The packed rows; its ``kind`` names the codec, its ``rows_per_scale`` is where tiles may be cut.
    row_nbytes
        Bytes of an output row.
    """
    per_row = transform.rows_per_scale if transform.op == "scales" else 1
    step = max(
        source.rows_per_scale, TILE_LEN // max(1, source.row_len) // source.rows_per_scale * source.rows_per_scale
    )
    tiles = []
    offset = 0
    for start in range(0, source.rows, step):
        stop = min(source.rows, start + step)
        nbytes = -(-(stop - start) // per_row) * row_nbytes
        tiles.append(Tile(0, stop - start, offset, nbytes, source.cut(start, stop)))
        offset += nbytes
    shape = (-(-source.rows // per_row), row_nbytes)
    return PlannedTensor(name, shape, dtype, -1, offset, transform, tuple(tiles), ((source.name,),))


def copy_tensor(name: str, shape: tuple[int, ...], kind: str, type_id: int, source: Span) -> PlannedTensor:
    """Plan a tensor whose packed bytes are copied as they are; its type need not be known."""
    # Bytes per tile as a tile of BF16 has.
    step = 2 * TILE_LEN
    tiles = []
    for start in range(0, source.nbytes, step):
        nbytes = min(step, source.nbytes - start)
        tiles.append(Tile(0, 1, start, nbytes, (Span(source.file, source.offset + start, nbytes),)))
    transform = Transform("copy", kind, kind, (shape[-1] if shape else 1,))
    return PlannedTensor(name, shape, kind, type_id, source.nbytes, transform, tuple(tiles), ((name,),))


@dataclass(frozen=True)
class PlannedFile:
    """One output file: header bytes, and tensors at offsets behind them. This one is a GGUF; others override."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[PlannedTensor, ...]
    alignment: int

    @cached_property
    def header(self) -> bytes:
        """The complete header, padded to the alignment."""
        directory = [(t.name, t.shape, t.type_id, t.offset) for t in self.tensors]
        return encode_header(self.metadata, directory, self.alignment)

    @property
    def data_nbytes(self) -> int:
        """Bytes of the data section, padding included."""
        if not self.tensors:
            return 0
        last = self.tensors[-1]
        return align_up(last.offset + last.nbytes, self.alignment)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_nbytes

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield (first byte, bytes) of all that lies behind the header and belongs to no tensor; it is zero."""
        at = len(self.header)
        for tensor in sorted(self.tensors, key=lambda t: (t.offset, t.nbytes)):
            start = len(self.header) + tensor.offset
            if start > at:
                yield at, start - at
            at = max(at, start + tensor.nbytes)
        if self.nbytes > at:
            yield at, self.nbytes - at

    def reads_back(self, path: Path) -> bool:
        """Return whether the finished file at ``path`` has this header, read as any reader would."""
        written = read_container(path)
        try:
            directory = [(e.name, e.shape, e.type_id, e.offset) for e in written.entries]
            keys = written.metadata.typed()
            return (
                directory == [(t.name, t.shape, t.type_id, t.offset) for t in self.tensors]
                and list(keys) == list(self.metadata)
                and all(keys[key].same(value) for key, value in self.metadata.items())
                and (written.file_nbytes, written.data_offset) == (self.nbytes, len(self.header))
            )
        finally:
            written.close()


@dataclass(frozen=True)
class PlannedShard(PlannedFile):
    """A safetensors file: tensors follow each other without padding, :attr:`PlannedTensor.type` is safetensors' dtype.

    Attributes
    ----------
    constants
        Single numbers (I64 without axes) by their names, which no source has: they lie before the tensors.
    """

    metadata: Mapping[str, Value] = field(default_factory=dict)
    tensors: tuple[PlannedTensor, ...] = ()
    alignment: int = 1
    constants: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def entries(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Name -> dtype, shape, first byte and the one after the last, counted from the end of the JSON."""
        start = 8 * len(self.constants)
        return {
            **{name: ("I64", (), 8 * number, 8 * number + 8) for number, name in enumerate(self.constants)},
            **{
                t.name: (*(t.stored or (t.type, t.shape)), start + t.offset, start + t.offset + t.nbytes)
                for t in self.tensors
            },
        }

    @cached_property
    def header(self) -> bytes:
        """Length, JSON and the spaces that bring it to a multiple of 8 bytes; then the constants."""
        entries = {
            name: {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            for name, (dtype, shape, begin, end) in self.entries.items()
        }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        numbers = (number.to_bytes(8, "little", signed=True) for number in self.constants.values())
        return len(text).to_bytes(8, "little") + text + b"".join(numbers)

    def reads_back(self, path: Path) -> bool:
        """Return whether the finished file has this header and no byte too many."""
        (nbytes, _), tensors = read_shard(path, 0)
        start = len(self.header) - 8 * len(self.constants)
        found = {t.name: (t.dtype, t.shape, t.offset - start, t.offset + t.nbytes - start) for t in tensors}
        return nbytes == self.nbytes and found == self.entries


# The official shards' order, and the safetensors library's: what is aligned to more bytes comes first.
_SHARD_ORDER = ("I64", "F32", "BF16", "F16", "F8_E8M0", "F8_E4M3", "I8", "U8")


def placed_in_shard(tensors: Iterable[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """Order a shard's tensors as the official ones are, and give them their offsets: without holes."""
    placed = []
    offset = 0
    for tensor in sorted(tensors, key=lambda t: (_SHARD_ORDER.index((t.stored or (t.type,))[0]), t.name)):
        placed.append(replace(tensor, offset=offset))
        offset += tensor.nbytes
    return tuple(placed)


@dataclass(frozen=True)
class PlannedText(PlannedFile):
    """A small file that is all header: config.json, an index, a tokenizer."""

    metadata: Mapping[str, Value] = field(default_factory=dict)
    tensors: tuple[PlannedTensor, ...] = ()
    alignment: int = 1
    content: bytes = b""

    @cached_property
    def header(self) -> bytes:
        """The content."""
        return self.content

    def reads_back(self, path: Path) -> bool:
        """Return whether the file holds the content."""
        return path.read_bytes() == self.content


@dataclass(frozen=True)
class Plan:
    """Everything a run will write.

    Attributes
    ----------
    files
        One, or the members of a split.
    source_files
        Absolute paths that the tiles' spans index.
    source_states
        (size, modification time in ns) of each when its header was read.
    dialect
        Of the output.
    skipped
        (source tensor, reason) of everything that is left out.
    notes
        Sentences the user should read: choices made, values missing.
    """

    files: tuple[PlannedFile, ...]
    source_files: tuple[str, ...]
    source_states: tuple[tuple[int, int], ...]
    dialect: str
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    file_type: str = ""

    def __repr__(self) -> str:
        """Return the first file's path and the counts: a large plan written out whole has millions of characters."""
        path = self.files[0].path if self.files else ""
        return f"<Plan {str(path)!r}: {len(self.files)} files, {len(self.tensors)} tensors, {self.dialect}>"

    @property
    def tensors(self) -> list[PlannedTensor]:
        """All tensors, in file order."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def metadata(self) -> Mapping[str, Value]:
        """Metadata of the (first) file."""
        return self.files[0].metadata

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def data_nbytes(self) -> int:
        """Bytes of all data sections."""
        return sum(file.data_nbytes for file in self.files)

    def jobs(self) -> Iterator[tuple[int, PlannedTensor, Tile]]:
        """Iterate over (file index, tensor, tile) in order; a tile's number is its position here."""
        for number, file in enumerate(self.files):
            for tensor in file.tensors:
                for tile in tensor.tiles:
                    yield number, tensor, tile

    @cached_property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return sum(len(tensor.tiles) for tensor in self.tensors)

    def sources_changed(self) -> list[str]:
        """Return the sources whose size or modification time is no longer what it was when they were planned with."""
        return [
            path for path, state in zip(self.source_files, self.source_states, strict=True) if _state(path) != state
        ]

    @cached_property
    def digest(self) -> str:
        """Fingerprint of what will be written, of the sources' sizes and modification times, and of ggufx's version (hex)."""
        digest = hashlib.sha256()
        digest.update(repr((__version__, self.source_files, self.source_states)).encode())
        for file in self.files:
            digest.update(os.fsencode(file.path.name) + b"\n")  # a name on the disk need not be UTF-8
            digest.update(file.header)
            for tensor in file.tensors:
                digest.update(repr((tensor.transform, tensor.tiles)).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        n_weights = sum(prod(t.shape) for t in self.tensors)
        return {
            "file": {
                "path": str(self.files[0].path),
                "paths": [str(file.path) for file in self.files],
                "dialect": self.dialect,
                "file_type": self.file_type,
                "alignment": self.files[0].alignment,
                "n_tensors": len(self.tensors),
                "n_weights": n_weights,
                "nbytes": self.nbytes,
                "data_offset": len(self.files[0].header),
                "bits_per_weight": sum(t.nbytes for t in self.tensors) * 8 / n_weights if n_weights else 0.0,
            },
            "metadata": {as_unicode(key): value.to_json() for key, value in self.metadata.items()},
            "tensors": [
                {
                    "name": as_unicode(t.name),
                    "shape": list(t.shape),
                    "type": t.type,
                    "type_id": t.type_id,
                    "offset": t.offset,
                    "nbytes": t.nbytes,
                    "lossless": t.lossless,
                    "sources": [as_unicode(name) for name in t.sources],
                    **({"file": number} if len(self.files) > 1 else {}),
                }
                for number, file in enumerate(self.files)
                for t in file.tensors
            ],
            "data_nbytes": self.data_nbytes,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "notes": list(self.notes),
        }


@dataclass
class _Shard:
    tensors: list[PlannedTensor] = field(default_factory=list)
    end: int = 0


def build(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Iterable[PlannedTensor],
    *,
    source_files: Sequence[str | Path],
    source_states: Sequence[tuple[int, int]] | None = None,
    dialect: str,
    alignment: int = container.DEFAULT_ALIGNMENT,
    split_max_nbytes: int | None = None,
    split_max_tensors: int | None = None,
    tensor_first: bool = True,
    members: Sequence[int] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    file_type: str = "",
) -> Plan:
    """Lay tensors out one after the other, in the order given, and split if asked.

    Parameters
    ----------
    source_files, source_states
        Of the spans; states that are not given are taken now.
    split_max_nbytes
        Start a new file when a tensor would take the data section past this many bytes; metadata goes to the first file,
        ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (the total) to all.
    split_max_tensors
        Start a new file after this many tensors.
    tensor_first
        ``False``: the first file of a split holds the metadata and no tensor.
    members
        Number of each tensor's file, ascending, instead of ``split_max_nbytes``.

    Raises
    ------
    PlanError
        Two tensors share a name, or the path has none.
    """
    if not path.name:
        raise PlanError(f"{path}: is a directory; name a file")
    if path.is_symlink():
        # The file grows beside the one it will replace, on the same disk, and the link stays a link.
        path = path.resolve()
    split = bool(split_max_nbytes or split_max_tensors)
    shards = [_Shard()] if tensor_first or not split else [_Shard(), _Shard()]
    names: set[str] = set()
    held = 0
    for position, tensor in enumerate(tensors):
        if tensor.name in names:
            raise PlanError(f"two sources map to the output tensor {tensor.name!r}")
        names.add(tensor.name)
        shard = shards[-1]
        if members is not None:
            # A first member may hold the metadata and no tensor.
            shards += [_Shard() for _ in range(held, members[position])]
            shard, held, full = shards[-1], members[position], False
        else:
            full = split_max_nbytes is not None and shard.end + tensor.nbytes > split_max_nbytes
            full = full or len(shard.tensors) == split_max_tensors
        if full and shard.tensors:
            shard = _Shard()
            shards.append(shard)
        shard.tensors.append(replace(tensor, offset=shard.end))
        shard.end += align_up(tensor.nbytes, alignment)
    files = []
    for number, shard in enumerate(shards):
        keys = dict(metadata) if number == 0 else {}
        if number and alignment != container.DEFAULT_ALIGNMENT:
            keys["general.alignment"] = Value.u32(alignment)  # every member is a file of its own
        target = path
        if split or len(shards) > 1:
            target = container.split_name(path, number + 1, len(shards))
            keys["split.no"] = Value(ValueType.UINT16, number)
            keys["split.count"] = Value(ValueType.UINT16, len(shards))
            keys["split.tensors.count"] = Value(ValueType.INT32, len(names))
        files.append(PlannedFile(target, keys, tuple(shard.tensors), alignment))
    refused = container.loader_notes(metadata, ((t.name, t.shape) for shard in shards for t in shard.tensors))
    # Absolute, so that a run goes on from another directory, too.
    paths = tuple(str(Path(source).resolve()) for source in source_files)
    states = tuple(_state(source) for source in paths) if source_states is None else tuple(source_states)
    return Plan(tuple(files), paths, states, dialect, tuple(skipped), (*notes, *refused), file_type)


def _state(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns
