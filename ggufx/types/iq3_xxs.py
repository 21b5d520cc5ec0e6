"""IQ3_XXS: points of four elements of a grid of 256, with signs; 4-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types._grids import search_grid
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# Sampled scales of a group: (least, largest, number), over its largest magnitude / 62.
_SPANS: Final = {"fast": (0.85, 1.25, 3), "normal": (0.75, 1.4, 6), "high": (0.6, 1.45, 12)}


class IQ3_XXS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = ((d * (0.5 + a)) * 0.5) * +-grid[g][i % 4]``, 256 elements in 98 bytes.

    The first 64 bytes of ``qs`` are grid indices; then every 32 elements have a uint32 of signs and scale as in IQ2_XXS.

    Source: ``dequantize_row_iq3_xxs`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (96,))]))
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.25, plain_power=1.0)
    ids: ClassVar = {"llama.cpp": 18}
    file_types: ClassVar = {"llama.cpp": 23}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up points, apply signs and scale."""
        word = w.unsigned(block["qs"][..., 64:], 4)
        signs = w.joined(w.signs_of(w.shifted(word, 7, 28, 127)))
        points = w.negated(w.look_up(tables.GRID_IQ3_XXS, block["qs"][..., :64]).reshape(signs.shape), signs)
        scales = w.half(block["d"]) * (0.5 + w.floats(word >> 28)) * 0.5
        return w.joined(scales[..., None] * points)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid with the parity of the signs (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(2 mean + x^2) with m the importance and ``mean`` that
        of x^2 over the block, or mean / 4 + x^2 without importance (the library's x^2 alone lets small elements become large
        ones); ``mse``: w = m, or 1.
        """
        found = search_grid(self, 8, 64, _SPANS, (2.0, 0.25, 1.0), values, importance, search)
        _, blocks = self.layout.split(out)
        blocks["d"] = found.d
        signs = (found.signs & 127).reshape(*blocks.shape, 8, 4).astype(np.uint32)
        words = np.bitwise_or.reduce(signs << np.arange(0, 28, 7, dtype=np.uint32), axis=-1)
        words |= found.sub_scales.astype(np.uint32) << 28
        blocks["qs"][..., :64] = found.points
        blocks["qs"][..., 64:] = words.astype("<u4").view(np.uint8)
