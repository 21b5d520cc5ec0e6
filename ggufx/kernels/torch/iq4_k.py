"""IQ4_K in torch, see :mod:`ggufx.types.iq4_k`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled, twin


def decode(block: Fields, header: Fields) -> Tensor:
    scales = (fields(block["scales_l"], 4) | fields(block["scales_h"], 2) << 4).float() - 32
    return scaled(half(block["d"]), scales, twin("IQ4", fields(block["qs"], 4, 16), fields(block["extra"], 1)))
