"""Checkpoints and conversions that the end-to-end tests share: each is made once per session, and only when asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Run

from .oracle import ROOT, Gguf, Source

__all__ = ["CASES", "Run", "assert_nothing_left", "assert_one_line", "run_process", "start"]

SMALL = {"hidden": 256, "moe": 128, "experts": 8, "heads": 4, "head_dim": 128, "index_heads": 4, "merges": 100}
CASES = {
    "flash": SMALL,
    "flash-base": SMALL | {"variant": "flash-base"},
    "pro-like": SMALL | {"variant": "pro-like"},
    "pruned": SMALL | {"experts": 13},
    "odd-96": SMALL | {"moe": 96},
    "odd-160": SMALL | {"moe": 160},
    "no-expert-dtype": SMALL | {"omit_expert_dtype": True},
    "one-file": SMALL | {"shards": 1, "merge_pairs": True},
    # One layer of each attention kind but 128, for tests that change a copy.
    "mini": SMALL | {"layers": 3, "hash_layers": 1, "hidden": 128, "experts": 6, "heads": 2, "merges": 40},
    # Some thousand tiles: long enough to be killed in the middle.
    "long": SMALL | {"hidden": 512, "moe": 256, "experts": 96, "merges": 40},
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the checkpoint of a case; not to be changed."""
    from make_tiny_v4 import make_tiny_v4

    root = tmp_path_factory.mktemp("checkpoints")

    def get(case: str) -> Path:
        path = root / f"Tiny-{case}"
        if not path.exists():
            make_tiny_v4(path, **CASES[case])
        return path

    return get


@pytest.fixture(scope="session")
def source(checkpoint_path: Callable[[str], Path]) -> Callable[[str], Source]:
    """The checkpoint of a case, read by the oracle; not to be changed."""
    held: dict[str, Source] = {}

    def get(case: str) -> Source:
        if case not in held:
            held[case] = Source(checkpoint_path(case))
        return held[case]

    return get


@pytest.fixture(scope="session")
def converted(checkpoint_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Gguf]:
    """The conversion of a case, read by the oracle; not to be changed."""
    from ggufx.convert import convert

    root = tmp_path_factory.mktemp("converted")
    held: dict[tuple[str, ...], Gguf] = {}

    def get(case: str, target: str = "nisparks", dense: str = "q8_0", *, mtp: bool = False) -> Gguf:
        key = (case, target, dense, "mtp" if mtp else "main")
        if key not in held:
            path = root / f"{'_'.join(key)}.gguf"
            assert convert(
                checkpoint_path(case), path, target=target, dense=None if target == "nisparks" else dense, mtp=mtp
            ) == [path]
            held[key] = Gguf(path)
        return held[key]

    return get


@pytest.fixture
def editable(checkpoint_path: Callable[[str], Path], tmp_path: Path) -> Source:
    """A copy of the smallest checkpoint, to be damaged."""
    shutil.copytree(checkpoint_path("mini"), tmp_path / "Mini")
    return Source(tmp_path / "Mini")


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start the command line as a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ggufx", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(command, **(pipes | options))  # type: ignore[call-overload]


def run_process(*arguments: object) -> Run:
    """Run the command line as a process, to its end."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return Run(process.returncode, out, err)


def assert_one_line(run: Run, *needed: str, code: int = 1) -> None:
    """The error path of the command line: exit code 1 (verify, diff: 2) and one line on stderr that holds the facts."""
    lines = [line for line in run.err.splitlines() if not line.startswith("note: ")]
    assert run.code == code, run
    assert len(lines) == 1, run.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in run.err
    for text in needed:
        assert text in lines[0], f"{text!r} not in {lines[0]!r}"


def assert_nothing_left(directory: Path, *, partial: bool = False) -> None:
    """No file under a final name (``*.gguf``), and no partial one unless it may be resumed."""
    assert not list(directory.rglob("*.gguf"))
    if not partial:
        assert not list(directory.rglob("*.partial"))
        assert not list(directory.rglob("*.journal"))
