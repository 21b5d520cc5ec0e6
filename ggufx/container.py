"""The GGUF container: header, key/values, tensor directory, alignment, splits.

Knows no quant type: a tensor here is a name, dims, a type id and a byte range. Both directions live here, reading
(:func:`read_container`) and writing (:func:`encode_header`).

Layout (``ggml/docs/gguf.md``, version 3; version 2 is the same)::

    "GGUF"  version u32  n_tensors u64  n_kv u64
    n_kv  x  key string, value type u32, value
    n_tensors  x  name string, n_dims u32, dims u64[n_dims], type u32, offset u64
    padding to the alignment, then the data section; tensor offsets count from its start

Values are in :mod:`ggufx.values`. Version 3 is written, little-endian. Read are, too, version 1, whose counts, lengths and dims
are u32, and big-endian files of version 2 and 3: their numbers are turned round as the header is read, and the bytes of their
tensors when they are decoded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ggufx.errors import ContainerError, quoted
from ggufx.stored import StoredFile
from ggufx.values import (
    DTYPES,
    MAX_NAME_NBYTES,
    MAX_NESTING,
    KeyValues,
    StringArray,
    Value,
    ValueType,
    decode_text,
    encode_string,
    encode_text,
)

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
    "loader_notes",
    "read_container",
    "split_name",
    "split_paths",
]

MAGIC: Final = b"GGUF"
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 21
"""The largest page that files are commonly mapped by. Every tensor is padded to the alignment, and so is a header: without a
limit a file of 64 bytes could ask for 2 GB of padding."""
MAX_DIMS: Final = 64
"""NumPy's limit."""
LOADER_MAX_DIMS: Final = 4
"""ggml's ``GGML_MAX_DIMS``; its loader refuses more."""
LOADER_MAX_NAME_NBYTES: Final = 63
"""ggml's ``GGML_MAX_NAME`` without the final NUL; its loader refuses longer tensor names."""
MAX_HEADER_NBYTES: Final = 1 << 28
"""The largest headers, those of big vocabularies, have some 16 MB; a longer one than this is damage, and not read to memory."""
MAX_NESTED: Final = 1 << 18
"""Arrays within the arrays of a file, each of which is an object of Python's: an empty one has only 12 bytes in the file."""
SPLIT_PATTERN: Final = re.compile(r"^(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_FIRST_READ_NBYTES: Final = 1 << 16


def backup_path(path: Path) -> Path:
    """Return where the old header of a file is kept while a new one is written in its place (see :mod:`ggufx.edit`)."""
    return path.with_name(path.name + ".header")


def align_up(nbytes: int, alignment: int) -> int:
    """Return ``nbytes`` rounded up to a multiple of ``alignment`` (a power of two)."""
    return (nbytes + alignment - 1) & -alignment


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
        Whether this is the last tensor of the file (its span may lack the final padding, or other bytes may follow it).
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
    """One GGUF file, its header parsed and its tensor directory checked.

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
    big_endian : bool
        Whether the file's numbers, those in its tensors too, have their highest byte first.
    """

    def __init__(
        self,
        stored: StoredFile,
        version: int,
        alignment: int,
        metadata: KeyValues,
        entries: tuple[Entry, ...],
        data_offset: int,
        *,
        big_endian: bool = False,
    ) -> None:
        self.path = stored.path
        self.version = version
        self.alignment = alignment
        self.metadata = metadata
        self.entries = entries
        self.data_offset = data_offset
        self.file_nbytes = stored.nbytes
        self.big_endian = big_endian
        self.stored = stored

    def __reduce__(self) -> tuple[Any, ...]:
        # For a tensor's sake, which needs nothing but the place of its bytes.
        return _restored, (self.stored, self.version, self.alignment, self.data_offset, self.big_endian)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self.stored.closed

    def bytes_of(self, entry: Entry, nbytes: int | None = None) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes, uint8 [nbytes], a read-only view of the file; default: the whole span."""
        return self.stored.view(self.data_offset + entry.offset, entry.span if nbytes is None else nbytes)

    def read_into(self, entry: Entry, start: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill a C-contiguous ``buffer``, uint8, with the tensor's bytes from its byte ``start``."""
        self.stored.read_into(self.data_offset + entry.offset + start, buffer)

    def require_little_endian(self) -> None:
        """Raise ContainerError for a file whose tensors cannot be copied byte by byte."""
        if self.big_endian:
            raise ContainerError(
                self.path,
                "endianness",
                "the file is big-endian: it can be inspected and decoded, but its bytes cannot be copied, changed or loaded as "
                "they are; convert it with the gguf package's gguf-convert-endian",
            )

    def close(self) -> None:
        """Release the file. Arrays that still view it keep its memory mapped until they go."""
        self.stored.close()


def _restored(stored: StoredFile, version: int, alignment: int, data_offset: int, big_endian: bool) -> Container:
    return Container(stored, version, alignment, KeyValues({}), (), data_offset, big_endian=big_endian)


class _Cursor:
    """Bounds-checked reading position over a file's first bytes, which are read as far as they are needed."""

    __slots__ = ("_base", "_size", "_stored", "_u32", "_u64", "_view", "end", "nested", "order", "path", "position")

    def __init__(self, stored: StoredFile, base: int) -> None:
        self._stored = stored
        self._base = base
        self._view = memoryview(b"")
        self.path = stored.path
        self.position = 0
        self.nested = 0
        self.end = stored.nbytes - base
        self.lay_out("<", 3)

    def lay_out(self, order: str, version: int) -> None:
        """Choose the byte order, ``<`` or ``>``, and the width of counts and lengths."""
        self.order = order
        self._u32, self._u64 = struct.Struct(f"{order}I"), struct.Struct(f"{order}Q")
        self._size = self._u32 if version == 1 else self._u64

    def fail(self, rule: str, detail: str) -> ContainerError:
        if backup_path(self.path).is_file():
            # Nobody should download 150 GB again for the sake of a header that lies beside them.
            detail += (
                f"; or a change of its metadata was cut off: if {backup_path(self.path).name} is ggufx's, the next ggufx set "
                "of this file puts the old header back first"
            )
        return ContainerError(self.path, rule, detail)

    def _limit(self, nbytes: int) -> None:
        if nbytes > MAX_HEADER_NBYTES:
            raise self.fail("header-length", f"the header has more than {MAX_HEADER_NBYTES} bytes: the file is damaged")

    def _hold(self, nbytes: int) -> None:
        """Have the first ``nbytes`` bytes in memory. Views of what was there before stay valid."""
        if nbytes <= len(self._view):
            return
        self._limit(nbytes)
        length = min(self.end, max(nbytes, 4 * len(self._view), _FIRST_READ_NBYTES))
        self._view = memoryview(self._stored.read(self._base, length)).toreadonly()  # type: ignore[arg-type]

    def take(self, nbytes: int, what: str) -> memoryview:
        start, end = self.position, self.position + nbytes
        if end > self.end:
            raise self.fail(
                "truncated",
                f"{what} at byte {start} needs {nbytes} bytes but the file ends at byte {self.end}: "
                "the model is corrupted or incomplete; download or convert it again",
            )
        self._hold(end)
        self.position = end
        return self._view[start:end]

    def u32(self, what: str) -> int:
        return int(self._u32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(self._u64.unpack(self.take(8, what))[0])

    def size(self, what: str) -> int:
        """Read a count or a length, which version 1 has in 32 bits."""
        return int(self._size.unpack(self.take(self._size.size, what))[0])

    def string(self, what: str, limit: int | None = None) -> str:
        start = self.position
        length = self.size(f"length of {what}")
        if limit is not None and length > limit:
            raise self.fail("string-length", f"{what} at byte {start} claims {length} bytes, more than {limit}")
        return decode_text(bytes(self.take(length, what)))

    def dims(self, count: int, what: str) -> tuple[int, ...]:
        letter = self._size.format[-1]
        return struct.unpack(f"{self.order}{count}{letter}", self.take(self._size.size * count, what))

    def strings(self, count: int, key: str) -> StringArray:
        """Skip ``count`` strings by their lengths alone; nothing is decoded or copied."""
        start = position = self.position
        done, head, unpack = 0, self._size.size, self._size.unpack_from
        while True:
            view = self._view
            try:
                for done in range(done, count):  # noqa: B007, B020 (it goes on where the memory ended)
                    position += head + unpack(view, position)[0]
            except (struct.error, OverflowError):  # past what is in memory; past what a C index can hold
                if position + head <= self.end:
                    self._hold(position + head)
                    continue
                position = self.end + 1
            break
        if position > self.end:
            raise self.fail(
                "truncated",
                f"string array {quoted(key)} of {count} elements runs past the end of the file at byte {self.end}",
            )
        self._hold(position)
        self.position = position
        raw = self._view[start:position]
        if self._size.format != "<Q":
            raw = memoryview(self._reencoded(raw, count))
        return StringArray(raw, count)

    def _reencoded(self, raw: memoryview, count: int) -> bytes:
        parts: list[bytes | memoryview] = []
        position, head = 0, self._size.size
        for _ in range(count):
            (length,) = self._size.unpack_from(raw, position)
            parts += [_U64.pack(length), raw[position + head : position + head + length]]
            position += head + length
        return b"".join(parts)

    def value(self, key: str) -> Value:
        type_id = self.u32(f"type of {quoted(key)}")
        if type_id not in ValueType._value2member_map_:
            raise self.fail("value-type", f"key {quoted(key)} has unknown value type {type_id}; types 0 to 12 exist")
        kind = ValueType(type_id)
        if kind is ValueType.STRING:
            return Value(kind, self.string(f"value of {quoted(key)}"))
        if kind is ValueType.ARRAY:
            return self._array(key, 1)
        return Value.scalar(kind, self._scalars(kind, 1, key))

    def _array(self, key: str, depth: int) -> Value:
        element_id = self.u32(f"element type of {quoted(key)}")
        if element_id not in ValueType._value2member_map_:
            raise self.fail("value-type", f"key {quoted(key)} is an array of unknown type {element_id}")
        element = ValueType(element_id)
        count = self.size(f"length of array {quoted(key)}")
        # The least that an element takes: a string its length, an array its element type and its length.
        least = {ValueType.STRING: self._size.size, ValueType.ARRAY: 4 + self._size.size}
        nbytes = count * (least[element] if element in least else DTYPES[element].itemsize)
        if nbytes > self.end - self.position:
            raise self.fail(
                "truncated",
                f"array {quoted(key)} claims {count} elements, at least {nbytes} bytes, but only "
                f"{self.end - self.position} bytes are left in the file",
            )
        self._limit(self.position + nbytes)
        if element is ValueType.STRING:
            return Value(ValueType.ARRAY, self.strings(count, key), element)
        if element is ValueType.ARRAY:
            if depth == MAX_NESTING:
                raise self.fail("nested-array", f"key {quoted(key)} holds arrays within arrays, more than {depth} deep")
            self.nested += count
            if self.nested > MAX_NESTED:
                raise self.fail("nested-array", f"key {quoted(key)} brings the arrays within arrays to {self.nested}")
            return Value(ValueType.ARRAY, tuple(self._array(key, depth + 1) for _ in range(count)), element)
        return Value(ValueType.ARRAY, self._scalars(element, count, key), element)

    def _scalars(self, kind: ValueType, count: int, key: str) -> npt.NDArray[Any]:
        dtype = DTYPES[kind]
        raw = self.take(count * dtype.itemsize, f"value of {quoted(key)}")
        if kind is ValueType.BOOL and count:
            # A bool other than 0 and 1 is undefined behaviour in C readers; numpy would keep the odd byte.
            worst = int(np.frombuffer(raw, np.uint8).max())
            if worst > 1:
                raise self.fail("bool", f"key {quoted(key)} holds the byte {worst} as a bool; only 0 and 1 are")
        found = np.frombuffer(raw, dtype)
        if self.order == ">" and dtype.itemsize > 1:
            found = found.byteswap()
            found.flags.writeable = False
        return found


def read_container(path: str | Path, *, header_only: bool = False, base: int = 0) -> Container:
    """Open one GGUF file and parse its header.

    Reads the header only; arrays of strings are skipped by their lengths, not decoded. No memory is taken on the
    file's word: every count is checked against the bytes that are there.

    Parameters
    ----------
    path
        The file.
    header_only
        Accept a file that ends before the tensors do, such as the first megabytes of a download.
    base
        Byte at which the GGUF begins within the file.

    Raises
    ------
    ContainerError
        The file breaks a rule of the format; ``error.rule`` names it.
    FileNotFoundError, PermissionError
        As from ``open``.
    """
    stored = StoredFile(Path(path))
    if stored.nbytes == 0:
        raise ContainerError(stored.path, "magic", "the file is empty; a GGUF file starts with the bytes GGUF")
    cursor = _Cursor(stored, base)
    version, n_tensors, n_kv = _read_preamble(cursor)
    metadata = _read_metadata(cursor, n_kv)
    alignment = _alignment(cursor, metadata)
    entries, data_offset = _read_directory(cursor, n_tensors, alignment, header_only=header_only)
    return Container(
        stored,
        version,
        alignment,
        KeyValues(metadata),
        entries,
        base + data_offset,
        big_endian=cursor.order == ">",
    )


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = bytes(cursor.take(min(4, cursor.end), "magic"))
    if magic != MAGIC:
        raise cursor.fail("magic", f"invalid magic characters {magic!r}, expected {MAGIC!r}: this is not a GGUF file")
    version = cursor.u32("version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version in (1, 2, 3):
        cursor.lay_out("<", version)
    elif swapped in (2, 3):
        version = swapped
        cursor.lay_out(">", version)
    else:
        raise cursor.fail("version", f"GGUF version {version} is not supported; versions 1, 2 and 3 are")
    n_tensors, n_kv = cursor.size("tensor count"), cursor.size("key/value count")
    left = cursor.end - cursor.position
    # The smallest key/value is a length, a u32 type and one byte; the smallest directory line a length, two u32 and a u64.
    head = 4 if version == 1 else 8
    if n_kv * (head + 5) + n_tensors * (head + 16) > left:
        raise cursor.fail(
            "count", f"the header claims {n_kv} keys and {n_tensors} tensors but only {left} bytes follow it"
        )
    return version, n_tensors, n_kv


def _read_metadata(cursor: _Cursor, n_kv: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(n_kv):
        key = cursor.string(f"key {number}", MAX_NAME_NBYTES)
        if key in metadata:
            raise cursor.fail("duplicate-key", f"key {quoted(key)} occurs twice")
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
    if alignment > MAX_ALIGNMENT:
        raise cursor.fail(
            "alignment",
            f"general.alignment is {alignment}; at most {MAX_ALIGNMENT} is accepted, as header and tensors are padded to it",
        )
    return alignment


def _read_directory(
    cursor: _Cursor, n_tensors: int, alignment: int, *, header_only: bool
) -> tuple[tuple[Entry, ...], int]:
    lines: list[tuple[str, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for number in range(n_tensors):
        name = cursor.string(f"name of tensor {number}", MAX_NAME_NBYTES)
        if name in names:
            raise cursor.fail("duplicate-tensor", f"tensor {quoted(name)} occurs twice (duplicated tensor name)")
        names.add(name)
        n_dims = cursor.u32(f"number of dims of {quoted(name)}")
        if n_dims > MAX_DIMS:
            raise cursor.fail("dims", f"tensor {quoted(name)} has {n_dims} dims; at most {MAX_DIMS} are allowed")
        dims = cursor.dims(n_dims, f"dims of {quoted(name)}")
        count = 1
        for dim in dims:
            count *= dim or 1  # numpy and C loaders multiply the rest even when one dim is 0
        if count >= 2**60:
            # Eight bytes an element, as float64, would be more than a signed 64-bit size can say.
            raise cursor.fail(
                "dims", f"tensor {quoted(name)} of dims {list(dims)} has more elements than memory can hold, 2^60 - 1"
            )
        type_id = cursor.u32(f"type of {quoted(name)}")
        offset = cursor.u64(f"offset of {quoted(name)}")
        lines.append((name, tuple(reversed(dims)), type_id, offset))
    data_offset = align_up(cursor.position, alignment)
    available = max(0, cursor.end - data_offset)
    entries = []
    for number, (name, shape, type_id, offset) in enumerate(lines):
        last = number == len(lines) - 1
        following = max(available, offset) if last else lines[number + 1][3]
        if offset % alignment:
            raise cursor.fail("offset", f"tensor {quoted(name)} has offset {offset}, not a multiple of {alignment}")
        if number == 0 and offset != 0:
            raise cursor.fail("offset", f"tensor {quoted(name)} has offset {offset}, expected 0 for the first tensor")
        if offset > available and not header_only:
            raise cursor.fail(
                "truncated",
                f"tensor {quoted(name)} data is not within the file bounds (offset {offset}, data section {available} "
                "bytes): the model is corrupted or incomplete",
            )
        if following < offset:
            raise cursor.fail(
                "offset",
                f"tensor {quoted(lines[number + 1][0])} has offset {following}, before that of the preceding "
                f"{quoted(name)}, {offset}: offsets must not decrease",
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
        parts += [encode_string(key), value.encode()]
    for name, shape, type_id, offset in directory:
        parts += [
            encode_string(name),
            _U32.pack(len(shape)),
            struct.pack(f"<{len(shape)}Q", *reversed(shape)),
            _U32.pack(type_id),
            _U64.pack(offset),
        ]
    nbytes = sum(map(len, parts))
    parts.append(bytes(align_up(nbytes, alignment) - nbytes))
    return b"".join(parts)


def loader_notes(metadata: Mapping[str, Value], tensors: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Return what llama.cpp's loader (ggml's ``gguf.cpp``, which its forks share) refuses in a file, a sentence each.

    Parameters
    ----------
    metadata
        Key -> value.
    tensors
        (name, shape) of each.
    """
    deep, long = [], []
    for name, shape in tensors:
        if len(shape) > LOADER_MAX_DIMS:
            deep.append(name)
        if len(encode_text(name)) > LOADER_MAX_NAME_NBYTES:
            long.append(name)
    nested = [key for key, value in metadata.items() if value.element is ValueType.ARRAY]
    found = []
    if deep:
        found.append(f"{len(deep)} tensors have more than {LOADER_MAX_DIMS} axes, such as {quoted(deep[0])}")
    if long:
        found.append(
            f"{len(long)} tensors have names of more than {LOADER_MAX_NAME_NBYTES} bytes, such as {quoted(long[0])}"
        )
    if nested:
        found.append(f"the value of key {quoted(nested[0])} is an array of arrays")
    if "" in metadata:
        found.append("a key is empty")
    return [f"{what}: other readers take that, llama.cpp refuses to load such a file" for what in found]


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


def read_splits(
    path: Path, reader: Callable[[Path], Container] = read_container, *, incomplete: bool = False
) -> tuple[list[Container], list[str]]:
    """Open every member of a split file (from any member) and check that they belong together.

    Parameters
    ----------
    path
        Any member, or a file that is not split.
    reader
        Opens one.
    incomplete
        Do without the members that are missing, and take a file whose name is no longer a member's for itself.

    Returns
    -------
    The members that are there, in order, and the names of those that are missing.

    Raises
    ------
    ContainerError
        A member is missing, or ``split.no``, ``split.count`` or ``split.tensors.count`` disagree with the files.
    """
    first = reader(path)
    count = _split_number(first, "split.count") or 0
    if count <= 1:
        return [first], []
    members = split_paths(path)
    if len(members) != count or path not in members:
        if incomplete:
            return [first], []
        raise ContainerError(
            path,
            "split-name",
            f"invalid split file: split.count is {count} but the name does not end in -NNNNN-of-{count:05d}.gguf; "
            "rename the members as they were, or merge them",
        )
    missing = [member.name for member in members if not member.is_file()]
    if missing and not incomplete:
        raise ContainerError(
            path, "split-missing", f"{len(missing)} of {count} split files are missing: {', '.join(missing[:3])}"
        )
    containers = []
    for number, member in enumerate(members):
        if member.name in missing:
            continue
        container = first if member == path else reader(member)
        found = (_split_number(container, "split.no"), _split_number(container, "split.count"))
        if found != (number, count):
            raise ContainerError(
                container.path, "split-number", f"split.no, split.count are {found}, expected ({number}, {count})"
            )
        containers.append(container)
    total = _split_number(first, "split.tensors.count")
    seen = sum(len(container.entries) for container in containers)
    if total is not None and total != seen and not missing:
        raise ContainerError(path, "split-tensors", f"wrong number of tensors; expected {total}, got {seen}")
    return containers, missing


def _split_number(container: Container, key: str) -> int | None:
    """Return an integer key of a split file, ``None`` without it; writers differ in its width."""
    number = container.metadata.get(key)
    if number is None or type(number) is int:
        return number
    kind = container.metadata.value(key).type.name
    raise ContainerError(container.path, "split-key", f"{key} has type {kind}, it must be an integer")
