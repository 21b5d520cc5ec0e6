"""F32 in torch, see :mod:`ggufx.types.scalars`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, stored


def decode(block: Fields, header: Fields) -> Tensor:
    return stored(block["value"], torch.float32)
