"""IQ5_K in torch, see :mod:`ggufx.types.iq5_k`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled, twin


def decode(block: Fields, header: Fields) -> Tensor:
    scales = (fields(block["scales_l"], 4) | fields(block["scales_h"], 2) << 4).float() - 32
    codes = fields(block["qs"], 4, 32) | fields(block["qh"], 1, 32) << 4
    return scaled(half(block["d"]), scales, twin("IQ5", codes, fields(block["extra"], 1)))
