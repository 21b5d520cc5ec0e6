"""What the command line prints goes through here: texts of files made harmless, tables, and streams as they come.

Names, paths, keys and values are somebody else's words. A terminal obeys escape sequences, and shows texts that change the
direction of writing as something else; so these characters are printed as their codes, whatever they stand in.
"""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import Any, ClassVar, Final, NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

__all__ = ["Lines", "err", "fail", "hush", "make_table", "out", "prepare_streams", "printable"]

_HARMFUL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tabs and newlines: escape sequences begin with one
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that change the direction of writing
    "\u2028\u2029\ud800-\udfff]"  # separators of lines, and halves of surrogate pairs, which are bytes that are no UTF-8
)
_NUMBERS: Final = frozenset({
    "tensors", "bytes", "bpw", "count", "weights", "max error", "relative rms", "differing", "left out", "SQNR dB", "seconds",
    "values", "rows", "min", "mean", "max",
})  # fmt: skip
"""Headings of columns that hold numbers."""
_PIPE_WIDTH: Final = 1 << 16
"""Nothing that another program reads is wrapped."""


def printable(text: str, *, line: bool = False) -> str:
    r"""Return a text whose harmful characters are codes, such as ``\x1b``, which a regular expression reads as the same.

    Parameters
    ----------
    line
        Newlines and tabs are codes, too: the text is a part of a line.
    """

    def code(match: re.Match[str]) -> str:
        number = ord(match[0])
        # What Python reads bytes as that are no UTF-8.
        if 0xDC80 <= number <= 0xDCFF:
            return f"\\x{number - 0xDC00:02x}"
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

    text = _HARMFUL.sub(code, text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if line else text


class Lines(Console):
    """A console that prints every text harmless; lines for a pipe are not wrapped and have no blanks at their end.

    Attributes
    ----------
    hushed
        Of all consoles: nothing goes to standard output, and no notes to standard error.
    """

    hushed: ClassVar[bool] = False

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, highlight=False)
        if not self.is_terminal:
            self.width = _PIPE_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text of anybody's."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as every console does."""
        if self.hushed and (not self.stderr or str(objects[0] if objects else "").startswith("note: ")):
            return
        tables = [item for item in objects if isinstance(item, _Harmless)]
        if self.is_terminal or not tables:
            left_out = [name for table in tables for name in table.fit(self.width)]
            super().print(*objects, **options)
            if left_out:
                super().print(f"(too narrow for: {', '.join(left_out)}; a pipe shows all)", style="dim", markup=False)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


_GAP: Final = 2
_LEAST: Final = 12
_LEAST_NAME: Final = 24
"""Columns are this far apart; a last column, and a name before others, that is cut keeps so many characters at least."""


def _width(column: Column) -> int:
    """Return the characters that a column takes."""
    texts = [str(column.header), *map(str, column._cells)]
    return max(cell_len(Text.from_markup(text).plain if "[" in text or "\\" in text else text) for text in texts)


class _Harmless(Table):
    """A table whose cells are parts of a line."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row."""
        super().add_row(*(printable(c, line=True) if isinstance(c, str) else c for c in cells), **options)

    def fit(self, width: int) -> list[str]:
        """Make the table as narrow as a terminal, and return the headings of columns that had to go.

        What gives way is the last column, if it is text; then the widest text, as names of tensors are; numbers never.
        """
        widths = {id(column): _width(column) for column in self.columns}
        gone: list[str] = []
        while self.columns:
            over = sum(widths[id(column)] + _GAP for column in self.columns) - _GAP - width
            last, texts = self.columns[-1], [column for column in self.columns if column.justify == "left"]
            widest = max(texts, key=lambda column: widths[id(column)], default=last)
            for column, least in ((last, _LEAST), (widest, _LEAST_NAME)):
                if column.justify == "left" and over > 0 and widths[id(column)] - over >= least:
                    column.width = widths[id(column)] - over
                    over = 0
            if over <= 0 or len(self.columns) == 1:
                break
            gone.insert(0, str(last.header))
            self.columns.remove(last)
        return gone


def make_table(*columns: str) -> Table:
    """Return a table with these headings; columns of numbers end at their right."""
    table = _Harmless(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    return table


def prepare_streams() -> None:
    """Make standard streams usable, whatever the caller has made of them.

    A stream that is closed (``>&-``, a daemon's) leads to nowhere, instead of into the next file that is opened under its
    number. Characters that a stream's encoding lacks are printed as their codes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        stream = getattr(sys, name)
        if number and isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


out = Lines()
err = Lines(stderr=True)


def hush(asked: bool) -> None:
    """Print errors and warnings only, or everything again."""
    Lines.hushed = asked


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error as one line, and end with an exit code."""
    err.print(f"error: {printable(message, line=True)}", markup=False, style="red")
    raise SystemExit(code)
