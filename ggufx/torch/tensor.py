"""A packed tensor on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import EllipsisType
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from ggufx import types
from ggufx.errors import CodecError, UnknownType
from ggufx.torch import ops
from ggufx.torch.arguments import check_bias, check_planes
from ggufx.torch.decoding import dtype_of
from ggufx.types import Codec

__all__ = ["GGUFTensor", "autocast", "checked_bias", "linear", "linear_of", "linears"]

Index: TypeAlias = int | slice | EllipsisType | list[int] | Tensor


class GGUFTensor:
    """Packed bytes on a device, with what decodes them.

    Parameters
    ----------
    packed
        uint8 [..., row_nbytes]; flat uint8 [nbytes] of a tensor without axes or of a type that no dialect knows.
    codec
        The type, or its name; ``None`` for one that no dialect knows: such a tensor moves, but does not decode.
    shape
        Logical shape, the last axis is the row; by default what ``packed`` holds.
    dtype
        What :meth:`dequantize` gives by default; ``None``: float32, or the stored dtype of integers and float64.
    name, type
        For messages; the type's name by default the codec's.
    planes
        Codes and scales in tensors of their own, instead of ``packed`` (see :meth:`with_planes`).
    scale
        float32 that broadcasts to ``shape`` with a last axis of 1: the factor of :attr:`ggufx.file.Tensor.scale`, which
        decoded values and products have and the bytes have not.

    Raises
    ------
    CodecError
        The bytes are not those of the shape.
    TypeError
        ``dtype`` is not torch's.
    """

    def __init__(
        self,
        packed: Tensor | None,
        codec: Codec | str | None,
        shape: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        name: str = "",
        type: str | None = None,
        planes: Sequence[Tensor] | None = None,
        scale: Tensor | None = None,
    ) -> None:
        if isinstance(codec, str):
            codec = types.get(codec)
        if (packed is None) == (planes is None):
            raise CodecError("a tensor is either packed or in planes")
        if shape is None:
            if packed is None or codec is None or packed.ndim == 0:
                raise CodecError("the shape is unknown: give one")
            shape = (*packed.shape[:-1], codec.layout.row_len(packed.shape[-1]))
        _check_dtype(dtype)
        self.name = name
        self.codec = codec
        self.type = type or ("unknown" if codec is None else codec.name)
        self.shape = tuple(shape)
        self.planes = None if planes is None else tuple(planes)
        self.scale = scale
        self._dtype = dtype
        if packed is not None:
            nbytes = packed.numel() if codec is None else codec.layout.nbytes(self.shape)
            if packed.dtype != torch.uint8 or packed.numel() != nbytes:
                raise CodecError(
                    f"{self.type}{list(self.shape)} takes {nbytes} bytes of torch.uint8, got {packed.dtype}"
                    f"{list(packed.shape)}"
                )
            if codec is not None and self.shape:
                packed = packed.reshape(*self.shape[:-1], codec.layout.row_nbytes(self.shape[-1]))
        else:
            assert planes is not None
            got = [list(plane.shape) for plane in planes]
            if codec is None or len(self.shape) != 2 or got[:1] != [list(self.shape)]:
                raise CodecError(f"planes {got} do not make up {self.type}{list(self.shape)}")
            check_planes(codec.name, planes, self.shape[0])
        self._packed = packed

    @property
    def packed(self) -> Tensor:
        """The bytes as they lie in the file, uint8 ``shape[:-1] + (row_nbytes,)``; made anew where they are in planes."""
        if self._packed is not None:
            return self._packed
        assert self.planes is not None
        assert self.codec is not None
        rows = ops.join_planes(self.codec.name, self.planes)
        return rows.view(*self.shape[:-1], rows.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self._parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """What :meth:`dequantize` gives by default."""
        return dtype_of(self._known()) if self._dtype is None else self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(part.nbytes for part in self._parts)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode: the CPU decoder's bits, rounded to ``dtype`` (default :attr:`dtype`), on the same device.

        Raises
        ------
        UnknownType, UnsupportedType
            No dialect knows the type, or it has no decoder.
        CodecError
            ``dtype`` is neither a float of 16, 32 or 64 bits nor the stored dtype of integers.
        """
        codec = self._known()
        _check_dtype(dtype)
        dtype = self.dtype if dtype is None else dtype
        packed = self.packed if self.shape else self.packed.view(1, -1)
        if self.scale is None:
            return ops.dequantize(packed, codec.name, dtype).view(self.shape)
        # A half float may not hold what stands before the product.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (ops.dequantize(packed, codec.name, wide).view(self.shape) * self.scale).to(dtype)

    def with_planes(self) -> GGUFTensor:
        """Return the tensor with codes and scales in memory of their own; itself, if its type has no such form.

        Products of F8_E4M3_B128 read planes faster than blocks of 129 bytes. Slices and :attr:`packed` cost a copy then.
        """
        if self.codec is None or self._packed is None or self.ndim != 2:
            return self
        planes = ops.split_planes(self.codec.name, self._packed)
        return self if planes is None else self._like(None, self.shape, planes, scale=self.scale)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> GGUFTensor:
        """Return the tensor on ``device``, decoding to ``dtype`` by default; itself where nothing changes."""
        if isinstance(device, torch.dtype):  # as torch.Tensor.to(dtype)
            device, dtype = None, device
        target = self.device if device is None else torch.empty(0, device=device).device
        if target == self.device and dtype in (None, self._dtype):
            return self
        parts = [part.to(target, non_blocking=non_blocking) for part in self._parts[:2]]
        scale = None if self.scale is None else self.scale.to(target, non_blocking=non_blocking)
        if self.planes is None:
            return self._like(parts[0], self.shape, None, dtype or self._dtype, scale)
        if target != self.device:
            name = self._known().name
            return self._like(None, self.shape, ops.split_planes(name, ops.join_planes(name, parts)), dtype, scale)
        return self._like(None, self.shape, self.planes, dtype, scale)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> GGUFTensor:
        """Return a slice along all axes but the last one, still packed: a view where torch gives one.

        Integers, slices, ``...``, lists and integer tensors, as in torch.
        """
        parts = index if isinstance(index, tuple) else (index,)
        outer = max(0, self.ndim - 1)
        named = sum(part is not Ellipsis for part in parts)
        # An ellipsis at the end stands for the row, too; what follows an earlier one would name the row.
        if named > outer or any(part is Ellipsis for part in parts[:-1]):
            raise IndexError(
                f"a packed tensor of {self.ndim} axes is cut along the first {outer} only, got {len(parts)} indices; "
                "dequantize() first to cut rows"
            )
        if any(part is None or isinstance(part, (bool, float, str)) for part in parts):
            raise IndexError("only integers, slices, ..., lists and integer tensors index a packed tensor")
        self._known()
        packed = self.packed[parts]
        scale = None if self.scale is None else self.scale.expand(*self.shape[:-1], 1)[parts]
        return self._like(packed, (*packed.shape[:-1], *self.shape[-1:]), scale=scale)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __iter__(self) -> Iterator[GGUFTensor]:
        if self.ndim < 2:
            raise TypeError("a packed row is not iterated over; dequantize() first")
        return (self[number] for number in range(len(self)))

    def cpu(self) -> GGUFTensor:
        """Return the tensor in the host's memory, as :meth:`to`."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None, *, non_blocking: bool = False) -> GGUFTensor:
        """Return the tensor on a CUDA device, the current one by default, as :meth:`to`."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Serve ``torch.nn.functional.linear(x, w, bias)``; no other function of torch's takes a packed tensor."""
        if function is torch.nn.functional.linear:
            return linear(*args, **_renamed(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"torch's {name} does not take a packed tensor; dequantize() first, or use ggufx.torch.linear")

    def __reduce__(self) -> tuple[Any, ...]:
        # By the type's name and what is stored: torch.load(weights_only=True) takes it, and no code object travels.
        parts = list(self._parts[:2])
        codec = None if self.codec is None else self.codec.name
        return _restored, (parts, codec, self.shape, self._dtype, self.name, self.type)

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        # Else numpy would take what can be indexed for a list.
        raise TypeError("a packed tensor is no array; dequantize() first")

    def __repr__(self) -> str:
        name = f"{self.name} " if self.name else ""
        planes = "" if self.planes is None else ", planes"
        return f"<GGUFTensor {name}{self.type}{list(self.shape)} {self.nbytes} bytes, {self.device}{planes}>"

    @property
    def _parts(self) -> Sequence[Tensor]:
        if self.planes is not None:
            return self.planes
        assert self._packed is not None
        return (self._packed,)

    def _like(
        self,
        packed: Tensor | None,
        shape: Sequence[int],
        planes: Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
        scale: Tensor | None = None,
    ) -> GGUFTensor:
        return GGUFTensor(
            packed,
            self.codec,
            shape,
            dtype=dtype or self._dtype,
            name=self.name,
            type=self.type,
            planes=planes,
            scale=scale,
        )

    def _known(self) -> Codec:
        if self.codec is None:
            raise UnknownType(
                f"tensor {self.name!r} is of type {self.type}, which ggufx has no decoder for; it can be moved, not decoded"
            )
        return self.codec


def _renamed(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords of torch's linear by the names that ours has."""
    return {{"input": "x", "weight": "w"}.get(name, name): value for name, value in keywords.items()}


def _restored(
    parts: list[Tensor], codec: str | None, shape: Sequence[int], dtype: torch.dtype | None, name: str, type: str
) -> GGUFTensor:
    """Return the tensor of which ``GGUFTensor.__reduce__`` gave the parts: packed bytes, or codes and scales."""
    known = None if codec is None else types.get(codec)
    if len(parts) == 1:
        return GGUFTensor(parts[0], known, shape, dtype=dtype, name=name, type=type)
    assert codec is not None
    # What a kernel makes of the scales belongs to its device, where they may be another's now.
    planes = ops.split_planes(codec, ops.join_planes(codec, parts))
    return GGUFTensor(None, known, shape, dtype=dtype, name=name, type=type, planes=planes)


torch.serialization.add_safe_globals([_restored])


def linear(x: Tensor, w: GGUFTensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a packed matrix: ``x`` [..., in], ``w`` [out, in], ``bias`` [out] -> [..., out] of ``x``'s dtype.

    Up to eight rows go through a fused CUDA kernel where the type has one; more rows, and other devices, through a decoded
    workspace and torch's matmul; a tensor in planes through FP8 where that is faster (see :func:`ggufx.torch.ops.choose`).
    Gradients reach ``x`` and ``bias``; the weight is frozen.

    Under autocast ``x`` is cast as for torch's own linear.

    Raises
    ------
    CodecError
        Shapes, dtypes or devices do not fit.
    UnknownType, UnsupportedType
        No dialect knows the type, or it has no decoder.
    TypeError
        A weight is not a GGUFTensor, or a bias is one.
    """
    codec = _matrix(w, "linear takes a matrix")
    if w.scale is not None:
        return _scaled(x, w, bias)
    return linear_of(x, w.planes, None if w.planes is not None else w.packed, codec.name, w.shape[0], bias)


def _scaled(x: Tensor, w: GGUFTensor, bias: Tensor | None) -> Tensor:
    """Multiply by a matrix with a factor, which comes after the product and before the bias."""
    assert w.scale is not None
    x = autocast(x)
    added = checked_bias(bias, w.shape[0], x.dtype)
    # What stands before the factor is beyond a half float where weights are small.
    wide = x.float() if x.dtype == torch.float16 else x
    packed = None if w.planes is not None else w.packed
    y = linear_of(wide, w.planes, packed, w._known().name, w.shape[0], None)
    scaled = (y * w.scale.expand(w.shape[0], 1).reshape(-1)).to(x.dtype)
    return scaled if added is None else scaled + added


def _matrix(w: GGUFTensor, what: str) -> Codec:
    if not isinstance(w, GGUFTensor):
        raise TypeError(f"{what} (GGUFTensor), got {type(w).__name__}")
    if w.ndim != 2:
        raise CodecError(f"{what}, {w!r} has {w.ndim} axes")
    return w._known()


def linears(x: Tensor, weights: Sequence[GGUFTensor], biases: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Multiply the same ``x`` by several matrices, such as those of query, key and value, or gate and up.

    The results are those of :func:`linear` for each. On a GPU a few rows of activations are prepared once for all matrices
    whose types read them in the same order, and the products run into each other.

    Parameters
    ----------
    x
        [..., in].
    weights
        Matrices [out, in], each of its own type and length.
    biases
        [out] or ``None`` for each.

    Returns
    -------
    A tensor [..., out] of ``x``'s dtype for each matrix

    Raises
    ------
    CodecError
        Shapes, dtypes or devices do not fit.
    UnknownType, UnsupportedType
        No dialect knows the type, or it has no decoder.
    TypeError
        A weight is not a GGUFTensor, or a bias is one.
    """
    # Whatever can be gone through, but more than once.
    weights, biases = list(weights), None if biases is None else list(biases)
    codecs = [_matrix(w, "linears takes matrices") for w in weights]
    if biases is not None and len(biases) != len(weights):
        raise CodecError(f"{len(weights)} matrices have {len(biases)} biases: one for each, or None")
    if not weights:
        return []
    if any(w.scale is not None for w in weights):
        return [linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    x = autocast(x)
    added = [
        checked_bias(b, w.shape[0], x.dtype) for w, b in zip(weights, biases or [None] * len(weights), strict=True)
    ]
    parts = [list(w.planes) if w.planes is not None else [w.packed] for w in weights]
    outs = ops.linears(
        x,
        [part for own in parts for part in own],
        [len(own) for own in parts],
        ",".join(codec.name for codec in codecs),
        [w.shape[0] for w in weights],
    )
    return [y if b is None else y + b for y, b in zip(outs, added, strict=True)]


def linear_of(
    x: Tensor, planes: Sequence[Tensor] | None, packed: Tensor | None, type: str, out_features: int, bias: Tensor | None
) -> Tensor:
    """Multiply by planes or packed rows, whichever is given; see :func:`linear`."""
    x = autocast(x)
    bias = checked_bias(bias, out_features, x.dtype)
    if packed is not None:
        return ops.linear(x, packed, type, bias)
    assert planes is not None
    return ops.linear_planes(x, list(planes), type, out_features, bias)


def checked_bias(bias: Tensor | None, rows: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return a bias in the activations' dtype; raises CodecError or TypeError for one that does not fit."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        hint = "; dequantize() it first" if isinstance(bias, GGUFTensor) else ""
        raise TypeError(f"a bias is a torch.Tensor, got {type(bias).__name__}{hint}")
    check_bias(bias, rows)
    return bias if dtype is None else bias.to(dtype)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is a torch.dtype or None, got {dtype!r}")


def autocast(x: Tensor) -> Tensor:
    """Return activations in the dtype that torch.autocast asks for, where it is on."""
    if not isinstance(x, Tensor):
        raise TypeError(f"activations are a torch.Tensor, got {type(x).__name__}")
    device = x.device.type
    # Devices without autocast, such as meta, refuse to be asked whether it is on.
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
