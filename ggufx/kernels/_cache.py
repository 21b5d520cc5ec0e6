"""The machine code of kernels on disk: read back only if it is whole and was made from these very sources.

A file holds one signature of one kernel, under a digest of everything that the code depends on and of its own bytes. So code of
older sources or of another Numba, a file that a power cut or a full disk has cut, and plain garbage are one case: as if no file
were there. The kernel is compiled again and the file replaced. Nothing is unpickled before its digest is right.

The folder is ``NUMBA_CACHE_DIR`` where that is set. Else three are tried in turn, for reading and for writing: ``__pycache__``
beside the source, ``ggufx`` in the user's cache folder (``XDG_CACHE_HOME``), and one of the user's own in ``TMPDIR``. One that
can only be read (an image that was warmed up when it was made) serves as well. Who can write there can have this process run
anything, so the last two must belong to the user and be closed to everybody else; who can write to the first can change the
sources, and ``NUMBA_CACHE_DIR`` was named by the user.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import caching, compiler
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from ggufx import outputs
from ggufx.errors import OutputExists
from ggufx.kernels import CacheWarning, unkept
from ggufx.kernels._folders import is_private, make_private, private_folders

__all__ = ["KNOWN_NUMBA", "DiskCache"]

KNOWN_NUMBA = "0.68."
"""Versions whose insides the shortcuts of the kernels were tried with; others go Numba's own, slower way."""

_DIGEST_NBYTES = 32


@cache
def _stamp() -> bytes:
    """Return a digest of what decides on the code of every kernel, but for the processor and the arguments.

    Numba looks at one file only, and serves stale code when a helper or a table in another file changes.
    """
    digest = hashlib.sha256()
    for version in (numba.__version__, llvmlite.__version__, np.__version__, platform.python_version()):
        digest.update(f"{version}\n".encode())
    here = Path(__file__).parent
    for path in (here.parent / "tables.py", *sorted(here.glob("*.py"))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.digest()


@cache
def _source_stamp(source: Path) -> bytes:
    """Return the same for the kernels of a file, which may be a third party's."""
    own = b"" if source.parent == Path(__file__).parent else source.read_bytes()
    return hashlib.sha256(_stamp() + own).digest()


def _folders(source: Path) -> Iterator[tuple[Path, Path | None]]:
    """Return where the code of a file's kernels may be, and the folder above it that must be private, the best first."""
    folder = source.parent
    own = f"{folder.name}_{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR) / own, None
        return
    yield folder / "__pycache__", None
    for private in private_folders():
        yield private / own, private


class DiskCache(caching.NullCache):  # type: ignore[misc]
    """What Numba asks for the code of a kernel before it compiles, and gives it to afterwards.

    Parameters
    ----------
    function
        The kernel.
    key
        What tells a function made by a factory from the others of that factory; by default what its closure holds.
    """

    def __init__(self, function: Callable[..., Any], key: str | None) -> None:
        self._code, self._module = function.__code__, function.__module__
        self._source = Path(inspect.getfile(function)).absolute()
        # Numba pickles what a closure holds, and other compiled functions pickle differently in every process.
        self._key = key if key is not None else dumps(tuple(cell.cell_contents for cell in function.__closure__ or ()))

    @property
    def cache_path(self) -> str:
        """The folder that is tried first."""
        return str(next(_folders(self._source))[0])

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code of a signature, or ``None``."""
        # Numba registers its whole library of overloads first (0.1 s), which only compiling needs, and compiling does so
        # itself. Machine code from the cache needs the runtime alone (without it, it crashes): known for the versions that
        # the tests have run with, so others keep to Numba's own way.
        if numba.__version__.startswith(KNOWN_NUMBA):
            rtsys.initialize(target_context)
        else:
            target_context.refresh()
        name, key = self._named(sig, target_context.codegen())
        for folder, private in _folders(self._source):
            try:
                if private is not None and not is_private(private):
                    continue
                found = (folder / name).read_bytes()
            except OSError:
                continue
            content = found[_DIGEST_NBYTES:]
            if found[:_DIGEST_NBYTES] == self._digest(content):
                held, code = pickle.loads(content)
                if held == key:
                    return compiler.CompileResult._rebuild(target_context, *code)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code of a signature; where that is not possible, the process has it and a warning says so, once."""
        if data.library.has_dynamic_globals or any(not lifted.can_cache for lifted in data.lifted):
            return  # addresses of this process
        name, key = self._named(sig, data.codegen)
        content = dumps((key, data._reduce()))
        why = ""
        for folder, private in _folders(self._source):
            try:
                if private is not None:
                    make_private(private)
                folder.mkdir(parents=True, exist_ok=True)
                with outputs.replacing(folder / name, overwrite=True) as file:
                    file.write(self._digest(content))
                    file.write(content)
                return
            except OSError as error:
                why = why or f"{folder}: {error.strerror or error}"
            except OutputExists as error:
                why = why or str(error)
        if not unkept:
            warnings.warn(
                f"compiled kernels cannot be kept ({why}), so every run compiles them again; set NUMBA_CACHE_DIR to a folder "
                "that can be written",
                CacheWarning,
                stacklevel=2,
            )
        unkept.append(name)

    def _named(self, sig: Any, codegen: Any) -> tuple[str, Any]:
        """Return the name of a signature's file, the same for all versions of a kernel, and what the file must be of."""
        module, function = self._source.stem, self._code.co_qualname
        # The module is imported where the code is loaded, which would fail for a file that now is another module.
        machine = (sig, codegen.magic_tuple(), self._key, self._module, numba.config.BOUNDSCHECK)
        name = f"{module}.{function.replace('<', '').replace('>', '')}.{sys.implementation.cache_tag}"
        digest = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
        return f"{name}-{digest}.ggufx", (*machine, self._code.co_firstlineno)

    def _digest(self, content: bytes) -> bytes:
        return hashlib.sha256(_source_stamp(self._source) + content).digest()
