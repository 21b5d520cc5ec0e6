"""IQ4_KT: a 15-bit trellis index per 4 elements, 7-bit scales per 32 elements, one float32 scale per row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_trellis
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ4_KT(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (D * s) * v`` with v the integers of the trellis generator, -126..126.

    256 elements in 128 bytes after 4 bytes per row; two roundings. A word of ``qs`` has bit 0: the offset grows by
    32768; bits 1..7: scale; three bits for each of eight indices. Then low and middle bits of the 64 indices (upstream
    declares all of it as ``qs``). Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("qs", "<u4", (8,)), ("ql", "u1", (64,)), ("qh", "u1", (32,))]),
        np.dtype([("d", "<f4")]),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.5, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 155}
    file_types: ClassVar = {"ik_llama.cpp": 153}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scales -64..63; run the generator from each index."""
        packed = w.unsigned(block["qs"], 4)
        high = w.shifted(packed >> 8, 3, 24, 7)
        low = w.parted(block["ql"] | w.cast(w.fields(block["qh"], 4, 32), "i8") << 8, 8, 8)
        offsets = tables.TRELLIS_OFFSET + (packed & 1) * 32768
        seeds = w.joined((low | high << 12) + offsets[..., None])
        return w.scaled(w.single(header["d"]), w.floats(packed >> 1 & 127) - 64, w.trellis(seeds, 4))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales and points; see :func:`ggufx.types._search.search_trellis`."""
        search_trellis(self.name, 4, values, out, importance, search)
