"""The operations as torch knows them: ``torch.ops.ggufx.*``, with the shapes for tracing and gradients for activations.

An operation is opaque to torch.compile and torch.export: they see its result's shape and dtype (the fake kernels below), not
how a type is decoded. Types go by name, because an operation takes tensors, numbers and strings only. Weights are frozen: only
activations (and a bias) have gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from ggufx import kernels, types
from ggufx.errors import CodecError
from ggufx.torch.arguments import (
    Matrix,
    check_activations,
    check_bias,
    check_decoding,
    check_grad,
    check_matrices,
    check_matrix,
    check_planes,
    check_routing,
)
from ggufx.torch.decoding import CUDA_DTYPES, decode_rows, runs_cuda
from ggufx.types import Codec

__all__ = [
    "FUSED_BATCH",
    "choose",
    "dequantize",
    "experts",
    "join_planes",
    "linear",
    "linear_planes",
    "linears",
    "split_planes",
]

FUSED_BATCH: Final = 8
"""Rows of activations up to which the fused products work."""

_WORKSPACE_LEN: Final = 1 << 28
"""Decoded weights at a time on a GPU: a bf16 workspace of 512 MB holds all but the largest matrices whole."""
_WORKSPACE_LEN_CPU: Final = 1 << 22
"""The same on a CPU, where a workspace that stays near its caches is the faster one."""


# Ways -------------------------------------------------------------------------------------------------------------------


@cache
def _cuda_verb(type_name: str, verb: str) -> Callable[..., Any] | None:
    """Return a function of a CUDA kernel module, or ``None`` where the module or the function does not exist."""
    module = kernels.find(type_name, cuda=True)
    return None if module is None else getattr(module, verb, None)


def choose(type_name: str, x: Tensor, out_features: int, *, planes: bool = False) -> str:
    """Return how ``x @ w.T`` is done: ``fused``, ``fp8`` or ``workspace``.

    ``x`` is [B, in_features]; ``planes`` says whether codes and scales are apart. The measured thresholds are in
    ``ggufx.kernels.cuda._thresholds``; a way that the device, dtype or type does not have is never chosen.
    """
    if not runs_cuda(x.device) or x.dtype not in CUDA_DTYPES:
        return "workspace"
    able = {"workspace"}
    if x.shape[0] <= FUSED_BATCH and _cuda_verb(type_name, "linear") is not None:
        able.add("fused")
    if planes and x.dtype == torch.bfloat16:
        supported = _cuda_verb("_scaled", "supported")
        if supported is not None and supported(x.device):
            able.add("fp8")
    table = _cuda_verb("_thresholds", "choose")
    if table is not None:
        way: str = table(type_name, x.shape[0], out_features, x.shape[1])
        if way in able:
            return way
    return "fused" if "fused" in able else "workspace"


def _flat(x: Tensor) -> Tensor:
    # As many rows as there are: of an empty tensor reshape(-1, ...) cannot tell.
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


# dequantize -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ggufx::dequantize", mutates_args=())
def dequantize(packed: Tensor, type: str, dtype: torch.dtype) -> Tensor:
    """Decode packed rows: ``packed`` uint8 [..., row_nbytes] -> ``dtype`` [..., row_len], bits as the CPU's decoder has them.

    Raises
    ------
    CodecError
        Lengths or dtypes do not fit the type.
    UnknownType, UnsupportedType
        No type of that name, or no decoder for it.
    """
    codec, row_len = check_decoding(type, packed, dtype)
    out = torch.empty((*packed.shape[:-1], row_len), dtype=dtype, device=packed.device)
    rows = _flat(packed).contiguous()
    decode_rows(codec, rows, out.view(rows.shape[0], row_len))
    return out


@dequantize.register_fake
def _(packed: Tensor, type: str, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], check_decoding(type, packed, dtype)[1]), dtype=dtype)


def _decoded_tiles(codec: Codec, packed: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, their values [rows, row_len])`` in one workspace: valid until the next is asked for."""
    row_len = codec.layout.row_len(packed.shape[-1])
    limit = _WORKSPACE_LEN_CPU if packed.device.type == "cpu" else _WORKSPACE_LEN
    step = min(max(1, limit // max(1, row_len)), packed.shape[0])
    workspace = torch.empty((step, row_len), dtype=dtype, device=packed.device)
    for start in range(0, packed.shape[0], max(1, step)):
        tile = packed[start : start + step].contiguous()
        values = workspace[: tile.shape[0]]
        decode_rows(codec, tile, values)
        yield slice(start, start + tile.shape[0]), values


# linear -----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ggufx::linear", mutates_args=())
def linear(x: Tensor, packed: Tensor, type: str, bias: Tensor | None = None) -> Tensor:
    """Multiply by a packed matrix: ``x`` [..., row_len], ``packed`` uint8 [R, row_nbytes] -> [..., R] of ``x``'s dtype.

    Up to eight rows of activations go through the fused CUDA kernel where the type has one; else the matrix is decoded to
    ``x``'s dtype, all of it or in tiles of 512 MB, and multiplied by torch's matmul.

    Raises
    ------
    CodecError
        Lengths, dtypes or devices do not fit.
    """
    codec = _check_linear(x, packed, type, bias).codec
    out = _multiply(codec, _flat(x), packed)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], packed.shape[0])


