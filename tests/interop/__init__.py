"""Tests against the programs that read and write these files: transformers, llama.cpp and its converter.

They need the `interop` extra and run with `pytest -m interop`. Reference values come from a random checkpoint in the
official format (tools/make_tiny_v4.py) and from transformers; nothing is stored.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

REQUIRED = bool(os.environ.get("GGUFX_INTEROP"))
"""Set by `make interop`: what is missing is then an error, not a reason to skip."""
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def need(name: str) -> ModuleType:
    """Import a module of the interop group: skip without it, but fail where the group was asked for (`make interop`)."""
    return importlib.import_module(name) if REQUIRED else pytest.importorskip(name)


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where the group was asked for."""
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)
