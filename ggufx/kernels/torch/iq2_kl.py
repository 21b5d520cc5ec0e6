"""IQ2_KL in torch, see :mod:`ggufx.types.iq2_kl`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, look_up, scaled


def decode(block: Fields, header: Fields) -> Tensor:
    scales = (fields(block["scales_l"], 4, 4) | fields(block["scales_h"], 2) << 4).float() - 32
    codes = fields(block["qs"], 4, 16) | fields(block["qh"], 1, 16) << 4
    return scaled(half(header["d"]), scales, look_up("KL_PAIRS", codes).flatten(-2))