def _multiply(codec: Codec, x: Tensor, packed: Tensor, way: str | None = None) -> Tensor:
    """Return ``x`` [B, row_len] times ``packed`` uint8 [R, row_nbytes], [B, R]."""
    out = x.new_empty((x.shape[0], packed.shape[0]))
    if (way or choose(codec.name, x, packed.shape[0])) == "fused":
        fused = _cuda_verb(codec.name, "linear")
        assert fused is not None
        if out.numel():
            fused(x.contiguous(), packed.contiguous(), out)
        return out
    for rows, values in _decoded_tiles(codec, packed, x.dtype):
        if values.shape[0] == packed.shape[0]:
            torch.mm(x, values.T, out=out)
        else:
            out[:, rows] = x @ values.T
    return out


@linear.register_fake
def _(x: Tensor, packed: Tensor, type: str, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check_linear(x, packed, type, bias).out_features))


def _check_linear(x: Tensor, packed: Tensor, type: str, bias: Tensor | None) -> Matrix:
    matrix = check_matrix(type, packed)
    check_activations(matrix.codec, x, packed, matrix.row_len)
    check_bias(bias, matrix.out_features, x)
    return matrix


@torch.library.custom_op("ggufx::linear_grad", mutates_args=())
def _linear_grad(grad: Tensor, packed: Tensor, type: str) -> Tensor:
    """Return the gradient [..., row_len] of :func:`linear`'s activations from that of its result [..., R]."""
    codec, _, row_len, _ = _check_linear_grad(grad, packed, type)
    flat = _flat(grad)
    out = flat.new_zeros((flat.shape[0], row_len))
    for rows, values in _decoded_tiles(codec, packed, grad.dtype):
        if values.shape[0] == packed.shape[0]:
            torch.mm(flat, values, out=out)
        else:
            out += flat[:, rows] @ values
    return out.view(*grad.shape[:-1], out.shape[-1])


@_linear_grad.register_fake
def _(grad: Tensor, packed: Tensor, type: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], _check_linear_grad(grad, packed, type).row_len))


def _check_linear_grad(grad: Tensor, packed: Tensor, type: str) -> Matrix:
    matrix = check_matrix(type, packed)
    check_grad(matrix.codec, grad, packed, matrix.out_features)
    return matrix


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, ctx.type, *_ = inputs
    ctx.save_for_backward(packed)


def _linear_twice_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (packed,) = ctx.saved_tensors
    return linear(grad, packed, ctx.type), None, None


