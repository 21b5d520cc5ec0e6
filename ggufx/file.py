"""Open a GGUF: a directory entry meets its codec here.

>>> import ggufx
>>> with ggufx.open("model.gguf") as f:                    # doctest: +SKIP
...     w = f["blk.0.attn_q_a.weight"]
...     w.shape, w.type, w.nbytes
...     w.numpy()                                          # float32, decoded
...     f["blk.3.ffn_gate_exps.weight"][17]                # decodes one expert only
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Final, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ggufx import dialects, factors, types
from ggufx.container import MAGIC, Container, Entry, KeyValues, align_up, read_container, read_splits
from ggufx.errors import CodecError, ContainerError, GGUFError, UnknownType, UnsupportedType, quoted
from ggufx.named_types import NamedType
from ggufx.stored import StoredFile, scratch
from ggufx.typed import Facts, architecture_of
from ggufx.types import Codec
from ggufx.values import as_unicode

__all__ = ["File", "Tensor", "open", "open_parts"]

DIALECT_KEY = "ggufx.dialect"
_TURNED: Final = frozenset(
    ("F32", "F16", "F64", "I8", "I16", "I32", "I64", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4")
)
"""Types whose big-endian bytes are known: numbers, and those that gguf-convert-endian turns round, whose blocks have their
scales in the highest-byte-first order and nothing else of more than one byte. Of BF16 tools disagree."""

_PIECE_NBYTES: Final = 1 << 20
"""Of rows from here and there that are copied at a time."""
_SHOWN_TENSORS: Final = 200
"""Rows of the table in a notebook."""
_MAX_FILES: Final = 10_000
"""GGUFs that are counted behind the first one of a file."""

T = TypeVar("T")
Index = int | slice | EllipsisType | npt.NDArray[np.integer[Any]] | list[int]


class Tensor:
    """A tensor of an open file: nothing is read until asked.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Numpy order; the last axis is the row.
    type : str
        Type name, or ``"id 999"`` when no dialect knows the id.
    type_id : int
    codec : Codec or None
    named : NamedType or None
        What is known of a type without a codec.
    factor : Tensor or None
        F32 tensor whose values :meth:`numpy` and slices multiply the decoded ones by: [1], or one for each expert.
    nbytes : int
        Packed bytes (for an unknown type: its span, which may end in padding).
    """

    factor: Tensor | None = None

    def __init__(self, container: Container, entry: Entry, codec: Codec | None, named: NamedType | None = None) -> None:
        self._container = container
        self._entry = entry
        self.name = entry.name
        self.shape = entry.shape
        self.type_id = entry.type_id
        self.codec = codec
        self.named = named
        kind = codec or named
        self.type = f"id {entry.type_id}" if kind is None else kind.name
        self.nbytes = entry.span if kind is None else kind.layout.nbytes(entry.shape)

    @property
    def type_label(self) -> str:
        """The type as listings have it: a type without a codec with its id."""
        return self.type if self.named is None else self.named.label

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that :meth:`numpy` gives by default."""
        return self._known().value_dtype

    @property
    def bits_per_weight(self) -> float:
        """Packed bits per element, row headers included."""
        return self.nbytes * 8 / self.size if self.size else 0.0

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are in the file: of one that was opened with ``header_only`` they need not be."""
        return self._container.data_offset + self._entry.offset + self.nbytes <= self._container.file_nbytes

    @property
    def is_big_endian(self) -> bool:
        """Whether the file is big-endian: :meth:`numpy` turns the bytes round, :attr:`packed` has them as they are."""
        return self._container.big_endian

    @property
    def path(self) -> Path:
        """The file that holds the bytes (a member of the split, if split)."""
        return self._container.path

    @property
    def position(self) -> int:
        """Byte position of the tensor in :attr:`path`."""
        return self._container.data_offset + self._entry.offset

    @property
    def file_offset(self) -> int:
        """Byte position of the tensor in :attr:`path`, for who takes its bytes from there.

        Raises
        ------
        ContainerError
            The file is big-endian, so that its bytes are not those of the type.
        """
        self._container.require_little_endian()
        return self.position

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The bytes as they lie in the file, a read-only view: uint8 ``shape[:-1] + (row_nbytes,)``.

        One axis of ``nbytes`` for a type that no dialect knows. They decode to values without :attr:`scale`. Valid as long
        as it is referenced, even after the file is closed. The system reads what is looked at; if another process shortens the
        file meanwhile, looking at what is gone ends the process (SIGBUS). :meth:`numpy` and indexing look for that and raise.

        Raises
        ------
        ContainerError
            The file does not have these bytes.
        """
        data = self._container.bytes_of(self._entry, self.nbytes)
        if self.codec is None or not self.shape:
            return data
        return data.reshape(*self.shape[:-1], self.codec.layout.row_nbytes(self.shape[-1]))

    def numpy(
        self,
        dtype: npt.DTypeLike | None = None,
        *,
        out: npt.NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> npt.NDArray[Any]:
        """Decode the whole tensor; its values have the factor of :attr:`scale`, if it has one.

        Parameters
        ----------
        dtype
            float32 (default for every quant and float type), float16, bfloat16 or float64. Integers and float64 come as
            stored by default.
        out
            C-contiguous array to fill.
        threads
            Row chunks decoded at a time.

        Raises
        ------
        UnknownType, UnsupportedType
            No dialect knows the id, or the type has no decoder.
        CodecError
            ``dtype`` or ``out`` does not fit.
        ContainerError
            The file does not have the bytes: it is incomplete, or was shortened or replaced after it was opened.
        """
        decoded = self._decode(0, self.shape, dtype, out, threads)
        if self.factor is None:
            return decoded
        if decoded.dtype not in (np.float32, np.float64):
            # Rounded once, and after the product: a half float may not hold what stands before it.
            decoded[...] = self._decode(0, self.shape, threads=threads) * self._factors()
            return decoded
        decoded *= self._factors()
        return decoded

    def packed_rows(self, piece_nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Iterate over the tensor's bytes in pieces of whole rows, about ``piece_nbytes`` each: uint8 [n].

        Each piece lies in memory that the next one takes, so that a tensor of any size needs no more than a piece.

        Raises
        ------
        ContainerError
            The file is big-endian, or does not have the bytes.
        """
        self._container.require_little_endian()
        row_nbytes = self._known().layout.row_nbytes(self.shape[-1] if self.shape else 1)
        step = max(1, piece_nbytes // max(1, row_nbytes)) * row_nbytes
        for start in range(0, self.nbytes, step):
            buffer = scratch("packed rows", min(step, self.nbytes - start))
            self._container.read_into(self._entry, start, buffer)
            yield buffer

    def rows_at(self, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """Decode rows by their numbers, outer axes flattened: ``value_dtype`` [n, row_len] for integers [n]."""
        codec = self._decodable()
        wanted = np.asarray(numbers, np.int64)
        decoded = codec.decode(self._packed_rows(wanted, codec.layout.row_nbytes(self.shape[-1])))
        row_factors = self.row_factors(wanted)
        if row_factors is not None:
            decoded *= row_factors
        return decoded

    def row_factors(self, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32] | None:
        """Return the factors of rows by their numbers, outer axes flattened: float32 [n, 1]; ``None`` where there is none."""
        scale = self.scale
        if scale is None:
            return None
        rows_per_scale = max(1, prod(self.shape[:-1]) // scale.size)
        found: npt.NDArray[np.float32] = scale[np.asarray(numbers) // rows_per_scale][:, None]
        return found

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self.name!r} of type {self.type} cannot become an array without decoding a copy")
        return self.numpy(dtype)

    @property
    def scale(self) -> npt.NDArray[np.float32] | None:
        """Factor that the loader applies beside the type's own scales: float32 [1], or [experts]; ``None`` without one.

        NVFP4 models have one, the second level of its scales; :meth:`numpy` and slices apply it, :attr:`packed` has it not.
        """
        return None if self.factor is None else self.factor.numpy(np.float32).reshape(-1)

    def _factors(self) -> npt.NDArray[np.float32]:
        """Return :attr:`scale` as an array of the tensor's shape that takes no memory."""
        scale = self.scale
        assert scale is not None
        return np.broadcast_to(scale.reshape(-1, *[1] * (self.ndim - 1)), self.shape)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> npt.NDArray[Any]:
        """Decode a slice, as :meth:`numpy` does: of the outer axes only what is asked is decoded, the last is cut afterwards.

        Integers, slices, ``...`` and 1-D integer arrays, as in numpy.
        """
        decoded = self._sliced(index)
        return decoded if self.factor is None else decoded * self._factors()[index]

    def _sliced(self, index: Index | tuple[Index, ...]) -> npt.NDArray[Any]:
        """Return the decoded values of a slice, without :attr:`scale`."""
        codec = self._decodable()
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is None or isinstance(part, bool | np.bool_) for part in parts):
            raise IndexError("only integers, slices, ... and integer arrays index a tensor")
        if any(part is Ellipsis for part in parts):
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            fill = self.ndim - (len(parts) - 1)
            if fill < 0 or any(part is Ellipsis for part in parts[at + 1 :]):
                raise IndexError(f"too many indices for {self.name!r} of {self.ndim} axes")
            parts = (*parts[:at], *(slice(None),) * fill, *parts[at + 1 :])
        if len(parts) > self.ndim:
            raise IndexError(f"too many indices for {self.name!r} of {self.ndim} axes: {len(parts)}")
        outer, inner = parts[: max(0, self.ndim - 1)], parts[max(0, self.ndim - 1) :]
        if (
            inner
            and not isinstance(inner[0], slice)
            and any(isinstance(p, list) or np.ndim(p) for p in parts if p is not ... and not isinstance(p, slice))
        ):
            numbers, paired = self._rows_named_by(outer)
            row_nbytes = codec.layout.row_nbytes(self.shape[-1])
            packed = self._packed_rows(numbers.reshape(-1), row_nbytes).reshape(*numbers.shape, row_nbytes)
            return codec.decode(packed)[(*paired, *inner)]
        decoded = self._decode_outer(outer)
        return decoded[(..., *inner)] if inner else decoded

    def _decode_outer(self, outer: tuple[Any, ...]) -> npt.NDArray[Any]:
        """Decode what indices of the outer axes name, whole rows."""
        codec, lead, first = self._decodable(), self.shape[:-1], 0
        if all(isinstance(part, int | np.integer | slice) for part in outer):
            rest = list(outer)
            while rest and not isinstance(rest[0], slice):
                number = operator.index(rest.pop(0))
                if not -lead[0] <= number < lead[0]:
                    axis = len(outer) - len(rest) - 1
                    raise IndexError(f"index {number} is out of bounds for axis {axis} with size {lead[0]}")
                first += number % lead[0] * prod(lead[1:])
                lead = lead[1:]
            outer = tuple(rest)
            if len(rest) == 1:
                start, stop, step = rest[0].indices(lead[0])
                if step == 1:
                    first += start * prod(lead[1:])
                    lead, outer = (max(0, stop - start), *lead[1:]), ()
            if not outer:
                return self._decode(first, (*lead, *self.shape[-1:]))
        numbers = np.asarray((first + np.arange(prod(lead)).reshape(lead))[outer])
        row_nbytes = codec.layout.row_nbytes(self.shape[-1])
        return codec.decode(self._packed_rows(numbers.reshape(-1), row_nbytes).reshape(*numbers.shape, row_nbytes))

    def _rows_named_by(self, outer: tuple[Any, ...]) -> tuple[npt.NDArray[np.int64], list[Any]]:
        """Return the numbers of the rows that ``outer`` names, and ``outer`` in terms of them.

        numpy pairs the integer arrays of all axes, the last one included, so their pairing must wait until the rows are
        decoded.
        """
        numbers = np.arange(prod(self.shape[:-1])).reshape(self.shape[:-1])
        paired: list[Any] = []
        for axis, part in enumerate(outer):
            if isinstance(part, slice):
                numbers = numbers[(slice(None),) * axis + (part,)]
                paired.append(slice(None))
                continue
            indices = np.asarray(part)
            if indices.size and indices.dtype.kind not in "iu":
                raise IndexError(f"an array of {indices.dtype} beside an index of the last axis; use integers")
            wanted, where = np.unique(indices.astype(np.intp), return_inverse=True)
            numbers = numbers.take(wanted, axis=axis)
            paired.append(where.reshape(indices.shape))
        return numbers, paired

    def _packed_rows(self, numbers: npt.NDArray[np.int64], row_nbytes: int) -> npt.NDArray[np.uint8]:
        """Read rows by their numbers, in any order: uint8 [n, row_nbytes]; raises IndexError for a number that is no row's."""
        n_rows = prod(self.shape[:-1])
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < n_rows:
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {quoted(self.name)}, which has {n_rows}")
        packed = np.empty((numbers.size, row_nbytes), np.uint8)
        if not self._container.big_endian:
            if numbers.size:
                view = self.packed.reshape(-1, row_nbytes)
                # As in decoding: whether the file still has the bytes is looked at before each piece.
                step = max(1, _PIECE_NBYTES // row_nbytes)
                for start in range(0, numbers.size, step):
                    piece = numbers[start : start + step]
                    self._container.stored.require(self.position + (int(piece.max()) + 1) * row_nbytes)
                    # The numbers are those of rows, so nothing is clipped; the default looks, and copies twice.
                    view.take(piece, axis=0, out=packed[start : start + step], mode="clip")
            return packed
        # Rows that follow each other are one read.
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        for start, stop in zip((0, *breaks), (*breaks, numbers.size), strict=True):
            if start < stop:
                self._read_rows(int(numbers[start]), packed[start:stop])
        return packed

    def _read_rows(self, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill ``buffer``, uint8 [n, row_nbytes], with the rows from ``first``, in the byte order of this machine."""
        self._container.read_into(self._entry, first * buffer.shape[1], buffer)
        if self._container.big_endian and self.codec is not None:
            blocks = buffer.reshape(-1).view(self.codec.layout.block)
            for name in self.codec.layout.block.names or ():
                if blocks[name].dtype.itemsize > 1:
                    blocks[name].byteswap(inplace=True)

    def _decode(
        self,
        first: int,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike | None = None,
        out: npt.NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> npt.NDArray[Any]:
        """Decode the rows from ``first`` that ``shape`` counts."""
        codec = self._decodable()
        row_nbytes = codec.layout.row_nbytes(shape[-1] if shape else 1)
        if self._container.big_endian:

            def rows_of(start: int, stop: int) -> npt.NDArray[np.uint8]:
                rows = scratch("packed", (stop - start) * row_nbytes).reshape(stop - start, row_nbytes)
                self._read_rows(first + start, rows)
                return rows

        else:
            # A view, as reading into memory first costs a fifth of a decoder's time and more; whether the file still has the
            # bytes is looked at before each piece.
            rows_view = (
                self.packed.reshape(-1, row_nbytes)[first:] if prod(shape) else np.empty((0, row_nbytes), np.uint8)
            )
            end = self.position + first * row_nbytes

            def rows_of(start: int, stop: int) -> npt.NDArray[np.uint8]:
                self._container.stored.require(end + stop * row_nbytes)
                return rows_view[start:stop]

        try:
            return codec.decode_from(rows_of, shape, dtype=dtype, out=out, threads=threads)
        except CodecError as error:
            raise CodecError(f"{self.path}: tensor {quoted(self.name)}: {error}") from None

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Tensor {self.name} {self.type}{list(self.shape)} {self.nbytes} bytes>"

    def why_unknown(self) -> str:
        """Return, as the end of a sentence, what keeps a tensor without a codec from being decoded."""
        if self.named is not None:
            return (
                f"is of type {self.named.label} of {self.named.program} ({self.named.what}), which ggufx has no decoder for; "
                "it can be listed and copied, not decoded"
            )
        return (
            f"has type id {self.type_id}, which no known dialect defines; it can be listed and copied, not decoded. "
            "Register a codec for it (see ggufx.types) or name the dialect"
        )

    def _known(self) -> Codec:
        if self.codec is None:
            raise UnknownType(f"{self.path}: tensor {quoted(self.name)} {self.why_unknown()}")
        return self.codec

    def _decodable(self) -> Codec:
        codec = self._known()
        if self._container.big_endian and codec.name not in _TURNED:
            raise UnsupportedType(
                f"{self.path}: tensor {quoted(self.name)}: {codec.name} of a big-endian file cannot be decoded; convert the "
                "file with the gguf package's gguf-convert-endian"
            )
        return codec

    def __getstate__(self) -> dict[str, Any]:
        # A codec is one of this process: its name travels.
        return {**self.__dict__, "codec": None if self.codec is None else self.codec.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.codec = None if state["codec"] is None else types.get(state["codec"])


class File(Mapping[str, Tensor]):
    """An open GGUF, split or not: a mapping of tensor name -> :class:`Tensor`, in file order.

    Attributes
    ----------
    metadata : KeyValues
        Of the first split.
    dialect : str or None
        Name of the dialect that explains every id (the first of :attr:`equivalent`), ``None`` for a mix.
    equivalent : tuple of str
        Every dialect that explains the file equally well.
    notes : tuple of str
        What is odd about the file and does not keep it from being read, a sentence each: ids that no dialect's layout fits,
        bytes that belong to no tensor, factors beside weights, and with ``header_only`` what is missing.
    complete : bool
        Whether all tensors' bytes and all members are there; only with ``header_only`` they may not be.

    An open file, and a tensor of one, can be pickled: it is opened again by its path, and must be the same file then.
    """

    def __init__(
        self,
        containers: list[Container],
        dialect: str | None = None,
        *,
        missing: Sequence[str] = (),
        header_only: bool = False,
    ) -> None:
        first = containers[0]
        self.metadata: KeyValues = first.metadata
        self._containers = containers
        stamped = first.metadata.get(DIALECT_KEY)
        entries = [entry for container in containers for entry in container.entries]
        resolution = dialects.resolve(
            first.path,
            entries,
            dialect=dialect,
            stamped=stamped if isinstance(stamped, str) else None,
            incomplete=header_only,
        )
        self.dialect = None if resolution.dialect is None else resolution.dialect.name
        self.equivalent = resolution.equivalent
        self._tensors: dict[str, Tensor] = {}
        for container in containers:
            for entry in container.entries:
                if entry.name in self._tensors:
                    raise ContainerError(
                        container.path, "duplicate-tensor", f"tensor {quoted(entry.name)} is in another split, too"
                    )
                codec, named = resolution.codecs.get(entry.type_id), resolution.named.get(entry.type_id)
                self._tensors[entry.name] = Tensor(container, entry, codec, named)
        self._reopen: tuple[Any, ...] = (
            first.path.absolute(),
            dialect,
            len(containers) > 1 or bool(missing),
            header_only,
        )
        self.complete = not missing
        self.notes: tuple[str, ...] = (*resolution.notes, *self._notes(missing, dialect), *self._pair_factors())

    def _notes(self, missing: Sequence[str], dialect: str | None) -> Iterator[str]:
        if missing:
            count = len(missing) + len(self._containers)
            yield f"{len(missing)} of {count} split members are missing: {', '.join(missing[:3])}"
        needed = there = 0
        for container in self._containers:
            if container.big_endian:
                yield f"{container.path.name} is big-endian: its values are shown as they were meant"
            end = _end_of_data(container, self._tensors)
            needed += end - container.data_offset
            there += max(0, min(end, container.file_nbytes) - container.data_offset)
            if container.entries and self._tensors[container.entries[-1].name].codec is None:
                continue  # nobody knows where the last tensor ends
            padded = container.data_offset + align_up(end - container.data_offset, container.alignment)
            if container.file_nbytes > padded:
                yield _follows(container, end, padded, dialect)
        if there < needed:
            self.complete = False
            yield f"tensor data is incomplete: {there} of {needed} bytes are there"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (*self._reopen, tuple(container.stored for container in self._containers))

    def _pair_factors(self) -> Iterator[str]:
        """Give weights their factors; yields a note where any has one."""
        factors = [self._pair(tensor) for tensor in self._tensors.values() if tensor.name.endswith(".weight")]
        scaled = [name for name in factors if name]
        if scaled:
            have = f"and {len(scaled) - 1} more have" if len(scaled) > 1 else "has"
            yield (
                f"{quoted(scaled[0])} {have} a factor beside the weight, in a tensor called .scale: values read by numpy() and "
                "by ggufx.torch have it, packed bytes do not"
            )

    def _pair(self, tensor: Tensor) -> str:
        """Give a weight its factor, where it has one and upstream's loader applies it; returns its name then."""
        factor = self._tensors.get(factors.name_of(tensor.name))
        if factor is None or tensor.codec is None or not factors.is_loaded(tensor.name, tensor.type):
            return ""
        wanted = tensor.shape[:1] if tensor.ndim == 3 else (1,)
        if factor.type != "F32" or factor.shape != wanted or tensor.dtype.kind != "f":
            return ""  # no loader takes it
        tensor.factor = factor
        return tensor.name

    @property
    def path(self) -> Path:
        """The file, or the first of its splits."""
        return self._containers[0].path

    @property
    def paths(self) -> list[Path]:
        """All splits."""
        return [container.path for container in self._containers]

    @property
    def version(self) -> int:
        """GGUF version."""
        return self._containers[0].version

    @property
    def alignment(self) -> int:
        """Alignment of the tensors, in bytes."""
        return self._containers[0].alignment

    @property
    def architecture(self) -> str | None:
        """``general.architecture``, ``None`` without it; raises PlanError where it is no text."""
        return architecture_of(self.path, self.metadata)

    @property
    def facts(self) -> Facts:
        """The metadata as values of the types that they must have: what decides something is taken from here."""
        return Facts.of_metadata(self.path, self.metadata)

    @property
    def file_type(self) -> str | None:
        """Spelling of ``general.file_type``, ``None`` where the file or its dialect has none."""
        number = self.metadata.get("general.file_type")
        if type(number) is not int or self.dialect is None:
            return None
        return dialects.get(self.dialect).file_type_name(number)

    @property
    def containers(self) -> list[Container]:
        """The containers, one a split."""
        return list(self._containers)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in file order."""
        return list(self._tensors.values())

    @cached_property
    def data_nbytes(self) -> int:
        """Bytes of all tensors, padding aside."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def matching(self, patterns: Iterable[str]) -> list[Tensor]:
        """Return the tensors of some shell patterns, in file order; all of their bytes are there.

        Raises
        ------
        GGUFError
            A pattern matches no tensor.
        ContainerError
            The bytes of a tensor that matches are missing.
        """
        patterns = list(patterns)
        found = [t for t in self._tensors.values() if any(fnmatch.fnmatchcase(t.name, p) for p in patterns)]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(tensor.name, pattern) for tensor in found):
                missing = "" if self.complete else f" that are there ({self.notes[-1]})"
                raise GGUFError(
                    f"{self.path}: {quoted(pattern)} matches none of the {len(self)} tensors{missing}; ggufx inspect lists them"
                )
        cut = next((tensor for tensor in found if not tensor.is_whole), None)
        if cut is not None:
            raise ContainerError(
                cut.path,
                "truncated",
                f"the bytes of tensor {quoted(cut.name)} are not all there; download the file again",
            )
        return found

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r} (it has {len(self)}){self._close_to(name)}") from None

    # A mapping's own ways to say these two would look for like names each time.
    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @overload
    def get(self, name: str, default: None = None) -> Tensor | None: ...
    @overload
    def get(self, name: str, default: Tensor) -> Tensor: ...
    @overload
    def get(self, name: str, default: T) -> Tensor | T: ...
    def get(self, name: str, default: object = None) -> object:
        """Return the tensor of a name, or ``default``."""
        return self._tensors.get(name, default)

    def _close_to(self, name: object) -> str:
        """Return, as the end of a sentence, the names of tensors that are most like one that is none's."""
        import difflib  # only for messages

        found = difflib.get_close_matches(name, self, 3) if isinstance(name, str) and len(name) < 200 else []
        return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Release the file; arrays that view it stay valid. Reading a tensor afterwards raises ValueError."""
        for container in self._containers:
            container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<File {self.path.name}: {len(self)} tensors, {self.data_nbytes} bytes, dialect {self.dialect}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a line about the file and a table of its tensors."""
        from html import escape  # only for notebooks

        shown = list(islice(self._tensors.values(), _SHOWN_TENSORS))
        rows = "".join(
            f"<tr><td>{escape(as_unicode(tensor.name))}</td><td>{escape(tensor.type_label)}</td>"
            f"<td>{' × '.join(map(str, tensor.shape))}</td><td style='text-align:right'>{tensor.nbytes:,}</td>"
            f"<td style='text-align:right'>{tensor.bits_per_weight:.3g}</td></tr>"
            for tensor in shown
        )
        rest = len(self) - len(shown)
        more = f"<tr><td colspan='5'>and {rest} more tensors</td></tr>" if rest > 0 else ""
        return (
            f"<div><b>{escape(as_unicode(self.path.name))}</b>: {len(self)} tensors, {self.data_nbytes:,} bytes, "
            f"{len(self.metadata)} keys, dialect {escape(str(self.dialect))}"
            "<table><thead><tr><th>tensor</th><th>type</th><th>shape</th><th>bytes</th><th>bits per weight</th></tr></thead>"
            f"<tbody>{rows}{more}</tbody></table></div>"
        )


def _end_of_data(container: Container, tensors: Mapping[str, Tensor]) -> int:
    """Return the byte after the last tensor of a container."""
    if not container.entries:
        return container.data_offset
    last = container.entries[-1]
    return container.data_offset + last.offset + tensors[last.name].nbytes


def _follows(container: Container, end: int, padded: int, dialect: str | None) -> str:
    """Return what to say of the bytes behind the last tensor."""
    extra = f"{container.file_nbytes - end} bytes follow the last tensor of {container.path.name} at byte {end}"
    if not container.entries:
        extra = f"{container.file_nbytes - end} bytes follow the header of {container.path.name} at byte {end}"
    for position in dict.fromkeys((padded, end)):
        count = _count_files(container, position, dialect)
        if count:
            files = "1 more GGUF file follows" if count == 1 else f"{count} more GGUF files follow"
            return (
                f"{files} in {container.path.name} at byte {position}; only the first one is read. If they are the members of "
                "a split that were concatenated, cut them apart, give them their names and join them with ggufx merge-splits"
            )
    return f"{extra}; they belong to no tensor, and commands that write a model leave them out"


def _count_files(container: Container, position: int, dialect: str | None) -> int:
    """Return how many GGUFs begin one after the other from a byte of a container's file."""
    count = 0
    while (
        count < _MAX_FILES
        and position + len(MAGIC) <= container.file_nbytes
        and container.stored.read(position, len(MAGIC)).tobytes() == MAGIC
    ):
        count += 1
        try:
            following = read_container(container.path, base=position)
            codecs = dialects.resolve(container.path, following.entries, dialect=dialect).codecs
        except GGUFError:
            break  # what it is cannot be said, but that it is one
        tensors = {entry.name: Tensor(following, entry, codecs.get(entry.type_id)) for entry in following.entries}
        nbytes = _end_of_data(following, tensors) - following.data_offset
        position = following.data_offset + align_up(nbytes, following.alignment)
    return count


def open(path: str | Path, *, dialect: str | None = None, splits: bool = True, header_only: bool = False) -> File:
    """Open a GGUF file of any dialect for reading.

    Parameters
    ----------
    path
        The file; any member opens a whole split file.
    dialect
        ``"llama.cpp"``, ``"ik_llama.cpp"`` or ``"nisparks"``; by default the file's own stamp or what its ids and spans
        say. ``"opaque"`` takes every tensor for bytes of an unknown type: a file that no dialect explains opens, too.
    splits
        ``False`` opens one member of a split file alone.
    header_only
        ``True`` opens what lacks tensor data, or members of a split, too: the first megabytes of a download tell names, shapes
        and types. :attr:`File.notes` says what is missing; reading a tensor whose bytes are not there raises ContainerError.

    Raises
    ------
    ContainerError
        The file breaks a rule of the container.
    UnknownDialect, AmbiguousDialect
        No dialect, or several that disagree, explain the ids. An id that no dialect knows is no error.
    """
    path = Path(path)

    def reader(member: Path) -> Container:
        return read_container(member, header_only=header_only)

    if not splits:
        return File([reader(path)], dialect, header_only=header_only)
    try:
        containers, missing = read_splits(path, reader, incomplete=header_only)
    except ContainerError as error:
        if error.rule == "split-name":
            _refuse_concatenated(path, dialect)
        raise
    return File(containers, dialect, missing=missing, header_only=header_only)


def open_parts(path: str | Path, patterns: Iterable[str], *, dialect: str | None = None) -> File:
    """Open a GGUF for the tensors of some shell patterns: what holds none of them may be missing.

    Parameters
    ----------
    path
        The file; any member of a split, whose other members need not be there.
    patterns
        As :meth:`File.matching` takes them.
    dialect
        As in :func:`open`.

    Raises
    ------
    ContainerError, UnknownDialect, AmbiguousDialect
        As :func:`open`; what is missing is no error, unless a tensor that matches is.
    GGUFError
        As :meth:`File.matching`.
    """
    try:
        file = open(path, dialect=dialect)
    except ContainerError:
        file = open(path, dialect=dialect, header_only=True)
        if file.complete:
            raise
    file.matching(patterns)
    return file


def _refuse_concatenated(path: Path, dialect: str | None) -> None:
    """Raise ContainerError for members of a split that were put into one file, which is no way to merge them."""
    try:
        alone = open(path, dialect=dialect, splits=False)
    except GGUFError:
        return
    note = next((note for note in alone.notes if "GGUF file" in note), None)
    if note is not None:
        raise ContainerError(path, "split-name", note) from None


def _reopened(
    path: Path,
    dialect: str | None,
    splits: bool,
    header_only: bool,
    stored: tuple[StoredFile, ...],
) -> File:
    """Open the file of a pickle; that it is the same one was seen when ``stored`` came out of it."""
    file = open(path, dialect=dialect, splits=splits, header_only=header_only)
    if [container.stored.state for container in file.containers] != [one.state for one in stored]:
        raise ContainerError(path, "changed", "the file is not what it was when it was first opened; open it again")
    return file
