"""Scales that several types pack alike."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import kernel, load32, load64

_LOW6 = np.uint64(0x3F3F3F3F)
_LOW4 = np.uint64(0x0F0F0F0F)
_TOP2 = np.uint64(0x30303030)
_TWO = np.uint64(2)
_FOUR = np.uint64(4)
_WORD = np.uint64(32)


@kernel
def scales_and_minima(row, at):
    """Unpack the twelve bytes of Q4_K and Q5_K at ``at`` into two uint64 of eight bytes each."""
    both, low = load64(row, at), np.uint64(load32(row, at + 8))
    scales, minima = both, both >> _WORD
    upper_scales = (low & _LOW4) | ((scales >> _TWO) & _TOP2)
    upper_minima = ((low >> _FOUR) & _LOW4) | ((minima >> _TWO) & _TOP2)
    return (scales & _LOW6) | (upper_scales << _WORD), (minima & _LOW6) | (upper_minima << _WORD)