# A product's gradient is a product: its own gradient is the first one again, here and below.
_linear_grad.register_autograd(_linear_twice_backward, setup_context=_keep_weight)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    grad_x = _linear_grad(grad, packed, ctx.type) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, _bias_grad(ctx, grad, 3)


def _bias_grad(ctx: Any, grad: Tensor, position: int) -> Tensor | None:
    # The dispatcher drops arguments that have their default: without a bias there may be no such input.
    if len(ctx.needs_input_grad) <= position or not ctx.needs_input_grad[position]:
        return None
    return _flat(grad).sum(0)


linear.register_autograd(_linear_backward, setup_context=_keep_weight)


# linear on planes -------------------------------------------------------------------------------------------------------


def split_planes(type_name: str, rows: Tensor) -> list[Tensor] | None:
    """Take codes and scales of rows uint8 [R, row_nbytes] apart; ``None`` for a type that has no such form.

    The first two planes are codes and scales, uint8, the same on every device. What a CUDA kernel adds is made of them, belongs
    to its device, and may have strides that a copy would lose: it is made anew, never moved or stored.
    """
    split = _cuda_verb(type_name, "split") if runs_cuda(rows.device) else None
    if split is not None:
        return list(split(rows))
    codec = types.get(type_name)
    if codec.planes is None:
        return None
    block, _ = codec.layout.fields(rows)
    return [block[field].flatten(-2).contiguous() for field in codec.planes]


def join_planes(type_name: str, planes: Sequence[Tensor]) -> Tensor:
    """Return the packed rows uint8 [R, row_nbytes] that :func:`split_planes` took apart."""
    codec = types.get(type_name)
    assert codec.planes is not None
    n_blocks = planes[1].shape[-1]
    parts = {
        field: plane.reshape(*plane.shape[:-1], n_blocks, plane.shape[-1] // max(1, n_blocks))
        for field, plane in zip(codec.planes, planes, strict=False)
    }
    return torch.cat([parts[field] for field in codec.layout.block.names or ()], dim=-1).flatten(-2)


def _aligned(planes: Sequence[Tensor]) -> bool:
    """Return whether a fused kernel can read the planes."""
    return planes[0].data_ptr() % 16 == 0 and planes[0].is_contiguous() and planes[1].is_contiguous()


@torch.library.custom_op("ggufx::linear_planes", mutates_args=())
def linear_planes(
    x: Tensor, planes: Sequence[Tensor], type: str, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """Multiply by a matrix whose codes and scales are apart (see :func:`split_planes`); otherwise as :func:`linear`.

    Large batches of bfloat16 go through torch's block-scaled FP8 matmul on Hopper and newer: the activations are rounded to
    FP8, which costs some 3 % of error.
    """
    codec = _check_linear_planes(x, planes, type, out_features, bias).codec
    flat = _flat(x)
    way = choose(codec.name, flat, out_features, planes=True)
    if way == "fp8":
        scaled = _cuda_verb("_scaled", "linear_fp8")
        assert scaled is not None
        out: Tensor = scaled(flat.contiguous(), tuple(planes)).to(x.dtype)
    elif way == "fused" and _aligned(planes):
        fused = _cuda_verb(codec.name, "linear")
        assert fused is not None
        out = x.new_empty((flat.shape[0], out_features))
        if out.numel():
            # Of the rows it takes the device alone: aligned planes are read instead.
            fused(flat.contiguous(), planes[0], out, planes=tuple(planes))
    else:
        out = _multiply(codec, flat, join_planes(type, planes), "workspace")
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], out_features)


@linear_planes.register_fake
def _(x: Tensor, planes: Sequence[Tensor], type: str, out_features: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check_linear_planes(x, planes, type, out_features, bias).out_features))


def _check_linear_planes(
    x: Tensor, planes: Sequence[Tensor], type: str, out_features: int, bias: Tensor | None
) -> Matrix:
    matrix = check_planes(type, planes, out_features)
    check_activations(matrix.codec, x, planes[0], matrix.row_len)
    check_bias(bias, out_features, x)
    return matrix


