"""Checkpoints and sources that the interop tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from . import ROOT, unavailable

SDIST = "llama_cpp_python-0.3.36"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The default tiny checkpoint: every kind of layer and router."""
    from make_tiny_v4 import make_tiny_v4

    # The directory's name is where converters take the model's name from.
    out = tmp_path_factory.mktemp("checkpoint") / "Tiny-DeepSeek-V4"
    make_tiny_v4(out)
    return out


@pytest.fixture(scope="session")
def choice_free(tmp_path_factory) -> Path:
    """A tiny checkpoint that never chooses: all experts come from tables, the indexer keeps more than there is.

    A top-k over close scores makes a step of a rounding error. Without one, small errors of the weights stay small.
    """
    from make_tiny_v4 import make_tiny_v4

    out = tmp_path_factory.mktemp("choice_free") / "Tiny-DeepSeek-V4"
    make_tiny_v4(out, hash_layers=5, index_topk=512)
    return out


def _fetch(cache: Path) -> Path:
    """Get llama.cpp's sources out of the llama-cpp-python source distribution; skip the test if it cannot be had."""
    source = cache / SDIST / "vendor" / "llama.cpp"
    if source.exists():
        return source
    cache.mkdir(exist_ok=True)
    archive = cache / f"{SDIST}.tar.gz"
    if not archive.exists():
        requirement = "llama-cpp-python==" + SDIST.rpartition("-")[2]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(cache)]
        try:
            done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired:
            unavailable(f"pip download {requirement} takes more than 10 minutes")
        if done.returncode or not archive.exists():
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
            unavailable(f"the source distribution of {requirement} cannot be had: {reason}")
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    return source


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """A llama.cpp source tree with its converter: of GGUFX_LLAMA_CPP if that is set, else downloaded once."""
    if given := os.environ.get("GGUFX_LLAMA_CPP"):
        return Path(given)
    return _fetch(ROOT / ".interop")
