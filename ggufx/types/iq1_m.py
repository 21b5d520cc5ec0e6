"""IQ1_M: points of a ternary grid of 2048, shifted by an eighth; 3-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types._grids import bits, search_grid
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

# Sampled scales of a group: (least, largest, number), over sum w x^2 / sum w |x|.
_SPANS: Final = {"fast": (0.11, 0.15, 2), "normal": (0.095, 0.19, 4), "high": (0.09, 0.22, 6)}

SHIFT = 0.125


class IQ1_M(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (2 a + 1)) * (grid[g][i % 8] +- 0.125)``, 256 elements in 56 bytes.

    ``qs`` has the low bits of the grid indices; every nibble of ``qh`` the high three bits of an index and the sign of its
    shift. ``scales`` is four uint16: each has four scales a, and a nibble of the f16 d on top.

    Source: ``dequantize_row_iq1_m`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("qs", "u1", (32,)), ("qh", "u1", (16,)), ("scales", "u1", (8,))]))
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.25, plain_power=1.0)
    ids: ClassVar = {"llama.cpp": 29}
    file_types: ClassVar = {"llama.cpp": 31}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Gather the scale from its nibbles; look up points, shift and scale."""
        packed = w.unsigned(block["scales"], 2)
        d = w.total(packed >> 12 << w.steps(16, 4, packed))[..., None]
        high = w.fields(block["qh"], 4)
        indices = block["qs"] | w.cast(high & 7, "i4") << 8
        # + SHIFT, or - SHIFT where bit 3 is set.
        shift = SHIFT - w.floats(high >> 3) * (2 * SHIFT)
        values = (w.look_up(tables.GRID_IQ1, indices) + shift[..., None]).reshape(*high.shape[:-1], 16, 16)
        a = w.joined(w.shifted(packed, 3, 12, 7))
        scales = w.floats(w.reinterpreted(w.cast(d, "i2"), "f2")) * w.floats(2 * a + 1)
        return w.joined(scales[..., None] * values)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales exactly, over the whole grid under both shifts (docs/formats.md, 7.1).

        Minimises ``sum w (x - y)^2``. Objective ``reference``: w = m sqrt(2 mean + x^2) with m the importance and ``mean`` that
        of x^2 over the block, or mean / 4 + x^2 without importance (the library's x^2 alone lets small elements become large
        ones); ``mse``: w = m, or 1.
        """
        found = search_grid(self, 16, 32, _SPANS, (2.0, 0.25, 1.0), values, importance, search)
        _, blocks = self.layout.split(out)
        blocks["qs"] = found.points & 255
        blocks["qh"] = bits(found.points >> 8 | found.shifts << 3, 4)
        scales = found.sub_scales.reshape(*blocks.shape, 4, 4).astype(np.uint16) << np.arange(0, 12, 3, dtype=np.uint16)
        nibbles = found.d.view(np.uint16)[..., None] >> np.arange(0, 16, 4, dtype=np.uint16) & np.uint16(15)
        words = np.bitwise_or.reduce(scales, axis=-1) | nibbles << 12
        blocks["scales"] = words.astype("<u2").view(np.uint8)
