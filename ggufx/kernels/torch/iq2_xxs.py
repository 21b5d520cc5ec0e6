"""IQ2_XXS in torch, see :mod:`ggufx.types.iq2_xxs`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, half, look_up, negated, shifted, signs_of, words


def decode(block: Fields, header: Fields) -> Tensor:
    groups = block["qs"].unflatten(-1, (8, 8))
    word = words(groups[..., 4:], 4)[..., 0]
    points = negated(look_up("GRID_IQ2_XXS", groups[..., :4]), signs_of(shifted(word, 7, 28, 127)))
    scales = half(block["d"]) * (0.5 + (word >> 28).float()) * 0.25
    return (scales[..., None] * points.flatten(-2)).flatten(-2)
