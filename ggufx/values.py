r"""Metadata of a GGUF: typed values, their bytes, and the mapping that a file gives of them.

A string is a u64 byte length and bytes, which should be UTF-8. An array is element type u32, count u64, elements; an array of
arrays has such an array for each element. All integers are little-endian here: :mod:`ggufx.container` turns what a big-endian
file or one of version 1 holds into these bytes when it reads the header.

Text that is not UTF-8 is no reason to refuse a file: its odd bytes become the code points U+DC80 to U+DCFF (Python's
``surrogateescape``), so that they come back as the same bytes, and :func:`as_unicode` shows them as ``\xff``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from ggufx.errors import PlanError, quoted

__all__ = [
    "DTYPES",
    "MAX_NAME_NBYTES",
    "MAX_NESTING",
    "KeyValues",
    "StringArray",
    "Value",
    "ValueType",
    "as_unicode",
    "as_value",
    "check_name",
    "decode_text",
    "encode_string",
    "encode_text",
]


class ValueType(IntEnum):
    """Type tag of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: Final[Mapping[ValueType, np.dtype[Any]]] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
"""NumPy dtype of every fixed-width value type."""

MAX_NESTING: Final = 8
"""Arrays within arrays."""
MAX_NAME_NBYTES: Final = 65535
"""Longest name of a key or a tensor that is read or written."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def decode_text(data: bytes) -> str:
    """Return the text of a string's bytes; bytes that are not UTF-8 become U+DC80 to U+DCFF."""
    return data.decode("utf-8", "surrogateescape")


def encode_text(text: str) -> bytes:
    """Return the bytes that :func:`decode_text` took."""
    return text.encode("utf-8", "surrogateescape")


def as_unicode(text: str) -> str:
    r"""Return a text with each byte that is not UTF-8 written as ``\xff``: what can be printed and put into JSON."""
    return text if text.isascii() else _SURROGATE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    # What was one byte; another lone surrogate can only come from Python itself, and JSON text takes neither.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def encode_string(text: str) -> bytes:
    """Return a string as GGUF stores it: u64 byte length and bytes."""
    data = encode_text(text)
    return _U64.pack(len(data)) + data


