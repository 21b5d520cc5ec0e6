"""Values that were read from a file, as the types they must have: of JSON files and of a GGUF's metadata.

Whatever stands in a file was written by somebody else. Every value that decides something goes through :class:`Facts`, and
every JSON file through :func:`read_object`, so that a value of another kind ends in one sentence: the file, the key, what
was found and what was expected.
"""

from __future__ import annotations

import builtins
import json
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, overload

import numpy as np

from ggufx.errors import CheckpointError, GGUFError, PlanError

__all__ = [
    "ADVICE",
    "FLOAT32_MAX",
    "Facts",
    "architecture_of",
    "open_regular",
    "parse_object",
    "read_object",
    "shown",
]

FLOAT32_MAX: Final = float(2**128 - 2**104)
U32_MAX: Final = 2**32 - 1
MAX_JSON_NBYTES: Final = 128 << 20
"""No JSON file of a published model comes near: the largest tokenizers have 40 MB, the largest indices 20."""
_SHOWN_LEN: Final = 60

ADVICE: Final = "correct the file, or download it again"
"""What the error of a checkpoint's file tells to do."""

T = TypeVar("T")


class _Missing(Enum):
    """Stands for a default that is not there."""

    REQUIRED = "required"


_REQUIRED: Final = _Missing.REQUIRED


