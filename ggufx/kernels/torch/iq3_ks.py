"""IQ3_KS in torch, see :mod:`ggufx.types.iq3_ks`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled, twin


def decode(block: Fields, header: Fields) -> Tensor:
    extra = fields(block["extra"], 1)
    scales = (fields(block["scales"], 4, 4) | extra[..., :8] << 4).float() - 16
    codes = fields(block["qs"], 2, 32) | fields(block["qh"], 1, 32) << 2
    return scaled(half(header["d"]), scales, twin("IQ3", codes, extra[..., 8:]))