class StringArray(Sequence[str]):
    """A metadata array of strings that is decoded only where it is looked at.

    The first access walks the lengths once; ``len()`` and copying the raw bytes cost nothing. A byte that is not UTF-8 becomes
    one of U+DC80 to U+DCFF; :meth:`element_bytes` gives an element's own bytes.
    """

    __slots__ = ("_buffer", "_count", "_starts")

    def __init__(self, buffer: memoryview | bytes, count: int) -> None:
        self._buffer = memoryview(buffer)
        self._count = count
        self._starts: list[int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return StringArray, (bytes(self._buffer), self._count)

    @property
    def raw(self) -> memoryview:
        """The encoded elements: (u64 length, bytes) each."""
        return self._buffer

    def __len__(self) -> int:
        return self._count

    def _index(self) -> list[int]:
        if self._starts is None:
            starts, position, unpack = [], 0, _U64.unpack_from
            buffer = self._buffer
            for _ in range(self._count):
                starts.append(position)
                position += 8 + unpack(buffer, position)[0]
            starts.append(position)
            self._starts = starts
        return self._starts

    def element_bytes(self, index: int) -> bytes:
        """Bytes of one element, not decoded."""
        starts = self._index()
        return bytes(self._buffer[starts[index] + 8 : starts[index + 1]])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of a string array of {self._count}")
        return decode_text(self.element_bytes(index))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(self._count))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self._count == other._count and self._buffer == other._buffer
        if isinstance(other, Sequence) and not isinstance(other, str | bytes):
            return len(other) == self._count and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<StringArray of {self._count}>"


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value with its type on disk.

    Attributes
    ----------
    type
        Type tag.
    data
        ``bool``, ``int``, ``float`` or ``str`` for scalars; a 1-D ``ndarray`` for arrays of fixed-width elements; a
        :class:`StringArray` or list of ``str`` for arrays of strings; a tuple of :class:`Value` for arrays of arrays.
    element
        Element type of an array, else ``None``.
    nan
        The bytes of a float32 that is NaN, little-endian: on the way to Python's float a signalling NaN becomes a quiet one,
        which would not be a copy.
    """

    type: ValueType
    data: Any
    element: ValueType | None = None
    nan: bytes | None = None

    @classmethod
    def string(cls, text: str) -> Value:
        """Return a string value."""
        return cls(ValueType.STRING, text)

    @classmethod
    def u32(cls, number: int) -> Value:
        """Return an unsigned 32-bit value."""
        return cls(ValueType.UINT32, int(number))

    @classmethod
    def f32(cls, number: float) -> Value:
        """Return a float32 value (rounded to the nearest float32)."""
        return cls(ValueType.FLOAT32, float(np.float32(number)))

    @classmethod
    def boolean(cls, flag: bool) -> Value:
        """Return a boolean value."""
        return cls(ValueType.BOOL, bool(flag))

    @classmethod
    def array(cls, element: ValueType, items: Any) -> Value:
        """Return an array value of fixed-width numbers or strings."""
        if element is ValueType.STRING:
            return cls(ValueType.ARRAY, items if isinstance(items, StringArray) else list(items), element)
        return cls(ValueType.ARRAY, np.asarray(items, dtype=DTYPES[element]), element)

    @classmethod
    def scalar(cls, kind: ValueType, stored: npt.NDArray[Any]) -> Value:
        """Return the value of one fixed-width element as stored, ``DTYPES[kind]`` [1]."""
        odd = kind is ValueType.FLOAT32 and bool(np.isnan(stored[0]))
        return cls(kind, stored[0].item(), nan=stored.tobytes() if odd else None)

    def encode(self) -> bytes:
        """Return the value's bytes, type tag included."""
        return _U32.pack(self.type) + self._encode_untagged()

    def _encode_untagged(self) -> bytes:
        if self.type is ValueType.STRING:
            return encode_string(self.data)
        if self.type is not ValueType.ARRAY:
            return self.nan or np.array(self.data, dtype=DTYPES[self.type]).tobytes()
        assert self.element is not None
        head = _U32.pack(self.element) + _U64.pack(len(self.data))
        if isinstance(self.data, StringArray):
            return head + bytes(self.data.raw)
        if self.element is ValueType.STRING:
            return head + b"".join(map(encode_string, self.data))
        if self.element is ValueType.ARRAY:
            return head + b"".join(item._encode_untagged() for item in self.data)
        return head + np.ascontiguousarray(self.data, dtype=DTYPES[self.element]).tobytes()

    def plain(self) -> Any:
        """Return what a file's metadata gives for the key: :attr:`data`, and for an array of arrays a list of theirs."""
        return [item.plain() for item in self.data] if self.element is ValueType.ARRAY else self.data

    def to_json(self, limit: int | None = None) -> Any:
        r"""Return the value as plain JSON data: arrays as lists, bytes that are not UTF-8 as ``\xff``.

        A float32 becomes the shortest number that is the same float32: 1e-06, and not 9.999999974752427e-07.

        Parameters
        ----------
        limit
            Take so many elements of an array at most; ``None`` takes all.
        """
        if self.type is ValueType.STRING:
            return as_unicode(self.data)
        if self.type is ValueType.FLOAT32:
            return float(str(np.float32(self.data)))
        if self.type is not ValueType.ARRAY:
            return self.data
        shown = self.data if limit is None else self.data[:limit]
        if self.element is ValueType.ARRAY:
            return [item.to_json(limit) for item in shown]
        if isinstance(shown, np.ndarray):
            return [float(str(x)) for x in shown] if shown.dtype == np.float32 else shown.tolist()
        return [as_unicode(text) for text in shown]

    @property
    def kind(self) -> str:
        """Name of the type as people read it: ``UINT32``, ``ARRAY[STRING]``."""
        return self.type.name if self.element is None else f"{self.type.name}[{self.element.name}]"

    def same(self, other: Value) -> bool:
        """Return whether the two values are equal bit for bit, types included."""
        return self.type is other.type and self.element is other.element and self.encode() == other.encode()


class KeyValues(Mapping[str, Any]):
    """Metadata of a file: key -> Python value, in file order; :meth:`value` gives the typed value.

    Scalars are ``bool``, ``int``, ``float`` or ``str``; arrays are read-only ``ndarray`` or lazy :class:`StringArray` objects;
    an array of arrays is a list of these. :meth:`to_json` gives what ``json.dumps`` takes.
    """

    def __init__(self, values: dict[str, Value]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key].plain()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: str) -> Value:
        """Return the typed value of ``key``; raises ``KeyError``."""
        return self._values[key]

    def typed(self) -> dict[str, Value]:
        """Return a new dict of the typed values, in file order."""
        return dict(self._values)

    def to_json(self) -> dict[str, Any]:
        r"""Return all keys and values as plain JSON data: arrays as lists, bytes that are not UTF-8 as ``\xff``.

        NaN and infinities stay floats, which ``json.dumps`` writes as ``NaN`` and ``Infinity`` unless told otherwise.
        """
        return {as_unicode(key): value.to_json() for key, value in self._values.items()}

    def __repr__(self) -> str:
        return f"<KeyValues of {len(self)}: {', '.join(list(self)[:4])}{', ...' if len(self) > 4 else ''}>"


