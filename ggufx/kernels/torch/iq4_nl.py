"""IQ4_NL in torch, see :mod:`ggufx.types.iq4_nl`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, look_up


def decode(block: Fields, header: Fields) -> Tensor:
    return half(block["d"]) * look_up("IQ4", fields(block["qs"], 4, 16))
