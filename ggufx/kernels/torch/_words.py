"""Words the torch decoders share, twins of :mod:`ggufx.types.packing`: codes out of bytes, scales, tables, the trellis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggufx import tables

__all__ = [
    "Fields",
    "fields",
    "half",
    "look_up",
    "negated",
    "scaled",
    "scales_and_minima",
    "shifted",
    "signs_of",
    "single",
    "stored",
    "trellis",
    "twin",
    "words",
]

Fields = Mapping[str, Tensor]


def stored(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes [..., k * itemsize] as [..., k] of ``dtype``, a copy.

    A copy, because a view of another dtype needs its first byte aligned, which a field of a block of 17 bytes is not.
    """
    return field.clone(memory_format=torch.contiguous_format).view(dtype)


def half(field: Tensor) -> Tensor:
    """Widen binary16 [..., 2] to float32 [..., 1], ready to scale what is in the last axis."""
    return stored(field, torch.float16).float()


def single(field: Tensor) -> Tensor:
    """Return float32 [..., 4] as [..., 1]."""
    return stored(field, torch.float32)


def words(field: Tensor, nbytes: int) -> Tensor:
    """Return little-endian unsigned words of 2 or 4 bytes [..., W * nbytes] as [..., W]: int32 or int64, never negative."""
    if nbytes == 2:
        return stored(field, torch.int16).int() & 0xFFFF
    return stored(field, torch.int32).long() & 0xFFFFFFFF


def shifted(codes: Tensor, step: int, stop: int, mask: int) -> Tensor:
    """Return ``codes [..., None] >> (0, step, 2 step ... below stop) & mask``."""
    return codes[..., None] >> torch.arange(0, stop, step, dtype=codes.dtype, device=codes.device) & mask


def fields(codes: Tensor, width: int, run: int = 1) -> Tensor:
    """Return the codes of ``width`` bits (1, 2 or 4) in bytes uint8 [..., W] as uint8 [..., W * 8 / width].

    Bytes come in runs of ``run``: first the lowest bits of each byte of a run, then its next bits, and so on. With a run of 1,
    words of two or four bytes give the same as their bytes.
    """
    runs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // run, 1, run)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
    return (runs >> shifts & (1 << width) - 1).reshape(*codes.shape[:-1], codes.shape[-1] * 8 // width)


@cache
def _table(key: Any, device: torch.device) -> Tensor:
    if callable(key):
        values = key()
    else:
        values = getattr(tables, key)
        # A copy: the grids are read-only, which torch warns of.
        values = np.array(values, None if isinstance(values, np.ndarray) else np.float32)
    return torch.from_numpy(values).to(device)


def look_up(table: str | Callable[[], np.ndarray[Any, Any]], codes: Tensor) -> Tensor:
    """Return a table's entries for ``codes``: ``table`` names one of :mod:`ggufx.tables`, or makes one.

    Tables stay on the device once used.
    """
    return _table(table, codes.device)[codes.int()]


def signs_of(seven: Tensor) -> Tensor:
    """Return seven sign bits [...] as eight flags uint8 [..., 8], the last one the parity of the others."""
    return fields(look_up(_even_signs, seven)[..., None], 1)


def _even_signs() -> np.ndarray[Any, Any]:
    return np.array(tables.EVEN_SIGNS, np.uint8)


def negated(points: Tensor, signs: Tensor) -> Tensor:
    """Negate the elements of ``points`` int8 [..., n] whose flag in ``signs`` uint8 [..., n] is set."""
    return torch.where(signs != 0, -points, points)


def scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the twelve bytes [..., 12] of Q4_K and Q5_K into eight 6-bit scales and eight 6-bit minima, [..., 8] each."""
    scales, minima, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    return (
        torch.cat([scales & 63, low & 15 | scales >> 6 << 4], dim=-1),
        torch.cat([minima & 63, low >> 4 | minima >> 6 << 4], dim=-1),
    )


def twin(table: str, codes: Tensor, flags: Tensor) -> Tensor:
    """Look codes [..., N] up; a sub-block whose flag [..., sub-blocks] is set uses the shifted twin of the table."""
    shift = tables.SHIFTS[len(getattr(tables, table)).bit_length() - 1]
    values = look_up(table, codes).reshape(*flags.shape, -1)
    return (values + (flags * shift).float()[..., None]).reshape(codes.shape)


def scaled(d: Tensor, sub_scales: Tensor, values: Tensor) -> Tensor:
    """Return ``(d * sub_scale) * value``: two float32 multiplications in this order.

    ``d`` is [R, 1] (of row headers) or [R, n, 1], ``sub_scales`` [R, n, sub-blocks], ``values`` [R, n, block_len].
    """
    if d.ndim < sub_scales.ndim:
        d = d[:, None]
    scales = d * sub_scales.float()
    return (scales[..., None] * values.reshape(*scales.shape, -1)).reshape(values.shape)


def trellis(seeds: Tensor, group_len: int) -> Tensor:
    """Return the ``group_len`` integers in -126..126 that follow each seed [..., G] as float32 [..., G * group_len]."""
    # The factor minus 2^32 is the same modulo 2^32, and products stay within int64.
    factor = tables.TRELLIS_FACTOR - (1 << 32)
    state, values = seeds.long(), []
    for _ in range(group_len):
        state = state * factor & 0xFFFFFFFF
        masked = state & tables.TRELLIS_MASK
        values.append((masked & 255) + (masked >> 8 & 255) + (masked >> 16 & 255) + (masked >> 24) - 126)
    return torch.stack(values, dim=-1).reshape(*seeds.shape[:-1], -1).float()
