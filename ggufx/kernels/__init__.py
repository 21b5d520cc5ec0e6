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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Final

__all__ = ["OUTPUTS", "compiles", "exists", "find", "load", "provide", "uncollected"]

OUTPUTS: Final = {"float32": "float32", "float16": "uint16", "bfloat16": "int16"}
"""Dtypes that kernels decode to, and how they are handed over: Numba knows no 16-bit floats on the CPU, so the dtype of the
bits tells which they are."""


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
