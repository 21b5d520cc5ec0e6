"""What the encoders of evenly spaced codes share on this side of their kernels: the choice of what to search."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np

from ggufx import kernels
from ggufx.errors import UnsupportedType
from ggufx.types.codec import F32, U8, Search

if TYPE_CHECKING:
    from ggufx.types.codec import Codec

__all__ = [
    "encode_affine",
    "encode_affine32",
    "encode_block32",
    "encode_levels",
    "encode_plain",
    "kernel_of",
    "locked",
    "relative",
]


def kernel_of(codec: Codec) -> ModuleType:
    """Return the kernels of a type whose search exists compiled only.

    Raises
    ------
    UnsupportedType
        Numba's compiler is switched off.
    """
    kernel = kernels.find(codec.name)
    if kernel is None:
        raise UnsupportedType(f"encoding to {codec.name} needs Numba's compiler, which NUMBA_DISABLE_JIT switches off")
    return kernel


def locked(array: F32 | None) -> F32:
    """Return a read-only view, so that kernels are compiled for one kind of array; empty for ``None``."""
    view = np.empty(0, np.float32) if array is None else np.ascontiguousarray(array, np.float32).view()
    view.flags.writeable = False
    return view


def relative(importance: F32 | None, block_len: int) -> F32:
    """Return the importance divided by the largest of its block: only ratios count, and sums neither vanish nor overflow."""
    if importance is None:
        return locked(None)
    parts = importance.reshape(-1, block_len).astype(np.float64)
    return locked((parts / parts.max(axis=1, keepdims=True)).astype(np.float32).ravel())


# What the largest element is tried as, in levels beyond the outermost one: (from, to, step) with the sign
# of the lowest level, then of the highest; and the number of refits.
_BLOCK32: Final = {
    "fast": ((-1.8, 1.1, 0.4), (-1.5, 0.7, 0.5), 0),
    "normal": ((-2.5, 1.5, 0.25), (-2.0, 1.5, 0.25), 1),
    "high": ((-3.5, 1.55, 0.1), (-3.0, 1.55, 0.1), 2),
}


def encode_block32(codec: Codec, bits: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Encode blocks of 32 codes around zero under one f16: Q4_0, Q5_0, Q6_0.

    Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(sigma2 + x^2), sigma2 the mean of x^2 over the row and
    m the importance, or 1 without importance; ``mse``: w = m, or 1. See :func:`ggufx.kernels._linear.encode_block32`.
    """
    kernel = kernel_of(codec)
    below, above, refits = _BLOCK32[search.effort]
    top = float(1 << (bits - 1))
    steps = [-(top + t) for t in np.arange(*below)]
    steps += [top - 0.5 + t for t in np.arange(*above)]
    kernel.encode_block32(
        locked(values),
        relative(importance, 32),
        out,
        bits,
        codec.layout.block.itemsize,
        search.objective == "reference",
        np.array(steps, np.float32),
        # Groups: the steps that give the largest element the same level.
        np.append(np.flatnonzero(np.diff(np.rint(steps))) + 1, len(steps)),
        refits,
    )


# Levels beyond the codes' own that the span of a block is tried as (from, to, step), shares of these at the lower end, refits.
_AFFINE32: Final = {
    "fast": ((-1.0, 2.1, 0.5), (0.0, 0.5, 1.0), 1),
    "normal": ((-1.0, 5.1, 0.5), (0.0, 0.25, 0.5, 0.75, 1.0), 1),
    "high": ((-1.0, 8.1, 0.25), (0.0, 0.17, 0.33, 0.5, 0.67, 0.83, 1.0), 2),
}


