"""IQ2_KS in torch, see :mod:`ggufx.types.iq2_ks`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled, twin


def decode(block: Fields, header: Fields) -> Tensor:
    extra = fields(block["extra"], 1)
    scales = (fields(block["scales"], 4) | extra[..., 8:] << 4).float() - 16
    return scaled(half(header["d"]), scales, twin("IQ2", fields(block["qs"], 2, 32), extra[..., :8]))
