"""What the encoders of grid types share on this side of their kernel: weights, efforts, and the search's result as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import F32, U8, Search
from ggufx.types.scalar import kernel_of, locked, relative

if TYPE_CHECKING:
    from ggufx.types.codec import Codec

__all__ = ["Found", "Weights", "bits", "search_grid"]

U16 = npt.NDArray[np.uint16]

Weights = tuple[float, float, float]
"""(c, f, p): w = m sqrt(c mean(x^2) + x^2) with importance m, f mean(x^2) + p x^2 without, means over the block."""
_MSE: Final[Weights] = (-1.0, 0.0, 0.0)
# Columns that count for nothing may not become just anything; next to the block's largest weight this is nothing, too.
_LEAST = np.float32(2.0**-17)
# Sub-scales tried to either side of the nearest one, values of d tried in earnest, refits of each, further rounds of sweeps.
_EFFORTS: Final = {"fast": (1, 1, 1, 0), "normal": (1, 1, 1, 0), "high": (2, 4, 2, 1)}


class Found(NamedTuple):
    """What a search found, for every block.

    Attributes
    ----------
    d
        binary16 [R, n].
    sub_scales
        uint8 [R, n, groups].
    points
        uint16 [R, n, slots]: numbers in the grid.
    shifts
        uint8 [R, n, slots]: 1 for the second shift.
    signs
        uint8 [R, n, 32]: a bit an element.
    """

    d: npt.NDArray[np.float16]
    sub_scales: U8
    points: U16
    shifts: U8
    signs: U8


def search_grid(
    codec: Codec,
    groups: int,
    slots: int,
    spans: dict[str, tuple[float, float, int]],
    weights: Weights,
    values: F32,
    importance: F32 | None,
    search: Search,
) -> Found:
    """Run a type's search over blocks of 256; ``spans``: least, largest and number of the scales that it samples."""
    kernel = kernel_of(codec)
    rows, blocks = values.shape[0], values.shape[1] // 256
    n = rows * blocks
    d = np.empty(n, np.uint16)
    sub_scales, points = np.empty((n, groups), np.uint8), np.empty((n, slots), np.uint16)
    signs = np.empty((n, 32), np.uint8)
    kernel.search(
        locked(values),
        locked(np.maximum(relative(importance, 256), _LEAST)),
        (d, sub_scales, points, signs),
        weights if search.objective == "reference" else _MSE,
        np.geomspace(*spans[search.effort], dtype=np.float32),
        _EFFORTS[search.effort],
    )
    return Found(
        d.view(np.float16).reshape(rows, blocks),
        sub_scales.reshape(rows, blocks, groups),
        (points & np.uint16(0x7FFF)).reshape(rows, blocks, slots),
        (points >> 15).astype(np.uint8).reshape(rows, blocks, slots),
        signs.reshape(rows, blocks, 32),
    )


def bits(codes: npt.NDArray[Any], width: int) -> U8:
    """Pack codes of ``width`` bits [..., n] into bytes [..., n * width / 8], the first one lowest: ``fields`` reversed."""
    per_byte = 8 // width
    parts = codes.astype(np.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed: U8 = np.bitwise_or.reduce(parts << np.arange(0, 8, width, dtype=np.uint8), axis=-1)
    return packed