class Facts:
    """Values of a file by their names, as the types they must have.

    A name that is missing and one whose value is ``null`` are the same: the method's ``default``, or an error without one.
    A value of another kind is always an error, whatever the default.

    Parameters
    ----------
    where
        How an error names the file.
    values
        By name: what ``json`` gives, or a GGUF's metadata (:class:`ggufx.container.KeyValues`), whose arrays are NumPy's or
        sequences of texts.
    error
        Class of the errors.
    advice
        What an error tells the reader to do.
    label
        Goes before the names in errors.
    prefix
        Goes before the names in errors and in ``values``.
    """

    def __init__(
        self,
        where: object,
        values: Mapping[str, Any],
        *,
        error: type[GGUFError] = CheckpointError,
        advice: str = ADVICE,
        label: str = "",
        prefix: str = "",
    ) -> None:
        self.where = where
        self._values = values
        self._error = error
        self._advice = advice
        self._label = label
        self._prefix = prefix

    def find(self, key: str) -> Any:
        """Return a value as it was read; ``None`` where it is missing or ``null``."""
        return self._values.get(self._prefix + key)

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def wrong(self, key: str, expected: str) -> GGUFError:
        """Return the error about a value: what was found, and what was expected."""
        found = self.find(key)
        what = (
            f"is {shown(found)}"
            if found is not None
            else "is null"
            if self._prefix + key in self._values
            else "is missing"
        )
        return self._error(
            f"{self.where}: {self._label}{self._prefix}{key} {what}, expected {expected}; {self._advice}"
        )

    def _read(self, key: str, default: Any, sound: Callable[[Any], bool], expected: str) -> Any:
        found = self.find(key)
        if found is None and default is not _REQUIRED:
            return default
        if found is None or not sound(found):
            raise self.wrong(key, expected)
        return found

    @overload
    def integer(self, key: str, *, least: int = 0, most: int = U32_MAX) -> int: ...
    @overload
    def integer(self, key: str, default: T, *, least: int = 0, most: int = U32_MAX) -> int | T: ...
    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 0, most: int = U32_MAX) -> Any:
        """Return an integer from ``least`` to ``most``."""
        expected = f"an integer from {least} to {most}"
        return self._read(key, default, lambda v: type(v) is int and least <= v <= most, expected)

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: T) -> float | T: ...
    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a finite number that float32 can hold."""
        found = self._read(key, default, _is_number, "a number that float32 can hold")
        return float(found) if _is_number(found) else found

    @overload
    def flag(self, key: str) -> bool: ...
    @overload
    def flag(self, key: str, default: T) -> bool | T: ...
    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return ``True`` or ``False``."""
        return self._read(key, default, lambda v: isinstance(v, bool), "true or false")

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: T) -> str | T: ...
    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a text."""
        return self._read(key, default, lambda v: isinstance(v, str), "a text")

    @overload
    def choice(self, key: str, choices: Collection[str]) -> str: ...
    @overload
    def choice(self, key: str, choices: Collection[str], default: T) -> str | T: ...
    def choice(self, key: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """Return a text that is one of ``choices``."""
        return self._read(key, default, lambda v: isinstance(v, str) and v in choices, " or ".join(choices))

    @overload
    def integers(self, key: str) -> list[int]: ...
    @overload
    def integers(self, key: str, default: T) -> list[int] | T: ...
    def integers(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return an array of integers as a list."""
        sound = lambda v: (items := _items(v)) is not None and all(type(item) is int for item in items)  # noqa: E731
        found = self._read(key, default, sound, "an array of integers")
        return _items(found) if found is not default else default

    @overload
    def numbers(self, key: str) -> list[float]: ...
    @overload
    def numbers(self, key: str, default: T) -> list[float] | T: ...
    def numbers(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return an array of finite numbers that float32 can hold as a list."""
        sound = lambda v: (items := _items(v)) is not None and all(map(_is_number, items))  # noqa: E731
        found = self._read(key, default, sound, "an array of numbers that float32 can hold")
        return [float(item) for item in _items(found) or ()] if found is not default else default

    @overload
    def texts(self, key: str) -> Sequence[str]: ...
    @overload
    def texts(self, key: str, default: T) -> Sequence[str] | T: ...
    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return an array of texts, as it is."""
        return self._read(key, default, _are_texts, "an array of texts")

    @classmethod
    def of_metadata(cls, where: builtins.object, metadata: Mapping[str, Any], prefix: str = "") -> Facts:
        """Return the facts of a GGUF's metadata (its Python values), whose keys begin with ``prefix``."""
        return cls(where, metadata, error=PlanError, advice="correct it with ggufx set", label="key ", prefix=prefix)

    @overload
    def object(self, key: str) -> Facts: ...
    @overload
    def object(self, key: str, default: T) -> Facts | T: ...
    def object(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a JSON object's own values, as facts whose errors name both keys."""
        found = self._read(key, default, lambda v: isinstance(v, dict), "an object")
        return self.within(f"{key}.", found) if found is not default else default

    def within(self, label: str, values: Mapping[str, Any]) -> Facts:
        """Return facts of the same file whose names in errors begin with ``label``."""
        return Facts(self.where, values, error=self._error, advice=self._advice, label=self._label + label)

    def expect(self, key: str, assumed: builtins.object, why: str) -> None:
        """Raise the error of a value that the output has no place for and that is not the one its readers assume.

        Parameters
        ----------
        key
            The value's name. Missing or ``null``, it is what is assumed.
        assumed
            What readers assume; numbers are equal as float32.
        why
            Who assumes it, and what to do.
        """
        found = self.find(key)
        if found is None:
            return
        equal = type(found) is type(assumed) and found == assumed
        if _is_number(assumed):
            equal = _is_number(found) and np.float32(found) == np.float32(assumed)  # type: ignore[arg-type]
        if not equal:
            raise self._error(
                f"{self.where}: {self._label}{self._prefix}{key} is {shown(found)}, expected {shown(assumed)}: {why}"
            )


def architecture_of(where: object, metadata: Mapping[str, Any]) -> str | None:
    """Return ``general.architecture`` of a GGUF's metadata, ``None`` without it; raises PlanError where it is no text."""
    # No command sets this key, as the names of all others depend on it.
    advice = "the file is damaged; download or make it again"
    return Facts(where, metadata, error=PlanError, advice=advice, label="key ").text("general.architecture", None)


def shown(value: object) -> str:
    """Return a value as an error shows it: short, on one line, whatever it is."""
    if isinstance(value, np.ndarray) or (isinstance(value, Sequence) and not isinstance(value, str | bytes | list)):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN_LEN else f"{text[:_SHOWN_LEN]}..."


def _is_number(value: object) -> bool:
    # NaN is not less than anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _items(value: object) -> list[Any] | None:
    """Return the elements of an array of a JSON file or a GGUF; ``None`` if it is none."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return value if isinstance(value, list) else None


def _are_texts(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    # A GGUF's array of strings, which is decoded only where it is looked at.
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


# Files ----------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Open a file of a checkpoint for reading, if it is a file: a FIFO would be waited for, a device read without end.

    Raises
    ------
    FileNotFoundError
        Nothing has the name.
    CheckpointError
        It is no regular file, a link to nothing, or cannot be opened.
    """
    try:
        # A FIFO without a writer opens at once so, and is refused below.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to {path.readlink()}, which is not there; download it") from None
        raise
    except OSError as error:
        raise CheckpointError(f"{str(path)[:200]}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        kind = "a directory" if path.is_dir() else "a device, a pipe or a socket"
        raise CheckpointError(f"{path}: is {kind}, expected a regular file; move it away")
    return os.fdopen(descriptor, "rb")


def read_object(path: Path, *, needed: str = "", constants: bool = True) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Parameters
    ----------
    path
        A regular file of at most :data:`MAX_JSON_NBYTES`.
    needed
        What the file is needed for. Without this, a file that is not there is an empty object.
    constants
        As for :func:`parse_object`.

    Raises
    ------
    CheckpointError
        The file is missing and needed, is no regular file, too large, or no JSON object.
    """
    try:
        with open_regular(path) as file:
            # What the file's size says may be false (in /proc it is 0), or change.
            text = file.read(MAX_JSON_NBYTES + 1)
    except FileNotFoundError:
        if needed:
            raise CheckpointError(f"{path}: missing; {needed}") from None
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) > MAX_JSON_NBYTES:
        raise CheckpointError(f"{path}: has more than {MAX_JSON_NBYTES} bytes, which no JSON file of a model has")
    return parse_object(text, str(path), constants=constants)


def parse_object(text: bytes, where: str, *, constants: bool = True, unique: bool = False) -> dict[str, Any]:
    """Parse a JSON object.

    Parameters
    ----------
    text
        UTF-8, without a byte order mark.
    where
        How an error names it.
    constants
        Whether ``NaN``, ``Infinity`` and ``-Infinity`` may stand for numbers: transformers writes them, but JSON has no
        such numbers and most readers refuse them.
    unique
        Whether a name may occur once only in an object; else the last one counts.

    Raises
    ------
    CheckpointError
        The text is no JSON object, is nested too deeply to be read, or has an integer of thousands of digits.
    """
    hooks: dict[str, Any] = {}
    if not constants:
        hooks["parse_constant"] = _refuse_constant
    if unique:
        hooks["object_pairs_hook"] = _unique
    try:
        data = json.loads(text.decode("utf-8"), **hooks)
    except RecursionError:
        raise CheckpointError(f"{where}: cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:  # of the decoder, too
        raise CheckpointError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(data).__name__}, expected an object")
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} occurs twice")
    return found
