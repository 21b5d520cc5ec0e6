"""Q1_0 in torch, see :mod:`ggufx.types.q1_0`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    d = half(block["d"])
    return torch.where(fields(block["qs"], 1) != 0, d, -d)
