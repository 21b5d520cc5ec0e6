"""Q4_1 in torch, see :mod:`ggufx.types.q4_1`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    return half(block["d"]) * fields(block["qs"], 4, 16) + half(block["m"])
