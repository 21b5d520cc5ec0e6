"""Q4_K: 4-bit codes; 6-bit scales and minima of 32 elements under two f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, scales_and_minima, widen

BLOCK_LEN = 256


class Q4_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * n - (dmin * m)`` in four roundings, 256 elements in 144 bytes.

    64 elements share 32 bytes of ``qs``: 32 low nibbles, then 32 high ones. ``scales``: see :func:`scales_and_minima`.

    Source: ``dequantize_row_q4_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (12,)), ("qs", "u1", (128,))])
    )
    ids: ClassVar = {"llama.cpp": 12}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Scale the codes of every 32 elements, subtract their minimum."""
        _, blocks = self.layout.split(rows)
        codes = fields(blocks["qs"], 4, 32).reshape(*blocks.shape, 8, 32)
        s, m = scales_and_minima(blocks["scales"])
        with np.errstate(invalid="ignore"):
            scales, minima = widen(blocks["d"]) * s, widen(blocks["dmin"]) * m
            out.reshape(codes.shape)[...] = scales[..., None] * codes - minima[..., None]
