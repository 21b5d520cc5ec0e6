"""Words the specifications share: codes out of bytes, twin tables, scales of sub-blocks, the trellis generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types.codec import F32

__all__ = ["planes", "scaled", "trellis", "twin"]


def planes(words: npt.NDArray[Any], n_bits: int, run: int = 1) -> npt.NDArray[Any]:
    """Return the codes of ``n_bits`` bits in ``words`` (unsigned, [..., W]) as [..., W * codes per word].

    Words come in runs of ``run``: first the lowest bits of each word of a run, then its next bits, and so on. A run of 1 is
    plain little-endian packing, a run of 16 nibbles is Q4_0's.
    """
    per_word = words.dtype.itemsize * 8 // n_bits
    shifts = np.arange(0, per_word * n_bits, n_bits, dtype=words.dtype)
    runs = words.reshape(*words.shape[:-1], words.shape[-1] // run, 1, run)
    codes: npt.NDArray[Any] = runs >> shifts[:, None] & words.dtype.type((1 << n_bits) - 1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * per_word)


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
