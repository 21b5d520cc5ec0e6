"""IQ2_XS in torch, see :mod:`ggufx.types.iq2_xs`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, half, look_up, negated, signs_of, words


def decode(block: Fields, header: Fields) -> Tensor:
    qs = words(block["qs"], 2)
    points = negated(look_up("GRID_IQ2_XS", qs & 511), signs_of(qs >> 9))
    scales = half(block["d"]) * (0.5 + fields(block["scales"], 4).float()) * 0.25
    return (scales[..., None] * points.reshape(*scales.shape, 16)).flatten(-2)
