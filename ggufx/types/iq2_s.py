"""IQ2_S: points of a grid of 1024, with signs; 4-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types._grids import bits, search_grid
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# Sampled scales of a group: (least, largest, number), over its largest magnitude / 43.
_SPANS: Final = {"fast": (0.7, 1.05, 3), "normal": (0.55, 1.2, 5), "high": (0.45, 1.45, 12)}


class IQ2_S(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.25) * +-grid[g][i % 8]``, 256 elements in 82 bytes.

    The first 32 bytes of ``qs`` are the low bits of the grid indices, the others the signs, a bit an element; ``qh`` has the
    indices' high two bits. Nibble b of ``scales`` is the scale a of elements 16 b and on.

    Source: ``dequantize_row_iq2_s`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (64,)), ("qh", "u1", (8,)), ("scales", "u1", (8,))])
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.5, plain_power=1.0)
    ids: ClassVar = {"llama.cpp": 22}
    file_types: ClassVar = {"llama.cpp": 28}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up points, apply signs and scale."""
        indices = block["qs"][..., :32] | w.cast(w.fields(block["qh"], 2), "i4") << 8
        points = w.negated(w.look_up(tables.GRID_IQ2_S, indices), w.fields(block["qs"][..., 32:, None], 1))
        scales = w.half(block["d"]) * (0.5 + w.floats(w.fields(block["scales"], 4))) * 0.25
        return w.joined(scales[..., None] * points.reshape(*scales.shape, 16))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(2 mean + x^2) or mean / 2 + x^2 without
        importance, ``mean`` that of x^2 over the block and m the importance; ``mse``: w = m, or 1.
        """
        found = search_grid(self, 16, 32, _SPANS, (2.0, 0.5, 1.0), values, importance, search)
        _, blocks = self.layout.split(out)
        blocks["d"] = found.d
        blocks["qs"][..., :32] = found.points & 255
        blocks["qs"][..., 32:] = found.signs
        blocks["qh"] = bits(found.points >> 8, 2)
        blocks["scales"] = bits(found.sub_scales, 4)
