"""The words of specifications (:mod:`ggufx.types.words`) in torch, on any of its devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ggufx.types.words import Table, Words, as_table

__all__ = ["TorchWords"]

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64,
}  # fmt: skip


class TorchWords(Words):
    """Torch's primitives. Tables stay on a device once used."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, torch.device], tuple[Table, Tensor]] = {}

    def stored(self, field: Tensor, dtype: str) -> Tensor:
        """Return bytes as numbers, a copy: a view of another dtype needs its first byte aligned, which a field is not."""
        return field.clone(memory_format=torch.contiguous_format).view(_DTYPES[dtype])

    def reinterpreted(self, values: Tensor, dtype: str) -> Tensor:
        """Return the same bits."""
        return values.view(_DTYPES[dtype])

    def cast(self, values: Tensor, dtype: str) -> Tensor:
        """Convert as C does."""
        return values.to(_DTYPES[dtype])

    def steps(self, stop: int, step: int, like: Tensor) -> Tensor:
        """Count."""
        return torch.arange(0, stop, step, dtype=like.dtype, device=like.device)

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Choose."""
        return torch.where(condition, a, b)

    def concatenate(self, parts: Sequence[Tensor]) -> Tensor:
        """Join."""
        return torch.cat(list(parts), dim=-1)

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """Join along a new axis."""
        return torch.stack(list(parts), dim=-1)

    def total(self, values: Tensor) -> Tensor:
        """Add."""
        return values.sum(-1, dtype=values.dtype)

    def look_up(self, table: Table, codes: Tensor) -> Tensor:
        """Index."""
        held: Any = self._tables.get((id(table), codes.device))
        if held is None:
            # The table is kept with its copy, so that its number stays its own. A copy, because torch warns of read-only ones.
            held = table, torch.from_numpy(as_table(table).copy()).to(codes.device)
            self._tables[id(table), codes.device] = held
        values: Tensor = held[1]
        return values[codes.int()]
