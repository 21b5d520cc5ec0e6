"""IQ4_KSS in torch, see :mod:`ggufx.types.iq4_kss`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, scaled, single, twin, words


def decode(block: Fields, header: Fields) -> Tensor:
    packed = words(block["qs"], 2).unflatten(-1, (8, 8))
    c = ((packed & 1) << torch.arange(8, dtype=torch.int32, device=packed.device)).sum(-1)
    packed = packed & 0xFFFE
    packed = (packed ^ packed >> 1).flatten(-2)
    nibbles = torch.stack([packed & 255, packed >> 8], dim=-1).to(torch.uint8).flatten(-2)
    return scaled(single(header["d"]), (c & 254).float() - 127, twin("IQ4", fields(nibbles, 4, 16), c & 1))
