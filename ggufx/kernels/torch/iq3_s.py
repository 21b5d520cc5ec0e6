"""IQ3_S in torch, see :mod:`ggufx.types.iq3_s`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, look_up, negated


def decode(block: Fields, header: Fields) -> Tensor:
    indices = block["qs"] | fields(block["qh"], 1).int() << 8
    signs = fields(block["signs"], 1)
    points = negated(look_up("GRID_IQ3_S", indices).reshape(signs.shape), signs)
    scales = half(block["d"]) * (1 + 2 * fields(block["scales"], 4)).float()
    return (scales[..., None] * points.unflatten(-1, (8, 32))).flatten(-2)
