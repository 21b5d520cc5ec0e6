"""Bytes of an open file: read at an offset, or viewed, with a bounded number of descriptors whatever the number of files.

A model may be a thousand files, and a process may have 256 descriptors. So a file here gives its descriptor away when others
need it, and opens its path again at the next read, where it makes sure that the path still leads to the same file.

A file that was shortened since is an error where it is read into memory of the caller. Looking at bytes of a mapped view that
are gone ends the process (SIGBUS); who looks at a view asks :meth:`StoredFile.require` before, which costs nothing beside it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final
from weakref import ReferenceType, WeakValueDictionary, ref

import numpy as np
import numpy.typing as npt

from ggufx.errors import ContainerError

__all__ = ["StoredFile", "descriptor_limit", "scratch"]

_PIECE_NBYTES: Final = 1 << 30
"""At a time: Linux reads 2 GB at most, other systems refuse more."""

_local = threading.local()


def scratch(slot: str, nbytes: int) -> npt.NDArray[np.uint8]:
    """Return this thread's memory called ``slot``, uint8 [nbytes], used again by the next call: fresh pages cost a copy."""
    held: npt.NDArray[np.uint8] | None = getattr(_local, slot, None)
    if held is None or held.nbytes < nbytes:
        held = np.empty(nbytes, np.uint8)
        setattr(_local, slot, held)
    return held[:nbytes]


def descriptor_limit() -> int:
    """Return how many descriptors one cache of them may hold: a quarter of what the process may have, 8 to 256."""
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError, ValueError):  # a system without such limits
        return 256
    return 256 if allowed == resource.RLIM_INFINITY else min(256, max(8, allowed // 4))


class _Recent:
    """The files that hold a descriptor, least recently read first."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        # Re-entrant: the garbage collector may end a file while this thread holds the lock.
        self.lock = threading.RLock()
        self.files: OrderedDict[int, ReferenceType[StoredFile]] = OrderedDict()

    def after_fork(self) -> None:
        """Take the files over into a forked process: no other thread of the parent's reads here."""
        files = self.files
        self.reset()
        for number in list(files):
            held = files.get(number)
            file = None if held is None else held()
            if held is not None and file is not None:
                file._users = 0
                self.files[number] = held

    def make_room(self, room: int) -> None:
        """Close idle descriptors until at most ``room`` are held; the caller holds the lock."""
        # Of the numbers alone: making pairs may start the garbage collector, which ends files and so changes the dict.
        for number in list(self.files):
            if len(self.files) <= room:
                return
            reference = self.files.get(number)
            file = None if reference is None else reference()
            if file is None:
                self.files.pop(number, None)
            elif not file._users:
                file._drop()


_recent: Final = _Recent()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_recent.after_fork)


class _Mapping:
    """A whole file, mapped read-only, for ``numpy.asarray``; it ends with the last array that views it.

    Not :class:`mmap.mmap`, which keeps a descriptor of its own as long as it lives: views of a thousand files would take as
    many.
    """

    def __init__(self, address: int, nbytes: int, unmap: Callable[[int, int], int]) -> None:
        self._range, self._unmap = (address, nbytes), unmap
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, True), "version": 3}

    @classmethod
    def of(cls, descriptor: int, nbytes: int) -> _Mapping | None:
        """Map the file of a descriptor; ``None`` where the system does not."""
        map_memory, unmap = _system_calls()
        address = map_memory(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        return None if address in (None, ctypes.c_void_p(-1).value) else cls(address, nbytes, unmap)

    def __del__(self) -> None:
        self._unmap(*self._range)


@cache
def _system_calls() -> tuple[Callable[..., int | None], Callable[[int, int], int]]:
    library = ctypes.CDLL(None)
    map_memory, unmap = library.mmap, library.munmap
    map_memory.restype = ctypes.c_void_p
    map_memory.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t)
    unmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return map_memory, unmap


