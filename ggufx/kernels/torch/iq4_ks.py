"""IQ4_KS in torch, see :mod:`ggufx.types.iq4_ks`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, scaled, single, twin


def decode(block: Fields, header: Fields) -> Tensor:
    c = block["scales"]
    values = twin("IQ4", fields(block["qs"], 4, 16), c & 1)
    return scaled(single(header["d"]), (c & 254).float() - 127, values)
