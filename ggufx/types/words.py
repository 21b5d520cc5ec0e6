"""The words that specifications are written in: codes out of bytes, scales, tables, the trellis; for any array library.

A type's :meth:`~ggufx.types.Codec.decode_blocks` gets its fields as bytes and one of these. What is not the same in every
library is a primitive (reinterpreted bytes, casts, joining, choosing, tables); the rest is written once, over them. NumPy's
primitives are here, torch's in :mod:`ggufx.torch.words`.

Arrays of all libraries share operators, indexing, ``shape`` and ``reshape``, so specifications use these as they are. Where
libraries promote differently (NumPy makes float64 of float32 and int32), a specification casts first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ggufx import tables

__all__ = ["EVEN_SIGNS", "Array", "Fields", "NumpyWords", "Words"]

Array = Any
"""An array of the library that the words are of."""

Fields = Mapping[str, Array]
"""Name of a block's (or header's) field -> its bytes, uint8 [R, n, nbytes] (or [R, nbytes])."""

Table = npt.NDArray[Any] | tuple[Any, ...]
"""A constant of the format. A tuple of numbers is a table of float32."""

EVEN_SIGNS: Final = np.array(tables.EVEN_SIGNS, np.uint8)
"""uint8 [128]: seven sign bits -> eight, the last one being the parity of the others."""


class Words(ABC):
    """Array operations for specifications. Dtypes are named as NumPy's codes: ``u1 i1 i2 i4 i8 f2 f4 f8``."""

    # Primitives --------------------------------------------------------------------------------------------------

    @abstractmethod
    def stored(self, field: Array, dtype: str) -> Array:
        """Return little-endian bytes uint8 [..., k * itemsize] as [..., k] of ``dtype``."""

    @abstractmethod
    def reinterpreted(self, values: Array, dtype: str) -> Array:
        """Return the bits of ``values`` as a ``dtype`` of the same width."""

    @abstractmethod
    def cast(self, values: Array, dtype: str) -> Array:
        """Return ``values`` converted to ``dtype``; integers wrap."""

    @abstractmethod
    def steps(self, stop: int, step: int, like: Array) -> Array:
        """Return 0, step, 2 step ... below ``stop``, of the dtype and on the device of ``like``."""

    @abstractmethod
    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """Return ``a`` where the condition holds, else ``b``."""

    @abstractmethod
    def concatenate(self, parts: Sequence[Array]) -> Array:
        """Join arrays along their last axis."""

    @abstractmethod
    def stack(self, parts: Sequence[Array]) -> Array:
        """Join arrays [...] along a new last axis."""

    @abstractmethod
    def total(self, values: Array) -> Array:
        """Return the sum over the last axis, in the values' own dtype."""

    @abstractmethod
    def look_up(self, table: Table, codes: Array) -> Array:
        """Return a table's entries for ``codes``: [...] plus the axes of an entry."""

    # Written over them -------------------------------------------------------------------------------------------

    def floats(self, values: Array) -> Array:
        """Return ``values`` as float32."""
        return self.cast(values, "f4")

    def half(self, field: Array) -> Array:
        """Widen binary16 [..., 2] to float32 [..., 1], ready to scale what is in the last axis."""
        return self.floats(self.stored(field, "f2"))

    def single(self, field: Array) -> Array:
        """Return float32 [..., 4] as [..., 1]."""
        return self.stored(field, "f4")

    def unsigned(self, field: Array, nbytes: int) -> Array:
        """Return unsigned words of 2 or 4 bytes [..., W * nbytes] as [..., W]: int32 or int64, never negative.

        Not every library has unsigned words of these widths.
        """
        if nbytes == 2:
            return self.cast(self.stored(field, "i2"), "i4") & 0xFFFF
        return self.cast(self.stored(field, "i4"), "i8") & 0xFFFFFFFF

    def parted(self, values: Array, *axes: int) -> Array:
        """Return the last axis as several."""
        return values.reshape(*values.shape[:-1], *axes)

    def joined(self, values: Array) -> Array:
        """Return the last two axes as one."""
        return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])

    def shifted(self, codes: Array, step: int, stop: int, mask: int) -> Array:
        """Return ``codes [..., None] >> (0, step, 2 step ... below stop) & mask``."""
        return codes[..., None] >> self.steps(stop, step, codes) & mask

    def fields(self, codes: Array, width: int, run: int = 1) -> Array:
        """Return the codes of ``width`` bits (1, 2 or 4) in bytes uint8 [..., W] as uint8 [..., W * 8 / width].

        Bytes come in runs of ``run``: first the lowest bits of each byte of a run, then its next bits, and so on. With a run of
        1, words of two or four bytes give the same as their bytes. A run of 16 nibbles is Q4_0's.
        """
        runs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // run, 1, run)
        parts = runs >> self.steps(8, width, codes)[:, None] & (1 << width) - 1
        return parts.reshape(*codes.shape[:-1], codes.shape[-1] * 8 // width)

    def signs_of(self, seven: Array) -> Array:
        """Return seven sign bits [...] as eight flags uint8 [..., 8], the last one the parity of the others."""
        return self.fields(self.look_up(EVEN_SIGNS, seven)[..., None], 1)

    def negated(self, points: Array, signs: Array) -> Array:
        """Negate the elements of ``points`` [..., n] whose flag in ``signs`` uint8 [..., n] is set."""
        return self.where(signs != 0, -points, points)

    def scales_and_minima(self, packed: Array) -> tuple[Array, Array]:
        """Unpack the twelve bytes [..., 12] of Q4_K and Q5_K into eight 6-bit scales and eight 6-bit minima, [..., 8] each.

        Bytes 0..3 hold scales 0..3 and, in their top bits, the high two bits of scales 4..7; bytes 4..7 the same of the
        minima. Bytes 8..11 hold the low four bits of scale (low nibble) and minimum (high) 4..7.
        """
        scales, minima, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        return (
            self.concatenate([scales & 63, low & 15 | scales >> 6 << 4]),
            self.concatenate([minima & 63, low >> 4 | minima >> 6 << 4]),
        )

    def twin(self, table: tuple[int, ...], codes: Array, flags: Array) -> Array:
        """Look codes [..., N] up; a sub-block whose flag [..., sub-blocks] is set uses the shifted twin of the table."""
        shift = tables.SHIFTS[len(table).bit_length() - 1]
        values = self.look_up(table, codes).reshape(*flags.shape, codes.shape[-1] // flags.shape[-1])
        return (values + (self.floats(flags) * shift)[..., None]).reshape(codes.shape)

    def scaled(self, d: Array, sub_scales: Array, values: Array) -> Array:
        """Return ``(d * sub_scale) * value``: two float32 multiplications in this order.

        ``d`` is [R, 1] (of row headers) or [R, n, 1], ``sub_scales`` [R, n, sub-blocks], ``values`` [R, n, block_len].
        """
        if d.ndim < sub_scales.ndim:
            d = d[:, None]
        scales = d * self.floats(sub_scales)
        parts = values.reshape(*scales.shape, values.shape[-1] // scales.shape[-1])
        return (scales[..., None] * parts).reshape(values.shape)

    def trellis(self, seeds: Array, group_len: int) -> Array:
        """Return the ``group_len`` integers in -126..126 that follow each seed [..., G] as float32 [..., G * group_len]."""
        # The factor minus 2^32 is the same modulo 2^32, and products stay within int64.
        factor = tables.TRELLIS_FACTOR - (1 << 32)
        state, values = self.cast(seeds, "i8"), []
        for _ in range(group_len):
            state = state * factor & 0xFFFFFFFF
            masked = state & tables.TRELLIS_MASK
            values.append((masked & 255) + (masked >> 8 & 255) + (masked >> 16 & 255) + (masked >> 24) - 126)
        return self.floats(self.joined(self.stack(values)))


class NumpyWords(Words):
    """NumPy's primitives."""

    def stored(self, field: Array, dtype: str) -> Array:
        """Return bytes as numbers, a copy where the bytes do not lie together."""
        return np.ascontiguousarray(field).view("<" + dtype)

    def reinterpreted(self, values: Array, dtype: str) -> Array:
        """Return the same bits."""
        return values.view(dtype)

    def cast(self, values: Array, dtype: str) -> Array:
        """Convert as C does."""
        return values.astype(dtype)

    def steps(self, stop: int, step: int, like: Array) -> Array:
        """Count."""
        return np.arange(0, stop, step, dtype=like.dtype)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """Choose."""
        return np.where(condition, a, b)

    def concatenate(self, parts: Sequence[Array]) -> Array:
        """Join."""
        return np.concatenate(parts, axis=-1)

    def stack(self, parts: Sequence[Array]) -> Array:
        """Join along a new axis."""
        return np.stack(parts, axis=-1)

    def total(self, values: Array) -> Array:
        """Add."""
        return values.sum(axis=-1, dtype=values.dtype)

    def look_up(self, table: Table, codes: Array) -> Array:
        """Index."""
        return as_table(table)[codes]


def as_table(table: Table) -> npt.NDArray[Any]:
    """Return a table as an array: numbers in a tuple become float32."""
    return table if isinstance(table, np.ndarray) else np.array(table, np.float32)
