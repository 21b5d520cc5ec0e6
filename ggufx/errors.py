"""Errors of ggufx.

Every error that bad input can cause is a :class:`GGUFError`: one clear line that names the file, the tensor or key, the
rule that was broken, the numbers, and what to do. The command line prints that line and exits with 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from string import Formatter
from typing import Final

__all__ = [
    "AmbiguousDialect",
    "BadValueError",
    "CheckpointError",
    "CodecError",
    "ContainerError",
    "DiskError",
    "FallbackError",
    "GGUFError",
    "MissingExtra",
    "NonFiniteError",
    "OptionError",
    "OutOfRangeError",
    "OutputExists",
    "PlanError",
    "PluginError",
    "RecipeError",
    "SourceCodesError",
    "UnknownDialect",
    "UnknownType",
    "UnsupportedType",
    "quoted",
]


_LONG_NAME: Final = re.compile(r"'[^'\s]{300,}'")
"""A quoted word: sentences with two apostrophes have spaces between them."""


def _shortened(found: re.Match[str]) -> str:
    return quoted(found[0][1:-1])


def quoted(name: str) -> str:
    """Return a name as messages show it: in quotes, odd characters escaped, and the middle of a long one left out."""
    if len(name) <= 120:
        return repr(name)
    return f"{name[:60]!r}...{name[-30:]!r} ({len(name)} characters)"


class GGUFError(Exception):
    """Base of every error that ggufx raises on purpose.

    A name in quotes that is longer than any real one (a file may give a tensor 65535 bytes) is shortened in the message.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_LONG_NAME.sub(_shortened, arg) if isinstance(arg, str) else arg for arg in args))


class ContainerError(GGUFError):
    """A GGUF file breaks a rule of the container format.

    Parameters
    ----------
    path
        The file.
    rule
        Short name of the broken rule (``"magic"``, ``"truncated"``, ``"offset"`` ...): stable, meant for programs.
    detail
        The sentence for people, with the numbers.
    """

    def __init__(self, path: object, rule: str, detail: str) -> None:
        super().__init__(f"{path}: {detail} [rule: {rule}]")
        self.path = str(path)
        self.rule = rule
        self.detail = detail

    def __reduce__(self) -> tuple[type[ContainerError], tuple[str, str, str]]:
        # Worker processes send errors as pickles, which call the class with what is in args otherwise.
        return type(self), (self.path, self.rule, self.detail)


class UnknownType(GGUFError):
    """A tensor's type id has no meaning in the file's dialect, so its bytes cannot be decoded."""


class UnsupportedType(GGUFError):
    """A type is known (name, sizes) but the requested operation is not implemented for it."""


class UnknownDialect(GGUFError):
    """A dialect of that name is not registered, or no dialect explains the file."""


class AmbiguousDialect(GGUFError):
    """Several dialects explain the file and give its type ids different meanings."""


class MissingExtra(GGUFError, ImportError):
    """A module needs a package that is not installed; names the extra of ggufx that brings it."""


class PluginError(GGUFError):
    """A third-party type that is installed cannot be loaded; names its distribution and entry point."""


class CodecError(GGUFError):
    """Bytes or values do not fit the type: wrong length, row length, dtype or code."""


class BadValueError(CodecError):
    """A value cannot be encoded.

    Parameters
    ----------
    row, column
        Where it is.
    value
        What it is.
    name
        Name of the type.
    rows_per_expert
        Of stacked experts, the rows of each: the message then names the expert, and the row within it. 0 for others.
    """

    _RULE = "{name} cannot encode it"

    def __init__(self, row: int, column: int, value: object, name: str, rows_per_expert: int = 0) -> None:
        where = f"row {row}"
        if rows_per_expert:
            where = f"expert {row // rows_per_expert}, row {row % rows_per_expert}"
        super().__init__(f"found {value!s} at {where}, column {column}: {self._RULE.format(name=name)}")
        self._facts = (row, column, value, name)

    def __reduce__(self) -> tuple[type[BadValueError], tuple[int, int, object, str]]:
        return type(self), self._facts

    def moved(self, rows: int, rows_per_expert: int = 0) -> BadValueError:
        """Return the error for rows that are a part of something, of which ``rows`` rows come before."""
        row, column, value, name = self._facts
        return type(self)(row + rows, column, value, name, rows_per_expert)


class NonFiniteError(BadValueError):
    """A value to be encoded is NaN or infinite."""

    _RULE = "{name} encodes finite values only"


class OutOfRangeError(BadValueError):
    """A value is beyond what the scales of a type can hold: it, and its neighbours, would become something else."""

    _RULE = "it is beyond what {name} can hold; choose a wider type, such as BF16"


class CheckpointError(GGUFError):
    """A Hugging Face checkpoint is incomplete, inconsistent or not of a supported kind."""


class SourceCodesError(CheckpointError):
    """A source tensor holds codes that consumers disagree on (E4M3 NaN, E8M0 255)."""


class PlanError(GGUFError):
    """The requested output cannot be planned."""


class OptionError(PlanError):
    """Options exclude each other, or one of them would have no effect.

    Parameters
    ----------
    text
        The sentence, with options as ``{dense}`` and further texts as ``{0}``. The message has a function's parameters there;
        the command line, where they have other names, asks for :meth:`told`.
    details
        The further texts.
    """

    def __init__(self, text: str, *details: object) -> None:
        self.text, self.details = text, details
        super().__init__(self.told(str))

    def told(self, spell: Callable[[str], str]) -> str:
        """Return the message with options as ``spell`` writes a parameter's name."""
        formatter = Formatter()
        names = {field for _, field, _, _ in formatter.parse(self.text) if field and not field.isdigit()}
        return formatter.vformat(self.text, self.details, {name: spell(name) for name in names})

    def __reduce__(self) -> tuple[type[OptionError], tuple[object, ...]]:
        # Worker processes send errors as pickles, which call the class with what is in args otherwise.
        return type(self), (self.text, *self.details)


class OutputExists(PlanError):
    """The output exists and ``overwrite`` was not asked for."""


class RecipeError(PlanError):
    """A recipe is damaged, or does not fit the model or the target."""


class FallbackError(RecipeError):
    """A type does not fit the rows of a tensor, and falling back to another one was forbidden. Exit code 3."""


class DiskError(GGUFError):
    """Reading or writing failed (disk full, I/O error); what is done so far is kept for resuming."""
