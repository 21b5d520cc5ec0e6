"""NVFP4: one unsigned E4M3 scale per 16 E2M1 codes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import F32, U8, Codec, Layout
from ggufx.types.packing import fields


def _halved_ue4m3() -> F32:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-10, (8 + mantissa) * 2.0 ** (exponent - 11))
    values[0x7F] = 0
    return values.astype(np.float32)


HALF_UE4M3 = _halved_ue4m3()
"""float32 [256]: half the value of every scale code."""


class NVFP4(Codec):
    """``y[i] = E2M1[n] * E4M3(d)``, 64 elements in 36 bytes; bit 7 of a scale is ignored.

    Byte j of a sub-block's 8 bytes of ``qs`` holds elements j (low) and j + 8 (high). Scale codes 0x00 and 0x7F give 0,
    0xFF gives 240. A checkpoint's tensor scale is a tensor of its own. Source: ggml-common.h and ggml-quants.c of
    llama.cpp.
    """

    layout: ClassVar = Layout(
        64,
        np.dtype([("d", "u1", (4,)), ("qs", "u1", (32,))]),
    )
    ids: ClassVar = {"llama.cpp": 40}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Scale doubled table values by half the scale."""
        _, blocks = self.layout.split(rows)
        values = np.array(tables.E2M1_DOUBLED, np.float32)[fields(blocks["qs"], 4, 8)]
        out.reshape(values.shape)[...] = np.repeat(HALF_UE4M3[blocks["d"]], 16, axis=-1) * values