def encode_affine32(codec: Codec, bits: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Encode blocks of 32 codes under an f16 scale, from an f16 minimum of any sign on: Q4_1, Q5_1.

    Minimises ``sum w (x - y)^2`` with the weights of :func:`encode_block32`. Effort ``reference`` gives the C library's bytes:
    ``d = (max - min) / top`` and plain rounding, or with importance the best of 38 least-squares fits whose minimum is never
    above 0. Only a scale or minimum beyond binary16, which the library stores as infinity, is clamped to 65504. See
    :mod:`ggufx.kernels._affine` for the search. Source: ``quantize_row_q4_1_ref`` and ``quantize_row_q4_1_impl`` of llama.cpp.
    """
    kernel = kernel_of(codec)
    nbytes = codec.layout.block.itemsize
    if search.effort == "reference":
        kernel.encode_reference(locked(values), locked(importance), out, bits, nbytes)
        return
    span, places, refits = _AFFINE32[search.effort]
    steps = [(1 << bits) - 1 + t for t in np.arange(*span)]
    kernel.encode_affine32(
        locked(values),
        relative(importance, 32),
        out,
        bits,
        nbytes,
        search.objective == "reference",
        np.array(steps * len(places), np.float32),
        np.repeat(np.array(places, np.float32), len(steps)),
        np.arange(1, len(places) + 1) * len(steps),
        refits,
    )


# Scales that are tried (per sign, where it matters) from the largest magnitude down, the range they span, and as many again
# between the neighbours of the best.
_LEVELS: Final = {"reference": (0, 1.0, 0), "fast": (16, 12.0, 0), "normal": (16, 16.0, 16), "high": (32, 48.0, 32)}


def encode_levels(codec: Codec, ternary: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Encode blocks of two or three levels and zero under one f16: TQ1_0 (``ternary`` 1), TQ2_0 (2), Q2_0 (0).

    Minimises ``sum m (x - y)^2``, m the importance or 1: both objectives are the same. Effort ``reference`` gives the C
    library's bytes, whatever the importance: the scale is the largest magnitude of the block. That is right for models that
    were trained with three levels, which the search leaves as exact; of others it makes zeros, mostly. Only a scale beyond
    binary16, which the library stores as infinity, is clamped to 65504. Source: ``quantize_row_tq2_0_ref`` and its likes of
    llama.cpp.
    """
    count, span, again = _LEVELS[search.effort]
    steps = span ** (np.arange(count) / max(1, count - 1))
    nearby = span ** (np.linspace(-1, 1, again + 2)[1:-1] / max(1, count - 1))
    if not ternary:
        steps = np.concatenate([steps, -steps])
    block = codec.layout.block
    assert block.fields is not None
    kernel_of(codec).encode_levels(
        locked(values),
        relative(None if search.effort == "reference" else importance, codec.layout.block_len),
        out,
        ternary,
        codec.layout.block_len,
        block.itemsize,
        block.fields["d"][1],
        steps.astype(np.float32),
        nearby.astype(np.float32),
    )


# Steps of the first stage as above, then window of sub-scales, minima to either side (of types that have them), rounds.
_AFFINE: Final = {
    "fast": ((-1.6, 1.1, 0.4), 1, 0, 2),
    "normal": ((-1.6, 1.0, 0.2), 2, 1, 3),
    "high": ((-2.0, 1.1, 0.1), 4, 2, 4),
}
_PLAIN: Final = {
    "fast": ((-0.75, 1.25, 0.25), 1, 2),
    "normal": ((-2.0, 1.4, 0.2), 2, 3),
    "high": ((-2.5, 1.6, 0.1), 5, 4),
}


def encode_affine(codec: Codec, bits: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Encode blocks of 256 with scales and minima: Q2_K, Q4_K, Q5_K.

    Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(sigma2 + x^2), sigma2 the mean of x^2 over the block and
    m the importance, or 1 without (the library's weights are alike, and differ from type to type); ``mse``: w = m, or 1.
    See :mod:`ggufx.kernels._kquants` for the search.
    """
    kernel = kernel_of(codec)
    span, window, near, rounds = _AFFINE[search.effort]
    steps = np.array([(1 << bits) - 1 + t for t in np.arange(*span)], np.float32)
    by_energy = search.objective == "reference"
    weights = relative(importance, 256)
    nbytes = codec.layout.block.itemsize
    kernel.encode_affine(locked(values), weights, out, bits, nbytes, by_energy, steps, window, near, rounds)


def encode_plain(codec: Codec, bits: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Encode blocks of 256 with signed scales: Q3_K, Q6_K. Objectives as in :func:`encode_affine`."""
    kernel = kernel_of(codec)
    span, window, rounds = _PLAIN[search.effort]
    top = float(1 << (bits - 1))
    steps = np.array([s for t in np.arange(*span) for s in (-(top + t), top - 0.5 + t)], np.float32)
    by_energy = search.objective == "reference"
    weights = relative(importance, 256)
    kernel.encode_plain(
        locked(values), weights, out, bits, codec.layout.block.itemsize, by_energy, steps, window, rounds
    )
