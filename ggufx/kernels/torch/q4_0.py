"""Q4_0 in torch, see :mod:`ggufx.types.q4_0`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    return (fields(block["qs"], 4, 16).float() - 8) * half(block["d"])
