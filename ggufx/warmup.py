"""Compile kernels ahead of their first use.

Numba compiles a kernel when it is first called and keeps the machine code on disk, in the first of these folders that can be
written: ``NUMBA_CACHE_DIR`` where that is set, ``__pycache__`` beside the kernels, the user's cache folder, and a folder of the
user's own below that for temporary files. Warming up calls every verb of a type through the base class, so that the kernels see
exactly the argument types that they will see later: no call after that compiles. Decoders are compiled for each dtype that they
write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from ggufx import types
from ggufx.types import Codec
from ggufx.types._effort import errors
from ggufx.types.codec import EFFORTS, OBJECTIVES

__all__ = ["Warmed", "compiling", "kept", "kernels_of", "warm_up"]


@dataclass(frozen=True)
class Warmed:
    """A kernel that is ready.

    Attributes
    ----------
    type, verb
        ``verb`` is ``decode``, ``encode``, ``pack`` or ``unpack``.
    seconds
        Compiling and storing it, or loading it from the cache.
    compiled
        Whether machine code was made; else the cache had it all.
    """

    type: str
    verb: str
    seconds: float
    compiled: bool


def kernels_of(names: Iterable[str] | None = None) -> list[tuple[Codec, str]]:
    """Return (codec, verb) of every kernel of the types ``names`` (default all); raises UnknownType.

    Imports Numba when one of them has a kernel.
    """
    codecs = types.all_codecs() if names is None else map(types.get, names)
    verbs = {"decode": "can_decode", "encode": "can_encode", "pack": "can_pack", "unpack": "can_pack"}
    return [
        (codec, verb)
        for codec in codecs
        for verb, able in verbs.items()
        if getattr(codec, able) and (verb in codec._kernels or (verb == "encode" and codec.searches and codec._kernels))
    ]


def warm_up(
    names: Iterable[str] | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[Warmed]:
    """Make the kernels of the types ``names`` (default all) ready, in this process and on disk.

    Parameters
    ----------
    names
        Types, in any case.
    progress
        Told the number of kernels done and of all.

    Yields
    ------
    Warmed
        One per kernel, when it is ready.

    Raises
    ------
    UnknownType
        A name is not known.
    """
    pairs = kernels_of(names)
    for number, (codec, verb) in enumerate(pairs):
        if progress is not None:
            progress(number, len(pairs))
        start = time.perf_counter()
        with compiling() as compiled:
            _CALLS[verb](codec)
        yield Warmed(codec.name, verb, time.perf_counter() - start, bool(compiled))
    if progress is not None:
        progress(len(pairs), len(pairs))


def kept() -> bool:
    """Return whether all kernels that this process compiled are on disk for the next one."""
    from ggufx.kernels import _cache

    return _cache.kept()


@contextmanager
def compiling() -> Iterator[list[str]]:
    """Collect the names of functions that Numba compiles in a with statement."""
    from numba.core import event

    compiled: list[str] = []

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            compiled.append(str(event.data["dispatcher"]))

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield compiled


def _decode(codec: Codec) -> None:
    row = np.zeros((1, codec.layout.row_nbytes(codec.layout.block_len)), np.uint8)
    for dtype in (None, np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        codec.decode(row, dtype=dtype)


def _encode(codec: Codec) -> None:
    # A type may have one kernel per wish: go through them all.
    row = np.zeros((1, codec.layout.block_len), np.float32)
    weights = np.ones(codec.layout.block_len, np.float32)
    for effort, objective, importance in product(EFFORTS, OBJECTIVES, (None, weights)):
        if (effort != "reference" or codec.reproduces) and (importance is not None or not codec.needs_importance):
            codec.encode(row, importance, effort=effort, objective=objective)
    if codec.searches and not codec.nested:
        errors(row, row, weights)  # zeros leave every effort the same bytes, so that none is compared above


def _pack(codec: Codec) -> None:
    codec.pack(np.zeros((1, codec.layout.block.itemsize - 1), np.uint8), np.zeros((1, 1), np.uint8))


def _unpack(codec: Codec) -> None:
    codec.unpack(np.zeros((1, codec.layout.row_nbytes(codec.layout.block_len)), np.uint8))


_CALLS: dict[str, Callable[[Codec], None]] = {"decode": _decode, "encode": _encode, "pack": _pack, "unpack": _unpack}
