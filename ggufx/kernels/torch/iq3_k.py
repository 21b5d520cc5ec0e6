"""IQ3_K in torch, see :mod:`ggufx.types.iq3_k`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled, twin


def decode(block: Fields, header: Fields) -> Tensor:
    magnitudes = 2 * fields(block["scales_l"], 4).float() + 1
    scales = torch.where(fields(block["scales_h"], 1) != 0, -magnitudes, magnitudes)
    codes = fields(block["qs"], 2, 32) | fields(block["qh"], 1, 32) << 2
    return scaled(half(block["d"]), scales, twin("IQ3", codes, fields(block["extra"], 1)))
