"""Words the specifications share: codes out of bytes, signs, twin tables, scales of sub-blocks, the trellis generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import F32, U8

__all__ = ["EVEN_SIGNS", "fields", "negated", "scaled", "scales_and_minima", "trellis", "twin", "widen"]

EVEN_SIGNS = np.array(tables.EVEN_SIGNS, np.uint8)
"""uint8 [128]: seven sign bits -> eight, the last one being the parity of the others."""


def fields(words: npt.NDArray[Any], width: int, run: int = 1) -> npt.NDArray[Any]:
    """Return the codes of ``width`` bits in ``words`` (unsigned, [..., W]) as [..., W * codes per word].

    Words come in runs of ``run``: first the lowest bits of each word of a run, then its next bits, and so on. A run of 1 is
    plain little-endian packing, a run of 16 nibbles is Q4_0's.
    """
    per_word = words.dtype.itemsize * 8 // width
    shifts = np.arange(0, per_word * width, width, dtype=words.dtype)
    runs = words.reshape(*words.shape[:-1], words.shape[-1] // run, 1, run)
    codes: npt.NDArray[Any] = runs >> shifts[:, None] & words.dtype.type((1 << width) - 1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * per_word)


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


def twin(table: tuple[int, ...], codes: npt.NDArray[Any], flags: npt.NDArray[Any]) -> F32:
    """Look codes [..., N] up; a sub-block whose flag [..., sub-blocks] is set uses the shifted twin of the table."""
    shift = tables.SHIFTS[len(table).bit_length() - 1]
    shifts = np.repeat(flags, codes.shape[-1] // flags.shape[-1], axis=-1) * np.int8(shift)
    values: F32 = np.array(table, np.float32)[codes] + shifts.astype(np.float32)
    return values


def scaled(d: npt.NDArray[Any], sub_scales: npt.NDArray[Any], values: F32, out: F32) -> None:
    """Fill ``out`` with ``(d * sub_scale) * value``: two float32 multiplications in this order.

    ``d`` is [R] (of row headers) or [R, n], ``sub_scales`` [R, n, sub-blocks], ``values`` [R, n, block_len].
    """
    d = d.astype(np.float32).reshape(*d.shape, *[1] * (sub_scales.ndim - d.ndim))
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.repeat(d * sub_scales.astype(np.float32), values.shape[-1] // sub_scales.shape[-1], axis=-1)
        np.multiply(scales, values, out=out.reshape(values.shape))


def trellis(seeds: npt.NDArray[np.uint32], group_len: int) -> F32:
    """Return the ``group_len`` integers in -126..126 that follow each seed [..., G] as [..., G * group_len]."""
    values = np.empty((*seeds.shape, group_len), np.float32)
    state = seeds.astype(np.uint32)
    for i in range(group_len):
        state = state * np.uint32(tables.TRELLIS_FACTOR)
        masked = (state & np.uint32(tables.TRELLIS_MASK))[..., None].view(np.uint8)
        values[..., i] = masked.sum(axis=-1, dtype=np.float32) - np.float32(126)
    return values.reshape(*seeds.shape[:-1], seeds.shape[-1] * group_len)