# From Python's values ---------------------------------------------------------------------------------------------------

_INTEGERS: Final = (ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64)
"""What an ``int`` becomes: the first that holds it, as converters write counts and lengths."""
_ARRAY_INTEGERS: Final = (ValueType.INT32, ValueType.INT64, ValueType.UINT64)
"""The same for the numbers of a list, whose type loaders expect to be INT32."""
_VALUE_TYPES: Final[Mapping[np.dtype[Any], ValueType]] = {dtype: kind for kind, dtype in DTYPES.items()}


def check_name(name: object, what: str) -> str:
    """Return the name of a key or a tensor.

    Parameters
    ----------
    what
        ``key`` or ``tensor``, for the message.

    Raises
    ------
    PlanError
        It is no text, empty, longer than :data:`MAX_NAME_NBYTES` bytes, or holds what no UTF-8 text can.
    """
    if not isinstance(name, str):
        raise PlanError(f"the name of a {what} must be a str, got {type(name).__name__}")
    try:
        nbytes = len(encode_text(name))
    except UnicodeEncodeError:
        raise PlanError(f"{what} {name!r}: the name has half of a surrogate pair, which UTF-8 cannot hold") from None
    if not 0 < nbytes <= MAX_NAME_NBYTES:
        raise PlanError(
            f"{what} {quoted(name)}: the name has {nbytes} bytes; a GGUF takes names of 1 to {MAX_NAME_NBYTES} bytes"
        )
    return name


def as_value(key: str, data: object) -> Value:
    """Return a Python value as a typed value of a GGUF.

    ========================================== =========================================================================
    ``bool``                                   BOOL
    ``int``                                    the first of UINT32, INT32, UINT64 and INT64 that holds it
    ``float``                                  FLOAT32; FLOAT64 where it is beyond float32's range
    ``str``                                    STRING
    NumPy scalar, array of one axis            the type of its dtype (float16 and bfloat16: FLOAT32)
    list or tuple of ``int``                   ARRAY of the first of INT32, INT64 and UINT64 that holds all
    list or tuple of ``float``, or with ints   ARRAY of FLOAT32
    list or tuple of ``str`` or of ``bool``    ARRAY of STRING or of BOOL
    list or tuple of lists                     ARRAY of arrays, which llama.cpp does not load
    :class:`Value`                             what it says
    ========================================== =========================================================================

    Parameters
    ----------
    key
        For messages.
    data
        The value.

    Raises
    ------
    PlanError
        No type of a GGUF holds the value, or its type is not known: ``None``, ``bytes``, a dict, an empty or mixed list.

    Examples
    --------
    >>> from ggufx.values import Value, ValueType, as_value
    >>> as_value("llama.block_count", 32).kind
    'UINT32'
    >>> as_value("tokenizer.ggml.tokens", ["<s>", "</s>"]).kind
    'ARRAY[STRING]'
    >>> as_value("tokenizer.ggml.merges", Value.array(ValueType.STRING, [])).kind  # a list without elements has no type
    'ARRAY[STRING]'
    """
    if isinstance(data, Value):
        try:
            data.encode()
        except (AssertionError, AttributeError, OverflowError, TypeError, ValueError):
            raise PlanError(f"key {quoted(key)}: {str(data.data)[:60]!r} is no {data.kind}") from None
        return data
    if isinstance(data, np.generic | np.ndarray):
        return _from_numpy(key, data)
    if isinstance(data, StringArray):
        return Value.array(ValueType.STRING, data)
    if isinstance(data, list | tuple):
        return _from_list(key, data)
    if isinstance(data, bool):
        return Value.boolean(data)
    if isinstance(data, int):
        return Value(_holding(key, [data], _INTEGERS), data)
    if isinstance(data, float):
        with np.errstate(over="ignore"):
            wide = np.isinf(np.float32(data)) and not np.isinf(data)
        return Value(ValueType.FLOAT64, data) if wide else Value.f32(data)
    if isinstance(data, str):
        _check_text(key, data)
        return Value.string(data)
    cure = {
        "bytes": "np.frombuffer(data, np.uint8) makes an array of them, data.decode() a text",
        "dict": "json.dumps makes a text of it",
        "NoneType": "leave the key out",
    }.get(type(data).__name__, "use a bool, int, float, str, a list of one of them, an array, or a ggufx.values.Value")
    raise PlanError(f"key {quoted(key)}: a GGUF has no type for a {type(data).__name__}; {cure}")


