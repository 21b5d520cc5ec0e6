"""IQ1_S in torch, see :mod:`ggufx.types.iq1_s`."""

from __future__ import annotations

from torch import Tensor

from ggufx.kernels.torch._words import Fields, half, look_up, shifted, words


def decode(block: Fields, header: Fields) -> Tensor:
    qh = words(block["qh"], 2)
    indices = block["qs"].unflatten(-1, (8, 4)) | shifted(qh, 3, 12, 7) << 8
    # + 0.125, or - 0.125 where the top bit is set.
    shift = 0.125 - (qh >> 15).float() * 0.25
    values = look_up("GRID_IQ1", indices).flatten(-2) + shift[..., None]
    scales = half(block["d"]) * (2 * (qh >> 12 & 7) + 1).float()
    return (scales[..., None] * values).flatten(-2)
