"""IQ4_XS: nibbles into the table of IQ4_NL; signed 6-bit scales of 32 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

IQ4 = np.array(tables.IQ4, np.int8)


class IQ4_XS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (s - 32)) * IQ4[n]``, 256 elements in 136 bytes.

    Nibble k of ``scales_l`` is the low, bits 2 k and on of ``scales_h`` the high part of scale k; every 32 elements have 16
    bytes of ``qs``, low nibbles first.

    Source: ``dequantize_row_iq4_xs`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", (4,)), ("qs", "u1", (128,))])
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_power=1.0)
    ids: ClassVar = {"llama.cpp": 23}
    file_types: ClassVar = {"llama.cpp": 30}
    fallbacks: ClassVar = {"llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look up and scale."""
        scales = w.fields(block["scales_l"], 4) | w.fields(block["scales_h"], 2) << 4
        return w.scaled(w.half(block["d"]), w.floats(scales) - 32, w.look_up(tables.IQ4, w.fields(block["qs"], 4, 16)))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``x^2`` without; sigma2 is
        2 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 32, values, out, importance, search)
