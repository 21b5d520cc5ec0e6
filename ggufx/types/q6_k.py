"""Q6_K: 6-bit codes; signed 8-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, widen

BLOCK_LEN = 256


class Q6_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * (n - 32)``, 256 elements in 210 bytes.

    128 elements share 64 bytes of ``ql`` (64 low nibbles, then 64 high ones) and 32 of ``qh``, two bits for every 32.

    Source: ``dequantize_row_q6_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<f2")])
    )
    ids: ClassVar = {"llama.cpp": 14}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Put the codes together and multiply, scale by sub-scale first."""
        _, blocks = self.layout.split(rows)
        codes = (fields(blocks["ql"], 4, 64) | fields(blocks["qh"], 2, 32) << 4).reshape(*blocks.shape, 16, 16)
        with np.errstate(invalid="ignore"):
            scales = widen(blocks["d"]) * blocks["scales"]
            out.reshape(codes.shape)[...] = scales[..., None] * (codes.astype(np.int8) - np.int8(32))
