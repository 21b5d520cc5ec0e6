"""Modules over packed weights: frozen, as small as the file, and as trainable around them as any layer.

A module's state is its packed bytes (or its planes), its bias and the type's name, so that bytes of another type are refused
and not taken for numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ggufx import types
from ggufx.errors import CodecError
from ggufx.torch import ops
from ggufx.torch.tensor import GGUFTensor, autocast, checked_bias, linear_of

__all__ = ["GGUFEmbedding", "GGUFExperts", "GGUFLinear"]


class _Packed(nn.Module):
    """A module with one packed weight of ``ndim`` axes."""

    ndim: int
    codes: Tensor
    scales: Tensor

    def __init__(self, weight: GGUFTensor) -> None:
        super().__init__()
        if not isinstance(weight, GGUFTensor):
            raise TypeError(f"{type(self).__name__} takes a weight as a GGUFTensor, got {type(weight).__name__}")
        if weight.codec is None or weight.ndim != self.ndim:
            raise CodecError(
                f"{type(self).__name__} takes a weight of {self.ndim} axes and a known type, got {weight!r}"
            )
        if weight.scale is not None:
            raise CodecError(
                f"{weight!r} has a factor of its own (scale), which {type(self).__name__} does not keep; use "
                "ggufx.torch.linear, or dequantize() it"
            )
        self.type_name = weight.codec.name
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.in_planes = weight.planes is not None
        if weight.planes is None:
            # A cut through experts has gaps: kernels and formats of state dicts would copy it every time.
            self.register_buffer("weight", weight.packed.contiguous())
        else:
            codes, scales, *made = weight.planes
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)
            self._made, self._made_of = tuple(made), scales

    @classmethod
    def _empty(cls, shape: Sequence[int], type: str, device: Any, dtype: torch.dtype | None) -> GGUFTensor:
        codec = types.get(type)
        packed = torch.zeros((*shape[:-1], codec.layout.row_nbytes(shape[-1])), dtype=torch.uint8, device=device)
        return GGUFTensor(packed, codec, tuple(shape), dtype=dtype)

    @property
    def planes(self) -> tuple[Tensor, ...] | None:
        """Codes, scales and what a kernel made of these; ``None`` where the weight is packed."""
        if not self.in_planes:
            return None
        codes, scales = self.codes, self.scales
        # Export, functional_call and replicas put other buffers in their places, without a word.
        return (codes, scales, *self._made) if scales is self._made_of else (codes, scales)

    def _renew_planes(self) -> None:
        """Make the planes of the buffers, which may be others now, or elsewhere."""
        parts = [self.codes, self.scales]
        # A state in several pieces may bring one before the other.
        if self.codes.device == self.scales.device:
            parts = ops.split_planes(self.type_name, ops.join_planes(self.type_name, parts)) or parts
        self.codes, self.scales, *made = parts
        self._made, self._made_of = tuple(made), self.scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, as every module; a cast leaves the bytes alone and says what they decode to, where that is floats."""
        super()._apply(fn, recurse)
        if self.dtype.is_floating_point:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.in_planes:
            self._renew_planes()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load, as every module, but nothing of another type; the state of the planes may come without the type's name."""
        if prefix + "_extra_state" in state_dict:
            self.set_extra_state(state_dict[prefix + "_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.in_planes and (prefix + "codes" in state_dict or prefix + "scales" in state_dict):
            self._renew_planes()

    def gguf(self) -> GGUFTensor:
        """Return the weight."""
        packed = None if self.in_planes else self.get_buffer("weight")
        return GGUFTensor(packed, types.get(self.type_name), self.shape, dtype=self.dtype, planes=self.planes)

    def get_extra_state(self) -> Tensor:
        """Return the type's name as bytes: a tensor, so that every format of state dicts can hold it."""
        return torch.tensor(list(self.type_name.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state of another type; raises CodecError."""
        name = bytes(torch.as_tensor(state).tolist()).decode()
        if name != self.type_name:
            raise CodecError(f"the state is of type {name}, the module of type {self.type_name}")

    def extra_repr(self) -> str:
        """Return type and shape for ``print(module)``."""
        return f"{self.type_name}{list(self.shape)}" + (", planes" if self.in_planes else "")


class GGUFLinear(_Packed):
    """``y = x @ w.T + bias`` with ``w`` packed; the result has ``x``'s dtype.

    Parameters
    ----------
    weight
        [out_features, in_features].
    bias
        [out_features], frozen like the weight; it is cast to ``x``'s dtype.
    """

    ndim = 2
    bias: Tensor | None

    def __init__(self, weight: GGUFTensor, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = self.shape
        bias = checked_bias(bias, self.out_features)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        type: str,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a module of zero bytes, to load a state dict into."""
        weight = cls._empty((out_features, in_features), type, device, dtype)
        return cls(weight, torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., in_features] -> [..., out_features]."""
        packed = None if self.in_planes else self.get_buffer("weight")
        return linear_of(x, self.planes, packed, self.type_name, self.out_features, self.bias)


class GGUFEmbedding(_Packed):
    """Rows of a packed matrix by number: only the rows that are looked up are decoded.

    Parameters
    ----------
    weight
        [num_embeddings, embedding_dim].
    dtype
        Of the result; by default what the weight decodes to.
    """

    ndim = 2

    def __init__(self, weight: GGUFTensor, *, dtype: torch.dtype | None = None) -> None:
        if isinstance(weight, GGUFTensor):
            weight = GGUFTensor(
                weight.packed,
                weight.codec,
                weight.shape,
                dtype=dtype or weight.dtype,
                name=weight.name,
                scale=weight.scale,
            )
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = self.shape

    @classmethod
    def empty(
        cls, num_embeddings: int, embedding_dim: int, type: str, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return a module of zero bytes, to load a state dict into."""
        return cls(cls._empty((num_embeddings, embedding_dim), type, device, dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: integers [...] -> [..., embedding_dim]."""
        rows = self.get_buffer("weight").index_select(0, ids.reshape(-1))
        return ops.dequantize(rows, self.type_name, self.dtype).view(*ids.shape, self.embedding_dim)


class GGUFExperts(_Packed):
    """Stacked experts: each token times the experts it is routed to, only these decoded, each once for all its tokens.

    Parameters
    ----------
    weight
        [experts, out_features, in_features].
    """

    ndim = 3

    def __init__(self, weight: GGUFTensor) -> None:
        super().__init__(weight)
        self.num_experts, self.out_features, self.in_features = self.shape

    @classmethod
    def empty(
        cls,
        num_experts: int,
        in_features: int,
        out_features: int,
        type: str,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a module of zero bytes, to load a state dict into."""
        return cls(cls._empty((num_experts, out_features, in_features), type, device, dtype))

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """Multiply: ``x`` [T, in], or [T, K, in] for one row an expert, ``expert_ids`` integers [T, K] -> [T, K, out]."""
        weight, x = self.get_buffer("weight"), autocast(x)
        if x.ndim != 3 or expert_ids.ndim != 2:
            return ops.experts(x, weight, expert_ids, self.type_name)
        if x.shape[:-1] != expert_ids.shape:
            raise CodecError(f"activations {list(x.shape)} do not fit expert ids {list(expert_ids.shape)}")
        flat = ops.experts(x.flatten(0, 1), weight, expert_ids.reshape(-1, 1), self.type_name)
        return flat.view(*expert_ids.shape, self.out_features)
