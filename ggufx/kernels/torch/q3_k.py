"""Q3_K in torch, see :mod:`ggufx.types.q3_k`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, scaled


def decode(block: Fields, header: Fields) -> Tensor:
    codes = fields(block["qs"], 2, 32) | fields(block["hmask"], 1, 32) << 2
    packed = block["scales"]
    scales = fields(packed[..., :8], 4, 8) | fields(packed[..., 8:], 2, 4) << 4
    return scaled(half(block["d"]), scales.float() - 32, codes.float() - 4)
