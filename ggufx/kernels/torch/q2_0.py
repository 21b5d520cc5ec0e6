"""Q2_0 in torch, see :mod:`ggufx.types.q2_0`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half


def decode(block: Fields, header: Fields) -> Tensor:
    return (fields(block["qs"], 2).float() - 1) * half(block["d"])
