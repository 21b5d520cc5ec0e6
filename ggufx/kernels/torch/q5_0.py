"""Q5_0 in torch, see :mod:`ggufx.types.q5_0`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    codes = fields(block["qs"], 4, 16) | fields(block["qh"], 1) << 4
    return half(block["d"]) * (codes.float() - 16)
