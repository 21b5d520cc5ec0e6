"""Q1_0: an f16 scale and 128 signs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.scalar import kernel_of, locked, relative
from ggufx.types.words import Array, Fields, Words


class Q1_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = d`` where bit i is set, else ``-d``; 128 elements in 18 bytes.

    ik_llama.cpp calls it Q1_0_G128. Source: ggml-common.h and ggml-quants.c of llama.cpp.
    """

    layout: ClassVar = Layout(
        128,
        np.dtype([("d", "<f2"), ("qs", "u1", (16,))]),
    )
    reproduces: ClassVar = True
    nested: ClassVar = True
    ids: ClassVar = {"llama.cpp": 41}
    file_types: ClassVar = {"llama.cpp": 40}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Choose the sign."""
        d = w.half(block["d"])
        return w.where(w.fields(block["qs"], 1) != 0, d, -d)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Take the signs, and the mean magnitude, weighted by the importance.

        That is the least ``sum m (x - y)^2`` there is, m the importance or 1, so effort and objective change nothing; effort
        ``reference`` ignores the importance, as the C library does, and gives its bytes. Only a scale beyond binary16, which
        the library stores as infinity, is clamped to 65504. Source: ``quantize_row_q1_0_ref`` of llama.cpp.
        """
        weights = relative(None if search.effort == "reference" else importance, self.layout.block_len)
        kernel_of(self).encode_signs(locked(values).reshape(-1), weights, out.reshape(-1), self.layout.block_len)
