"""What the searching encoders share: effort and objective as numbers for their kernels, weights made safe."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ggufx import kernels
from ggufx.types.codec import F32, U8, Effort, Search

__all__ = ["search_blocks", "search_codebook"]

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

_DEAD = np.float32(1e-9)


def _weights(importance: F32 | None, sub_len: int) -> F32:
    """Return the importance as the reference uses it: sub-blocks of columns with none get 1e-9. Empty for none."""
    if importance is None:
        return np.empty(0, np.float32)
    weights = importance.copy()
    blocks = weights.reshape(-1, sub_len)
    with np.errstate(over="ignore"):
        blocks[(blocks.astype(np.float64) ** 2).sum(axis=1) <= sub_len * 1e-18] = _DEAD
    # A power of two, so that products with it stay finite and exact.
    scaled: F32 = np.ldexp(weights, -np.frexp(weights.max())[1]).astype(np.float32)
    return scaled


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
