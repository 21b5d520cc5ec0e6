"""TQ1_0 in torch, see :mod:`ggufx.types.tq1_0`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx.kernels.torch._words import Fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=block["qs"].device)[:, None]
    runs = (block["qs"][..., :32], 5), (block["qs"][..., 32:], 5), (block["qh"], 4)
    # Bytes times powers wrap modulo 256: the digit wanted is on top.
    parts = [(run[..., None, :] * powers[:digits]).flatten(-2) for run, digits in runs]
    codes = torch.cat(parts, dim=-1).int() * 3 >> 8
    return half(block["d"]) * (codes - 1)
