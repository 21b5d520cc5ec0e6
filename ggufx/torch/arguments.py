"""What the registered operations accept: every argument is checked before a kernel takes an address from it.

``torch.ops.ggufx.*`` can be called by anybody with anything. A kernel computes addresses from the shapes it is told, so that a
number that does not fit would read or write beyond a tensor's memory on a device. The same checks run while a graph is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ggufx import types
from ggufx.errors import CodecError
from ggufx.torch.decoding import FLOATS, dtype_of
from ggufx.types import Codec

__all__ = [
    "Matrix",
    "check_activations",
    "check_bias",
    "check_decoding",
    "check_grad",
    "check_matrices",
    "check_matrix",
    "check_planes",
    "check_routing",
    "check_rows",
]

_ID_DTYPES: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Matrix(NamedTuple):
    """A matrix whose arguments fit together."""

    codec: Codec
    parts: list[Tensor]
    """Packed rows alone, or the planes."""
    row_len: int
    out_features: int


def _dense(what: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise CodecError(f"{what} must be dense (torch.strided), got {tensor.layout}")


def _bytes(what: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise CodecError(f"{what} must be torch.uint8, got {tensor.dtype}")
    _dense(what, tensor)


def check_rows(type_name: str, packed: Tensor, axes: int | None = None) -> tuple[Codec, int]:
    """Check packed rows uint8 [..., row_nbytes] and return their codec and row length in elements.

    Parameters
    ----------
    axes
        How many ``packed`` must have: 2 for a matrix, 3 for stacked experts; ``None`` for any but none.

    Raises
    ------
    CodecError
        ``packed`` is not uint8, not dense, has other axes, or its last axis is no whole number of blocks.
    UnknownType
        There is no type of that name.
    """
    codec = types.get(type_name)
    _bytes(f"packed rows of {codec.name}", packed)
    if packed.ndim == 0 or (axes is not None and packed.ndim != axes):
        expected = "at least one axis" if axes is None else "[R, row_nbytes]" if axes == 2 else "[E, R, row_nbytes]"
        raise CodecError(f"packed rows of {codec.name} must have {expected}, got {list(packed.shape)}")
    # While a graph is traced the length may be a symbol: a weight's row is one length for ever, so it becomes a number.
    return codec, codec.layout.row_len(int(packed.shape[-1]))


def check_decoding(type_name: str, packed: Tensor, dtype: torch.dtype) -> tuple[Codec, int]:
    """Check what :func:`ggufx.torch.ops.dequantize` is given and return the codec and the row length in elements.

    Raises
    ------
    CodecError
        As :func:`check_rows`, or the type does not decode to ``dtype``.
    """
    codec, row_len = check_rows(type_name, packed)
    if dtype not in FLOATS and dtype != dtype_of(codec):
        raise CodecError(f"{codec.name} decodes to {dtype_of(codec)} or a float of 16, 32 or 64 bits, not to {dtype}")
    return codec, row_len


def check_planes(type_name: str, planes: Sequence[Tensor], out_features: int) -> Matrix:
    """Check codes uint8 [R, row_len], scales uint8 [R, row_len // block_len] and what a kernel may have made of the latter.

    Raises
    ------
    CodecError
        The type has no planes; there are fewer than two; dtypes, shapes or devices do not fit; or ``out_features`` is not R.
    UnknownType
        There is no type of that name.
    """
    codec = types.get(type_name)
    if codec.planes is None:
        raise CodecError(f"{codec.name} has no planes; pass its packed rows")
    if len(planes) < 2:
        raise CodecError(f"planes of {codec.name} are codes and scales, got {len(planes)} tensors")
    codes, scales, *made = planes
    _bytes(f"codes of {codec.name}", codes)
    _bytes(f"scales of {codec.name}", scales)
    block_len = codec.layout.block_len
    row_len = int(codes.shape[-1]) if codes.ndim == 2 else 0
    if codes.ndim != 2 or row_len % block_len:
        raise CodecError(
            f"codes of {codec.name} must have [R, row_len] with a multiple of {block_len} elements a row, "
            f"got {list(codes.shape)}"
        )
    if scales.ndim != 2 or scales.shape[0] != codes.shape[0] or scales.shape[1] != row_len // block_len:
        raise CodecError(
            f"codes {list(codes.shape)} of {codec.name} go with scales {[codes.shape[0], row_len // block_len]}, "
            f"got {list(scales.shape)}"
        )
    if scales.device != codes.device:
        raise CodecError(f"codes of {codec.name} are on {codes.device}, their scales on {scales.device}")
    if codes.shape[0] != out_features:
        raise CodecError(f"out_features is {out_features}, but {codec.name} planes have {codes.shape[0]} rows")
    for extra in made:
        # Whether one scale serves 128 rows or one decides which they are.
        rows = (codes.shape[0], -(-codes.shape[0] // block_len))
        fits = extra.ndim == 2 and extra.shape[0] in rows and extra.shape[1] == scales.shape[1]
        if len(made) > 1 or extra.dtype != torch.float32 or extra.device != codes.device or not fits:
            raise CodecError(
                f"a third plane of {codec.name} is the scales as torch.float32 on {codes.device}, "
                f"[{rows[0]} or {rows[1]}, {scales.shape[1]}]; got {[f'{p.dtype}{list(p.shape)}' for p in made]}"
            )
    return Matrix(codec, list(planes), row_len, int(out_features))


def check_matrix(type_name: str, packed: Tensor) -> Matrix:
    """Check packed rows uint8 [R, row_nbytes] of one matrix; raises as :func:`check_rows`."""
    codec, row_len = check_rows(type_name, packed, 2)
    return Matrix(codec, [packed], row_len, packed.shape[0])


def check_matrices(
    parts: Sequence[Tensor], counts: Sequence[int], type_names: str, out_features: Sequence[int]
) -> list[Matrix]:
    """Check what :func:`ggufx.torch.ops.linears` is given and return its matrices.

    Raises
    ------
    CodecError
        The lists' lengths disagree, or a matrix' own arguments do.
    UnknownType
        There is no type of a name.
    """
    names = type_names.split(",")
    if not len(names) == len(counts) == len(out_features) or sum(counts) != len(parts) or min(counts, default=0) < 1:
        raise CodecError(
            f"{len(names)} types, {len(counts)} counts and {len(out_features)} out_features must be one of each for every "
            f"matrix, and the counts {list(counts)}, at least 1 each, must add up to the {len(parts)} tensors"
        )
    matrices, at = [], 0
    for name, count, rows in zip(names, counts, out_features, strict=True):
        own = parts[at : at + count]
        matrix = check_matrix(name, own[0]) if count == 1 else check_planes(name, own, rows)
        if matrix.out_features != rows:
            raise CodecError(
                f"out_features is {rows}, but packed rows of {matrix.codec.name} are {list(own[0].shape)}: "
                f"{matrix.out_features} rows"
            )
        matrices.append(matrix)
        at += count
    return matrices


def check_activations(codec: Codec, x: Tensor, weight: Tensor, row_len: int) -> None:
    """Raise CodecError unless ``x`` is a dense float [..., row_len] on the weight's device."""
    if x.ndim == 0 or x.shape[-1] != row_len:
        raise CodecError(f"activations {list(x.shape)} do not fit {codec.name} rows of {row_len} elements")
    _check_floats("activations", x, weight, codec)


def _check_floats(what: str, values: Tensor, weight: Tensor, codec: Codec) -> None:
    if values.dtype not in FLOATS:
        raise CodecError(f"{what} must be floats of 16, 32 or 64 bits, got {values.dtype}")
    if values.device != weight.device:
        raise CodecError(f"{what} are on {values.device}, {codec.name} weights on {weight.device}")
    _dense(what, values)


def check_bias(bias: Tensor | None, rows: int, x: Tensor | None = None) -> None:
    """Raise CodecError unless a bias has one element for each row of the weight, and ``x``'s dtype and device where given."""
    if bias is None:
        return
    if bias.ndim != 1 or bias.shape[0] != rows:
        raise CodecError(f"bias has the shape {list(bias.shape)}, expected [{rows}]")
    if x is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise CodecError(f"bias is {bias.dtype} on {bias.device}, activations are {x.dtype} on {x.device}")


def check_grad(codec: Codec, grad: Tensor, weight: Tensor, rows: int) -> None:
    """Raise CodecError unless the gradient of a product is a dense float [..., rows] on the weight's device."""
    if grad.ndim == 0 or grad.shape[-1] != rows:
        raise CodecError(f"a gradient {list(grad.shape)} does not fit {rows} rows of {codec.name}")
    _check_floats("gradients", grad, weight, codec)


def check_routing(type_name: str, x: Tensor, packed: Tensor, expert_ids: Tensor, *, grad: bool = False) -> Matrix:
    """Check tokens, stacked experts and which token goes to which.

    Parameters
    ----------
    x
        Activations [T, row_len] or, with ``grad``, the gradient [T, K, R] of the products.
    packed
        uint8 [E, R, row_nbytes].
    expert_ids
        Integers [T, K]. Their values are not looked at: that would wait for a device.

    Raises
    ------
    CodecError
        Shapes, dtypes or devices do not fit.
    UnknownType
        There is no type of that name.
    """
    codec, row_len = check_rows(type_name, packed, 3)
    if expert_ids.dtype not in _ID_DTYPES:
        raise CodecError(f"expert ids must be integers, got {expert_ids.dtype}")
    if expert_ids.device != packed.device:
        raise CodecError(f"expert ids are on {expert_ids.device}, {codec.name} weights on {packed.device}")
    _dense("expert ids", expert_ids)
    if grad:
        check_grad(codec, x, packed, packed.shape[1])
    else:
        check_activations(codec, x, packed, row_len)
    fits = expert_ids.ndim == 2 and (x.shape[:-1] == expert_ids.shape if grad else x.shape[:-1] == expert_ids.shape[:1])
    if not fits:
        raise CodecError(
            f"expected {'gradients [T, K, R]' if grad else 'activations [T, row_len]'}, experts [E, R, row_nbytes] and ids "
            f"[T, K]; got {list(x.shape)}, {list(packed.shape)}, {list(expert_ids.shape)}"
        )
    return Matrix(codec, [packed], row_len, packed.shape[1])
