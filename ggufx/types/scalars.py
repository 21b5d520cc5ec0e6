"""The plain number types: a block is one element."""

from __future__ import annotations

from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ggufx.errors import CodecError
from ggufx.types.codec import F32 as Floats
from ggufx.types.codec import U8, Codec, Layout, Search
from ggufx.types.words import Array, Fields, Words


class _Scalar(Codec):
    """A type whose element is one number of ``stored``; integers and float64 decode to themselves, not to float32."""

    stored: ClassVar[np.dtype[Any]]
    reproduces: ClassVar = True

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Reinterpret, then widen if the value dtype is wider; exact."""
        return w.cast(w.stored(block["value"], self.stored.str[1:]), self.value_dtype.str[1:])

    def encode_rows(self, values: Floats, out: U8, importance: Floats | None, search: Search) -> None:
        """Round to the stored dtype (nearest, ties to even); importance changes nothing."""
        with np.errstate(over="ignore", invalid="ignore"):
            stored = values.astype(self.stored)
        if self.stored.kind in "iu" and not np.array_equal(stored, values):
            raise CodecError(f"{self.name} holds integers; a value is not one or is out of range")
        out[...] = stored.view(np.uint8)


def _layout(dtype: npt.DTypeLike) -> Layout:
    return Layout(1, np.dtype([("value", dtype)]))


class F32(_Scalar):
    """float32."""

    stored: ClassVar = np.dtype("<f4")
    layout: ClassVar = _layout("<f4")
    ids: ClassVar = {"llama.cpp": 0}
    file_types: ClassVar = {"llama.cpp": 0}
    lossy: ClassVar = False


class F16(_Scalar):
    """IEEE binary16."""

    stored: ClassVar = np.dtype("<f2")
    layout: ClassVar = _layout("<f2")
    ids: ClassVar = {"llama.cpp": 1}
    file_types: ClassVar = {"llama.cpp": 1}


class BF16(_Scalar):
    """bfloat16: the upper half of a float32."""

    stored: ClassVar = np.dtype(ml_dtypes.bfloat16)
    layout: ClassVar = _layout("<u2")
    ids: ClassVar = {"llama.cpp": 30}
    file_types: ClassVar = {"llama.cpp": 32}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Shift the bits up, which keeps NaN payloads, too."""
        return w.reinterpreted(w.unsigned(block["value"], 2) << 16, "f4")


class F64(_Scalar):
    """float64."""

    stored: ClassVar = np.dtype("<f8")
    layout: ClassVar = _layout("<f8")
    ids: ClassVar = {"llama.cpp": 28}
    value_dtype: ClassVar = np.dtype(np.float64)
    lossy: ClassVar = False


class I8(_Scalar):
    """Signed 8-bit integer."""

    stored: ClassVar = np.dtype("i1")
    layout: ClassVar = _layout("i1")
    ids: ClassVar = {"llama.cpp": 24}
    value_dtype: ClassVar = np.dtype(np.int8)


class I16(_Scalar):
    """Signed 16-bit integer."""

    stored: ClassVar = np.dtype("<i2")
    layout: ClassVar = _layout("<i2")
    ids: ClassVar = {"llama.cpp": 25}
    value_dtype: ClassVar = np.dtype(np.int16)


class I32(_Scalar):
    """Signed 32-bit integer."""

    stored: ClassVar = np.dtype("<i4")
    layout: ClassVar = _layout("<i4")
    ids: ClassVar = {"llama.cpp": 26}
    value_dtype: ClassVar = np.dtype(np.int32)


class I64(_Scalar):
    """Signed 64-bit integer."""

    stored: ClassVar = np.dtype("<i8")
    layout: ClassVar = _layout("<i8")
    ids: ClassVar = {"llama.cpp": 27}
    value_dtype: ClassVar = np.dtype(np.int64)
