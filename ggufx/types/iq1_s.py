"""IQ1_S: points of a ternary grid of 2048, shifted by an eighth; 3-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types._grids import search_grid
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# Sampled scales of a group: (least, largest, number), over sum w x^2 / sum w |x|.
_SPANS: Final = {"fast": (0.11, 0.15, 2), "normal": (0.1, 0.165, 3), "high": (0.09, 0.2, 5)}

SHIFT = 0.125


class IQ1_S(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (2 a + 1)) * (grid[g][i % 8] +- 0.125)``, 256 elements in 50 bytes.

    ``qs`` has the low bits of the grid indices. Every 32 elements have a uint16 of ``qh``: four times the high three bits of an
    index, the scale a, and on top the sign of the shift.

    Source: ``dequantize_row_iq1_s`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (32,)), ("qh", "<u2", (8,))]))
    needs_importance: ClassVar = True
    weighting: ClassVar = Weighting(factor=2.0)
    ids: ClassVar = {"llama.cpp": 19}
    file_types: ClassVar = {"llama.cpp": 24}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up points, shift and scale."""
        qh = w.unsigned(block["qh"], 2)
        indices = w.parted(block["qs"], 8, 4) | w.shifted(qh, 3, 12, 7) << 8
        # + SHIFT, or - SHIFT where the top bit is set.
        shift = SHIFT - w.floats(qh >> 15) * (2 * SHIFT)
        values = w.joined(w.look_up(tables.GRID_IQ1, indices)) + shift[..., None]
        scales = w.half(block["d"]) * w.floats(2 * (qh >> 12 & 7) + 1)
        return w.joined(scales[..., None] * values)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid under both shifts (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(2 mean + x^2), ``mean`` that of x^2 over
        the block and m the importance; ``mse``: w = m.
        """
        found = search_grid(self, 8, 32, _SPANS, (2.0, 0.0, 0.0), values, importance, search)
        _, blocks = self.layout.split(out)
        blocks["d"] = found.d
        high = (found.points >> 8).reshape(*blocks.shape, 8, 4)
        qh = np.bitwise_or.reduce(high << np.arange(0, 12, 3, dtype=np.uint16), axis=-1)
        blocks["qs"] = found.points & 255
        blocks["qh"] = qh | found.sub_scales.astype(np.uint16) << 12 | found.shifts[..., ::4].astype(np.uint16) << 15
