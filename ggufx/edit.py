"""Set and remove metadata of a GGUF: in its header where the padding allows it, else by writing the file anew.

The header of a 150 GB file is a few megabytes before the data. If the new one takes the same bytes, rounded up to the
alignment, only those change; else the file is rewritten by the engine and takes its own name at the very end.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import xxhash

from ggufx import execute, outputs, plan
from ggufx.assignments import FIXED_KEYS
from ggufx.container import (
    Container,
    backup_path,
    encode_header,
    read_container,
    split_paths,
)
from ggufx.errors import DiskError, PlanError
from ggufx.execute import Progress
from ggufx.plan import Plan, Span
from ggufx.values import Value, ValueType, as_unicode

__all__ = ["Edit", "plan_edit", "set_keys", "typed_metadata"]

_BACKUP_MAGIC: Final = b"ggufx\0h1"
_BACKUP: Final = struct.Struct("<8sQQQ")  # magic, inode, bytes of the file, checksum of the header that follows


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
    state: tuple[int, int, int]
    """Inode, bytes and modification time (ns) of the file that the change was planned for."""
    notes: tuple[str, ...] = ()
    """Sentences the user should read."""


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
        A key cannot be changed without breaking the file, is both set and removed, or names a token that is not there.
    """
    target = _holder(Path(path))
    _recover(target)
    state = _state(target)
    container = read_container(target)
    try:
        container.require_little_endian()
        keys = container.metadata.typed()
        for key in (*assignments, *remove):
            if key in FIXED_KEYS:
                raise PlanError(f"{target}: {key} cannot be changed by itself: {FIXED_KEYS[key]}")
        both = [key for key in remove if key in assignments]
        if both:
            raise PlanError(f"{target}: {both[0]} is both set and removed")
        notes = [f"{key} is not in the file, so it need not be removed" for key in remove if key not in keys]
        lines = [f"- {as_unicode(key)}" for key in dict.fromkeys(remove) if keys.pop(key, None) is not None]
        for key, value in assignments.items():
            old = keys.get(key)
            if old is not None and old.same(value):
                continue
            lines.append(
                f"+ {as_unicode(key)} = {_short(value)}"
                if old is None
                else f"~ {as_unicode(key)}: {_short(old)} -> {_short(value)}"
            )
            keys[key] = value
        _check_token_ids(target, keys, assignments)
        directory = [(entry.name, entry.shape, entry.type_id, entry.offset) for entry in container.entries]
        header = encode_header(keys, directory, container.alignment)
        fits = len(header) == container.data_offset or not lines
        extra = container.file_nbytes - container.data_offset
        if not fits and not container.entries and extra > 0:
            lines.append(f"- {extra} bytes behind the header, which belong to no tensor")
        return Edit(target, tuple(lines), header, None if fits else _plan_anew(container, keys), state, tuple(notes))
    finally:
        container.close()


def _check_token_ids(path: Path, keys: Mapping[str, Value], assignments: Mapping[str, Value]) -> None:
    """Raise PlanError for the id of a special token that the vocabulary does not have: programs would crash on it."""
    tokens = keys.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.element is None:
        return
    for key, value in assignments.items():
        named = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if named and isinstance(value.data, int) and not 0 <= value.data < len(tokens.data):
            raise PlanError(f"{path}: {key} is {value.data}, but the vocabulary has {len(tokens.data)} tokens")


def typed_metadata(path: str | Path) -> dict[str, Value]:
    """Return the metadata that :func:`plan_edit` would change: of a split, the first member's."""
    container = read_container(_holder(Path(path)))
    try:
        return container.metadata.typed()
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
    backup = backup_path(edit.path)
    try:
        with _locked(edit.path) as file:
            if _state(edit.path) != edit.state:
                raise PlanError(
                    f"{edit.path}: changed since the edit was planned; nothing was written, run the command again"
                )
            if edit.plan is not None:
                execute.execute(
                    edit.plan,
                    overwrite=True,
                    resume=resume,
                    threads=threads,
                    progress=progress,
                    replace_source=True,
                    mode=stat.S_IMODE(os.fstat(file.fileno()).st_mode),
                )
                return edit.path
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


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file to change it, while no other process does."""
    with path.open("rb+") as file:
        outputs.lock(
            file.fileno(),
            path,
            f"{path}: another process is changing its metadata; wait for it and run the command again",
        )
        if not outputs.same_file(path.resolve(), os.fstat(file.fileno()).st_ino):
            raise PlanError(f"{path}: was replaced meanwhile; nothing was written, run the command again")
        yield file


def _recover(target: Path) -> None:
    """Put back the header of an edit that was cut off, and remove what a finished one left."""
    if not target.is_file():
        return
    execute.clean_up(target)
    backup = backup_path(target)
    if not backup.is_file() or backup.is_symlink():
        return
    with _locked(target):
        _put_back(backup, target)


def _put_back(backup: Path, target: Path) -> None:
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


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


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
