"""Unpacking of bit fields, shared by the specifications of the types."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import F32, U8

__all__ = ["EVEN_SIGNS", "fields", "negated", "scales_and_minima", "widen"]

EVEN_SIGNS = np.array(tables.EVEN_SIGNS, np.uint8)
"""uint8 [128]: seven sign bits -> eight, the last one being the parity of the others."""


def fields(packed: npt.NDArray[Any], width: int, run: int) -> U8:
    """Unpack bytes [..., n] into their fields of ``width`` bits, [..., n * 8 // width], lowest bits first.

    Runs of ``run`` bytes follow one another: the lowest fields of a run's bytes, then their next fields, and so on. A run of
    one byte gives the plain order of bits.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts = packed.reshape(*packed.shape[:-1], -1, 1, run) >> shifts & np.uint8((1 << width) - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def widen(half: npt.NDArray[Any]) -> F32:
    """Widen binary16 scales [...] to float32 [..., 1], ready to scale what is in the last axis."""
    return half.astype(np.float32)[..., None]


def negated(points: npt.NDArray[np.int8], signs: U8) -> npt.NDArray[np.int8]:
    """Negate the elements of ``points`` int8 [..., n] whose bit of ``signs`` uint8 [..., n] is set."""
    return np.where(signs, -points, points)


def scales_and_minima(packed: U8) -> tuple[U8, U8]:
    """Unpack the twelve bytes [..., 12] of Q4_K and Q5_K into eight 6-bit scales and eight 6-bit minima, [..., 8] each.

    Bytes 0..3 hold scales 0..3 and, in their top bits, the high two bits of scales 4..7; bytes 4..7 the same of the minima.
    Bytes 8..11 hold the low four bits of scale (low nibble) and minimum (high) 4..7.
    """
    scales, minima, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    return (
        np.concatenate([scales & 63, low & 15 | scales >> 6 << 4], axis=-1),
        np.concatenate([minima & 63, low >> 4 | minima >> 6 << 4], axis=-1),
    )
