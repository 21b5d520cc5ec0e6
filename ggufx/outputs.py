"""Files that this program makes: never through a name that somebody planted, locked while in use, named when complete.

A name such as ``OUT.partial`` can be guessed, so a link, a pipe or a file of somebody else may wait there. Files are created
where nothing is, opened again only if they are plain files with this one name, and never emptied: a file that has a second
name (a finished output, after a kill at the last moment) would lose its content under both.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from ggufx.errors import OutputExists, PlanError

__all__ = [
    "OutputWarning",
    "create",
    "create_private",
    "give_name",
    "lock",
    "open_plain",
    "refuse_existing",
    "replacing",
    "reserve",
    "same_file",
    "start_writeback",
    "write_at",
]

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_SYNC_FILE_RANGE_WRITE: Final = 2
_PIECE_NBYTES: Final = 1 << 18
"""Bytes of a call that writes: calls of 8 MB were measured to take four times the processor's time of these (Linux, ext4)."""
_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL})
"""What flock says on file systems without locks: Lustre without ``-o flock``, some FUSE, NFS without lockd."""


class OutputWarning(UserWarning):
    """Something about an output that its owner should know, while the work goes on."""


def create(path: Path, mode: int | None = None) -> int:
    """Create a file where nothing is and return its descriptor, open for reading and writing.

    Parameters
    ----------
    mode
        Permissions, whatever the umask is; ``None`` for what the umask leaves of 0666.

    Raises
    ------
    FileExistsError
        Something has the name, be it a link to nothing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666 if mode is None else mode & 0o600)
    if mode is not None:
        os.fchmod(descriptor, mode)
    return descriptor


def open_plain(path: Path) -> int | None:
    """Open a file of ours for reading and writing; ``None`` where nothing has the name.

    Raises
    ------
    PlanError
        It is a link, a directory, a device, a pipe or a socket: somebody else put it there.
    """
    try:
        # A pipe without a writer opens at once so.
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
            raise
        raise _strange(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _strange(path)
    return descriptor


def _strange(path: Path) -> PlanError:
    kind = "a link" if path.is_symlink() else "a directory" if path.is_dir() else "a device, a pipe or a socket"
    return PlanError(f"{path}: is {kind}, which ggufx did not put there; move it away, or choose another output")


def same_file(path: Path, inode: int) -> bool:
    """Return whether a name is still that of the file with a given inode number, and no link to it."""
    try:
        return path.lstat().st_ino == inode
    except OSError:
        return False


def lock(descriptor: int, path: Path, held: str) -> None:
    """Lock an open file for this process alone, until it is closed.

    A file system without locks is noted by an :class:`OutputWarning`; the work goes on.

    Raises
    ------
    PlanError
        Another process holds the lock: ``held`` says what that means.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise PlanError(held) from None
        import warnings

        warnings.warn(
            f"{path}: this file system has no locks ({os.strerror(error.errno)}); nothing keeps another process from writing "
            "the same output",
            OutputWarning,
            stacklevel=3,
        )


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise OutputExists for an output that must not be replaced: any without ``overwrite``, and what is no plain file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputExists(
            f"{str(path)[:300]}: cannot be looked at ({error.strerror}); choose another --outfile"
        ) from None
    if stat.S_ISDIR(status.st_mode):
        raise OutputExists(f"{path}: is a directory; choose another --outfile")
    if not stat.S_ISREG(status.st_mode):
        raise OutputExists(
            f"{path}: is a device, a pipe or a socket, which is never replaced by a file; choose another --outfile"
        )
    if not overwrite:
        raise OutputExists(f"{path}: exists; choose another --outfile or pass --overwrite")


@cache
def _renameat2() -> Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def give_name(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Give a finished file its name; without ``overwrite`` never to the loss of a file that came there meanwhile.

    Raises
    ------
    OutputExists
        The name is taken.
    """
    if overwrite:
        partial.replace(path)
        return
    exists = OutputExists(
        f"{path}: came into being while {partial.name} was written; move one of them away, or pass --overwrite"
    )
    rename = _renameat2()
    if rename is not None:
        # In one step: between a second name and the removal of the first a kill would leave both.
        if rename(_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            raise exists
        if number not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(path))
    try:
        os.link(partial, path)
    except FileExistsError:
        raise exists from None
    except OSError:
        # No hard links on this file system: look, then rename.
        if path.exists():
            raise exists from None
        partial.replace(path)
    else:
        partial.unlink()


def create_private(path: Path) -> tuple[int, Path]:
    """Create a file beside ``path`` under a name that nobody can guess.

    Returns
    -------
    (descriptor, open for reading and writing; the file's name)
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        os.fchmod(descriptor, 0o666 & ~_umask())
    except BaseException:
        os.close(descriptor)
        partial.unlink(missing_ok=True)
        raise
    return descriptor, partial


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Write a small file under a name that nobody can guess; it takes its own when it is complete and on the disk.

    On an error nothing is left.

    Raises
    ------
    OutputExists
        The output exists and must not be replaced.
    """
    refuse_existing(path, overwrite=overwrite)
    if path.is_symlink():
        path = path.resolve()
    descriptor, partial = create_private(path)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        give_name(partial, path, overwrite=overwrite)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _umask() -> int:
    try:
        # To ask for it otherwise is to change it, which other threads would see.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except (OSError, ValueError, IndexError):
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_at(descriptor: int, offset: int, buffer: npt.NDArray[np.uint8] | bytes) -> None:
    """Write a C-contiguous buffer at a byte of an open file, whole."""
    view, done = memoryview(buffer), 0  # type: ignore[arg-type] # ndarrays are buffers
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _PIECE_NBYTES], offset + done)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found: Callable[[int, int, int, int], int] = function
    return found


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Have the disk begin with what was just written: else most of it waits for the sync at the end, which then takes long."""
    # A hint, so its failure is none: the sync reports errors. Unlike POSIX_FADV_DONTNEED, which also starts writing, it
    # leaves the pages in the cache for whoever reads the file next.
    function = _sync_file_range()
    if function is not None:
        function(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def reserve(descriptor: int, nbytes: int) -> None:
    """Reserve the disk space where the file system can, so that a full disk is known before the work, not after.

    ``os.posix_fallocate`` falls back to writing every block where the file system cannot, which on a network share takes
    as long as the conversion; the plain system call says so instead.
    """
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if nbytes and fallocate(descriptor, 0, 0, nbytes) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, f"{nbytes} bytes cannot be reserved: {os.strerror(number)}")
