"""IQ4_XS in torch, see :mod:`ggufx.types.iq4_xs`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, look_up, scaled


def decode(block: Fields, header: Fields) -> Tensor:
    scales = fields(block["scales_l"], 4) | fields(block["scales_h"], 2) << 4
    return scaled(half(block["d"]), scales.float() - 32, look_up("IQ4", fields(block["qs"], 4, 16)))
