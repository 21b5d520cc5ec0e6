"""Q6_K in torch, see :mod:`ggufx.types.q6_k`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled


def decode(block: Fields, header: Fields) -> Tensor:
    codes = fields(block["ql"], 4, 64) | fields(block["qh"], 2, 32) << 4
    return scaled(half(block["d"]), block["scales"].view(torch.int8), codes.float() - 32)