def _check_text(key: str, text: str) -> None:
    try:
        encode_text(text)
    except UnicodeEncodeError:
        raise PlanError(f"key {quoted(key)}: a text has half of a surrogate pair, which UTF-8 cannot hold") from None


def _holding(key: str, numbers: Sequence[int], kinds: Sequence[ValueType]) -> ValueType:
    """Return the first of some integer types that holds all numbers."""
    least, most = min(numbers), max(numbers)
    for kind in kinds:
        limits = np.iinfo(DTYPES[kind])
        if limits.min <= least and most <= limits.max:
            return kind
    raise PlanError(
        f"key {quoted(key)}: {str(least)[:40]} to {str(most)[:40]} is more than an integer of 64 bits holds"
    )


def _from_numpy(key: str, data: np.generic | npt.NDArray[Any]) -> Value:
    array = np.asarray(data)
    if array.dtype.kind == "U" or (array.dtype.kind == "O" and array.ndim == 1):
        return as_value(key, array.tolist())
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise PlanError(f"key {quoted(key)}: a GGUF has no type for {array.dtype}")
    if array.ndim > 1:
        raise PlanError(
            f"key {quoted(key)}: an array of {array.ndim} axes {list(array.shape)}; a value has one axis at most, "
            "reshape(-1) makes one of it"
        )
    if array.dtype.itemsize == 2 and array.dtype.kind not in "iu":
        array = array.astype(np.float32)
    stored = array.astype(array.dtype.newbyteorder("<"))
    kind = _VALUE_TYPES.get(stored.dtype)
    if kind is None:
        raise PlanError(f"key {quoted(key)}: a GGUF has no type for {array.dtype}")
    return Value.array(kind, stored) if array.ndim else Value.scalar(kind, stored.reshape(1))


def _from_list(key: str, items: Sequence[Any], depth: int = 1) -> Value:
    if depth > MAX_NESTING:
        raise PlanError(f"key {quoted(key)}: lists within lists, more than {MAX_NESTING} deep")
    if not items:
        raise PlanError(
            f"key {quoted(key)}: a list without elements has no element type; give one with "
            "ggufx.values.Value.array(ValueType.STRING, [])"
        )
    kinds = {type(item) for item in items}
    if kinds == {str}:
        for text in items:
            _check_text(key, text)
        return Value.array(ValueType.STRING, items)
    if kinds == {bool}:
        return Value.array(ValueType.BOOL, items)
    if kinds == {int}:
        return Value.array(_holding(key, items, _ARRAY_INTEGERS), items)
    if kinds <= {int, float}:
        numbers = _floats(key, items)
        return Value.array(ValueType.FLOAT32, numbers)
    if all(isinstance(item, list | tuple | np.ndarray) for item in items):
        nested = tuple(
            _from_numpy(key, item) if isinstance(item, np.ndarray) else _from_list(key, item, depth + 1)
            for item in items
        )
        if any(value.type is not ValueType.ARRAY for value in nested):
            raise PlanError(f"key {quoted(key)}: a list holds arrays without axes beside lists")
        return Value(ValueType.ARRAY, nested, ValueType.ARRAY)
    if all(isinstance(item, np.generic) for item in items) and len(kinds) == 1:
        return _from_numpy(key, np.asarray(items))
    names = ", ".join(sorted(kind.__name__ for kind in kinds)[:5])
    raise PlanError(
        f"key {quoted(key)}: the elements of a list must be of one type, and one that a GGUF has; got {names}"
    )


def _floats(key: str, items: Sequence[int | float]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        try:
            numbers = np.asarray([float(item) for item in items]).astype(np.float32)
        except OverflowError:
            raise PlanError(f"key {quoted(key)}: an integer is more than a float holds") from None
    odd = [item for item, number in zip(items, numbers, strict=True) if np.isinf(number) and abs(item) != float("inf")]
    if odd:
        raise PlanError(
            f"key {quoted(key)}: {str(odd[0])[:40]} is more than FLOAT32 holds; give an array of float64 for FLOAT64"
        )
    return numbers
