"""Arrays that become tensors, and tensors that become arrays: what may be given to a writer, seen in one way.

A :class:`Described` is the shape, the dtype or the packed type of what was given, and a way to its rows, piece by piece.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.errors import BadValueError, CodecError, PlanError, quoted
from ggufx.file import Tensor
from ggufx.types import Codec, Effort, Objective

__all__ = [
    "Described",
    "Lazy",
    "Packed",
    "dequantize",
    "describe",
    "describe_by",
    "native_dtype",
    "packed_rows",
    "quantize_array",
    "type_for",
]

NATIVE: Final[dict[np.dtype[Any], str]] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.int8): "I8",
    np.dtype(np.int16): "I16",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}
"""Type of a tensor that keeps an array's dtype."""
_DTYPES: Final = {name: dtype for dtype, name in NATIVE.items()}
_DESCRIBERS: Final[list[tuple[type, Callable[[str, Any], Described]]]] = []
_READ_NBYTES: Final = 1 << 22
"""Bytes of a tensor of an open file that are read at a time."""
_PIECE_NBYTES: Final = 8 << 20
"""Bytes of an array that are written at a time."""
_CHUNK_LEN: Final = 1 << 23
"""Values that are encoded at a time."""


class Packed:
    """Packed bytes with their type: a tensor that a writer copies, and :func:`dequantize` decodes.

    Parameters
    ----------
    data
        uint8 [..., row_nbytes], or uint8 or ``bytes`` of the right total length where ``shape`` is given.
    type
        Name of the type, in any case.
    shape
        Logical shape, numpy order; by default ``data.shape[:-1] + (row_len,)``.

    Attributes
    ----------
    data : uint8 ``shape[:-1] + (row_nbytes,)``
    codec : Codec
    shape : tuple of int

    Raises
    ------
    UnknownType
        There is no type of that name.
    CodecError
        The bytes are not those of the shape.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> rows = ggufx.quantize_array(np.ones((4, 64), np.float32), "Q8_0")
    >>> ggufx.Packed(rows, "q8_0")
    <Packed Q8_0[4, 64] 272 bytes>
    """

    def __init__(
        self,
        data: npt.NDArray[np.uint8] | bytes | bytearray | memoryview,
        type: str,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.codec = types.get(type)
        array = np.asarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        if array.dtype != np.uint8:
            raise CodecError(f"packed data must be uint8, got {array.dtype}; .view(np.uint8) gives an array's bytes")
        layout = self.codec.layout
        if shape is None:
            if array.ndim == 0 or not isinstance(data, np.ndarray):
                raise CodecError(f"the shape of {self.codec.name} bytes is unknown; give one")
            shape = (*array.shape[:-1], layout.row_len(array.shape[-1]))
        self.shape = tuple(int(n) for n in shape)
        nbytes = layout.nbytes(self.shape)
        if array.size != nbytes:
            raise CodecError(f"{self.codec.name}{list(self.shape)} takes {nbytes} bytes, got {array.size}")
        self.data = array.reshape(*self.shape[:-1], layout.row_nbytes(self.shape[-1] if self.shape else 1))

    @property
    def type(self) -> str:
        """Name of the type."""
        return self.codec.name

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.data.size

    def __repr__(self) -> str:
        return f"<Packed {self.type}{list(self.shape)} {self.nbytes} bytes>"


@dataclass(frozen=True)
class Lazy:
    """An array that is made when its turn to be written comes, all at once or in runs of rows.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy dtype
        Of the values; ``ml_dtypes`` included.
    make : callable
        Returns the array, or an iterable of arrays ``[..., row_len]`` whose rows follow each other: with these a tensor
        that is larger than memory can be written.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> rows = (np.full((2, 64), number, np.float32) for number in range(3))
    >>> path, = ggufx.save("lazy.gguf", {"w": ggufx.Lazy((6, 64), np.float32, lambda: rows)})
    >>> ggufx.load_file(path)["w"][:, 0].tolist()
    [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    """

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    make: Callable[[], Any]


@dataclass(frozen=True)
class Described:
    """What a writer knows of a tensor before it looks at its values.

    Attributes
    ----------
    shape
        Numpy order.
    dtype
        Of the values; ``None`` for packed rows of a quant type.
    codec
        Type of packed rows; ``None`` for values.
    pieces
        Iterates over runs of consecutive rows: values ``[rows, row_len]`` of any dtype, or packed bytes, uint8.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    codec: Codec | None
    pieces: Callable[[], Iterator[npt.NDArray[Any]]]

    @property
    def row_len(self) -> int:
        """Elements of a row; a tensor without axes is one row of one."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Number of rows, outer axes flattened."""
        return prod(self.shape[:-1])


def describe(name: str, value: Any) -> Described:
    """Return what is known of a value that shall become a tensor; no array is copied or computed.

    Parameters
    ----------
    name
        Of the tensor, for messages.
    value
        A NumPy array (or an ``ml_dtypes`` one), a torch tensor or :class:`ggufx.torch.GGUFTensor`, a :class:`Packed`, a
        tensor of an open file, a :class:`Lazy`, or whatever has ``shape`` and ``dtype`` and becomes an array in
        ``numpy.asarray``.

    Raises
    ------
    PlanError
        It is none of these.
    """
    if isinstance(value, Described):
        return value
    if isinstance(value, Packed):
        return describe_rows(value.shape, value.codec, lambda: iter((value.data.reshape(-1),)))
    if isinstance(value, Tensor):
        return _of_tensor(name, value)
    if isinstance(value, Lazy):
        shape = tuple(int(n) for n in value.shape)
        return Described(shape, np.dtype(value.dtype), None, lambda: _made(name, shape, np.dtype(value.dtype), value))
    for kind, describer in _DESCRIBERS:
        if isinstance(value, kind):
            return describer(name, value)
    if isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ())):
        return _of_torch(name, value)
    found_shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(found_shape, tuple) or dtype is None:
        raise PlanError(
            f"tensor {quoted(name)}: a {type(value).__name__} is no array; give an array of NumPy or torch (np.asarray makes "
            "one of a list), a ggufx.Packed or a ggufx.Lazy"
        )
    return Described(found_shape, np.dtype(dtype), None, lambda: _rows(np.asarray(value)))


