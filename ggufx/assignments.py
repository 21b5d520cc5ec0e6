"""Metadata as people write it on a command line: ``KEY=TYPE:VALUE``, checked against what the file has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ggufx.container import StringArray, Value, ValueType
from ggufx.errors import PlanError
from ggufx.typed import open_regular, shown
from ggufx.values import DTYPES, MAX_NAME_NBYTES

__all__ = ["FIXED_KEYS", "TYPES", "parse_assignments", "parse_overrides"]

TYPES: Final[Mapping[str, ValueType]] = {
    "u8": ValueType.UINT8, "i8": ValueType.INT8, "u16": ValueType.UINT16, "i16": ValueType.INT16, "u32": ValueType.UINT32,
    "i32": ValueType.INT32, "u64": ValueType.UINT64, "i64": ValueType.INT64, "f32": ValueType.FLOAT32,
    "f64": ValueType.FLOAT64, "bool": ValueType.BOOL, "str": ValueType.STRING,
}  # fmt: skip
"""Spellings of the scalar types; ``arr[T]`` is an array of one."""

FIXED_KEYS: Final[Mapping[str, str]] = {
    "general.alignment": "every tensor's offset depends on it; ggufx rewrite writes a file anew",
    "general.architecture": "the names of keys and tensors depend on it",
    "split.no": "it belongs to the split; ggufx split and merge-splits change it",
    "split.count": "it belongs to the split; ggufx split and merge-splits change it",
    "split.tensors.count": "it belongs to the split; ggufx split and merge-splits change it",
    "ggufx.dialect": "it says whose type ids the file has; ggufx retarget changes both",
}
"""Keys that cannot be changed by themselves, and why."""
_BOOLS: Final = {"true": True, "1": True, "false": False, "0": False}
_ELEMENT: Final = re.compile(r"(?P<key>.+)\[(?P<index>\d{1,18})\]")
_MAX_FILE_NBYTES: Final = 256 << 20
"""Of a value that is read from a file."""


def parse_assignments(
    texts: Iterable[str], known: Mapping[str, Value] | None = None, *, change_types: bool = False
) -> dict[str, Value]:
    """Parse ``KEY=TYPE:VALUE`` texts; an array is ``KEY=arr[i32]:[1, 2, 3]``, its elements as JSON.

    The types are :data:`TYPES`, the names of :class:`~ggufx.container.ValueType` in any case, and llama-quantize's ``int`` (a
    u32 where it fits, which is what loaders read, else an i64) and ``float`` (f32). A value ``@PATH`` is what the file holds: a
    text as it is, with its last newline, an array as JSON; ``@@`` is an ``@``.

    Parameters
    ----------
    known
        The file's values. With these ``KEY=VALUE`` takes the type that the key has, and ``KEY[3]=VALUE`` changes one element
        of an array.
    change_types
        A key may get another type than it has.

    Raises
    ------
    PlanError
        A text is not of that form, a value does not fit its type, a key is given twice, or has another type in the file.
    """
    found: dict[str, Value] = {}
    whole: set[str] = set()
    for text in texts:
        key, equals, rest = text.partition("=")
        if not equals or not key:
            raise PlanError(f"{text[:80]!r}: expected KEY=TYPE:VALUE, such as general.name=str:Mine")
        if not key.isprintable() or " " in key or len(key.encode()) > MAX_NAME_NBYTES:
            raise PlanError(f"{key[:80]!r}: a key is printable, without spaces, and of at most {MAX_NAME_NBYTES} bytes")
        part = None if known is None or key in known else _ELEMENT.fullmatch(key)
        if part is not None:
            key = part["key"]
            array = found.get(key) or (known or {}).get(key)
            found[key] = _with_element(key, array, int(part["index"]), rest)
            continue
        if key in whole or key in found:
            raise PlanError(f"{key}: is given twice")
        whole.add(key)
        old = None if known is None else known.get(key)
        found[key] = _parse(key, rest, old)
        same = change_types or key in FIXED_KEYS  # those are refused for a better reason
        if old is not None and not same and (old.type, old.element) != (found[key].type, found[key].element):
            raise PlanError(
                f"{key}: is {_type_name(old)} in the file, and loaders refuse another type; give a value of that type (not "
                f"{_type_name(found[key])}), or pass --change-type"
            )
    return found


def _type_name(value: Value) -> str:
    return value.type.name if value.element is None else f"an array of {value.element.name}"


def _with_element(key: str, array: Value | None, index: int, rest: str) -> Value:
    """Return an array with one element changed."""
    if array is None or array.element is None:
        what = "is not in the file" if array is None else f"is {_type_name(array)}, no array"
        raise PlanError(f"{key}[{index}]: {key} {what}")
    if index >= len(array.data):
        raise PlanError(f"{key}[{index}]: {key} has {len(array.data)} elements, the last one is {len(array.data) - 1}")
    one = _parse(key, rest, Value(array.element, None))
    if one.type is not array.element:
        raise PlanError(f"{key}[{index}]: is {one.type.name}, the elements of {key} are {array.element.name}")
    items = list(array.data) if isinstance(array.data, StringArray | list) else array.data.copy()
    items[index] = one.data
    return Value.array(array.element, items)


def parse_overrides(texts: Iterable[str]) -> dict[str, Value]:
    """Parse what ``--override-kv`` takes, as :func:`parse_assignments`.

    Raises
    ------
    PlanError
        As there; or a key decides how the file is read and cannot be overridden.
    """
    found = parse_assignments(texts)
    for key in found:
        if key in FIXED_KEYS:
            raise PlanError(f"{key} cannot be overridden: {FIXED_KEYS[key]}")
    return found


_NAMES: Final = {value.name.lower(): name for name, value in TYPES.items()}


def _parse(key: str, rest: str, old: Value | None) -> Value:
    kind, colon, value = rest.partition(":")
    kind = _NAMES.get(kind.lower(), kind)
    if not colon or not _is_type(kind):
        if old is None:
            if not colon:
                raise PlanError(f"{key}={shown(rest)}: expected KEY=TYPE:VALUE, such as general.name=str:Mine")
            raise PlanError(
                f"{key}: {kind[:60]!r} is no type; types are {', '.join(TYPES)}, int, float, and arr[T] of the first"
            )
        # Without a type it is the one that the key has.
        spellings = {kind: name for name, kind in TYPES.items()}
        kind = spellings[old.type] if old.element is None else f"arr[{spellings[old.element]}]"
        value = rest
    if value.startswith("@@"):
        value = value[1:]
    elif value.startswith("@"):
        value = _read(key, Path(value[1:]))
    if kind == "int":
        number = _scalar(key, "i64", value)
        kind = "u32" if 0 <= number < 2**32 else "i64"
    elif kind == "float":
        kind = "f32"
    element = _element_of(kind)
    if element is None:
        return Value(TYPES[kind], _scalar(key, kind, value))
    try:
        # Numbers stay texts until their type is known: Python would make 1e400 infinite.
        items = json.loads(value if value.lstrip().startswith("[") else f"[{value}]", parse_float=_Number)
    except (ValueError, RecursionError):
        raise PlanError(f'{key}: {value[:60]!r} is no JSON list, such as [1, 2] or ["a", "b"]') from None
    return Value.array(TYPES[element], [_element(key, element, item) for item in items])


def _element_of(kind: str) -> str | None:
    """Return T of ``arr[T]``, ``None`` for another type."""
    if not (kind.startswith("arr[") and kind.endswith("]")):
        return None
    element = kind[4:-1]
    return _NAMES.get(element.lower(), element)


def _is_type(kind: str) -> bool:
    element = _element_of(kind)
    return kind in ("int", "float") or (kind if element is None else element) in TYPES


def _read(key: str, path: Path) -> str:
    """Return the text of a file, its newlines as they are."""
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_FILE_NBYTES + 1)
        if len(data) > _MAX_FILE_NBYTES:
            raise PlanError(f"{key}: {path} has more than {_MAX_FILE_NBYTES} bytes")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise PlanError(f"{key}: {path} is not there; a value that begins with @ names a file, @@ is an @") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{key}: {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


class _Number(str):
    """The text of a number that is no integer."""

    __slots__ = ()


def _scalar(key: str, kind: str, text: str) -> Any:
    if kind == "str":
        return _element(key, kind, text)
    if kind == "bool":
        if text.lower() not in _BOOLS:
            raise PlanError(f"{key}: {text[:60]!r} is no bool; true and false are")
        return _BOOLS[text.lower()]
    try:
        return _element(key, kind, _Number(text) if kind in ("f32", "f64") else int(text, 0))
    except ValueError:
        raise PlanError(f"{key}: {text[:60]!r} is no {kind}") from None


def _element(key: str, kind: str, item: Any) -> Any:
    odd = PlanError(f"{key}: {str(item)[:60]!r} is no {kind}")
    if kind in ("str", "bool"):
        if type(item) is not (str if kind == "str" else bool):
            raise odd
        try:
            str(item).encode()
        except UnicodeEncodeError:
            raise PlanError(f"{key}: the text is not valid UTF-8") from None
        return item
    dtype = DTYPES[TYPES[kind]]
    if kind in ("f32", "f64"):
        if type(item) not in (int, float, _Number):
            raise odd
        with np.errstate(over="ignore"):
            try:
                number = float(np.array(float(item), dtype))
            except OverflowError:  # an integer of hundreds of digits
                number = np.inf
        # JSON's Infinity is a float; a text or an integer that becomes one was not meant so.
        if np.isinf(number) and type(item) is not float and "inf" not in str(item).lower():
            raise PlanError(f"{key}: {str(item)[:60]} is more than {kind} can hold")
        return number
    if type(item) is not int:
        raise odd
    limits = np.iinfo(dtype)
    if not limits.min <= item <= limits.max:
        raise PlanError(f"{key}: {str(item)[:60]} is outside {kind}, {limits.min} to {limits.max}")
    return item
