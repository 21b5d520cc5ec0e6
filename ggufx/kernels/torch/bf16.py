"""BF16 in torch, see :mod:`ggufx.types.scalars`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, words


def decode(block: Fields, header: Fields) -> Tensor:
    # Bits shifted up, which keeps what a NaN holds.
    return (words(block["value"], 2) << 16).view(torch.float32)
