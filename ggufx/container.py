"""The GGUF container: header, key/values, tensor directory, alignment, splits.

Knows no quant type: a tensor here is a name, dims, a type id and a byte range. Both directions live here, reading
(:func:`read_container`) and writing (:func:`encode_header`).

Layout (``ggml/docs/gguf.md``, version 3; version 2 is the same), all integers little-endian::

    "GGUF"  version u32  n_tensors u64  n_kv u64
    n_kv  x  key string, value type u32, value
    n_tensors  x  name string, n_dims u32, dims u64[n_dims], type u32, offset u64
    padding to the alignment, then the data section; tensor offsets count from its start

A string is a u64 byte length and UTF-8 bytes. An array is element type u32, count u64, elements.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from ggufx.errors import ContainerError

__all__ = [
    "Container",
    "Entry",
    "KeyValues",
    "StringArray",
    "Value",
    "ValueType",
    "align_up",
    "backup_path",
    "encode_header",
    "read_container",
    "split_name",
    "split_paths",
]

MAGIC: Final = b"GGUF"
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMS: Final = 4
"""ggml's ``GGML_MAX_DIMS``; loaders refuse more."""
MAX_NAME_NBYTES: Final = 65535
SPLIT_PATTERN: Final = re.compile(r"^(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


class ValueType(IntEnum):
    """Type tag of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: Final[Mapping[ValueType, np.dtype[Any]]] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
"""NumPy dtype of every fixed-width value type."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def backup_path(path: Path) -> Path:
    """Return where the old header of a file is kept while a new one is written in its place (see :mod:`ggufx.edit`)."""
    return path.with_name(path.name + ".header")


def align_up(nbytes: int, alignment: int) -> int:
    """Return ``nbytes`` rounded up to a multiple of ``alignment`` (a power of two)."""
    return (nbytes + alignment - 1) & -alignment


class StringArray(Sequence[str]):
    """A metadata array of strings that is decoded only where it is looked at.

    The first access walks the lengths once; ``len()`` and copying the raw bytes cost nothing.
    """

    __slots__ = ("_buffer", "_count", "_key", "_path", "_starts")

    def __init__(self, buffer: memoryview, count: int, path: str, key: str) -> None:
        self._buffer = buffer
        self._count = count
        self._path = path
        self._key = key
        self._starts: list[int] | None = None

    @property
    def raw(self) -> memoryview:
        """The encoded elements: (u64 length, bytes) each."""
        return self._buffer

    def __len__(self) -> int:
        return self._count

    def _index(self) -> list[int]:
        if self._starts is None:
            starts, position, unpack = [], 0, _U64.unpack_from
            buffer = self._buffer
            for _ in range(self._count):
                starts.append(position)
                position += 8 + unpack(buffer, position)[0]
            starts.append(position)
            self._starts = starts
        return self._starts

    def element_bytes(self, index: int) -> bytes:
        """Bytes of one element, not decoded."""
        starts = self._index()
        return bytes(self._buffer[starts[index] + 8 : starts[index + 1]])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of a string array of {self._count}")
        try:
            return self.element_bytes(index).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ContainerError(
                self._path, "utf-8", f"element {index} of array {self._key!r} is not UTF-8 ({error.reason})"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(self._count))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self._count == other._count and self._buffer == other._buffer
        if isinstance(other, Sequence) and not isinstance(other, str | bytes):
            return len(other) == self._count and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<StringArray of {self._count}>"


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value with its type on disk.

    Attributes
    ----------
    type
        Type tag.
    data
        ``bool``, ``int``, ``float`` or ``str`` for scalars; a 1-D ``ndarray`` for arrays of fixed-width elements; a
        :class:`StringArray` or list of ``str`` for arrays of strings.
    element
        Element type of an array, else ``None``.
    """

    type: ValueType
    data: Any
    element: ValueType | None = None

    @classmethod
    def string(cls, text: str) -> Value:
        """Return a string value."""
        return cls(ValueType.STRING, text)

    @classmethod
    def u32(cls, number: int) -> Value:
        """Return an unsigned 32-bit value."""
        return cls(ValueType.UINT32, int(number))

    @classmethod
    def f32(cls, number: float) -> Value:
        """Return a float32 value (rounded to the nearest float32)."""
        return cls(ValueType.FLOAT32, float(np.float32(number)))

    @classmethod
    def boolean(cls, flag: bool) -> Value:
        """Return a boolean value."""
        return cls(ValueType.BOOL, bool(flag))

    @classmethod
    def array(cls, element: ValueType, items: Any) -> Value:
        """Return an array value of fixed-width numbers or strings."""
        if element is ValueType.STRING:
            return cls(ValueType.ARRAY, items if isinstance(items, StringArray) else list(items), element)
        return cls(ValueType.ARRAY, np.asarray(items, dtype=DTYPES[element]), element)

    def encode(self) -> bytes:
        """Return the value's bytes, type tag included."""
        out = [_U32.pack(self.type)]
        if self.type is ValueType.STRING:
            out.append(_encode_string(self.data))
        elif self.type is ValueType.ARRAY:
            assert self.element is not None
            out += [_U32.pack(self.element), _U64.pack(len(self.data))]
            if isinstance(self.data, StringArray):
                out.append(bytes(self.data.raw))
            elif self.element is ValueType.STRING:
                out += [_encode_string(item) for item in self.data]
            else:
                out.append(np.ascontiguousarray(self.data, dtype=DTYPES[self.element]).tobytes())
        else:
            out.append(np.array(self.data, dtype=DTYPES[self.type]).tobytes())
        return b"".join(out)

    def to_json(self) -> Any:
        """Return the value as plain JSON data (arrays as lists)."""
        if self.type is ValueType.ARRAY:
            return self.data.tolist() if isinstance(self.data, np.ndarray) else list(self.data)
        return self.data

    def same(self, other: Value) -> bool:
        """Return whether the two values are equal bit for bit, types included."""
        return self.type is other.type and self.element is other.element and self.encode() == other.encode()


def _encode_string(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return _U64.pack(len(data)) + data


class KeyValues(Mapping[str, Any]):
    """Metadata of a file: key -> Python value, in file order; :meth:`value` gives the typed value.

    Scalars are ``bool``, ``int``, ``float`` or ``str``; arrays are read-only ``ndarray`` views of the file or lazy
    :class:`StringArray` objects.
    """

    def __init__(self, values: dict[str, Value]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key].data

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: str) -> Value:
        """Return the typed value of ``key``; raises ``KeyError``."""
        return self._values[key]

    def typed(self) -> dict[str, Value]:
        """Return a new dict of the typed values, in file order."""
        return dict(self._values)

    def __repr__(self) -> str:
        return f"<KeyValues of {len(self)}: {', '.join(list(self)[:4])}{', ...' if len(self) > 4 else ''}>"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the tensor directory.

    Attributes
    ----------
    name
        Tensor name.
    shape
        Logical shape in numpy order (GGUF stores the dims reversed; that order never leaves this module).
    type_id
        The number on disk; a type only together with a dialect.
    offset
        Byte offset within the data section.
    span
        Bytes from ``offset`` to the next tensor's offset, or to the end of the file for the last one: the size of the
        tensor rounded up to the alignment, as GGUF stores offsets and not sizes.
    last
        Whether this is the last tensor of the file (its span may lack the final padding).
    alignment
        Of the file that holds it, in bytes: the members of a split need not agree.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    span: int
    last: bool
    alignment: int = DEFAULT_ALIGNMENT


class Container:
    """One GGUF file, mapped into memory, its header parsed and its tensor directory checked.

    Attributes
    ----------
    path : Path
    version : int
    alignment : int
        ``general.alignment`` or 32, in bytes.
    metadata : KeyValues
    entries : tuple of Entry
        In file order.
    data_offset : int
        Byte position of the data section.
    file_nbytes : int
    """

    def __init__(
        self,
        path: Path,
        version: int,
        alignment: int,
        metadata: KeyValues,
        entries: tuple[Entry, ...],
        data_offset: int,
        mapping: mmap.mmap,
    ) -> None:
        self.path = path
        self.version = version
        self.alignment = alignment
        self.metadata = metadata
        self.entries = entries
        self.data_offset = data_offset
        self.file_nbytes = len(mapping)
        self._mapping: mmap.mmap | None = mapping

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._mapping is None

    def bytes_of(self, entry: Entry, nbytes: int | None = None) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes, uint8 [nbytes], a read-only view of the file; default: the whole span."""
        if self._mapping is None:
            raise ValueError(f"{self.path} is closed")
        count = entry.span if nbytes is None else nbytes
        if count == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._mapping, np.uint8, count, self.data_offset + entry.offset)

    def close(self) -> None:
        """Release the file. Arrays that still view it keep its memory mapped until they go."""
        self._mapping = None


class _Cursor:
    """Bounds-checked reading position over a file's bytes."""

    __slots__ = ("_view", "end", "path", "position")

    def __init__(self, view: memoryview, path: Path) -> None:
        self._view = view
        self.path = path
        self.position = 0
        self.end = len(view)

    def fail(self, rule: str, detail: str) -> ContainerError:
        if backup_path(self.path).is_file():
            # Nobody should download 150 GB again for the sake of a header that lies beside them.
            detail += (
                f"; or a change of its metadata was cut off: if {backup_path(self.path).name} is ggufx's, the next ggufx set "
                "of this file puts the old header back first"
            )
        return ContainerError(self.path, rule, detail)

    def take(self, nbytes: int, what: str) -> memoryview:
        if nbytes > self.end - self.position:
            raise self.fail(
                "truncated",
                f"{what} at byte {self.position} needs {nbytes} bytes but the file ends at byte {self.end}: "
                "the model is corrupted or incomplete; download or convert it again",
            )
        start = self.position
        self.position += nbytes
        return self._view[start : self.position]

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def string(self, what: str, limit: int | None = None) -> str:
        start = self.position
        length = self.u64(f"length of {what}")
        if limit is not None and length > limit:
            raise self.fail("string-length", f"{what} at byte {start} claims {length} bytes, more than {limit}")
        data = bytes(self.take(length, what))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("utf-8", f"{what} at byte {start} is not UTF-8 ({error.reason}): {data[:40]!r}") from None

    def strings(self, count: int, key: str) -> StringArray:
        """Skip ``count`` strings by their lengths alone; nothing is decoded or copied."""
        view, end, start, position = self._view, self.end, self.position, self.position
        unpack = _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + unpack(view, position)[0]
        except (struct.error, OverflowError):  # past the end; past what a C index can hold
            position = end + 1
        if position > end:
            raise self.fail(
                "truncated", f"string array {key!r} of {count} elements runs past the end of the file at byte {end}"
            )
        self.position = position
        return StringArray(view[start:position], count, str(self.path), key)

    def value(self, key: str) -> Value:
        type_id = self.u32(f"type of {key!r}")
        if type_id not in ValueType._value2member_map_:
            raise self.fail("value-type", f"key {key!r} has unknown value type {type_id}; types 0 to 12 exist")
        kind = ValueType(type_id)
        if kind is ValueType.STRING:
            return Value(kind, self.string(f"value of {key!r}"))
        if kind is not ValueType.ARRAY:
            return Value(kind, self._scalars(kind, 1, key)[0].item())
        element_id = self.u32(f"element type of {key!r}")
        if element_id == ValueType.ARRAY:
            raise self.fail("nested-array", f"key {key!r} is an array of arrays, which no GGUF loader accepts")
        if element_id not in ValueType._value2member_map_:
            raise self.fail("value-type", f"key {key!r} is an array of unknown type {element_id}")
        element = ValueType(element_id)
        count = self.u64(f"length of array {key!r}")
        least = count * (8 if element is ValueType.STRING else DTYPES[element].itemsize)
        if least > self.end - self.position:
            raise self.fail(
                "truncated",
                f"array {key!r} claims {count} elements, at least {least} bytes, but only "
                f"{self.end - self.position} bytes are left in the file",
            )
        if element is ValueType.STRING:
            return Value(kind, self.strings(count, key), element)
        return Value(kind, self._scalars(element, count, key), element)

    def _scalars(self, kind: ValueType, count: int, key: str) -> npt.NDArray[Any]:
        raw = self.take(count * DTYPES[kind].itemsize, f"value of {key!r}")
        if kind is ValueType.BOOL and count:
            # A bool other than 0 and 1 is undefined behaviour in C readers; numpy would keep the odd byte.
            worst = int(np.frombuffer(raw, np.uint8).max())
            if worst > 1:
                raise self.fail("bool", f"key {key!r} holds the byte {worst} as a bool; only 0 and 1 are")
        return np.frombuffer(raw, DTYPES[kind])


def read_container(path: str | Path) -> Container:
    """Map one GGUF file and parse its header.

    Reads the header only; arrays of strings are skipped by their lengths, not decoded. No memory is taken on the
    file's word: every count is checked against the bytes that are there.

    Raises
    ------
    ContainerError
        The file breaks a rule of the format; ``error.rule`` names it.
    FileNotFoundError, PermissionError
        As from ``open``.
    """
    path = Path(path)
    if path.is_dir():
        raise ContainerError(path, "magic", "is a directory, not a GGUF file")
    with path.open("rb") as file:
        try:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ContainerError(path, "magic", "the file is empty; a GGUF file starts with the bytes GGUF") from None
    cursor = _Cursor(memoryview(mapping), path)
    version, n_tensors, n_kv = _read_preamble(cursor)
    metadata = _read_metadata(cursor, n_kv)
    alignment = _alignment(cursor, metadata)
    entries, data_offset = _read_directory(cursor, n_tensors, alignment)
    return Container(path, version, alignment, KeyValues(metadata), entries, data_offset, mapping)


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = bytes(cursor.take(min(4, cursor.end), "magic"))
    if magic != MAGIC:
        raise cursor.fail("magic", f"invalid magic characters {magic!r}, expected {MAGIC!r}: this is not a GGUF file")
    version = cursor.u32("version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, 3):
            raise cursor.fail(
                "endianness",
                f"big-endian GGUF (version {swapped}) is not supported; convert it with the gguf package's "
                "gguf-convert-endian",
            )
        raise cursor.fail("version", f"GGUF version {version} is not supported; versions 2 and 3 are")
    n_tensors, n_kv = cursor.u64("tensor count"), cursor.u64("key/value count")
    left = cursor.end - cursor.position
    # The smallest key/value is a u64 length, a u32 type and one byte, the smallest directory line 24 bytes.
    if n_kv * 13 + n_tensors * 24 > left:
        raise cursor.fail(
            "count", f"the header claims {n_kv} keys and {n_tensors} tensors but only {left} bytes follow it"
        )
    return version, n_tensors, n_kv


def _read_metadata(cursor: _Cursor, n_kv: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(n_kv):
        key = cursor.string(f"key {number}", MAX_NAME_NBYTES)
        if key in metadata:
            raise cursor.fail("duplicate-key", f"key {key!r} occurs twice")
        metadata[key] = cursor.value(key)
    return metadata


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.type is not ValueType.UINT32:
        raise cursor.fail("alignment", f"general.alignment has type {value.type.name}, it must be UINT32")
    alignment = int(value.data)
    if alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail("alignment", f"general.alignment is {alignment}; it must be a power of two")
    return alignment


def _read_directory(cursor: _Cursor, n_tensors: int, alignment: int) -> tuple[tuple[Entry, ...], int]:
    lines: list[tuple[str, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for number in range(n_tensors):
        name = cursor.string(f"name of tensor {number}", MAX_NAME_NBYTES)
        if name in names:
            raise cursor.fail("duplicate-tensor", f"tensor {name!r} occurs twice (duplicated tensor name)")
        names.add(name)
        n_dims = cursor.u32(f"number of dims of {name!r}")
        if n_dims > MAX_DIMS:
            raise cursor.fail("dims", f"tensor {name!r} has {n_dims} dims; at most {MAX_DIMS} are allowed")
        dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, f"dims of {name!r}"))
        count = 1
        for dim in dims:
            count *= dim or 1  # numpy and C loaders multiply the rest even when one dim is 0
        if count >= 2**63:
            raise cursor.fail("dims", f"tensor {name!r} of dims {list(dims)} has more than 2^63 - 1 elements")
        type_id = cursor.u32(f"type of {name!r}")
        offset = cursor.u64(f"offset of {name!r}")
        lines.append((name, tuple(int(d) for d in reversed(dims)), type_id, offset))
    data_offset = align_up(cursor.position, alignment)
    available = max(0, cursor.end - data_offset)
    if not lines and available:
        raise cursor.fail(
            "trailing", f"{available} bytes follow the header at byte {data_offset}, but the file has no tensors"
        )
    entries = []
    for number, (name, shape, type_id, offset) in enumerate(lines):
        last = number == len(lines) - 1
        following = available if last else lines[number + 1][3]
        if offset % alignment:
            raise cursor.fail("offset", f"tensor {name!r} has offset {offset}, not a multiple of {alignment}")
        if number == 0 and offset != 0:
            raise cursor.fail("offset", f"tensor {name!r} has offset {offset}, expected 0 for the first tensor")
        if offset > available:
            raise cursor.fail(
                "truncated",
                f"tensor {name!r} data is not within the file bounds (offset {offset}, data section {available} "
                "bytes): the model is corrupted or incomplete",
            )
        if following < offset:
            raise cursor.fail(
                "offset",
                f"tensor {lines[number + 1][0]!r} has offset {following}, before that of the preceding {name!r}, "
                f"{offset}: offsets must not decrease",
            )
        entries.append(Entry(name, shape, type_id, offset, following - offset, last, alignment))
    return tuple(entries), data_offset


def encode_header(
    metadata: Mapping[str, Value], directory: Sequence[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> bytes:
    """Return a complete GGUF v3 header, padded to the alignment.

    Parameters
    ----------
    metadata
        Key -> value, in the order to write.
    directory
        ``(name, shape in numpy order, type id, offset within the data section)`` per tensor.
    alignment
        Bytes; a power of two. ``general.alignment`` is the caller's to write when it is not 32.
    """
    parts = [MAGIC, _U32.pack(VERSION), _U64.pack(len(directory)), _U64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [_encode_string(key), value.encode()]
    for name, shape, type_id, offset in directory:
        parts += [
            _encode_string(name),
            _U32.pack(len(shape)),
            struct.pack(f"<{len(shape)}Q", *reversed(shape)),
            _U32.pack(type_id),
            _U64.pack(offset),
        ]
    nbytes = sum(map(len, parts))
    parts.append(bytes(align_up(nbytes, alignment) - nbytes))
    return b"".join(parts)


def split_name(path: Path, number: int, count: int) -> Path:
    """Return the path of split ``number`` (from 1) of ``count`` for an unsplit output path."""
    stem = path.name.removesuffix(".gguf")
    return path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf")


def split_paths(path: Path) -> list[Path]:
    """Return every member of the split file that ``path`` belongs to, or ``[path]`` when its name is not a split's."""
    match = SPLIT_PATTERN.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['prefix']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def read_splits(path: Path, reader: Callable[[Path], Container] = read_container) -> list[Container]:
    """Open every member of a split file (from any member) and check that they belong together.

    Raises
    ------
    ContainerError
        A member is missing, or ``split.no``, ``split.count`` or ``split.tensors.count`` disagree with the files.
    """
    first = reader(path)
    count = _split_number(first, "split.count") or 0
    if count <= 1:
        return [first]
    members = split_paths(path)
    if len(members) != count or path not in members:
        raise ContainerError(
            path,
            "split-name",
            f"invalid split file: split.count is {count} but the name does not end in -NNNNN-of-{count:05d}.gguf; "
            "rename the members as they were, or merge them",
        )
    missing = [member.name for member in members if not member.is_file()]
    if missing:
        raise ContainerError(
            path, "split-missing", f"{len(missing)} of {count} split files are missing: {', '.join(missing[:3])}"
        )
    containers = [first if member == path else reader(member) for member in members]
    for number, container in enumerate(containers):
        found = (_split_number(container, "split.no"), _split_number(container, "split.count"))
        if found != (number, count):
            raise ContainerError(
                container.path, "split-number", f"split.no, split.count are {found}, expected ({number}, {count})"
            )
    total = _split_number(first, "split.tensors.count")
    seen = sum(len(container.entries) for container in containers)
    if total is not None and total != seen:
        raise ContainerError(path, "split-tensors", f"wrong number of tensors; expected {total}, got {seen}")
    return containers


def _split_number(container: Container, key: str) -> int | None:
    """Return an integer key of a split file, ``None`` without it; writers differ in its width."""
    number = container.metadata.get(key)
    if number is None or type(number) is int:
        return number
    kind = container.metadata.value(key).type.name
    raise ContainerError(container.path, "split-key", f"{key} has type {kind}, it must be an integer")
