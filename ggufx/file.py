"""Open a GGUF: a directory entry meets its codec here.

>>> import ggufx
>>> with ggufx.open("model.gguf") as f:                    # doctest: +SKIP
...     w = f["blk.0.attn_q_a.weight"]
...     w.shape, w.type, w.nbytes
...     w.numpy()                                          # float32, decoded
...     f["blk.3.ffn_gate_exps.weight"][17]                # decodes one expert only
"""

from __future__ import annotations

import re
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
from ggufx.named_types import NamedType
from ggufx.types import Codec

__all__ = ["File", "Tensor", "open"]

DIALECT_KEY = "ggufx.dialect"

# Weights whose products upstream's loader multiplies by a factor of their own, a tensor NAME.scale beside NAME.weight
# (llama-model.cpp), whatever the type and the architecture; the head's only where it is NVFP4.
_HAS_FACTOR = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|output|qkv|gate)|ffn_(gate|down|up)(_shexp|_exps)?|ssm_(in|out|alpha|beta)"
    r"|nextn\.(eh_proj|shared_head_head))\.weight"
)

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

        One axis of ``nbytes`` for a type that no dialect knows. They decode to values without :attr:`scale`. Valid as long
        as it is referenced, even after the file is closed.
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
        """
        codec = self._known()
        decoded = codec.decode(self.packed, self.shape, dtype=dtype, out=out, threads=threads)
        if self.factor is None:
            return decoded
        if decoded.dtype not in (np.float32, np.float64):
            # Rounded once, and after the product: a half float may not hold what stands before it.
            decoded[...] = codec.decode(self.packed, self.shape, threads=threads) * self._factors()
            return decoded
        decoded *= self._factors()
        return decoded

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
            raise UnknownType(f"{self.path}: tensor {self.name!r} {self.why_unknown()}")
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
    notes : tuple of str
        What there is to know before the tensors are used: ids that no dialect's layout fits.
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
        self.notes = resolution.notes
        self._tensors: dict[str, Tensor] = {}
        for container in containers:
            for entry in container.entries:
                if entry.name in self._tensors:
                    raise ContainerError(
                        container.path, "duplicate-tensor", f"tensor {entry.name!r} is in another split, too"
                    )
                codec, named = resolution.codecs.get(entry.type_id), resolution.named.get(entry.type_id)
                self._tensors[entry.name] = Tensor(container, entry, codec, named)

        factors = [self._pair(tensor) for tensor in self._tensors.values() if tensor.name.endswith(".weight")]
        scaled = [name for name in factors if name]
        if scaled:
            self.notes += (
                f"{scaled[0]} and {len(scaled) - 1} more have a factor of their own in a tensor called .scale: values read by "
                "numpy() and by ggufx.torch have it, packed bytes do not",
            )

    def _pair(self, tensor: Tensor) -> str:
        """Give a weight its factor, where it has one and upstream's loader applies it; returns its name then."""
        factor = self._tensors.get(tensor.name.removesuffix("weight") + "scale")
        head = tensor.name == "output.weight" and tensor.type == "NVFP4"
        if factor is None or tensor.codec is None or not (head or _HAS_FACTOR.fullmatch(tensor.name)):
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
    def file_type(self) -> str | None:
        """Spelling of ``general.file_type``, ``None`` where the file or its dialect has none."""
        number = self.metadata.get("general.file_type")
        if not isinstance(number, int) or self.dialect is None:
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
