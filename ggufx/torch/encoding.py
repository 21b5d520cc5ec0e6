"""Encode torch tensors where they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ggufx import kernels, types
from ggufx.errors import CodecError, NonFiniteError, UnsupportedType
from ggufx.torch.decoding import as_numpy, dtype_of, runs_cuda
from ggufx.types import Codec, Effort, ImportanceWarning, Objective, Search
from ggufx.types._effort import HEAD, unlike_weights
from ggufx.types.codec import EFFORTS, OBJECTIVES

__all__ = ["encode", "encodes_on"]

_CHUNK_LEN: Final = 1 << 26
"""Values that are made float32 at a time on a device, or that go through the CPU: 256 MB."""


def encodes_on(codec: Codec, device: torch.device, effort: Effort = "normal") -> bool:
    """Return whether values on ``device`` are encoded there; otherwise they pass through the CPU."""
    if not runs_cuda(device) or not kernels.exists("encode", cuda=True):
        return False
    module = kernels.find("encode", cuda=True)
    assert module is not None
    if effort == "reference":
        return codec.name in module.REPRODUCES
    # A longer search than the device's is the CPU's.
    return effort != "high" and codec.name in module.SUPPORTED


def encode(
    values: Tensor,
    type: str | Codec,
    importance: Any = None,
    *,
    effort: Effort = "normal",
    objective: Objective = "reference",
    out: Tensor | None = None,
    threads: int | None = None,
    saturate: bool = True,
    use_kernel: bool = True,
) -> Tensor:
    """Encode a torch tensor; the packed bytes are on its device.

    CUDA tensors of the types with a CUDA encoder are encoded there (efforts ``normal``, ``fast``, which is the same there, and
    ``reference``, where it gives the C library's bytes there, too). Others go through the CPU's encoders, values there and
    bytes back. Either way a row's bytes depend on that row alone, and are the same every time; device and CPU need not agree on
    them, only on the error, within half a percent.

    Parameters
    ----------
    values
        [..., row_len], finite, on any device.
    type
        The type, or its name.
    importance
        Non-negative weights [row_len] of the columns: tensor or array, on any device.
    effort, objective, threads, saturate, use_kernel
        As in :meth:`ggufx.types.Codec.encode`.
    out
        Contiguous uint8 [..., row_nbytes] on ``values``' device, to fill.

    Returns
    -------
    Tensor
        uint8 [..., row_nbytes]: ``out`` when given.

    Raises
    ------
    CodecError
        NaN or infinity (naming row and column), a row that is no multiple of the block, bad weights, a bad ``out``.
    OutOfRangeError
        Without ``saturate``, a value is beyond what the type's scales can hold.
    UnsupportedType
        The type has no encoder.
    """
    codec = types.get(type) if isinstance(type, str) else type
    if not isinstance(values, Tensor):
        raise TypeError(f"values are a torch.Tensor, got {values.__class__.__name__}")
    values = values.detach()
    if values.ndim == 0:
        raise CodecError("a row has at least one axis; got a scalar")
    if not codec.can_encode:
        raise UnsupportedType(f"encoding to {codec.name} is not implemented")
    if values.dtype == torch.bool or values.is_complex():
        raise CodecError(f"values must be real numbers, got {values.dtype}")
    if effort not in EFFORTS or objective not in OBJECTIVES:
        raise CodecError(
            f"effort {effort!r}, objective {objective!r}: expected one of {', '.join(EFFORTS)}, one of "
            f"{', '.join(OBJECTIVES)}"
        )
    row_len = values.shape[-1]
    shape = (*values.shape[:-1], codec.layout.row_nbytes(row_len))
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    elif (
        tuple(out.shape) != shape or out.dtype != torch.uint8 or not out.is_contiguous() or out.device != values.device
    ):
        raise CodecError(
            f"out is {out.dtype}{list(out.shape)} on {out.device}, it must be contiguous torch.uint8{list(shape)} on "
            f"{values.device}"
        )
    weights = as_numpy(importance.detach().cpu().float()) if isinstance(importance, Tensor) else importance
    search: dict[str, Any] = {
        "effort": effort,
        "objective": objective,
        "threads": threads,
        "saturate": saturate,
        "use_kernel": use_kernel,
    }
    if values.device.type == "cpu" and not encodes_on(codec, values.device, effort):
        codec.encode(as_numpy(_plain(values)), weights, out=as_numpy(out), **search)
        return out
    if out.numel() == 0:
        codec.encode(np.empty(tuple(values.shape), np.float32), weights, **search)  # its checks
        return out
    flat, target = values.reshape(-1, row_len), out.view(-1, shape[-1])
    _check_finite(codec, flat)
    if encodes_on(codec, values.device, effort):
        checked = codec._importance(weights, row_len)
        prepared = None if checked is None else torch.from_numpy(np.array(checked)).to(values.device)
        module = kernels.find("encode", cuda=True)
        assert module is not None
        device_effort = "reference" if effort == "reference" else "normal"
        step = max(1, _CHUNK_LEN // row_len)
        for start in range(0, flat.shape[0], step):
            part = flat[start : start + step].to(torch.float32).contiguous()
            rows = target[start : start + step]
            module.encode(codec.name, part, prepared, rows, objective=objective, effort=device_effort)
            if effort == "normal" and codec.searches and not codec.nested:
                size = min(HEAD, row_len)
                unusual = np.flatnonzero(unlike_weights(module.count_heads(part, size).cpu().numpy(), size)).tolist()
                if unusual:
                    packed = rows[unusual].cpu().numpy()
                    codec.keep_better(part[unusual].cpu().numpy(), packed, checked, Search(effort, objective))
                    rows[unusual] = torch.from_numpy(packed).to(rows.device)
            large = () if saturate else (part.abs().amax(dim=1) > codec.safe_magnitude).nonzero().flatten().tolist()
            for row in large:
                values_of, rows_of = part[row : row + 1].cpu().numpy(), rows[row : row + 1].cpu().numpy()
                codec.check_range(values_of, rows_of, checked, Search(effort, objective), start + row)
        return out
    _encode_by_cpu(codec, flat, target, weights, search)
    return out


def _encode_by_cpu(codec: Codec, flat: Tensor, target: Tensor, weights: Any, search: Mapping[str, Any]) -> None:
    """Fill ``target`` with what the CPU's encoder makes of ``flat``, both of another device, a few rows at a time."""
    step = max(1, _CHUNK_LEN // flat.shape[1])
    with warnings.catch_warnings():
        for start in range(0, flat.shape[0], step):
            part = _plain(flat[start : start + step].cpu())
            target[start : start + step].copy_(torch.from_numpy(codec.encode(as_numpy(part), weights, **search)))
            # Said once, not for every piece.
            warnings.simplefilter("ignore", ImportanceWarning)


def _plain(values: Tensor) -> Tensor:
    """Return values in a dtype of numpy's, contiguous."""
    return (values.float() if values.dtype.itemsize < 4 and values.is_floating_point() else values).contiguous()


def _check_finite(codec: Codec, flat: Tensor) -> None:
    if not flat.is_floating_point() or not dtype_of(codec).is_floating_point:
        return
    step = max(1, _CHUNK_LEN // flat.shape[1])
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        # What overflows float32 is infinite for a type that stores at most that.
        part = part.float() if dtype_of(codec) == torch.float32 else part
        wrong = ~torch.isfinite(part)
        if wrong.any():
            row, column = divmod(int(wrong.view(-1).int().argmax()), flat.shape[1])
            raise NonFiniteError(start + row, column, part[row, column].item(), codec.name)