def describe_by(kind: type, describer: Callable[[str, Any], Described]) -> None:
    """Have :func:`describe` hand what is of a class to ``describer(name, value)``.

    The module of the class registers it so: this one imports nothing that is above it.
    """
    _DESCRIBERS.append((kind, describer))


def _of_torch(name: str, tensor: Any) -> Described:
    """Describe a torch tensor through its own methods, so that nobody has to import :mod:`ggufx.torch` for it."""
    dtype_name = str(tensor.dtype).removeprefix("torch.")
    try:
        dtype = np.dtype(getattr(ml_dtypes, dtype_name, dtype_name))
    except TypeError:
        raise PlanError(f"tensor {quoted(name)}: a GGUF has no type for {tensor.dtype}") from None
    if str(tensor.layout) != "torch.strided":
        raise PlanError(f"tensor {quoted(name)}: is of layout {tensor.layout}; to_dense() makes a dense tensor of it")
    shape = tuple(tensor.shape)

    def pieces() -> Iterator[npt.NDArray[Any]]:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            # As bytes: NumPy has no bfloat16, and torch no way to ml_dtypes'.
            data: npt.NDArray[Any] = flat.view(sys.modules["torch"].uint8).numpy()
            yield data.view(dtype).reshape(-1, shape[-1] if shape else 1)

    return Described(shape, dtype, None, pieces)


def describe_rows(shape: tuple[int, ...], codec: Codec, pieces: Callable[[], Iterator[npt.NDArray[Any]]]) -> Described:
    """Return what is known of packed rows, which ``pieces`` iterates over; those of a plain type are values of its dtype."""
    dtype = _DTYPES.get(codec.name)
    if dtype is None:
        return Described(shape, None, codec, pieces)
    row_len = shape[-1] if shape else 1
    return Described(shape, dtype, None, lambda: (piece.view(dtype).reshape(-1, row_len) for piece in pieces()))


def _of_tensor(name: str, tensor: Tensor) -> Described:
    if tensor.codec is None:
        raise PlanError(
            f"tensor {quoted(name)}: {quoted(tensor.name)} of {tensor.path} is {tensor.type_label}, a type without a codec; "
            "ggufx.rewrite copies tensors of unknown types"
        )
    _ = tensor.file_offset  # raises for a big-endian file
    return describe_rows(tensor.shape, tensor.codec, lambda: tensor.packed_rows(_READ_NBYTES))


