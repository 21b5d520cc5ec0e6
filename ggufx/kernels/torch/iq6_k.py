"""IQ6_K in torch, see :mod:`ggufx.types.iq6_k`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggufx import tables
from ggufx.kernels.torch._words import Fields, fields, half, look_up, scaled


def _cubic() -> np.ndarray[Any, Any]:
    return np.array(tables.P6_BITS, np.uint32).view(np.float32)


def decode(block: Fields, header: Fields) -> Tensor:
    codes = fields(block["qs"], 4, 32) | fields(block["qh"], 2, 32) << 4
    flags = fields(block["extra"], 1).float()
    # A float32 addition, which rounds, then the products.
    values = (look_up(_cubic, codes).unflatten(-1, (16, 16)) + flags[..., None]).flatten(-2)
    return scaled(half(block["d"]), block["scales"].view(torch.int8), values)
