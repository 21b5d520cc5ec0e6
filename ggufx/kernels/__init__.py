"""Numba kernels, one module per quant type, found by the type's name in lower case.

``ggufx.kernels.cuda`` has their Triton twins under the same names, and says in its docstring what a module of it defines. A
kernel module for the CPU may define, all over C-contiguous arrays (``rows``
read-only uint8 [R, row_nbytes]):

``decode(rows, out, block_len)``
    Fill ``out`` [R, row_len] of a dtype of :data:`OUTPUTS` with exactly what the type's NumPy specification gives, rounded to
    nearest even if narrower than float32. Each dtype is an overload of its own, compiled when it is first wanted.
``encode(values, out, block_len)``
    Fill ``out``, uint8 [R, row_nbytes], from float32 [R, row_len] with exactly what the NumPy specification gives. Only for
    types without a search: importance and effort change nothing. A search is called by the type's ``encode_rows``.
``pack(codes, scales, out, block_len, rows_per_scale) -> (bad_codes, bad_scales)``
    Exact native packing; counts the codes and scales that consumers disagree on.
``unpack(rows, codes, scales, block_len)``
    The inverse of ``pack`` with one scale row per row.

Kernels are serial, hold no state and release the GIL; threads live with the caller. This package knows no quant type.

A type of another package names a module of its own with such functions (:attr:`ggufx.types.Codec.kernel_module`, and
``cuda_module`` for a GPU); :mod:`ggufx.kernels.jit` has what they are written with. A ``decode`` that fills float32 alone is
enough: one that fills the other dtypes, too, says so by a tuple ``OUTPUTS`` of their names in the module.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Final

from ggufx import stopping
from ggufx.kernels import _folders

__all__ = [
    "OUTPUTS",
    "CacheWarning",
    "NotCompiledError",
    "compiled",
    "compiles",
    "compiling_heard",
    "compiling_refused",
    "exists",
    "find",
    "load",
    "of_type",
    "provide",
    "uncollected",
    "unkept",
]

OUTPUTS: Final = {"float32": "float32", "float16": "uint16", "bfloat16": "int16"}
"""Dtypes that kernels decode to, and how they are handed over: Numba knows no 16-bit floats on the CPU, so the dtype of the
bits tells which they are."""

unkept: Final[list[str]] = []
"""Names of the compiled code that this process could keep nowhere on disk."""


class CacheWarning(UserWarning):
    """Compiled kernels cannot be kept on disk, so that every process compiles them again."""


class NotCompiledError(Exception):
    """A kernel would have to be compiled, within :func:`compiling_refused`."""


class _Thread(threading.local):
    type = ""
    """What is worked on: the kernels of a family do not know for which of its types they are compiled."""
    refuses = False


_thread = _Thread()
_listeners: Final[list[Callable[[str, bool], None]]] = []


_provided: dict[tuple[str, bool], str] = {}
"""(type's name in lower case, for CUDA) -> module of another package."""


def provide(name: str, module: str, *, cuda: bool = False) -> None:
    """Have the kernels of type ``name`` looked for in a module of another package, which is imported on first use."""
    _provided[name.lower(), cuda] = module
    exists.cache_clear()
    find.cache_clear()


def _module_name(name: str, cuda: bool) -> str:
    given = _provided.get((name.lower(), cuda))
    return given or ".".join([__name__, *(["cuda"] if cuda else []), name.lower()])


@cache
def exists(name: str, *, cuda: bool = False) -> bool:
    """Return whether type ``name`` has a kernel module, for the CPU or for CUDA, without importing it."""
    module = _module_name(name, cuda)
    package = module.rpartition(".")[0]
    # A package must be there before one may ask for what is in it.
    there = not package or importlib.util.find_spec(package) is not None
    return there and importlib.util.find_spec(module) is not None


@cache
def find(name: str, *, cuda: bool = False) -> ModuleType | None:
    """Return the kernel module of type ``name``, or ``None`` when the type has none.

    The first call for a type imports Numba, with ``cuda`` Triton. A kernel that exists but fails to
    import raises: nothing falls back in silence.
    """
    if not exists(name, cuda=cuda) or not (cuda or compiles()):
        return None
    if cuda:
        _folders.give_triton_one()
    with uncollected():
        return importlib.import_module(_module_name(name, cuda))


def compiles() -> bool:
    """Return whether Numba's compiler is on; off (to debug, say) the specifications run: intrinsics exist compiled only."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


@cache
def load(name: str) -> ModuleType:
    """Return module ``name`` of this package; the first call imports what it needs: Numba or Triton."""
    with uncollected():
        return importlib.import_module(f"{__name__}.{name}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Stop looking for garbage meanwhile: what importing Numba and compiling make nearly all stays.

    The search for it is a sixth of the time of the one, a tenth of the other's (measured).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def of_type(name: str) -> Iterator[None]:
    """Say that what this thread compiles meanwhile is for type ``name``."""
    before, _thread.type = _thread.type, name
    try:
        yield
    finally:
        _thread.type = before


@contextmanager
def compiling_refused() -> Iterator[None]:
    """Raise NotCompiledError in this thread where a kernel is neither loaded nor on disk."""
    before, _thread.refuses = _thread.refuses, True
    try:
        yield
    finally:
        _thread.refuses = before


@contextmanager
def compiling_heard(listener: Callable[[str, bool], None]) -> Iterator[None]:
    """Have ``listener(type, begins)`` called when a kernel begins to be compiled, and when that ends.

    It is called in whichever thread compiles; one does at a time. Of kernels that serve all types, ``type`` is empty.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def compiled(module: str) -> Iterator[None]:
    """Tell those who listen that a kernel of module ``module`` is compiled meanwhile."""
    stopping.check()
    if _thread.refuses:
        raise NotCompiledError(module)
    package, _, last = module.rpartition(".")
    # A module that serves many types has no name of one; another package's may have any.
    name = _thread.type if package != __name__ or last.startswith("_") else last.upper()
    told = tuple(_listeners)
    for listener in told:
        listener(name, True)
    try:
        yield
    finally:
        for listener in told:
            listener(name, False)
