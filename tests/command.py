"""The command line, run in the process of the tests: a process of its own takes half a second to load."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest


class Run(NamedTuple):
    """What a command line left."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run the command line in this process: what it prints and its exit code.

    It does not say what it compiles: that depends on which tests have run before.
    """
    from ggufx import kernels
    from ggufx.cli import main

    monkeypatch.setattr(kernels, "compiling_heard", lambda listener: nullcontext())

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["ggufx", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Run(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run
