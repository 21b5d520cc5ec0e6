"""IQ1_M in torch, see :mod:`ggufx.types.iq1_m`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, look_up, shifted, words


def decode(block: Fields, header: Fields) -> Tensor:
    packed = words(block["scales"], 2)
    d = (packed >> 12 << torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)).sum(-1, keepdim=True)
    high = fields(block["qh"], 4)
    indices = block["qs"] | (high & 7).int() << 8
    # + 0.125, or - 0.125 where bit 3 is set.
    shift = 0.125 - (high >> 3).float() * 0.25
    values = (look_up("GRID_IQ1", indices) + shift[..., None]).reshape(*high.shape[:-1], 16, 16)
    a = shifted(packed, 3, 12, 7).flatten(-2)
    scales = d.to(torch.int16).view(torch.float16).float() * (2 * a + 1).float()
    return (scales[..., None] * values).flatten(-2)
