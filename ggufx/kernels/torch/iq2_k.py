"""IQ2_K in torch, see :mod:`ggufx.types.iq2_k`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled, twin


def decode(block: Fields, header: Fields) -> Tensor:
    values = twin("IQ2", fields(block["qs"], 2, 32), fields(block["extra"], 1))
    return scaled(half(block["d"]), fields(block["scales"], 4).float() - 8, values)
