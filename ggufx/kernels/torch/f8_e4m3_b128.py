"""F8_E4M3_B128 in torch, see :mod:`ggufx.types.f8_e4m3_b128`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, look_up


def _e4m3() -> np.ndarray[Any, Any]:
    # A table, not torch.float8_e4m3fn: not every device of torch's has that dtype.
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def _e8m0() -> np.ndarray[Any, Any]:
    bits = np.arange(256, dtype=np.uint32) << 23
    bits[0] = 0x00400000  # 2^-127 is a float32 subnormal
    bits[255] = 0x7FC00000
    return bits.astype(np.uint32).view(np.float32)


def decode(block: Fields, header: Fields) -> Tensor:
    return look_up(_e4m3, block["qs"]) * look_up(_e8m0, block["e"])


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = rows.unflatten(-1, (rows.shape[-1] // 129, 129))
    return blocks[..., 1:].flatten(-2).contiguous(), blocks[..., 0].contiguous()


def join(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.cat([scales[..., None], codes.unflatten(-1, (codes.shape[-1] // 128, 128))], dim=-1).flatten(-2)
