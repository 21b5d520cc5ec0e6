"""IQ2_XXS: points of a grid of 256, with signs; 4-bit scales of 32 elements under an f16."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.scalar import kernel_of, locked, relative
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# (least, largest, number) of the sampled scales over largest magnitude / 43; window of sub-scales, starts, refits,
# whether the last choice is among all points.
_SEARCHES: Final = {
    "fast": ((0.45, 0.95, 4), 1, 1, 1, False),
    "normal": ((0.35, 1.1, 8), 1, 1, 1, True),
    "high": ((0.3, 1.15, 24), 2, 6, 2, True),
}


@cache
def _neighbours() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ``(starts [6562], points)``: what the C library tries for every eight levels 0..2 (level j times 3^j, summed).

    The point itself where the grid has it, else all points in the two smallest distinct distances, nearest first.
    """
    levels = np.arange(3**8)[:, None] // 3 ** np.arange(8) % 3
    grid = np.searchsorted([8, 25, 43], tables.GRID_IQ2_XXS)
    distances = ((levels[:, None, :] - grid).astype(np.int16) ** 2).sum(axis=-1)
    found = []
    for row in distances:
        smallest = np.unique(row)[: 1 if row.min() == 0 else 2]
        order = np.argsort(row, kind="stable")
        found.append(order[: np.count_nonzero(row <= smallest[-1])])
    starts = np.cumsum([0, *(len(points) for points in found)])
    return starts, np.concatenate(found)


class IQ2_XXS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.25) * +-grid[g][i % 8]``, 256 elements in 66 bytes.

    Every 32 elements have eight bytes of ``qs``: four grid indices, then a uint32 of four times seven sign bits (the eighth is
    their parity) and, on top, the scale a.

    Source: ``dequantize_row_iq2_xxs`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "<u2", (32,))]))
    needs_importance: ClassVar = True
    reproduces: ClassVar = True
    weighting: ClassVar = Weighting(factor=1.0)
    ids: ClassVar = {"llama.cpp": 16}
    file_types: ClassVar = {"llama.cpp": 19}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up points, apply signs and scale."""
        groups = w.parted(block["qs"], 8, 8)
        word = w.unsigned(groups[..., 4:], 4)[..., 0]
        points = w.negated(w.look_up(tables.GRID_IQ2_XXS, groups[..., :4]), w.signs_of(w.shifted(word, 7, 28, 127)))
        scales = w.half(block["d"]) * (0.5 + w.floats(word >> 28)) * 0.25
        return w.joined(scales[..., None] * w.joined(points))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid, with the parity of the signs (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(sigma2 + x^2), sigma2 the mean of x^2 over the block
        and m the importance; ``mse``: w = m. Effort ``reference`` is the C library's own search, step by step.
        """
        kernel = kernel_of(self)
        assert importance is not None
        if search.effort == "reference":
            kernel.encode_reference(locked(values), locked(importance), out, *_neighbours())
            return
        multiples, window, starts, passes, exact = _SEARCHES[search.effort]
        weights = relative(importance, BLOCK_LEN)
        by_energy = search.objective == "reference"
        steps = np.linspace(*multiples, dtype=np.float32)
        kernel.encode_search(locked(values), weights, out, by_energy, steps, window, starts, passes, exact)
