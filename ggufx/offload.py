"""Encoding tiles on a GPU: source bytes go up, packed bytes come down, what lies between stays on the device.

Worker threads of the engine call :func:`encode`, each with a stream and pinned memory of its own, so that one tile's reading
and copying hide behind another's search.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ggufx import kernels, types
from ggufx.errors import MissingExtra, NonFiniteError, OptionError
from ggufx.types import Codec, Effort, Objective, Search
from ggufx.types._effort import HEAD, unlike_weights

if TYPE_CHECKING:
    import torch

__all__ = ["check", "decodes", "encode", "encodes"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_AT_A_TIME: Final = 4
"""Tiles on the device at a time: two search while others travel. An encoder's scratch is several times its tile."""
_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_lane = threading.local()
_gate = threading.BoundedSemaphore(_AT_A_TIME)


def check(device: str) -> None:
    """Raise PlanError, saying what to do, unless tiles can be encoded on ``device``."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("--device needs torch: pip install 'ggufx[torch]'") from None
    try:
        found = torch.device(device)
    except RuntimeError:
        raise OptionError("{device} {0}: is no device of torch's; cpu, cuda and cuda:1 are such", device) from None
    if found.type == "cpu" and _interpreted():
        return  # Triton's interpreter: for tests
    if found.type != "cuda":
        raise OptionError("{device} {0}: encoders run on cpu and cuda", device)
    if not torch.cuda.is_available():
        raise OptionError("{device} {0}: torch sees no CUDA GPU here (torch {1})", device, torch.__version__)
    if (found.index or 0) >= torch.cuda.device_count():
        raise OptionError("{device} {0}: there are {1} GPUs, counted from 0", device, torch.cuda.device_count())
    if not kernels.exists("encode", cuda=True):
        raise OptionError("{device} {0}: this ggufx has no encoders for it", device)
    try:
        kernels.find("encode", cuda=True)
    except ImportError as error:
        raise OptionError(
            "{device} {0}: Triton cannot be loaded ({1}); torch's CUDA builds bring it", device, error
        ) from None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def encodes(codec: Codec, effort: str) -> bool:
    """Return whether the device has an encoder of this effort: others run on the CPU. It gives the CPU's bytes."""
    module = kernels.find("encode", cuda=True)
    assert module is not None
    if effort == "reference":
        return codec.name in module.REPRODUCES
    # Types without a search have one result for every effort.
    return codec.name in module.SUPPORTED and (effort == "normal" or not codec.searches)


def encode(
    codec: Codec,
    kind: str,
    source: npt.NDArray[Any],
    rows: int,
    out: U8,
    weights: F32 | None,
    *,
    effort: Effort,
    objective: Objective,
    device: str,
) -> None:
    """Encode some rows on a device.

    Parameters
    ----------
    codec
        What to encode to.
    kind
        Type of ``source``: a codec's name.
    source
        uint8, the packed rows of ``kind``; or float32 [rows, row_len] values, whatever ``kind``.
    rows
        Their number.
    out
        uint8 [rows, row_nbytes], filled.
    weights
        Importance, float32 [row_len], not all zero over any block.
    effort, objective
        As in :meth:`ggufx.types.Codec.encode`.
    device
        torch's name of it.

    Raises
    ------
    NonFiniteError, OutOfRangeError
        A value is NaN or infinite, or beyond the type's scales.
    """
    import torch

    module = kernels.find("encode", cuda=True)
    assert module is not None
    row_len = codec.layout.row_len(out.shape[1])
    target = torch.device(device)
    with _gate, _stream(target):
        raw = _upload("source", source.reshape(-1).view(np.uint8), target)
        if source.dtype == np.float32:
            values = raw.view(torch.float32).view(rows, row_len)
        elif kind in _DTYPES:
            values = raw.view(getattr(torch, _DTYPES[kind])).view(rows, row_len).to(torch.float32)
        else:
            decoder = kernels.find(kind, cuda=True)
            assert decoder is not None
            values = torch.empty((rows, row_len), dtype=torch.float32, device=target)
            decoder.decode(raw.view(rows, -1), values)
        at = module.first_nonfinite(values)
        if at >= 0:
            row, column = divmod(at, row_len)
            raise NonFiniteError(row, column, values[row, column].item(), codec.name)
        importance = None if weights is None else _upload("weights", weights.view(np.uint8), target).view(torch.float32)
        packed = torch.empty((rows, out.shape[1]), dtype=torch.uint8, device=target)
        search = Search(effort, objective)
        device_effort = "reference" if effort == "reference" else "normal"
        module.encode(codec.name, values, importance, packed, objective=objective, effort=device_effort)
        _download(packed, out)
        if effort == "normal" and codec.searches and not codec.nested:
            size = min(HEAD, row_len)
            unusual = np.flatnonzero(unlike_weights(module.count_heads(values, size).cpu().numpy(), size)).tolist()
            if unusual:
                better = out[unusual]
                codec.keep_better(values[unusual].cpu().numpy(), better, weights, search)
                out[unusual] = better
        large = values.abs().amax(dim=1) > codec.safe_magnitude if values.numel() else values.new_zeros(0)
        for number in large.nonzero().flatten().tolist():
            codec.check_range(
                values[number : number + 1].cpu().numpy(), out[number : number + 1], weights, search, number
            )


def decodes(kind: str) -> bool:
    """Return whether packed rows of ``kind`` are decoded on the device; others are on the CPU."""
    return kind in _DTYPES or (kernels.exists(kind, cuda=True) and types.get(kind).has_cuda)


def _stream(device: torch.device) -> Any:
    """Return a context in which this thread's own stream is the current one."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    held = getattr(_lane, "streams", None)
    if held is None:
        held = _lane.streams = {}
    if device not in held:
        held[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
    return torch.cuda.stream(held[device])


def _pinned(slot: str, nbytes: int) -> torch.Tensor:
    """Return this thread's page-locked memory called ``slot``, uint8 [nbytes], used again by the next call."""
    import torch

    held: torch.Tensor | None = getattr(_lane, slot, None)
    if held is None or held.numel() < nbytes:
        held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        setattr(_lane, slot, held)
    return held[:nbytes]


def _upload(slot: str, data: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    # The last tile's download has waited for the stream, so nothing reads this memory any more.
    staged = _pinned(slot, data.nbytes)
    staged.numpy()[:] = data
    return staged.to(device, non_blocking=True, copy=True)


def _download(packed: torch.Tensor, out: U8) -> None:
    import torch

    staged = _pinned("out", out.nbytes)
    staged.copy_(packed.view(-1), non_blocking=True)
    if packed.device.type == "cuda":
        torch.cuda.current_stream(packed.device).synchronize()
    out.reshape(-1)[:] = staged.numpy()
