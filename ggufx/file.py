"""Open a GGUF: a directory entry meets its codec here.

>>> import ggufx
>>> with ggufx.open("model.gguf") as f:                    # doctest: +SKIP
...     w = f["blk.0.attn_q_a.weight"]
...     w.shape, w.type, w.nbytes
...     w.numpy()                                          # float32, decoded
...     f["blk.3.ffn_gate_exps.weight"][17]                # decodes one expert only
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ggufx import dialects
from ggufx.container import Container, Entry, KeyValues, read_container, read_splits
from ggufx.errors import ContainerError, UnknownType
from ggufx.typed import Facts, architecture_of
from ggufx.types import Codec

__all__ = ["File", "Tensor", "open"]

DIALECT_KEY = "ggufx.dialect"

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
    nbytes : int
        Packed bytes (for an unknown type: its span, which may end in padding).
    """

    def __init__(self, container: Container, entry: Entry, codec: Codec | None) -> None:
        self._container = container
        self._entry = entry
        self.name = entry.name
        self.shape = entry.shape
        self.type_id = entry.type_id
        self.codec = codec
        self.type = f"id {entry.type_id}" if codec is None else codec.name
        self.nbytes = entry.span if codec is None else codec.layout.nbytes(entry.shape)

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
    def path(self) -> Path:
        """The file that holds the bytes (a member of the split, if split)."""
        return self._container.path

    @property
    def file_offset(self) -> int:
        """Byte position of the tensor in :attr:`path`."""
        return self._container.data_offset + self._entry.offset

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The bytes as they lie in the file, a read-only view: uint8 ``shape[:-1] + (row_nbytes,)``.

        One axis of ``nbytes`` for a type that no dialect knows. Valid as long as it is referenced, even after the file
        is closed.
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
        """Decode the whole tensor.

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
        """
        return self._known().decode(self.packed, self.shape, dtype=dtype, out=out, threads=threads)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self.name!r} of type {self.type} cannot become an array without decoding a copy")
        return self.numpy(dtype)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> npt.NDArray[Any]:
        """Decode a slice: of the outer axes only what is asked is decoded, the last axis is cut afterwards.

        Integers, slices, ``...`` and 1-D integer arrays, as in numpy.
        """
        codec = self._known()
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
            packed, paired = self._rows_named_by(outer)
            return codec.decode(packed)[(*paired, *inner)]
        decoded = codec.decode(self.packed[outer] if outer else self.packed)
        return decoded[(..., *inner)] if inner else decoded

    def _rows_named_by(self, outer: tuple[Any, ...]) -> tuple[npt.NDArray[np.uint8], list[Any]]:
        """Return the packed rows that ``outer`` names, and ``outer`` in terms of them.

        numpy pairs the integer arrays of all axes, the last one included, so their pairing must wait until the rows are
        decoded.
        """
        packed = self.packed
        paired: list[Any] = []
        for axis, part in enumerate(outer):
            if isinstance(part, slice):
                packed = packed[(slice(None),) * axis + (part,)]
                paired.append(slice(None))
                continue
            indices = np.asarray(part)
            if indices.size and indices.dtype.kind not in "iu":
                raise IndexError(f"an array of {indices.dtype} beside an index of the last axis; use integers")
            wanted, where = np.unique(indices.astype(np.intp), return_inverse=True)
            packed = packed.take(wanted, axis=axis)
            paired.append(where.reshape(indices.shape))
        return packed, paired

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Tensor {self.name} {self.type}{list(self.shape)} {self.nbytes} bytes>"

    def _known(self) -> Codec:
        if self.codec is None:
            raise UnknownType(
                f"{self.path}: tensor {self.name!r} has type id {self.type_id}, which no known dialect defines; it can be "
                "listed and copied, not decoded. Register a codec for it (see ggufx.types) or name the dialect"
            )
        return self.codec


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
    """

    def __init__(self, containers: list[Container], dialect: str | None = None) -> None:
        first = containers[0]
        self.metadata: KeyValues = first.metadata
        self._containers = containers
        stamped = first.metadata.get(DIALECT_KEY)
        entries = [entry for container in containers for entry in container.entries]
        resolution = dialects.resolve(
            first.path, entries, dialect=dialect, stamped=stamped if isinstance(stamped, str) else None
        )
        self.dialect = None if resolution.dialect is None else resolution.dialect.name
        self.equivalent = resolution.equivalent
        self._tensors: dict[str, Tensor] = {}
        for container in containers:
            for entry in container.entries:
                if entry.name in self._tensors:
                    raise ContainerError(
                        container.path, "duplicate-tensor", f"tensor {entry.name!r} is in another split, too"
                    )
                self._tensors[entry.name] = Tensor(container, entry, resolution.codecs.get(entry.type_id))

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

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r} (it has {len(self)})") from None

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


def open(path: str | Path, *, dialect: str | None = None, splits: bool = True) -> File:
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

    Raises
    ------
    ContainerError
        The file breaks a rule of the container.
    UnknownDialect, AmbiguousDialect
        No dialect, or several that disagree, explain the ids. An id that no dialect knows is no error.
    """
    path = Path(path)
    return File(read_splits(path) if splits else [read_container(path)], dialect)
