"""IQ4_KT in torch, see :mod:`ggufx.types.iq4_kt`."""

from __future__ import annotations

from torch import Tensor

from ggufx import tables
from ggufx.kernels.torch._words import Fields, fields, scaled, shifted, single, trellis, words


def decode(block: Fields, header: Fields) -> Tensor:
    packed = words(block["qs"], 4)
    high = shifted(packed >> 8, 3, 24, 7)
    low = (block["ql"] | fields(block["qh"], 4, 32).long() << 8).unflatten(-1, (8, 8))
    offsets = tables.TRELLIS_OFFSET + (packed & 1) * 32768
    seeds = ((low | high << 12) + offsets[..., None]).flatten(-2)
    return scaled(single(header["d"]), (packed >> 1 & 127).float() - 64, trellis(seeds, 4))
