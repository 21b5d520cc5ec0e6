"""NVFP4 in torch, see :mod:`ggufx.types.nvfp4`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, look_up


def _half_ue4m3() -> np.ndarray[Any, Any]:
    # Half of an E4M3 without sign: bit 7 is ignored, but code 0x7F alone is 0.
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-10, (8 + mantissa) * 2.0 ** (exponent - 11))
    values[0x7F] = 0
    return values.astype(np.float32)


def decode(block: Fields, header: Fields) -> Tensor:
    scales = look_up(_half_ue4m3, block["d"])
    values = look_up("E2M1_DOUBLED", fields(block["qs"], 4, 8))
    return (scales[..., None] * values.unflatten(-1, (4, 16))).flatten(-2)
