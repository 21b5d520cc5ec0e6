"""Q3_K: 3-bit codes; signed 6-bit scales of 16 elements under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields, widen

BLOCK_LEN = 256


class Q3_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * (s - 32)) * (n - 4)``, 256 elements in 110 bytes.

    Low two bits of n in ``qs`` as in Q2_K, the third in ``hmask``, whose byte i % 32 holds it for every 32nd element. Nibbles
    of the first eight bytes of ``scales`` are the low bits of s, two bits of each of the last four the high ones.

    Source: ``dequantize_row_q3_K`` of llama.cpp.
    """

    layout: ClassVar = Layout(
        BLOCK_LEN, np.dtype([("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), ("d", "<f2")])
    )
    ids: ClassVar = {"llama.cpp": 11}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Put codes and scales together from their parts and multiply."""
        _, blocks = self.layout.split(rows)
        codes = (fields(blocks["qs"], 2, 32) | fields(blocks["hmask"], 1, 32) << 2).reshape(*blocks.shape, 16, 16)
        packed = blocks["scales"]
        scales = fields(packed[..., :8], 4, 8) | fields(packed[..., 8:], 2, 4) << 4
        with np.errstate(invalid="ignore"):
            scaled = widen(blocks["d"]) * (scales.astype(np.int8) - np.int8(32))
            out.reshape(codes.shape)[...] = scaled[..., None] * (codes.astype(np.int8) - np.int8(4))
