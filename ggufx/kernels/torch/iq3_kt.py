"""IQ3_KT in torch, see :mod:`ggufx.types.iq3_kt`."""

from __future__ import annotations

import torch
from torch import Tensor

from ggufx import tables
from ggufx.kernels.torch._words import Fields, fields, scaled, single, trellis, words


def decode(block: Fields, header: Fields) -> Tensor:
    magnitudes = trellis(words(block["ql"], 2) + tables.TRELLIS_OFFSET, 8).abs()
    values = scaled(single(header["d"]), fields(block["scales"], 4, 4), magnitudes)
    # Signs come last, so that they show on zeros.
    return torch.where(fields(block["qh"], 1, 32) != 0, -values, values)
