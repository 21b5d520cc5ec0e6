"""IQ2_KL: 5-bit codes for pairs of elements, 6-bit scales per 32 elements, one f16 scale per row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ2_KL(Codec):  # noqa: N801 (upstream's spelling)
    """``y[2p], y[2p+1] = (D * s) * KL_PAIRS[n]``, one code n per pair.

    256 elements in 86 bytes after 2 bytes per row. Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("scales_h", "<u2"), ("scales_l", "u1", (4,)), ("qs", "u1", (64,)), ("qh", "u1", (16,))]),
        np.dtype([("d", "<f2")]),
    )
    weighting: ClassVar = Weighting(factor=2.25, plain_power=0.5)
    ids: ClassVar = {"ik_llama.cpp": 157}
    file_types: ClassVar = {"ik_llama.cpp": 155}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales -32..31; exact."""
        scales = w.floats(w.fields(block["scales_l"], 4, 4) | w.fields(block["scales_h"], 2) << 4) - 32
        codes = w.fields(block["qs"], 4, 16) | w.fields(block["qh"], 1, 16) << 4
        return w.scaled(w.half(header["d"]), scales, w.joined(w.look_up(tables.KL_PAIRS, codes)))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``abs(x)`` without; sigma2 is
        2.25 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 32, values, out, importance, search)