def _rows(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Cut an array into runs of rows [n, row_len] without copying more than a part of it."""
    if array.ndim > 2 and not array.flags.c_contiguous:
        for part in array:
            yield from _rows(part)
    elif array.size:
        yield array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _called(described: Described) -> str:
    """Return what messages call the values or the packed rows of a tensor."""
    return described.codec.name if described.codec is not None else str(described.dtype)


def _made(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], lazy: Lazy) -> Iterator[npt.NDArray[Any]]:
    made = lazy.make()
    whole = not isinstance(made, Iterable) or hasattr(made, "shape")
    for part in [made] if whole else made:
        found = describe(name, part)
        if found.dtype != dtype or (found.shape != shape if whole else found.shape[-1:] != shape[-1:]):
            raise PlanError(
                f"tensor {quoted(name)}: was declared as {dtype}{list(shape)} and its make() gives "
                f"{found.dtype or _called(found)}{list(found.shape)}"
            )
        yield from found.pieces()


def type_for(name: str, described: Described, wanted: str | None) -> Codec:
    """Return the type that a tensor will have.

    Parameters
    ----------
    name
        Of the tensor, for messages.
    described
        What was given.
    wanted
        Name of a type; ``None``: the one that keeps every bit.

    Raises
    ------
    UnknownType
        There is no type of that name.
    PlanError
        Packed rows are wanted as another type.
    CodecError
        The dtype has no type of its own, and none that it may become was named.
    """
    codec = None if wanted is None else types.get(wanted)
    if described.codec is not None:
        if codec not in (None, described.codec):
            raise PlanError(
                f"tensor {quoted(name)}: is packed as {described.codec.name}; to make {wanted} of it, give its values "
                "(ggufx.dequantize), which lose twice then"
            )
        return described.codec
    assert described.dtype is not None
    own = NATIVE.get(described.dtype.newbyteorder("="))
    if codec is None and own is not None:
        return types.get(own)
    if described.dtype == np.uint8:
        raise CodecError(
            f"tensor {quoted(name)}: uint8 is no type of a GGUF; give packed bytes as ggufx.Packed(data, type), and numbers as "
            "int16 or float32"
        )
    if codec is None:
        raise CodecError(
            f"tensor {quoted(name)}: a GGUF has no type that keeps {described.dtype}; name a type to convert to, such as F32, "
            f"or give one of {', '.join(map(str, NATIVE))}"
        )
    if described.dtype.kind not in "iuf" and not described.dtype.name.startswith(("bfloat", "float")):
        raise CodecError(f"tensor {quoted(name)}: values must be real numbers, got {described.dtype}")
    if own != codec.name and not codec.can_encode:
        raise CodecError(f"tensor {quoted(name)}: ggufx cannot encode {codec.name}; `ggufx types` lists what it can")
    return codec


def packed_rows(
    shape: tuple[int, ...],
    codec: Codec,
    described: Described,
    importance: npt.ArrayLike | None,
    effort: Effort,
    objective: Objective,
    threads: int | None,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Iterate over a tensor's bytes as they will lie in the file, uint8 [n].

    Parameters
    ----------
    shape, codec
        Of the tensor, as :func:`type_for` chose the type.
    described
        What was given.
    importance
        Weights [row_len] or [experts, row_len]; types without a search ignore them.
    effort, objective, threads
        As in :func:`quantize_array`.

    Raises
    ------
    PlanError
        Rows have another length than the shape says.
    CodecError, OutOfRangeError
        As :func:`quantize_array`; the row is that of the whole tensor.
    """
    dtype = described.dtype
    if dtype is None:
        for piece in described.pieces():
            yield piece.reshape(-1)
        return
    row_len = described.row_len
    keeps = NATIVE.get(dtype.newbyteorder("=")) == codec.name
    rows_per_expert = shape[-2] if len(shape) == 3 else 0
    searches = not keeps and codec.layout.block_len > 1
    weights = _weights(shape, importance) if searches else None
    step = max(1, (_PIECE_NBYTES // dtype.itemsize if keeps else _CHUNK_LEN) // max(1, row_len))
    done = 0
    for piece in described.pieces():
        if piece.shape[-1] != row_len:
            raise PlanError(f"rows of {piece.shape[-1]} elements came, {list(shape)} has rows of {row_len}")
        start = 0
        while start < len(piece):
            expert, row = divmod(done, rows_per_expert) if weights is not None and len(weights) > 1 else (0, 0)
            count = step if weights is None or len(weights) == 1 else min(step, rows_per_expert - row)
            part = piece[start : start + count]
            if keeps:
                yield np.ascontiguousarray(part, dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            else:
                try:
                    yield codec.encode(
                        part,
                        None if weights is None else weights[expert],
                        effort=effort,
                        objective=objective,
                        saturate=False,
                        threads=threads,
                    ).reshape(-1)
                except BadValueError as error:
                    raise error.moved(done, rows_per_expert) from None
            start += len(part)
            done += len(part)


def _weights(shape: tuple[int, ...], importance: npt.ArrayLike | None) -> npt.NDArray[np.float32] | None:
    """Return importance as [1, row_len], or [experts, row_len]."""
    if importance is None:
        return None
    weights = np.asarray(importance, np.float32)
    if weights.ndim == 1:
        weights = weights[None]
    experts = shape[0] if len(shape) == 3 else 1
    if weights.ndim != 2 or weights.shape[-1:] != shape[-1:] or len(weights) not in (1, experts):
        raise CodecError(f"importance of {list(weights.shape)} does not fit {list(shape)}: a weight for each column")
    return weights


def native_dtype(codec: Codec) -> np.dtype[Any] | None:
    """Return the dtype of a type of plain numbers as it is stored; ``None`` for a quant type."""
    return _DTYPES.get(codec.name)


def dequantize(
    packed: npt.ArrayLike | Packed | Tensor,
    type: str | None = None,
    shape: tuple[int, ...] | None = None,
    *,
    dtype: npt.DTypeLike | None = None,
    out: npt.NDArray[Any] | None = None,
    threads: int | None = None,
) -> npt.NDArray[Any]:
    """Decode packed bytes of a type.

    Parameters
    ----------
    packed
        uint8 [..., row_nbytes], or any uint8 array of the right total length when ``shape`` is given; or a
        :class:`Packed`, or a tensor of an open file, which know their type.
    type
        Name of the type, in any case.
    shape
        Logical shape, numpy order; by default ``packed.shape[:-1] + (row_len,)``.
    dtype
        float32, float16, bfloat16 (``ml_dtypes``) or float64; by default float32, and the stored dtype of integers and
        float64.
    out
        C-contiguous array of ``shape`` and ``dtype`` to fill.
    threads
        Threads at most; default: up to the CPU count, for large tensors.

    Returns
    -------
    ndarray of ``shape``

    Raises
    ------
    UnknownType, UnsupportedType
        There is no type of that name, or no decoder for it.
    CodecError
        Lengths, shapes or dtypes do not fit; or the type is not given.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> rows = ggufx.quantize_array(np.arange(32, dtype=np.float32)[None], "Q8_0")
    >>> ggufx.dequantize(rows, "Q8_0").shape
    (1, 32)
    >>> ggufx.dequantize(rows.tobytes(), "Q8_0", (2, 16))
    Traceback (most recent call last):
    ggufx.errors.CodecError: a row of 16 elements is not a multiple of the block of 32 elements
    """
    if isinstance(packed, Tensor):
        return packed.numpy(dtype, out=out, threads=threads)
    if isinstance(packed, Packed):
        return packed.codec.decode(packed.data, packed.shape, dtype=dtype, out=out, threads=threads)
    if type is None:
        raise CodecError("the type of packed bytes is not known; name it, as in dequantize(packed, 'Q4_K')")
    data = np.frombuffer(packed, np.uint8) if isinstance(packed, bytes | bytearray | memoryview) else packed
    return types.get(type).decode(data, shape, dtype=dtype, out=out, threads=threads)


def quantize_array(
    values: npt.ArrayLike,
    type: str,
    importance: npt.ArrayLike | None = None,
    *,
    effort: Effort = "normal",
    objective: Objective = "reference",
    saturate: bool = False,
    out: npt.NDArray[np.uint8] | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Quantize an array to packed rows of a type.

    Parameters
    ----------
    values
        Real numbers [..., row_len], finite. With :mod:`ggufx.torch` a torch tensor gives a torch tensor on its device.
    type
        Name of the type, in any case.
    importance
        Non-negative weights [row_len] of the columns, as a row of an importance matrix has them. A few types below two and a
        half bits need them.
    effort, objective
        How long the encoder searches, and what it minimises: see :meth:`ggufx.types.Codec.encode`.
    saturate
        ``True`` takes values beyond the type's range for the largest that it holds; by default they are an error.
    out
        C-contiguous uint8 [..., row_nbytes] to fill.
    threads
        Threads at most; default: up to the CPU count, for large arrays. The bytes do not depend on it.

    Returns
    -------
    uint8 [..., row_nbytes], as :class:`Packed` and :func:`dequantize` take them

    Raises
    ------
    UnknownType, UnsupportedType
        There is no type of that name, or no encoder for it.
    CodecError
        A row is no multiple of the block, a value is NaN or infinite (naming row and column), or weights do not fit.
    OutOfRangeError
        A value is beyond what the type's scales can hold.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> ggufx.quantize_array(np.zeros((3, 512), np.float32), "Q4_K").shape
    (3, 288)
    """
    return types.get(type).encode(
        values, importance, effort=effort, objective=objective, saturate=saturate, out=out, threads=threads
    )
