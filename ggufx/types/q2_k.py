"""Q2_K: 2-bit codes; 4-bit scales and minima of 16 elements under two f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, widen

BLOCK_LEN = 256


class Q2_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * n - (dmin * m)`` in four roundings, 256 elements in 84 bytes.

    Byte b of ``scales`` holds s (low nibble) and m (high) of elements 16 b and on; 128 elements share 32 bytes of ``qs``, two
    bits for every 32.

    Source: ``dequantize_row_q2_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("scales", "u1", (16,)), ("qs", "u1", (64,)), ("d", "<f2"), ("dmin", "<f2")])
    )
    ids: ClassVar = {"llama.cpp": 10}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Scale the codes of every 16 elements, subtract their minimum."""
        _, blocks = self.layout.split(rows)
        codes = fields(blocks["qs"], 2, 32).reshape(*blocks.shape, 16, 16)
        with np.errstate(invalid="ignore"):
            scales = widen(blocks["d"]) * (blocks["scales"] & 15)
            minima = widen(blocks["dmin"]) * (blocks["scales"] >> 4)
            out.reshape(codes.shape)[...] = scales[..., None] * codes - minima[..., None]
