"""The two converters under comparison, and other commands, each run as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from . import ROOT


def _run(command: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def ggufx(*arguments: object) -> None:
    """Run a command of ggufx."""
    _run([sys.executable, "-m", "ggufx", *map(str, arguments)])


def convert(checkpoint: Path, out: Path, *arguments: str) -> Path:
    """Convert a checkpoint with ggufx for llama.cpp."""
    command = [sys.executable, "-m", "ggufx", "convert", str(checkpoint), "--outfile", str(out)]
    _run([*command, "--target", "llama.cpp", *arguments])
    return out


def upstream_convert(source: Path, dense: str, checkpoint: Path, out: Path, *arguments: str) -> Path:
    """Convert a checkpoint with llama.cpp's converter; `dense` is its own q8_0, or bf16 (see upstream_convert.py)."""
    script = Path(__file__).with_name("upstream_convert.py")
    _run([sys.executable, str(script), str(source), dense, str(checkpoint), "--outfile", str(out), *arguments])
    return out
