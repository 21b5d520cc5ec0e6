"""Folders for what this program compiles: the user's own, and closed to everybody else, as code is loaded from there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["give_triton_one", "is_private", "make_private", "private_folders"]


def private_folders() -> Iterator[Path]:
    """Return where a folder of the user's own may be, whether it is there or not, the best first."""
    places = []
    with suppress(RuntimeError):  # a user without a home
        places.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ggufx")
    places.append(Path(os.environ.get("TMPDIR") or "/tmp") / f"ggufx-{os.geteuid()}")
    yield from (place for place in places if place.is_absolute())


def _keeps(folder: Path) -> bool:
    """Return whether what this user puts into a folder stays as it is: nobody else can put another in its place."""
    found = folder.stat()
    open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and not open_to_all


def is_private(folder: Path) -> bool:
    """Return whether a folder belongs to this user, and nobody else can write to it or replace it; raises OSError."""
    found = folder.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return mine and _keeps(folder.parent)


def make_private(folder: Path) -> None:
    """Make a folder of :func:`private_folders`; raises OSError where that fails or somebody else could write there."""
    # Looked at first, lest root leave folders in the home of another.
    if _keeps(_nearest(folder.parent)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(f"{folder}: others can write there")


def give_triton_one() -> None:
    """Name a folder to Triton where it can write to none: it would raise an error instead of compiling without one."""
    if os.environ.keys() & {"TRITON_CACHE_DIR", "TRITON_HOME"}:
        return
    with suppress(RuntimeError):
        if _can_be_written(Path("~/.triton/cache").expanduser()):
            return
    for folder in private_folders():
        with suppress(OSError):
            make_private(folder)
            if _can_be_written(folder / "triton"):
                os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
                return


def _can_be_written(folder: Path) -> bool:
    above = _nearest(folder)
    return folder.is_absolute() and above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def _nearest(folder: Path) -> Path:
    """Return a folder, or the one that is there of those above it."""
    return next(above for above in (folder, *folder.parents) if above.exists())
