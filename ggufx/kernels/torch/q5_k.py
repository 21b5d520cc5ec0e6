"""Q5_K in torch, see :mod:`ggufx.types.q5_k`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scales_and_minima


def decode(block: Fields, header: Fields) -> Tensor:
    codes = (fields(block["qs"], 4, 32) | fields(block["qh"], 1, 32) << 4).unflatten(-1, (8, 32))
    s, m = scales_and_minima(block["scales"])
    scales, minima = half(block["d"]) * s, half(block["dmin"]) * m
    return (scales[..., None] * codes - minima[..., None]).flatten(-2)