@torch.library.custom_op("ggufx::linear_planes_grad", mutates_args=())
def _linear_planes_grad(grad: Tensor, planes: Sequence[Tensor], type: str, in_features: int) -> Tensor:
    _check_linear_planes_grad(grad, planes, type, in_features)
    return _linear_grad(grad, join_planes(type, planes), type)


@_linear_planes_grad.register_fake
def _(grad: Tensor, planes: Sequence[Tensor], type: str, in_features: int) -> Tensor:
    _check_linear_planes_grad(grad, planes, type, in_features)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _check_linear_planes_grad(grad: Tensor, planes: Sequence[Tensor], type: str, in_features: int) -> None:
    matrix = check_planes(type, planes, grad.shape[-1] if grad.ndim else 0)
    check_grad(matrix.codec, grad, planes[0], matrix.out_features)
    if matrix.row_len != in_features:
        raise CodecError(f"in_features is {in_features}, but {matrix.codec.name} planes have rows of {matrix.row_len}")


def _keep_planes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, planes, ctx.type, *_ = inputs
    ctx.columns, ctx.n_planes = x.shape[-1], len(planes)
    ctx.save_for_backward(*planes)


def _linear_planes_twice_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_grad = linear_planes(grad, list(ctx.saved_tensors), ctx.type, ctx.columns)
    return grad_grad, [None] * ctx.n_planes, None, None


_linear_planes_grad.register_autograd(_linear_planes_twice_backward, setup_context=_keep_planes)


def _linear_planes_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _linear_planes_grad(grad, list(ctx.saved_tensors), ctx.type, ctx.columns)
    # As many as there were inputs: without a bias torch counts one less, and is strict where an input is a list.
    return (grad_x, [None] * ctx.n_planes, None, None, _bias_grad(ctx, grad, 4))[: len(ctx.needs_input_grad)]


linear_planes.register_autograd(_linear_planes_backward, setup_context=_keep_planes)


# many matrices, one x ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("ggufx::linears", mutates_args=())
def linears(
    x: Tensor, parts: Sequence[Tensor], counts: Sequence[int], type: str, out_features: Sequence[int]
) -> list[Tensor]:
    """Multiply the same activations by several matrices: as :func:`linear` and :func:`linear_planes` of each.

    Fused products share the preparation of ``x``, and each but the first may begin while the one before still runs.

    Parameters
    ----------
    x
        [..., row_len].
    parts, counts
        Of each matrix in turn its packed rows (a count of 1), or its planes.
    type
        Types of the matrices, with commas between them.
    out_features
        Rows of each matrix.

    Returns
    -------
    A tensor [..., R] of ``x``'s dtype for each matrix
    """
    matrices = _check_linears(x, parts, counts, type, out_features)
    flat = _flat(x).contiguous()
    # Before the activations are prepared: what comes after that may begin while the kernel before still runs.
    whole = [m.parts if len(m.parts) > 1 else [m.parts[0].contiguous()] for m in matrices]
    prepared: dict[int, Any] = {}
    outs = []
    for (codec, _, _, rows), own in zip(matrices, whole, strict=True):
        way = choose(codec.name, flat, rows, planes=len(own) > 1)
        if way != "fused" or not flat.numel() or not rows or (len(own) > 1 and not _aligned(own)):
            outs.append(_multiply_parts(codec, flat, own, rows))
        else:
            fused, prepare = _cuda_verb(codec.name, "linear"), _cuda_verb("_linear", "prepare")
            assert fused is not None
            assert prepare is not None
            order: Any = _cuda_verb(codec.name, "ORDER")
            if order not in prepared:
                prepared[order] = prepare(flat, order)
            out = x.new_empty((flat.shape[0], rows))
            fused(prepared[order], own[0], out, planes=tuple(own) if len(own) > 1 else None)
            outs.append(out)
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


