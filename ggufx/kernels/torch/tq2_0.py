"""TQ2_0 in torch, see :mod:`ggufx.types.tq2_0`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    return half(block["d"]) * (fields(block["qs"], 2, 32).float() - 1)
