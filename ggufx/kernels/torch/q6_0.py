"""Q6_0 in torch, see :mod:`ggufx.types.q6_0`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    shape = block["qs"].shape[:-1]
    high = fields(block["qh"], 2, 8).reshape(*shape, 2, 2, 8).transpose(-3, -2).reshape(*shape, 32)
    return ((fields(block["qs"], 4, 16) | high << 4).float() - 32) * half(block["d"])
