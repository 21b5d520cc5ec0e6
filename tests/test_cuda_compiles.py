"""Kernels brought to machine code without a GPU: the interpreter does not see what the compiler refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggufx import types

# Not imported here: other tests of this process want Triton's interpreter, and say so before its first import.
TRITON = importlib.util.find_spec("triton")
TOOL = Path(__file__).parent.parent / "tools" / "compile_cuda.py"
VERBS = ("decode", "linear", "settled", "experts")


@pytest.mark.skipif(
    TRITON is None or not list(Path(str(TRITON.origin)).parent.glob("backends/nvidia/bin/ptxas")),
    reason="no Triton with ptxas",
)
def test_every_kernel_compiles_and_keeps_to_its_registers(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--json", tmp_path / "report.json"]
    # Compiled anew: that is what is tested.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    wanted = {(codec.name, verb) for codec in types.all_codecs() if codec.has_cuda for verb in VERBS}
    assert {(line["type"], line["verb"]) for line in report} == wanted
    for line in report:
        assert line["spilled"] == 0, line
        assert 0 < line["integer"] < line["instructions"], line
