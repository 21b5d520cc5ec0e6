"""IQ2_KT: a 16-bit trellis index per 8 elements, 4-bit scales per 32 elements, one float32 scale per row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types._search import search_trellis
from ggufx.types.codec import F32, U8, Codec, Layout, Search, Weighting
from ggufx.types.words import Array, Fields, Words


class IQ2_KT(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (D * IQ4[s]) * v`` with v the integers of the trellis generator, -126..126.

    256 elements in 68 bytes after 4 bytes per row; two roundings. Source: ggml-common.h and iqk_quantize.cpp of
    ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("scales", "u1", (4,)), ("ql", "<u2", (32,))]),
        np.dtype([("d", "<f4")]),
    )
    weighting: ClassVar = Weighting(factor=2.0, plain_factor=0.5, plain_power=1.0)
    ids: ClassVar = {"ik_llama.cpp": 153}
    file_types: ClassVar = {"ik_llama.cpp": 151}
    fallbacks: ClassVar = {"ik_llama.cpp": "IQ4_NL"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Run the generator from each index."""
        values = w.trellis(w.unsigned(block["ql"], 2) + tables.TRELLIS_OFFSET, 8)
        return w.scaled(w.single(header["d"]), w.look_up(tables.IQ4, w.fields(block["scales"], 4, 4)), values)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales and points; see :func:`ggufx.types._search.search_trellis`."""
        search_trellis(self.name, 2, values, out, importance, search)
