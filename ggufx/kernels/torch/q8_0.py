"""Q8_0 in torch, see :mod:`ggufx.types.q8_0`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    return block["qs"].view(torch.int8) * half(block["d"])
