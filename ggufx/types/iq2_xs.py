"""IQ2_XS: points of a grid of 512, with signs; 4-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types._grids import bits, search_grid
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# Sampled scales of a group: (least, largest, number), over its largest magnitude / 43.
_SPANS: Final = {"fast": (0.7, 1.05, 3), "normal": (0.55, 1.25, 6), "high": (0.45, 1.5, 12)}


class IQ2_XS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.25) * +-grid[g][i % 8]``, 256 elements in 74 bytes.

    Every 8 elements have a uint16 of ``qs``: nine bits of grid index, seven sign bits (the eighth is their parity). Nibble b of
    ``scales`` is the scale a of elements 16 b and on.

    Source: ``dequantize_row_iq2_xs`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "<u2", (32,)), ("scales", "u1", (8,))]))
    needs_importance: ClassVar = True
    weighting: ClassVar = Weighting(factor=1.0)
    ids: ClassVar = {"llama.cpp": 17}
    file_types: ClassVar = {"llama.cpp": 20}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up points, apply signs and scale."""
        qs = w.unsigned(block["qs"], 2)
        points = w.negated(w.look_up(tables.GRID_IQ2_XS, qs & 511), w.signs_of(qs >> 9))
        scales = w.half(block["d"]) * (0.5 + w.floats(w.fields(block["scales"], 4))) * 0.25
        return w.joined(scales[..., None] * points.reshape(*scales.shape, 16))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid with the parity of the signs (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(mean + x^2), ``mean`` that of x^2 over the
        block and m the importance; ``mse``: w = m.
        """
        found = search_grid(self, 16, 32, _SPANS, (1.0, 0.0, 0.0), values, importance, search)
        _, blocks = self.layout.split(out)
        blocks["d"] = found.d
        blocks["qs"] = found.points | (found.signs & np.uint16(127)) << 9
        blocks["scales"] = bits(found.sub_scales, 4)
