"""Stacked experts: only the routed ones are read, all of them in one launch."""

from __future__ import annotations

import importlib

import torch

from ggufx.kernels.cuda import _linear

__all__ = ["linear"]


def linear(
    x: torch.Tensor | _linear.Prepared,
    rows: torch.Tensor,
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    type_name: str,
    *,
    planes: tuple[torch.Tensor, ...] | None = None,
    settled: bool = False,
) -> None:
    """Fill ``out[t, k]`` with ``decode(rows[expert_ids[t, k]]) @ x[t]``.

    Every pair of token and expert is multiplied on its own: eight tokens that choose 6 of 256 experts share next to none, and
    grouping them was slower (measured).

    Parameters
    ----------
    x
        float [T, row_len], or :func:`ggufx.kernels.cuda._linear.prepare`'s result in the type's order.
    rows
        uint8 [E, R, row_nbytes], contiguous.
    expert_ids
        int32 or int64 [T, K], contiguous, each in 0..E-1; any other gives NaN, as an error would have to wait for the device.
    out
        float [T, K, R], contiguous.
    type_name
        Any spelling of a type whose module has ``linear``.
    planes
        What the type's ``split`` gives for ``rows``.
    settled
        With prepared x only: promises that ``expert_ids`` were written before x was prepared.
    """
    module = importlib.import_module(f"ggufx.kernels.cuda.{type_name.lower()}")
    module.linear(x, rows, out, planes=planes, ids=expert_ids, settled=settled)
