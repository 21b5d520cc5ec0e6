"""IQ3_XXS in torch, see :mod:`ggufx.types.iq3_xxs`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, half, look_up, negated, shifted, signs_of, words


def decode(block: Fields, header: Fields) -> Tensor:
    word = words(block["qs"][..., 64:], 4)
    signs = signs_of(shifted(word, 7, 28, 127)).flatten(-2)
    points = negated(look_up("GRID_IQ3_XXS", block["qs"][..., :64]).reshape(signs.shape), signs)
    scales = half(block["d"]) * (0.5 + (word >> 28).float()) * 0.5
    return (scales[..., None] * points).flatten(-2)
