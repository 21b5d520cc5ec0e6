"""IQ3_S: points of four elements of a grid of 512, with signs; 4-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types._grids import bits, search_grid
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# Sampled scales of a group: (least, largest, number), over its largest magnitude / 15.
_SPANS: Final = {"fast": (0.85, 1.2, 3), "normal": (0.75, 1.3, 5), "high": (0.6, 1.4, 12)}


class IQ3_S(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (1 + 2 a)) * +-grid[g][i % 4]``, 256 elements in 110 bytes.

    ``qs`` has the low bits of the grid indices, ``qh`` their ninth, a bit a point; ``signs`` a bit an element. Nibble k of
    ``scales`` is the scale a of elements 32 k and on.

    Source: ``dequantize_row_iq3_s`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN,
        np.dtype(
            [("d", "<f2"), ("qs", "u1", (64,)), ("qh", "u1", (8,)), ("signs", "u1", (32,)), ("scales", "u1", (4,))]
        ),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.25, plain_power=1.0)
    ids: ClassVar = {"llama.cpp": 21}
    file_types: ClassVar = {"llama.cpp": 26}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up points, apply signs and scale."""
        indices = block["qs"] | w.cast(w.fields(block["qh"], 1), "i4") << 8
        signs = w.fields(block["signs"], 1)
        points = w.negated(w.look_up(tables.GRID_IQ3_S, indices).reshape(signs.shape), signs)
        scales = w.half(block["d"]) * w.floats(1 + 2 * w.fields(block["scales"], 4))
        return w.joined(scales[..., None] * w.parted(points, 8, 32))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(2 mean + x^2) with m the importance and ``mean`` that
        of x^2 over the block, or mean / 4 + x^2 without importance (the library's x^2 alone lets small elements become large
        ones); ``mse``: w = m, or 1.
        """
        found = search_grid(self, 8, 64, _SPANS, (2.0, 0.25, 1.0), values, importance, search)
        _, blocks = self.layout.split(out)
        blocks["d"] = found.d
        blocks["qs"] = found.points & 255
        blocks["qh"] = bits(found.points >> 8, 1)
        blocks["signs"] = found.signs
        blocks["scales"] = bits(found.sub_scales, 4)
