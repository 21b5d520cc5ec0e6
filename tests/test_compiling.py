"""That kernels are compiled is said, costs no estimate, and does not happen in a dry run; Triton's folder."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numba
import numpy as np
import pytest

from ggufx import budget, cli, kernels, types, warmup
from ggufx.kernels._jit import kernel
from ggufx.terminal import Lines

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m", "ggufx"]
SOURCE = """
def triple(values, out):
    for i in range(values.shape[0]):
        out[i] = 3 * values[i]
"""
Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes a small kernel, as a new process would; its code is kept in ``tmp_path``."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()

    def made(name: str = "q9_x", package: str = "ggufx.kernels.") -> Any:
        path = tmp_path / "source" / f"{name}.py"
        path.write_text(SOURCE)
        spec = importlib.util.spec_from_file_location(f"{package}{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return kernel(module.triple)

    return made


def call(made: Any, dtype: Any = np.int64) -> None:
    """Call a kernel and check what it does."""
    out = np.zeros(4, dtype)
    made(np.arange(4, dtype=dtype), out)
    assert out.tolist() == [0, 3, 6, 9]


# What is said ---------------------------------------------------------------------------------------------------


def test_who_listens_hears_the_type(make: Make) -> None:
    heard: list[tuple[str, bool]] = []
    with kernels.compiling_heard(lambda kind, begins: heard.append((kind, begins))):
        made = make()
        call(made)
        call(made)
        with kernels.of_type("IQ9_KS"):
            call(make("_family"))
        call(make("_all"))
        call(make("_all"))  # from the disk
        call(make("q8_z", "elsewhere_"))
    call(make("unheard"))
    assert heard == [(kind, begins) for kind in ("Q9_X", "IQ9_KS", "", "") for begins in (True, False)]


def test_searches_are_compiled_for_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    codec = types.get("Q4_K")
    monkeypatch.setattr(codec, "encode_rows", lambda *_: told.append(kernels._thread.type))
    codec.encode(np.ones((1, 256), np.float32))
    assert set(told) == {"Q4_K"}
    assert kernels._thread.type == ""


def test_a_note_without_a_terminal(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with cli._progress("quantize"):
        made = make()
        call(made)
        call(made, np.float32)
        call(make("_all"))
    assert capsys.readouterr().err == "note: compiling Q9_X (once)\nnote: compiling kernels (once)\n"


def test_the_bar_says_what_is_compiled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(Lines):
        is_terminal = True

    class Watched(cli.Progress):
        def update(self, task: Any, **fields: Any) -> None:
            super().update(task, **fields)
            seen.append(self.tasks[0].description)

    console, seen = Terminal(), list[str]()
    console.file = io.StringIO()
    monkeypatch.setattr(cli, "_err", console)
    monkeypatch.setattr(cli, "Progress", Watched)
    with cli._progress("quantize") as progress:
        progress(1, 4)
        call(make())
        progress(2, 4)
    assert seen == ["quantize", "quantize: compiling Q9_X (once)", "quantize", "quantize"]
    assert "note" not in console.file.getvalue()


def test_the_clock_of_the_estimate_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    compiling = cli._Compiling(lambda _: None)
    times = [compiling.clock()]
    for begins, later in ((None, 2.0), (True, 30.0), (False, 5.0), (True, 7.0), (False, 1.0)):
        if begins is not None:
            compiling("Q4_K", begins)
        now[0] += later
        times.append(compiling.clock())
    assert times == [100, 102, 102, 107, 107, 108]


# Dry runs -------------------------------------------------------------------------------------------------------


def model(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", np.ones((8, 512), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_dry_run_compiles_nothing(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    shutil.copytree(ROOT / "ggufx", tmp_path / "ggufx", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [
            *PYTHON,
            "recipe",
            "fit",
            str(path),
            "--target-bpw",
            "5",
            "--types",
            "q8_0,q4_k,iq3_kt",
            "--dry-run",
            "--json",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    data = json.loads(done.stdout)
    assert data["estimated_seconds"] is None
    assert data["not_compiled"] == ["Q8_0", "Q4_K", "IQ3_KT"]
    assert list((tmp_path / "cache").rglob("*.nb?")) == []


def test_an_estimate_by_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    found = budget.Budget(model(tmp_path / "m.gguf"), type_names=["q8_0", "q4_0", "q5_0"])
    codec = types.get("Q8_0")
    codec.decode(codec.encode(np.ones((1, 32), np.float32)), dtype=np.float32)
    clock = iter(np.arange(0.0, 100.0, 0.5))  # half a second a trial

    def refused(*_: Any, **__: Any) -> Any:
        raise kernels.NotCompiledError("q5_0")

    for name in ("Q4_0", "Q5_0"):
        monkeypatch.setattr(types.get(name), "encode", refused)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(clock))
    estimate = found.estimate(threads=1)
    assert estimate.tried == ("Q8_0",)
    assert estimate.not_compiled == ("Q4_0", "Q5_0")
    # 2 tensors of 4096 weights in 3 types, a trial being 4 rows of 4096 in 0.5 s.
    assert estimate.seconds == pytest.approx(2 * 4096 * 3 * 0.5 / (4 * 4096))
    run = cli("recipe", "fit", found._source.path, "--target-bpw", "5", "--types", "q8_0,q4_0,q5_0", "--dry-run")
    assert run.code == 0, run.err
    assert "(candidates tried for this estimate: 1)" in run.out
    assert "note: not compiled yet: q4_0, q5_0; " in run.out


# Triton's -------------------------------------------------------------------------------------------------------


def test_triton_is_given_a_folder_where_it_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(variable, "")  # what is unset afterwards is brought back
        monkeypatch.delenv(variable)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", "/dev/null")
    kernels._folders.give_triton_one()
    private = tmp_path / f"ggufx-{os.geteuid()}"
    assert os.environ["TRITON_CACHE_DIR"] == str(private / "triton")
    assert private.stat().st_mode & 0o777 == 0o700
    # Not a folder in which others can plant code, and not instead of one that was named or can be written.
    for mode, variable, value, given in (
        (0o777, "HOME", "/dev/null", None),
        (0o700, "TRITON_CACHE_DIR", "/somewhere", "/somewhere"),
        (0o700, "HOME", str(tmp_path), None),
    ):
        private.chmod(mode)
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        monkeypatch.setenv(variable, value)
        kernels._folders.give_triton_one()
        assert os.environ.get("TRITON_CACHE_DIR") == given


# Folders --------------------------------------------------------------------------------------------------------


def test_nothing_is_made_where_others_can_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is open to everybody and has no sticky bit, and one of another user, such as the home under sudo."""
    place = tmp_path / "place"
    place.mkdir()
    private = place / ".cache" / "ggufx"
    place.chmod(0o777)
    with pytest.raises(OSError, match="ggufx"):
        kernels._folders.make_private(private)
    place.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(place, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match="ggufx"):
        kernels._folders.make_private(private)
    assert list(place.iterdir()) == []
    monkeypatch.undo()
    os.chown(place, os.geteuid(), os.getegid())
    place.chmod(0o1777)  # as of /tmp
    kernels._folders.make_private(private.parent)
    assert private.parent.stat().st_mode & 0o777 == 0o700


def test_a_named_folder_is_the_only_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles() -> bool:
        made = make()
        with warmup.compiling() as compiled:
            call(made)
        return bool(compiled)

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    assert compiles()
    assert not compiles()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "named"))
    assert compiles(), "what is beside the source was loaded"
    assert not compiles()
