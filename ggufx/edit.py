"""Set and remove metadata of a GGUF: in its header where the padding allows it, else by writing the file anew.

The header of a 150 GB file is a few megabytes before the data. If the new one takes the same bytes, rounded up to the
alignment, only those change; else the file is rewritten by the engine and takes its own name at the very end.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from ggufx import execute, plan
from ggufx.container import (
    MAX_NAME_NBYTES,
    Container,
    backup_path,
    encode_header,
    read_container,
    split_paths,
)
from ggufx.errors import DiskError, PlanError
from ggufx.execute import Progress
from ggufx.plan import Plan, Span
from ggufx.values import DTYPES, Value, ValueType, printable

__all__ = ["TYPES", "Edit", "parse_assignments", "parse_overrides", "plan_edit", "set_keys"]

TYPES: Final[Mapping[str, ValueType]] = {
    "u8": ValueType.UINT8, "i8": ValueType.INT8, "u16": ValueType.UINT16, "i16": ValueType.INT16, "u32": ValueType.UINT32,
    "i32": ValueType.INT32, "u64": ValueType.UINT64, "i64": ValueType.INT64, "f32": ValueType.FLOAT32,
    "f64": ValueType.FLOAT64, "bool": ValueType.BOOL, "str": ValueType.STRING,
}  # fmt: skip
"""Spellings of the scalar types; ``arr[T]`` is an array of one."""

_REFUSED: Final[Mapping[str, str]] = {
    "general.alignment": "every tensor's offset depends on it; ggufx rewrite writes a file anew",
    "general.architecture": "the names of keys and tensors depend on it",
    "split.no": "it belongs to the split; ggufx split and merge-splits change it",
    "split.count": "it belongs to the split; ggufx split and merge-splits change it",
    "split.tensors.count": "it belongs to the split; ggufx split and merge-splits change it",
    "ggufx.dialect": "it says whose type ids the file has; ggufx retarget changes both",
}
_BACKUP_MAGIC: Final = b"ggufx\0h1"
_BACKUP: Final = struct.Struct("<8sQQQ")  # magic, inode, bytes of the file, checksum of the header that follows
_BOOLS: Final = {"true": True, "1": True, "false": False, "0": False}


def parse_assignments(texts: Iterable[str]) -> dict[str, Value]:
    """Parse ``KEY=TYPE:VALUE`` texts; an array is ``KEY=arr[i32]:[1, 2, 3]``, its elements as JSON.

    The types are :data:`TYPES`, and llama-quantize's ``int`` (a u32 where it fits, which is what loaders read, else an i64)
    and ``float`` (f32).

    Raises
    ------
    PlanError
        A text is not of that form, a value does not fit its type, or a key is given twice.
    """
    found: dict[str, Value] = {}
    for text in texts:
        key, value = _parse(text)
        if key in found:
            raise PlanError(f"{key}: is given twice")
        found[key] = value
    return found


def parse_overrides(texts: Iterable[str]) -> dict[str, Value]:
    """Parse what ``--override-kv`` takes, as :func:`parse_assignments`.

    Raises
    ------
    PlanError
        As there; or a key decides how the file is read and cannot be overridden.
    """
    found = parse_assignments(texts)
    for key in found:
        if key in _REFUSED:
            raise PlanError(f"{key} cannot be overridden: {_REFUSED[key]}")
    return found


def _parse(text: str) -> tuple[str, Value]:
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not equals or not colon or not key:
        raise PlanError(f"{text[:80]!r}: expected KEY=TYPE:VALUE, such as general.name=str:Mine")
    if not key.isprintable() or " " in key or len(key.encode()) > MAX_NAME_NBYTES:
        raise PlanError(f"{key[:80]!r}: a key is printable, without spaces, and of at most {MAX_NAME_NBYTES} bytes")
    if kind == "int":
        number = _scalar(key, "i64", value)
        kind = "u32" if 0 <= number < 2**32 else "i64"
    elif kind == "float":
        kind = "f32"
    element = kind.removeprefix("arr[").removesuffix("]") if kind.startswith("arr[") and kind.endswith("]") else None
    if (kind if element is None else element) not in TYPES:
        raise PlanError(
            f"{key}: {kind!r} is no type; types are {', '.join(TYPES)}, int, float, and arr[T] of the first"
        )
    if element is None:
        return key, Value(TYPES[kind], _scalar(key, kind, value))
    try:
        # Numbers stay texts until their type is known: Python would make 1e400 infinite.
        items = json.loads(value if value.lstrip().startswith("[") else f"[{value}]", parse_float=_Number)
    except (ValueError, RecursionError):
        raise PlanError(f'{key}: {value[:60]!r} is no JSON list, such as [1, 2] or ["a", "b"]') from None
    return key, Value.array(TYPES[element], [_element(key, element, item) for item in items])


class _Number(str):
    """The text of a number that is no integer."""

    __slots__ = ()


def _scalar(key: str, kind: str, text: str) -> Any:
    if kind == "str":
        return _element(key, kind, text)
    if kind == "bool":
        if text.lower() not in _BOOLS:
            raise PlanError(f"{key}: {text[:60]!r} is no bool; true and false are")
        return _BOOLS[text.lower()]
    try:
        return _element(key, kind, _Number(text) if kind in ("f32", "f64") else int(text, 0))
    except ValueError:
        raise PlanError(f"{key}: {text[:60]!r} is no {kind}") from None


def _element(key: str, kind: str, item: Any) -> Any:
    odd = PlanError(f"{key}: {str(item)[:60]!r} is no {kind}")
    if kind in ("str", "bool"):
        if type(item) is not (str if kind == "str" else bool):
            raise odd
        try:
            str(item).encode()
        except UnicodeEncodeError:
            raise PlanError(f"{key}: the text is not valid UTF-8") from None
        return item
    dtype = DTYPES[TYPES[kind]]
    if kind in ("f32", "f64"):
        if type(item) not in (int, float, _Number):
            raise odd
        with np.errstate(over="ignore"):
            try:
                number = float(np.array(float(item), dtype))
            except OverflowError:  # an integer of hundreds of digits
                number = np.inf
        # JSON's Infinity is a float; a text or an integer that becomes one was not meant so.
        if np.isinf(number) and type(item) is not float and "inf" not in str(item).lower():
            raise PlanError(f"{key}: {str(item)[:60]} is more than {kind} can hold")
        return number
    if type(item) is not int:
        raise odd
    limits = np.iinfo(dtype)
    if not limits.min <= item <= limits.max:
        raise PlanError(f"{key}: {str(item)[:60]} is outside {kind}, {limits.min} to {limits.max}")
    return item


@dataclass(frozen=True)
class Edit:
    """A change of metadata.

    Attributes
    ----------
    path
        The file that holds the metadata: of a split, the first member.
    lines
        What changes, a sentence per key.
    header
        The new header.
    plan
        How to write the file anew; ``None`` where the new header fits the old one's place.
    """

    path: Path
    lines: tuple[str, ...]
    header: bytes
    plan: Plan | None


def plan_edit(path: str | Path, assignments: Mapping[str, Value], remove: Sequence[str] = ()) -> Edit:
    """Plan to set and remove keys of a GGUF; puts its old header back first if an edit of it was cut off.

    Parameters
    ----------
    path
        The file; of a split, any member: the first is changed.
    assignments
        Values to set; keys that the file lacks come last.
    remove
        Keys to drop.

    Raises
    ------
    PlanError
        A key cannot be changed without breaking the file, or is not there to be removed.
    """
    target = _holder(Path(path))
    _recover(target)
    container = read_container(target)
    try:
        container.require_little_endian()
        keys = container.metadata.typed()
        for key in (*assignments, *remove):
            if key in _REFUSED:
                raise PlanError(f"{target}: {key} cannot be changed by itself: {_REFUSED[key]}")
        both = [key for key in remove if key in assignments]
        absent = [key for key in remove if key not in keys]
        if both or absent:
            why = "is both set and removed" if both else "is not in the file, so it cannot be removed"
            raise PlanError(f"{target}: {(both or absent)[0]} {why}")
        lines = [f"- {printable(key)}" for key in remove]
        for key in remove:
            del keys[key]
        for key, value in assignments.items():
            old = keys.get(key)
            if old is not None and old.same(value):
                continue
            lines.append(
                f"+ {printable(key)} = {_short(value)}"
                if old is None
                else f"~ {printable(key)}: {_short(old)} -> {_short(value)}"
            )
            keys[key] = value
        directory = [(entry.name, entry.shape, entry.type_id, entry.offset) for entry in container.entries]
        header = encode_header(keys, directory, container.alignment)
        fits = len(header) == container.data_offset or not lines
        extra = container.file_nbytes - container.data_offset
        if not fits and not container.entries and extra > 0:
            lines.append(f"- {extra} bytes behind the header, which belong to no tensor")
        return Edit(target, tuple(lines), header, None if fits else _plan_anew(container, keys))
    finally:
        container.close()


def _holder(path: Path) -> Path:
    """Return the file that holds the metadata: of a split, the first member."""
    first = split_paths(path)[0]
    if first == path:
        return path
    container = read_container(path)
    try:
        # A name like a member's does not make one.
        count = container.metadata.get("split.count")
        return first if isinstance(count, int) and count > 1 else path
    finally:
        container.close()


def _plan_anew(container: Container, keys: Mapping[str, Value]) -> Plan:
    # Spans, not sizes: types need not be known, and offsets stay as they are.
    tensors = [
        plan.copy_tensor(
            entry.name,
            entry.shape,
            f"id {entry.type_id}",
            entry.type_id,
            Span(0, container.data_offset + entry.offset, entry.span),
        )
        for entry in container.entries
    ]
    return plan.build(
        container.path, keys, tensors, source_files=[container.path], dialect="", alignment=container.alignment
    )


def set_keys(edit: Edit, *, resume: bool = True, threads: int | None = None, progress: Progress | None = None) -> Path:
    """Do a planned edit.

    A header is changed in place behind a copy of the old one in ``FILE.header``, which the next edit puts back if this one
    was cut off.

    Raises
    ------
    DiskError, PlanError, CheckpointError
        As :func:`ggufx.execute.execute`.
    """
    if not edit.lines:
        return edit.path
    if edit.plan is not None:
        mode = stat.S_IMODE(edit.path.stat().st_mode)
        execute.execute(
            edit.plan, overwrite=True, resume=resume, threads=threads, progress=progress, replace_source=True
        )
        edit.path.chmod(mode)
        return edit.path
    backup = backup_path(edit.path)
    try:
        with edit.path.open("rb+") as file:
            old = file.read(len(edit.header))
            with backup.open("xb") as copy:
                copy.write(_BACKUP.pack(_BACKUP_MAGIC, *_identity(edit.path), xxhash.xxh3_64_intdigest(old)) + old)
                copy.flush()
                os.fsync(copy.fileno())
            _write_header(file.fileno(), edit.header)
        backup.unlink()
    except FileExistsError:
        raise PlanError(
            f"{backup}: is not ggufx's, and is in the way: the old header is kept there while the new one is written; move "
            "it away"
        ) from None
    except OSError as error:
        raise DiskError(f"{error.filename or edit.path}: {error.strerror or error}") from error
    return edit.path


def _recover(target: Path) -> None:
    """Put back the header of an edit that was cut off."""
    backup = backup_path(target)
    if not backup.is_file() or not target.is_file():
        return
    with backup.open("rb") as file:
        # A power cut may leave the name without the bytes; anything else is somebody's own file.
        magic = file.read(len(_BACKUP_MAGIC))
        if magic.strip(b"\0") and magic != _BACKUP_MAGIC:
            return
        held = magic + file.read()
    if magic == _BACKUP_MAGIC and len(held) > _BACKUP.size:
        _, *identity, checksum = _BACKUP.unpack_from(held)
        old = held[_BACKUP.size :]
        # A copy that is itself incomplete was never followed by a change, and one of another file says nothing of this one.
        if tuple(identity) == _identity(target) and checksum == xxhash.xxh3_64_intdigest(old):
            with target.open("rb+") as file:
                _write_header(file.fileno(), old)
    backup.unlink()


def _identity(path: Path) -> tuple[int, int]:
    """Return what a change in place does not change: inode and length."""
    status = path.stat()
    return status.st_ino, status.st_size


def _write_header(descriptor: int, header: bytes) -> None:
    done = 0
    while done < len(header):
        done += os.pwrite(descriptor, header[done:], done)
    os.fsync(descriptor)


def _short(value: Value) -> str:
    if value.type is ValueType.ARRAY:
        assert value.element is not None
        return f"{value.element.name} array of {len(value.data)}"
    text = f"{value.type.name} {value.data!r}"
    return text if len(text) <= 80 else text[:77] + "..."
