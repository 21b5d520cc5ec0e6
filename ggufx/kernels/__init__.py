"""Numba kernels, one module per quant type, found by the type's name in lower case; their twins are in sub-packages.

``ggufx.kernels.cuda`` has Triton kernels under the same names, ``ggufx.kernels.torch`` decoders in plain torch; each says in
its docstring what a module of it defines. A kernel module for the CPU may define, all over C-contiguous arrays (``rows``
read-only uint8 [R, row_nbytes]):

``decode(rows, out, block_len)``
    Fill ``out``, float32 [R, row_len], with exactly what the type's NumPy specification gives.
``encode(values, out, block_len)``
    Fill ``out``, uint8 [R, row_nbytes], from float32 [R, row_len] with exactly what the NumPy specification gives. Only for
    types without a search: importance and effort change nothing. A search is called by the type's ``encode_rows``.
``pack(codes, scales, out, block_len, rows_per_scale) -> (bad_codes, bad_scales)``
    Exact native packing; counts the codes and scales that consumers disagree on.
``unpack(rows, codes, scales, block_len)``
    The inverse of ``pack`` with one scale row per row.

Kernels are serial, hold no state and release the GIL; threads live with the caller. This package knows no quant type.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

__all__ = ["exists", "find", "narrower"]


def _module_name(name: str, cuda: bool, torch: bool) -> str:
    return ".".join([__name__, *(["cuda"] if cuda else []), *(["torch"] if torch else []), name.lower()])


@cache
def exists(name: str, *, cuda: bool = False, torch: bool = False) -> bool:
    """Return whether type ``name`` has a kernel module, for the CPU, for CUDA, or in plain torch, without importing it."""
    module = _module_name(name, cuda, torch)
    # A package must be there before one may ask for what is in it.
    return (
        importlib.util.find_spec(module.rpartition(".")[0]) is not None and importlib.util.find_spec(module) is not None
    )


@cache
def narrower(name: str) -> Callable[..., None] | None:
    """Return the kernel that fills uint16 [n] with the ``float16`` or ``bfloat16`` bits of float32 [n], or ``None``."""
    if name not in ("float16", "bfloat16"):
        return None
    kernel: Callable[..., None] = getattr(importlib.import_module(f"{__name__}._narrow"), f"to_{name}")
    return kernel


@cache
def find(name: str, *, cuda: bool = False, torch: bool = False) -> ModuleType | None:
    """Return the kernel module of type ``name``, or ``None`` when the type has none.

    The first call for a type imports Numba, with ``cuda`` Triton, with ``torch`` torch. A kernel that exists but fails to
    import raises: nothing falls back in silence.
    """
    # With Numba's compiler switched off (to debug, say) the specifications run: the kernels' intrinsics exist compiled only.
    numba = not (cuda or torch)
    if not exists(name, cuda=cuda, torch=torch) or (
        numba and os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    ):
        return None
    # What importing Numba makes nearly all stays: looking for garbage among it is a sixth of the time (measured).
    collecting = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(_module_name(name, cuda, torch))
    finally:
        if collecting:
            gc.enable()