class StoredFile:
    """A file, open for reading.

    Parameters
    ----------
    path
        A regular file or a block device: what has a size.
    state
        (size, modification time in ns) that it must have, where it is opened a second time.

    Attributes
    ----------
    path : Path
    nbytes : int
        Size when it was opened.
    state : tuple of int
        (size, modification time in ns) then.

    Raises
    ------
    ContainerError
        It is a directory, a pipe or another thing without a size, or not the file that was open before.
    OSError
        As from ``open``.
    """

    def __init__(self, path: Path, state: tuple[int, int] | None = None) -> None:
        self.path = path
        self.closed = False
        self._users = 0
        self._descriptor: int | None = None
        # Kept as long as the descriptor, and as long as arrays view it.
        self._mapping: _Mapping | None = None
        self._viewed: ReferenceType[_Mapping] | None = None
        self._identity: tuple[int, ...] | None = None
        descriptor = self._take()
        try:
            status = os.fstat(descriptor)
            self._regular = stat.S_ISREG(status.st_mode)
            self.nbytes = status.st_size if self._regular else os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            self._give()
        self.state = (self.nbytes, status.st_mtime_ns)
        if state is not None and state != self.state:
            raise ContainerError(path, "changed", "the file is not what it was when it was first opened; open it again")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.closed:
            raise ValueError(f"{self.path} is closed")
        return _restored, (self.path.absolute(), self.state)

    def __del__(self) -> None:
        with _recent.lock:
            self._drop()

    def close(self) -> None:
        """Release the file. Arrays that still view it keep its memory mapped until they go."""
        with _recent.lock:
            self.closed = True
            if not self._users:
                self._drop()

    def read_into(self, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill a C-contiguous ``buffer``, uint8, from byte ``offset``.

        Raises
        ------
        ContainerError
            The file ends before, or is another one by now.
        """
        descriptor = self._take()
        try:
            view, done = memoryview(buffer.reshape(-1).data), 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done : done + _PIECE_NBYTES]], offset + done)
                if count == 0:
                    end = os.fstat(descriptor).st_size if self._regular else offset + done
                    raise self._short(offset, len(view), end)
                done += count
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            self._give()

    def read(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return ``nbytes`` bytes from ``offset``, uint8, in memory of their own; raises as :meth:`read_into`."""
        if offset + nbytes > self.nbytes:  # before memory is taken
            raise self._short(offset, nbytes, self.nbytes)
        buffer = np.empty(nbytes, np.uint8)
        self.read_into(offset, buffer)
        return buffer

    def require(self, end: int) -> None:
        """Raise ContainerError if the file no longer has ``end`` bytes."""
        descriptor = self._take()
        try:
            size = os.fstat(descriptor).st_size
        finally:
            self._give()
        if size < end and self._regular:
            raise self._short(0, end, size)

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return ``nbytes`` bytes from ``offset`` as a read-only view of the file: nothing is read until it is looked at.

        A copy where the system does not map it: a device, or a file system without that.

        Raises
        ------
        ContainerError
            The file ends before, or is another one by now.
        """
        descriptor = self._take()
        try:
            if nbytes == 0:
                return np.empty(0, np.uint8)
            with _recent.lock:
                mapping = self._mapping or (None if self._viewed is None else self._viewed())
                if mapping is None or os.fstat(descriptor).st_size < offset + nbytes:
                    mapping = self._mapped(descriptor, offset, nbytes)
            if mapping is None:
                data = self.read(offset, nbytes)
                data.flags.writeable = False
                return data
            return np.asarray(mapping)[offset : offset + nbytes]
        finally:
            self._give()

    def _mapped(self, descriptor: int, offset: int, nbytes: int) -> _Mapping | None:
        if not self._regular:
            return None
        size = os.fstat(descriptor).st_size
        if size < offset + nbytes:
            raise self._short(offset, nbytes, size)
        mapping = _Mapping.of(descriptor, size)
        if mapping is not None:
            self._mapping, self._viewed = mapping, ref(mapping)
        return mapping

    def _short(self, offset: int, nbytes: int, end: int) -> ContainerError:
        return ContainerError(
            self.path,
            "truncated",
            f"the file ends at byte {end}, expected {nbytes} bytes at {offset}: it is incomplete, or was shortened after it "
            "was opened; download or convert it again",
        )

    # Descriptors -------------------------------------------------------------------------------------------------

    def _take(self) -> int:
        """Return a descriptor that stays open until :meth:`_give`."""
        with _recent.lock:
            if self.closed:
                raise ValueError(f"{self.path} is closed")
            descriptor = self._descriptor
            if descriptor is None:
                descriptor = self._open()
            else:
                _recent.files.move_to_end(id(self))
            self._users += 1
            return descriptor

    def _give(self) -> None:
        with _recent.lock:
            self._users -= 1
            if self.closed and not self._users:
                self._drop()

    def _open(self) -> int:
        """Open the path, of the first time or again; the caller holds the lock."""
        _recent.make_room(descriptor_limit() - 1)
        # A pipe would wait for a writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            if self._identity is None:
                raise
            raise ContainerError(self.path, "changed", "the file was removed after it was opened") from None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            _recent.make_room(0)
            descriptor = os.open(self.path, flags)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise ContainerError(self.path, "magic", "is a directory, not a GGUF file")
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise ContainerError(
                    self.path,
                    "magic",
                    "is a pipe or a device without a size, not a GGUF file; write its content to a file",
                )
            # With size and time, as the next file may get the number of one that was removed.
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._identity not in (None, identity):
                raise ContainerError(
                    self.path,
                    "changed",
                    "another file has taken the place of the one that was opened, or it was changed; open it again",
                )
        except BaseException:
            os.close(descriptor)
            raise
        self._identity = identity
        self._descriptor = descriptor
        _recent.files[id(self)] = ref(self)
        return descriptor

    def _drop(self) -> None:
        """Close the descriptor; the caller holds the lock."""
        descriptor, self._descriptor = self._descriptor, None
        self._mapping = None
        _recent.files.pop(id(self), None)
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


_restored_files: WeakValueDictionary[tuple[Path, tuple[int, int]], StoredFile] = WeakValueDictionary()


def _restored(path: Path, state: tuple[int, int]) -> StoredFile:
    """Open the file of a pickle, once for all that were pickled of it."""
    file = _restored_files.get((path, state))
    if file is None or file.closed:
        file = _restored_files[path, state] = StoredFile(path, state)
    return file
