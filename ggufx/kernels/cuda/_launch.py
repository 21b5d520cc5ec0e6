"""The host's side of the decode kernels: how rows become a grid of programs."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from ggufx.kernels.cuda._words import INTERPRETED

__all__ = ["Shape", "converts_e4m3", "decode", "lead_of", "on", "options", "table"]


class Shape(NamedTuple):
    """How a type's bytes fall into units, one a lane.

    Attributes
    ----------
    block_len, block_nbytes, header_nbytes
        As in the type's layout.
    parts
        Units per block: a power of two.
    warps, repeat
        Warps of a program, and units of a lane: measured on an H200.
    """

    block_len: int
    block_nbytes: int
    header_nbytes: int
    parts: int
    warps: int = 4
    repeat: int = 1


def options(**wishes: Any) -> dict[str, Any]:
    """Return Triton's launch options; its interpreter knows none."""
    return {} if INTERPRETED.value else wishes


def lead_of(rows: torch.Tensor) -> int:
    """Return how many bytes ``rows`` begins after an aligned word."""
    return rows.data_ptr() % 4


@cache
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return 32-bit words on ``device``, uploaded once per device: by its first use, which no graph may capture."""
    signed = [value - (1 << 32) if value >= 1 << 31 else value for value in values]
    return torch.tensor(signed, dtype=torch.int32, device=device)


def decode(kernel: Any, shape: Shape, rows: torch.Tensor, out: torch.Tensor, *extra: torch.Tensor, **more: Any) -> None:
    """Launch a decode kernel.

    Parameters
    ----------
    kernel
        Its parameters are those of :func:`ggufx.kernels.cuda._words.locate` up to ``chunks``, then ``extra``, then the
        constants
        ``LEAD``, ``EVEN`` (no 16-bit field straddles a word), ``ALIGNED`` (words lie aligned), ``TILE``, ``LANES``, ``more``.
    rows, out
        uint8 [R, row_nbytes] and float [R, row_len], both contiguous, on one device.
    """
    n_rows, row_nbytes = rows.shape
    row_len = out.shape[1]
    if out.numel() == 0:
        return
    per_row = row_len // shape.block_len * shape.parts
    tile = 32 * shape.warps * shape.repeat
    lead = lead_of(rows)
    steps = (lead, row_nbytes, shape.block_nbytes, shape.header_nbytes)
    if shape.header_nbytes == 0:
        # Without row headers the rows are one long row.
        per_row, n_rows, lanes = per_row * n_rows, 1, tile
    else:
        lanes = min(tile, max(shape.parts, triton.next_power_of_2(per_row)))
    chunks = triton.cdiv(per_row, lanes)
    programs = triton.cdiv(n_rows, tile // lanes) * chunks
    with on(rows.device):
        kernel[(programs,)](
            rows,
            out,
            row_nbytes,
            row_len,
            n_rows,
            per_row,
            chunks,
            *extra,
            LEAD=lead,
            EVEN=all(step % 2 == 0 for step in steps),
            ALIGNED=all(step % 4 == 0 for step in steps),
            TILE=tile,
            LANES=lanes,
            **more,
            # A fused multiply-add would round once where the specification rounds twice.
            **options(num_warps=shape.warps, enable_fp_fusion=False),
        )


def on(device: torch.device) -> Any:
    """Make ``device`` current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else _Nothing()


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@cache
def converts_e4m3(device: torch.device) -> bool:
    """Return whether ``device`` converts E4M3 to binary16 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
