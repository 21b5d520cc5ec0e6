"""Compiled kernels on disk: where they are kept, how they are known to be whole, and what is said where they cannot be kept.

Numba keeps machine code in pickles beside the source, or in the user's cache folder. Four things are added to that.

- Code is stamped with every file of this package. Numba's own stamp covers one file only and serves stale code when a helper or
  table in another file changes.
- Every file carries a checksum. A power cut leaves empty or cut ones, of which Numba's loader raises whatever pickle does, and
  a wrong byte in machine code would be run.
- What was compiled beside the source is used also by those who may not write there, such as the user of a container whose
  image was warmed up by root.
- Where neither folder is writable, as for a user without a home, a private folder below that for temporary files is taken.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import stat
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numba
import xxhash
from numba.core import caching
from numba.core.runtime import rtsys

__all__ = ["KNOWN_NUMBA", "KernelCache", "kept"]

KNOWN_NUMBA: Final = "0.68."
"""Versions whose insides the shortcuts here and in ``_jit`` were tried with; others go Numba's own, slower way."""
_DIGEST_NBYTES: Final = 16


@cache
def _stamp() -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in (here.parent / "tables.py", *sorted(here.glob("*.py"))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamp_of(function: Callable[..., Any]) -> str:
    """Return the stamp of a kernel's code: a kernel of another package hangs on its own file, too."""
    path = Path(inspect.getfile(function))
    if path.parent == Path(__file__).parent:
        return _stamp()
    return _stamp() + hashlib.sha256(path.read_bytes()).hexdigest()


class _Stamped:
    """Mixin for Numba's cache locators: stamp of all kernels, and a folder of its own under bounds checks."""

    def get_source_stamp(self) -> str:
        return _stamp()

    def get_cache_path(self) -> str:
        path: str = super().get_cache_path()  # type: ignore[misc]
        return f"{path}/boundscheck" if numba.config.BOUNDSCHECK else path


class _UserProvided(_Stamped, caching.UserProvidedCacheLocator):  # type: ignore[misc]
    pass


class _InTree(_Stamped, caching.InTreeCacheLocator):  # type: ignore[misc]
    pass


class _UserWide(_Stamped, caching.UserWideCacheLocator):  # type: ignore[misc]
    pass


class _Temporary(_UserWide):
    """A folder of this user alone below the folder for temporary files.

    What is in it is run, so it must be nobody else's: others may write below /tmp and know its name.
    """

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._root = Path(tempfile.gettempdir()) / f"ggufx-kernels-{os.geteuid()}"
        self._cache_path = str(self._root / self.get_suitable_cache_subpath(py_file))

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Any:
        try:
            return super().from_function(py_func, py_file)
        except FileNotFoundError:
            return None  # there is no folder for temporary files

    def ensure_cache_path(self) -> None:
        self._root.mkdir(mode=0o700, exist_ok=True)
        status = self._root.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(f"{self._root} is not a folder of this user alone")
        super().ensure_cache_path()


class _ReadOnly(_InTree):
    """Beside the source, though nothing can be written there: for what is there already."""

    def ensure_cache_path(self) -> None:
        pass


class _Impl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_UserProvided, _InTree, _UserWide, _Temporary, _ReadOnly]  # noqa: RUF012 (Numba's own attribute)


def _sealed(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data) + data


def _unsealed(path: str) -> bytes | None:
    """Return what :func:`_sealed` wrote, or ``None`` of a file that is not there, is not readable or is not whole."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    data = content[_DIGEST_NBYTES:]
    return data if xxhash.xxh3_128_digest(data) == content[:_DIGEST_NBYTES] else None


class _SealedFiles(caching.IndexDataCacheFile):  # type: ignore[misc]
    """Numba's index and data files with checksums: one that is not whole is as good as none.

    ``installed`` are those beside the source, where these are others.
    """

    installed: _SealedFiles | None = None

    def load(self, key: Any) -> Any:
        found = super().load(key)
        return self.installed.load(key) if found is None and self.installed is not None else found

    def _load_index(self) -> dict[Any, str]:
        data = _unsealed(self._index_path)
        if data is None:
            return {}
        version, stamp, overloads = pickle.loads(data)
        found: dict[Any, str] = overloads
        return found if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        with self._open_for_write(self._index_path) as file:
            file.write(_sealed(self._dump((self._version, self._source_stamp, overloads))))

    def _load_data(self, name: str) -> Any:
        data = _unsealed(self._data_path(name))
        if data is None:
            raise FileNotFoundError(name)  # the caller takes that for "not kept"
        return pickle.loads(data)

    def _save_data(self, name: str, data: Any) -> None:
        with self._open_for_write(self._data_path(name)) as file:
            file.write(_sealed(self._dump(data)))


class KernelCache(caching.FunctionCache):  # type: ignore[misc]
    """Cache of one kernel."""

    _impl_class = _Impl

    def __init__(self, function: Callable[..., Any], key: str | None) -> None:
        super().__init__(function)
        self._key = key
        self._cache_file = self._files(self._cache_path)
        beside = _InTree(function, inspect.getfile(function)).get_cache_path()
        if beside != self._cache_path:
            self._cache_file.installed = self._files(beside)

    def _files(self, path: str) -> _SealedFiles:
        return _SealedFiles(
            cache_path=path, filename_base=self._impl.filename_base, source_stamp=_stamp_of(self._py_func)
        )

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # Numba pickles what a closure holds, and other compiled functions pickle differently in every process.
        if self._key is None:
            return super()._index_key(sig, codegen)
        return (sig, codegen.magic_tuple(), self._key)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Numba registers its whole library of overloads first (0.1 s), which only compiling needs, and compiling does so
        # itself. Machine code from the cache needs the runtime alone (without it, it crashes): known for the versions that
        # the tests have run with, so others keep to Numba's own way.
        if not numba.__version__.startswith(KNOWN_NUMBA):
            return super().load_overload(sig, target_context)
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            # The kernel itself is ready: a full disk must not end the work that it was compiled for.
            _say_unkept(f"{self._cache_path}: {error.strerror}")


_unkept: list[str] = []
"""Why kernels of this process are not kept on disk."""


def _say_unkept(reason: str) -> None:
    """Warn, once a process, that compiled kernels are not kept."""
    _unkept.append(reason)
    if len(_unkept) == 1:
        warnings.warn(
            f"compiled kernels cannot be kept on disk, so that every run compiles them again ({reason}); set NUMBA_CACHE_DIR "
            "to a folder that can be written",
            stacklevel=2,
        )


def kept() -> bool:
    """Return whether everything that this process compiled is on disk, or was not to be: compiling may be switched off."""
    return not _unkept
