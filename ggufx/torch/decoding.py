"""Decode packed rows of a torch tensor on whatever device they are."""

from __future__ import annotations

import os
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ggufx import kernels
from ggufx.errors import CodecError
from ggufx.torch.words import TorchWords
from ggufx.types import Codec

__all__ = ["CUDA_DTYPES", "FLOATS", "as_numpy", "decode_rows", "dtype_of", "runs_cuda", "way_of"]

_WORDS: Final = TorchWords()

Way = Literal["cuda", "torch", "cpu"]

_CHUNK_LEN: Final = {"cpu": 1 << 20}
"""Elements that the plain torch decoders take at a time. Their scratch is some ten times that: on a GPU 2^24 are 1 GB at most,
and long enough that launches cost little."""
_CHUNK_LEN_ELSEWHERE: Final = 1 << 24

CUDA_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
"""What the Triton kernels write."""
FLOATS: Final = (*CUDA_DTYPES, torch.float64)
"""What all types decode to."""

_DTYPES: Final = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
}


def dtype_of(codec: Codec) -> torch.dtype:
    """Return the torch dtype of what a type's values are: float32, or the stored dtype of integers and float64."""
    try:
        return _DTYPES[codec.value_dtype]
    except KeyError:
        raise CodecError(f"{codec.name} decodes to {codec.value_dtype}, which torch does not have") from None


def runs_cuda(device: torch.device) -> bool:
    """Return whether Triton kernels run on ``device``: CUDA, or the CPU when TRITON_INTERPRET=1 asks for its interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def way_of(codec: Codec, device: torch.device) -> Way:
    """Return how ``codec`` is decoded on ``device``: by its CUDA kernel, in plain torch, or by the CPU's decoder.

    The CPU's decoder serves the CPU itself, where it is the fastest, and types that have neither of the others (third-party
    ones): their rows go to the CPU and the values come back.
    """
    if codec.has_cuda and runs_cuda(device):
        return "cuda"
    return "torch" if codec.has_torch and device.type != "cpu" else "cpu"


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a CPU tensor's memory as an array; bfloat16 in ml_dtypes' dtype."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = tensor.detach().numpy()
    return array


def decode_rows(codec: Codec, rows: Tensor, out: Tensor, way: Way | None = None) -> None:
    """Fill ``out`` with what packed rows hold: the bits of the CPU's decoder, rounded to ``out``'s dtype.

    Parameters
    ----------
    codec
        The type.
    rows
        uint8 [R, row_nbytes], contiguous.
    out
        [R, row_len], contiguous, on the same device: a float dtype, or the stored dtype of integer types.
    way
        How, instead of :func:`way_of`; for tests and benchmarks.

    Raises
    ------
    UnsupportedType
        The type is known by its layout only.
    """
    way = way_of(codec, rows.device) if way is None else way
    if not codec.can_decode:
        way = "cpu"  # which raises the type's own reason
    elif out.numel() == 0:
        return
    if way == "cuda":
        module = kernels.find(codec.name, cuda=True)
        assert module is not None
        if out.dtype in CUDA_DTYPES:
            module.decode(rows, out)
        else:
            values = torch.empty_like(out, dtype=torch.float32)
            module.decode(rows, values)
            out.copy_(values)
    elif way == "torch":
        step = max(1, _CHUNK_LEN.get(rows.device.type, _CHUNK_LEN_ELSEWHERE) // out.shape[1])
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            part.copy_(_decoded(codec, rows[start : start + step]).reshape(part.shape))
    elif rows.device.type == "cpu" and (out.dtype == dtype_of(codec) or out.dtype.is_floating_point):
        codec.decode(as_numpy(rows), tuple(out.shape), out=as_numpy(out))
    else:
        exact = dtype_of(codec) if codec.can_decode else torch.float32
        dtype = out.dtype if out.dtype.is_floating_point else exact
        values = torch.empty(out.shape, dtype=dtype)
        codec.decode(as_numpy(rows.cpu()), tuple(out.shape), out=as_numpy(values))
        out.copy_(values)


def _decoded(codec: Codec, rows: Tensor) -> Tensor:
    """Return the values of rows uint8 [R, row_nbytes], [R, n, block_len], by the specification in plain torch."""
    values: Tensor = codec.decode_blocks(*codec.layout.fields(rows), _WORDS)
    return values
