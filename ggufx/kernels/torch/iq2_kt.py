"""IQ2_KT in torch, see :mod:`ggufx.types.iq2_kt`."""

from __future__ import annotations

from torch import Tensor

from ggufx import tables
from ggufx.kernels.torch._words import Fields, fields, look_up, scaled, single, trellis, words


def decode(block: Fields, header: Fields) -> Tensor:
    values = trellis(words(block["ql"], 2) + tables.TRELLIS_OFFSET, 8)
    return scaled(single(header["d"]), look_up("IQ4", fields(block["scales"], 4, 4)), values)
