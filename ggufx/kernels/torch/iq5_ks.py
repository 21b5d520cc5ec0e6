"""IQ5_KS in torch, see :mod:`ggufx.types.iq5_ks`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, scaled, single, twin


def decode(block: Fields, header: Fields) -> Tensor:
    c = block["scales"]
    codes = fields(block["qs"], 4, 32) | fields(block["qh"], 1, 32) << 4
    return scaled(single(header["d"]), (c & 254).float() - 127, twin("IQ5", codes, c & 1))
