"""IQ2_S in torch, see :mod:`ggufx.types.iq2_s`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, look_up, negated


def decode(block: Fields, header: Fields) -> Tensor:
    indices = block["qs"][..., :32] | fields(block["qh"], 2).int() << 8
    points = negated(look_up("GRID_IQ2_S", indices), fields(block["qs"][..., 32:, None], 1))
    scales = half(block["d"]) * (0.5 + fields(block["scales"], 4).float()) * 0.25
    return (scales[..., None] * points.reshape(*scales.shape, 16)).flatten(-2)
