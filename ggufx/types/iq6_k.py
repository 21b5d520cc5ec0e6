"""IQ6_K: 6-bit codes into a cubic, signed 8-bit scales per 16 elements."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

CUBIC = np.array(tables.P6_BITS, np.uint32).view(np.float32)
"""float32 [64]: the values of the codes, by a cubic polynomial."""


class IQ6_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * (P6[n] + flag)``: a float32 addition, then a product; the flag is the sub-block's bit of ``extra``.

    256 elements in 212 bytes. P6 is the cubic as a build with fused multiply-add evaluates it: ``tables.P6_BITS``.
    Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("d", "<f2"), ("extra", "<u2"), ("scales", "i1", (16,)), ("qs", "u1", (128,)), ("qh", "u1", (64,))]),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.5, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 141}
    file_types: ClassVar = {"ik_llama.cpp": 142}
    fallbacks: ClassVar = {"ik_llama.cpp": "Q8_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look the cubic up; the addition rounds."""
        codes = w.fields(block["qs"], 4, 32) | w.fields(block["qh"], 2, 32) << 4
        flags = w.floats(w.fields(block["extra"], 1))
        values = w.joined(w.parted(w.look_up(CUBIC, codes), 16, 16) + flags[..., None])
        return w.scaled(w.half(block["d"]), w.reinterpreted(block["scales"], "i1"), values)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``0.25*sigma2 + x^2`` without; sigma2 is
        2 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 16, values, out, importance, search, fine=True)
