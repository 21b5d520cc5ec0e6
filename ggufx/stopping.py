"""Whether this process has been told to end soon: what its threads ask before they begin with another piece of long work.

A thread cannot be interrupted from outside, and ending waits for all of them. So a search of a large tensor, or the compiler,
would otherwise go on for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stopping", "begin", "check", "possible"]


class Stopping(BaseException):
    """The process ends, so that nothing new is begun."""


class _State:
    begun = False


def begin() -> None:
    """Have threads end before their next piece of work; may be called at any moment, in a signal's handler too."""
    _State.begun = True


def check() -> None:
    """Raise Stopping if the process has been told to end."""
    if _State.begun:
        raise Stopping


@contextmanager
def possible() -> Iterator[None]:
    """Forget afterwards that work was to stop: for the next command in the same process."""
    try:
        yield
    finally:
        _State.begun = False