def _check_linears(
    x: Tensor, parts: Sequence[Tensor], counts: Sequence[int], type: str, out_features: Sequence[int]
) -> list[Matrix]:
    matrices = check_matrices(parts, counts, type, out_features)
    for matrix in matrices:
        check_activations(matrix.codec, x, matrix.parts[0], matrix.row_len)
    return matrices


def _multiply_parts(codec: Codec, x: Tensor, own: list[Tensor], rows: int) -> Tensor:
    return _multiply(codec, x, own[0]) if len(own) == 1 else linear_planes(x, own, codec.name, rows)


@linears.register_fake
def _(
    x: Tensor, parts: Sequence[Tensor], counts: Sequence[int], type: str, out_features: Sequence[int]
) -> list[Tensor]:
    matrices = _check_linears(x, parts, counts, type, out_features)
    return [x.new_empty((*x.shape[:-1], matrix.out_features)) for matrix in matrices]


@torch.library.custom_op("ggufx::linears_grad", mutates_args=())
def _linears_grad(
    grads: Sequence[Tensor], parts: Sequence[Tensor], counts: Sequence[int], type: str, out_features: Sequence[int]
) -> Tensor:
    """Return the gradient of :func:`linears`' activations from those of its results: the sum over the matrices."""
    total: Tensor | None = None
    matrices = _check_linears_grad(grads, parts, counts, type, out_features)
    for grad, (codec, own, _, _) in zip(grads, matrices, strict=True):
        one = _linear_grad(grad, own[0] if len(own) == 1 else join_planes(codec.name, own), codec.name)
        total = one if total is None else total + one
    assert total is not None
    return total


@_linears_grad.register_fake
def _(
    grads: Sequence[Tensor], parts: Sequence[Tensor], counts: Sequence[int], type: str, out_features: Sequence[int]
) -> Tensor:
    matrices = _check_linears_grad(grads, parts, counts, type, out_features)
    return grads[0].new_empty((*grads[0].shape[:-1], matrices[0].row_len))


def _check_linears_grad(
    grads: Sequence[Tensor], parts: Sequence[Tensor], counts: Sequence[int], type: str, out_features: Sequence[int]
) -> list[Matrix]:
    matrices = check_matrices(parts, counts, type, out_features)
    if len(grads) != len(matrices):
        raise CodecError(f"{len(matrices)} matrices have {len(grads)} gradients: one for each")
    for grad, matrix in zip(grads, matrices, strict=True):
        check_grad(matrix.codec, grad, matrix.parts[0], matrix.out_features)
        if grad.shape[:-1] != grads[0].shape[:-1] or matrix.row_len != matrices[0].row_len:
            raise CodecError(
                f"gradients {[list(g.shape) for g in grads]} of matrices of rows {[m.row_len for m in matrices]} are not "
                "those of one x"
            )
    return matrices


