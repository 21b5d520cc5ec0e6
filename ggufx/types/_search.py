"""What the searching encoders share: effort and objective as numbers for their kernels, weights made safe."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np

from ggufx import kernels, tables
from ggufx.types.codec import F32, U8, Effort, Search
from ggufx.types.words import NumpyWords

__all__ = ["search_blocks", "search_codebook", "search_trellis"]

# Real scales per table and sign to start from (4, 8 or 16), values of D that the model judges, their range around the widest
# sub-block's, legal scales per table and sign tried exactly (at most 32), how often, under how many of the best D. Twice
# as many scales where the table has no twin.
_CODEBOOK: Final[dict[Effort, tuple[Any, ...]]] = {
    "fast": (4, 128, 0.5, 1.2, 8, 1, 1),
    "normal": (8, 256, 0.5, 1.3, 16, 1, 1),
    "high": (16, 256, 0.5, 1.4, 32, 1, 4),
}
# Of 5 bits on codes are so many that the explained energy has a maximum every few percent of the scale: more starts pay, and
# wide windows less.
_FINE: Final[dict[Effort, tuple[Any, ...]]] = {
    **_CODEBOOK,
    "fast": (8, 128, 0.5, 1.2, 8, 1, 1),
    "normal": (16, 128, 0.5, 1.2, 8, 1, 1),
}
# Real scales per half of a sign, rounds of trying stored scales.
_BLOCKS: Final[dict[Effort, tuple[int, ...]]] = {"fast": (16, 1), "normal": (16, 2), "high": (64, 3)}

# Cells looked into, for the last choice of points, how far from a sub-block's own scale legal ones are tried, rounds of that,
# values of D.
_TRELLIS: Final[dict[Effort, tuple[Any, ...]]] = {
    "fast": (24, 48, 1.25, 1, 1),
    "normal": (32, 64, 1.35, 1, 1),
    "high": (40, 96, 1.5, 1, 3),
}
# The same for IQ4_KT, with fewer points a cell and finer scales.
_TRELLIS4: Final[dict[Effort, tuple[Any, ...]]] = {
    "fast": (6, 16, 1.2, 1, 1),
    "normal": (8, 20, 1.35, 1, 1),
    "high": (12, 24, 1.7, 1, 1),
}

_DEAD = np.float32(1e-9)
_LEAST = 2.0**-10
"""Of the mean importance of 32 columns: what the least important of them counts in a search for points."""


def _weights(importance: F32 | None, sub_len: int) -> F32:
    """Return the importance with the largest near 1, and sub-blocks that have next to none at an even 1e-9. Empty for none."""
    if importance is None:
        return np.empty(0, np.float32)
    # A power of two, so that products with it stay finite and exact; first, as only ratios count.
    weights: F32 = np.ldexp(importance, -np.frexp(importance.max())[1]).astype(np.float32)
    blocks = weights.reshape(-1, sub_len)
    blocks[(blocks.astype(np.float64) ** 2).sum(axis=1) <= sub_len * 1e-18] = _DEAD
    return weights


def search_codebook(
    name: str, sub_len: int, values: F32, out: U8, importance: F32 | None, search: Search, *, fine: bool = False
) -> None:
    """Run the search kernel of a type with one scale per group and integer sub-scales; ``fine``: with many codes."""
    module = kernels.find(name)
    assert module is not None
    mse = search.objective == "mse"
    efforts = _FINE if fine else _CODEBOOK
    module.search(values, out, _weights(importance, sub_len), mse, *efforts[search.effort])


def search_blocks(name: str, sub_len: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Run the search kernel of a type whose blocks have a scale and codes."""
    module = kernels.find(name)
    assert module is not None
    mse = search.objective == "mse"
    module.search(values, out, _weights(importance, sub_len), mse, *_BLOCKS[search.effort])


@cache
def _trellis_scales(kind: int) -> tuple[Any, ...]:
    """Return, by variant, magnitudes of legal scales, their codes and sign, and the half of the generator."""
    if kind == 2:
        positive, negative = tables.IQ4[8:], tables.IQ4[7::-1]
        legal, codes = [list(positive), [-v for v in negative]], [list(range(8, 16)), list(range(7, -1, -1))]
        signs, halves = [1, -1], [0, 0]
    elif kind == 3:
        legal, codes, signs, halves = [list(range(1, 16))], [list(range(1, 16))], [1], [0]
    else:
        # 63 and 64 magnitudes: the last of the shorter is there twice.
        up, down = [*range(1, 64), 63], list(range(1, 65))
        legal, codes = [up, up, down, down], [[64 + v for v in up]] * 2 + [[64 - v for v in down]] * 2
        signs, halves = [1, 1, -1, -1], [0, 1] * 2
    return (
        np.array(legal, np.float32),
        np.array(codes, np.int64),
        np.array(signs, np.int64),
        np.array(halves, np.int64),
    )


@cache
def _zeros(kind: int) -> tuple[int, int]:
    """Return scale code and index of zeros: no sign shows under a scale of 0 and elements that are not negative."""
    group_len = 4 if kind == 4 else 8
    seeds = np.arange(1 << 15, dtype=np.uint32) + np.uint32(tables.TRELLIS_OFFSET)
    values = NumpyWords().trellis(seeds, group_len).reshape(-1, group_len)
    return {2: 8, 3: 0, 4: 64}[kind], int((values >= 0).all(axis=1).argmax())


def search_trellis(name: str, kind: int, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
    """Encode IQ2_KT, IQ3_KT or IQ4_KT.

    Minimises ``sum w (x - y)^2``. Objective ``reference``: with s2 the double mean of x^2 over 256 elements, w = m sqrt(s2 +
    x^2), m the importance, or s2 / 4 + x^2 without (``set_weights`` in iqk_quantize.cpp of ik_llama.cpp); ``mse``: w = m, or 1.
    See :mod:`ggufx.kernels._trellis` for the search.
    """
    module = kernels.find(name)
    assert module is not None
    group_len, n_bits, levels = (4, 15, 7) if kind == 4 else (8, 16, 3)
    found = module.points(group_len, n_bits, levels, kind == 3, 2 if kind == 4 else 1)
    weights = np.empty(0, np.float32)
    if importance is not None:
        # Of the row's largest, by a power of two: ratios count, and sums stay finite. Points are noise where nothing counts, so
        # that every column counts a little, and evenly where none of 32 does.
        weights = np.ldexp(importance, -np.frexp(importance.max())[1]).astype(np.float32)
        parts = weights.reshape(-1, 32)
        means = parts.mean(axis=1, keepdims=True, dtype=np.float64)
        np.maximum(parts, np.maximum(means * _LEAST, _DEAD), out=parts, casting="same_kind")
    how = (_TRELLIS4 if kind == 4 else _TRELLIS)[search.effort]
    module.search(
        values, out, weights, search.objective == "mse", kind, found, *_trellis_scales(kind), _zeros(kind), *how
    )
