"""Q2_K in torch, see :mod:`ggufx.types.q2_k`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    codes = fields(block["qs"], 2, 32).unflatten(-1, (16, 16))
    scales = half(block["d"]) * (block["scales"] & 15)
    minima = half(block["dmin"]) * (block["scales"] >> 4)
    return (scales[..., None] * codes - minima[..., None]).flatten(-2)
