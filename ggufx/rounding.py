"""How far a quantized block may be from its source: bounds that any sound encoder keeps, and damage does not.

Encoders differ: with importance they give up columns that matter little, and their scales are of other searches. So a block is
held against what our own quick encoder leaves of the same source, with room for both; and what it holds must be like the
source at all. Blocks so small that binary16's scales vanish are rounded to nothing by some encoders, and held to that.
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.types import Codec

__all__ = ["FarBlock", "far_blocks", "judges"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Blocks = npt.NDArray[np.bool_]

TIMES_OURS: Final = 4.0
"""A block's squared error may be this many times what our quick encoder leaves (C's with importance: 1.6 in the median)."""
TIMES_TYPICAL: Final = 6.0
"""... and this many times the part of normal values' energy that the type leaves, of the energy that the block would have
if its largest value lay three standard deviations out, or of its own if that is more. An outlier sets a block's scale."""
WEIGHTED: Final = 300.0
"""Importance that is concentrated on few columns may cost this many times what the type leaves of normal values ..."""
SACRIFICED: Final = 0.25
"""... but not more than this part of the block's energy."""
LEAST_LIKENESS: Final = 0.1
"""What the block has in common with its source (the inner product), at least, as a part of what our encoding has."""
MOST_LIKENESS: Final = 1.45
"""... and at most; a scale twice as large gives 2."""
TINY: Final = 2.0**-13
"""Largest magnitude of blocks that encoders may round to nothing: scales of scales vanish in binary16 below it."""
TINY_OF: Final = {"NVFP4": 6 * 2.0**-10}
"""The same where scales are of another kind: half of UE4M3's smallest, 2^-9, times the largest code."""


class FarBlock(NamedTuple):
    """A block that no encoder makes of its source."""

    row: int
    block: int
    relative: float
    """Its squared error, as a part of the source's energy."""
    expected: float
    """What our quick encoder leaves."""


def judges(codec: Codec) -> bool:
    """Return whether blocks of a type can be judged: it must be encodable."""
    return codec.can_encode and codec.can_decode and codec.layout.block_len > 1 and codec.value_dtype == np.float32


@cache
def _typical(name: str) -> float:
    """Return the part of normal values' energy that our quick encoder leaves."""
    values = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    left = _encoded(types.get(name), values).astype(np.float64) - values
    return float(np.square(left).sum() / np.square(values.astype(np.float64)).sum())


def _encoded(codec: Codec, values: F32) -> F32:
    """Return what is left of values after our quick encoder, float32 [R, row_len]."""
    ones = np.ones(values.shape[1], np.float32) if codec.needs_importance else None
    packed = codec.encode(values, ones, effort="fast", objective="mse", threads=1)
    return codec.decode(packed, dtype=np.float32, threads=1)


def far_blocks(codec: Codec, values: F32, source: F32) -> list[FarBlock]:
    """Return the blocks of ``values`` that are farther from ``source`` than the type explains.

    Parameters
    ----------
    codec
        The type that ``values`` were decoded from; :func:`judges` says whether it can be asked.
    values, source
        float32 [R, row_len].
    """
    n_rows, row_len = source.shape
    shape = (n_rows, row_len // codec.layout.block_len, codec.layout.block_len)
    wanted, found = (a.astype(np.float64).reshape(shape) for a in (source, values))
    largest = np.abs(wanted).max(axis=2, initial=0)
    typical, smallest = _typical(codec.name), TINY_OF.get(codec.name, TINY)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.square(found - wanted).sum(axis=2)
        energy, likeness = np.square(wanted).sum(axis=2), (found * wanted).sum(axis=2)
    scaled = np.maximum(energy, codec.layout.block_len * np.square(largest / 3))
    if codec.layout.header is not None:
        # A row with one scale for all is as good as its largest values allow.
        scaled = np.maximum(scaled, energy.mean(axis=1, keepdims=True))
    room = TIMES_TYPICAL * typical * scaled + min(WEIGHTED * typical, SACRIFICED) * energy
    room += codec.layout.block_len * smallest**2
    tiny = largest < smallest
    kept = (1 - typical) * energy

    def is_far(room: F64, least: F64, most: F64, error: F64, likeness: F64, tiny: npt.NDArray[np.bool_]) -> Blocks:
        unlike = ~(likeness >= LEAST_LIKENESS * least) | ~(likeness <= MOST_LIKENESS * most)
        far: Blocks = ~(error <= room) | (unlike & ~tiny)  # NaN is far, too
        return far

    suspect = is_far(room, energy, kept, error, likeness, tiny)
    rows = np.flatnonzero(suspect.any(axis=1))
    left = np.zeros((n_rows, shape[1]))
    if rows.size:
        # Only rows that may be damaged are encoded again.
        ours = _encoded(codec, np.ascontiguousarray(source[rows])).astype(np.float64).reshape(rows.size, *shape[1:])
        left[rows] = np.square(ours - wanted[rows]).sum(axis=2)
        like = (ours * wanted[rows]).sum(axis=2)
        suspect[rows] = is_far(
            room[rows] + TIMES_OURS * left[rows], np.minimum(like, energy[rows]), np.maximum(like, kept[rows]),
            error[rows], likeness[rows], tiny[rows],
        )  # fmt: skip
    return [
        FarBlock(
            int(row), int(block), float(error[row, block] / max(energy[row, block], 1e-300)),
            float(left[row, block] / max(energy[row, block], 1e-300)),
        )
        for row, block in np.argwhere(suspect)
    ]  # fmt: skip
