"""Torch tensors to a GGUF and back, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ggufx import arrays, saving
from ggufx.arrays import Described
from ggufx.errors import PlanError, UnknownType, quoted
from ggufx.torch import loading
from ggufx.torch.decoding import as_numpy
from ggufx.torch.tensor import GGUFTensor
from ggufx.writer import WriterOptions

__all__ = ["load_file", "save_file"]


def save_file(
    tensors: saving.Tensors,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    **options: Unpack[WriterOptions],
) -> list[Path]:
    """Write torch tensors to a GGUF as they are, with the parameters of ``safetensors.torch.save_file``.

    :func:`ggufx.save` takes torch tensors too, and quantizes them.

    Parameters
    ----------
    tensors
        Name -> tensor on any device, :class:`GGUFTensor`, or whatever :func:`ggufx.save` takes. Tensors of another device come
        to the host one at a time.
    path, metadata
        As in :func:`ggufx.save_file`.
    **options
        As in :func:`ggufx.save`.

    Returns
    -------
    list of Path
        The file, or the members of the split.

    Raises
    ------
    OutputExists, PlanError, CodecError, DiskError
        As :func:`ggufx.save`.

    Examples
    --------
    >>> import torch
    >>> import ggufx.torch
    >>> path, = ggufx.torch.save_file({"w": torch.ones(2, 3, dtype=torch.bfloat16)}, "torch.gguf")
    >>> ggufx.torch.load_file(path)
    {'w': tensor([[1., 1., 1.],
            [1., 1., 1.]], dtype=torch.bfloat16)}
    """
    return saving.save_file(tensors, path, metadata, **options)


def load_file(
    path: str | Path,
    device: loading.Devices = "cpu",
    dtype: torch.dtype | None = None,
    *,
    dialect: str | None = None,
    threads: int | None = None,
) -> dict[str, Tensor]:
    """Bring all tensors of a GGUF to a device, decoded: name -> tensor, in file order.

    :func:`load` keeps them packed.

    Parameters
    ----------
    path
        The file; any member opens a whole split file.
    device
        Where tensors go: one device, or a mapping or function of the tensor's name.
    dtype
        Of all tensors of floats; by default the stored dtype of float and integer types, bit for bit, and float32 for quant
        types.
    dialect, threads
        As in :func:`open`.

    Returns
    -------
    dict of name -> torch.Tensor

    Raises
    ------
    ContainerError, UnknownDialect, AmbiguousDialect
        As :func:`ggufx.open`.
    UnknownType, UnsupportedType
        A tensor's type is not known, or has no decoder.
    """
    with loading.open(path, device, dialect=dialect, threads=threads) as opened:
        # One by one: packed and decoded bytes of one tensor only are there together.
        return {name: _decoded(opened[name], dtype) for name in opened}


def _decoded(tensor: GGUFTensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.codec is None:
        raise UnknownType(
            f"tensor {quoted(tensor.name)} is of type {tensor.type}, which ggufx has no decoder for; ggufx.torch.load "
            "brings it packed"
        )
    stored = arrays.native_dtype(tensor.codec)
    if stored is None or tensor.scale is not None:
        return tensor.dequantize(dtype)
    kept = tensor.packed.reshape(-1).view(getattr(torch, stored.name)).view(tensor.shape)
    return kept if dtype is None or not kept.is_floating_point() else kept.to(dtype)


def _describe(name: str, value: GGUFTensor) -> Described:
    if value.codec is None or value.scale is not None:
        what = "a factor beside its bytes" if value.scale is not None else "a type without a codec"
        raise PlanError(f"tensor {quoted(name)}: has {what}; dequantize() it first")
    return arrays.describe_rows(value.shape, value.codec, lambda: iter((as_numpy(value.packed.cpu()).reshape(-1),)))


arrays.describe_by(GGUFTensor, _describe)