def _keep_matrices(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, parts, ctx.counts, ctx.type, ctx.out_features = inputs
    ctx.n_parts = len(parts)
    ctx.save_for_backward(*parts)


def _linears_twice_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = linears(grad, list(ctx.saved_tensors), ctx.counts, ctx.type, ctx.out_features)
    return grads, [None] * ctx.n_parts, None, None, None


_linears_grad.register_autograd(_linears_twice_backward, setup_context=_keep_matrices)


def _linears_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        given = [grad.contiguous() for grad in grads]
        grad_x = _linears_grad(given, list(ctx.saved_tensors), ctx.counts, ctx.type, ctx.out_features)
    return grad_x, [None] * ctx.n_parts, None, None, None


linears.register_autograd(_linears_backward, setup_context=_keep_matrices)


# experts ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ggufx::experts", mutates_args=())
def experts(x: Tensor, packed: Tensor, expert_ids: Tensor, type: str) -> Tensor:
    """Multiply each token by the experts it is routed to; only these are decoded, each once.

    Parameters
    ----------
    x
        Activations [T, row_len].
    packed
        Stacked experts, uint8 [E, R, row_nbytes].
    expert_ids
        Integers [T, K], the experts of each token.
    type
        Name of the packed type.

    Returns
    -------
    [T, K, R] of ``x``'s dtype

    Raises
    ------
    IndexError
        An expert id is not below E. On a GPU few tokens' results are NaN instead: an error would wait for the device.
    CodecError
        Lengths or dtypes do not fit.
    """
    codec = check_routing(type, x, packed, expert_ids).codec
    tokens, k = expert_ids.shape
    out = x.new_empty((tokens, k, packed.shape[1]))
    if out.numel() == 0:
        return out
    # The kernel reads expert 0 in place of one that is not there.
    if tokens <= FUSED_BATCH and packed.numel() and runs_cuda(x.device) and x.dtype in CUDA_DTYPES:
        fused = _cuda_verb("experts", "linear")
        if fused is not None and _cuda_verb(codec.name, "linear") is not None:
            # As they are, where the kernel reads them: in 32 bits a number of 2^32 would name an expert.
            ids = expert_ids if expert_ids.dtype in (torch.int32, torch.int64) else expert_ids.long()
            fused(x.contiguous(), packed.contiguous(), ids.contiguous(), out, codec.name)
            return out
    flat = out.view(tokens * k, -1)
    for expert, pairs in _grouped(expert_ids, packed.shape[0]):
        flat[pairs] = _multiply(codec, x[pairs // k], packed[expert])
    return out


@experts.register_fake
def _(x: Tensor, packed: Tensor, expert_ids: Tensor, type: str) -> Tensor:
    return x.new_empty((*expert_ids.shape, check_routing(type, x, packed, expert_ids).out_features))


def _grouped(expert_ids: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(expert, positions in expert_ids.flatten() that name it)`` for each expert that is named."""
    flat = expert_ids.reshape(-1)
    order = flat.argsort(stable=True)
    hit, counts = torch.unique_consecutive(flat[order], return_counts=True)
    # One wait for the device, for all of them.
    for expert, pairs in zip(hit.tolist(), order.split(counts.tolist()), strict=True):
        if not 0 <= expert < count:
            raise IndexError(f"expert id {expert} is not one of {count} experts")
        yield expert, pairs


@torch.library.custom_op("ggufx::experts_grad", mutates_args=())
def _experts_grad(grad: Tensor, packed: Tensor, expert_ids: Tensor, type: str) -> Tensor:
    """Return the gradient [T, row_len] of :func:`experts`' activations from that of its result [T, K, R]."""
    _, _, row_len, _ = check_routing(type, grad, packed, expert_ids, grad=True)
    tokens, k = expert_ids.shape
    out = grad.new_zeros((tokens * k, row_len))
    flat = grad.reshape(tokens * k, packed.shape[1])
    if flat.numel():
        for expert, pairs in _grouped(expert_ids, packed.shape[0]):
            out[pairs] = _linear_grad(flat[pairs], packed[expert], type)
    # Summed per token at the end: an addition per expert would depend on their order.
    return out.view(tokens, k, out.shape[1]).sum(1)


@_experts_grad.register_fake
def _(grad: Tensor, packed: Tensor, expert_ids: Tensor, type: str) -> Tensor:
    matrix = check_routing(type, grad, packed, expert_ids, grad=True)
    return grad.new_empty((grad.shape[0], matrix.row_len))


def _keep_routing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, expert_ids, ctx.type = inputs
    ctx.save_for_backward(packed, expert_ids)


def _experts_twice_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    packed, expert_ids = ctx.saved_tensors
    return experts(grad, packed, expert_ids, ctx.type), None, None, None


_experts_grad.register_autograd(_experts_twice_backward, setup_context=_keep_routing)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
    packed, expert_ids = ctx.saved_tensors
    return (_experts_grad(grad, packed, expert_ids, ctx.type) if ctx.needs_input_grad[0] else None), None, None, None


experts.register_autograd(_experts_backward, setup_context=_keep_routing)
