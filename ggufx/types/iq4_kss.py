"""IQ4_KSS: 4-bit codes into a table of 16 at 4.0 bits: the scales hide in the low bits of the code words."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ4_KSS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (D * s) * IQ4[n]``, or the table's shifted twin: bit 0 of the sub-block's scale byte c; ``s = (c & 254) - 127``.

    256 elements in 128 bytes after 4 bytes per row; two roundings. Eight 16-bit words per 32 elements (upstream
    declares 32-bit ones): bit 0 of word p is bit p of c, and the other bits, xor themselves shifted right by one, are
    nibbles 16 apart, of even parity per word. Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("qs", "<u2", (8, 8))]),
        np.dtype([("d", "<f4")]),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 146}
    file_types: ClassVar = {"ik_llama.cpp": 148}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Gather the scales' bits, unscramble the words."""
        packed = w.parted(w.unsigned(block["qs"], 2), 8, 8)
        c = w.total((packed & 1) << w.steps(8, 1, packed))
        packed = packed & 65534
        packed = w.joined(packed ^ packed >> 1)
        nibbles = w.joined(w.cast(w.stack([packed & 255, packed >> 8]), "u1"))
        return w.scaled(
            w.single(header["d"]), w.floats(c & 254) - 127, w.twin(tables.IQ4, w.fields(nibbles, 4, 16), c & 1)
        )

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``x^2`` without; sigma2 is
        2 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 32, values, out, importance, search)
