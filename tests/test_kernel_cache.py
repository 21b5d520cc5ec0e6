"""Compiled kernels on disk: where they are kept, that nothing damaged or planted is loaded, and what is said about it."""

from __future__ import annotations

import errno
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from ggufx import kernels, outputs, warmup
from ggufx.kernels import _cache
from ggufx.kernels._jit import kernel

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m", "ggufx"]
SOURCE = """
def triple(values, out):
    for i in range(values.shape[0]):
        out[i] = 3 * values[i]
"""
Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return a function that makes a small kernel, as a new process would; its cache can be nowhere but in ``tmp_path``."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "source").mkdir()
    before = list(kernels.unkept)
    kernels.unkept.clear()

    def made(name: str = "q9_x") -> Any:
        path = tmp_path / "source" / f"{name}.py"
        path.write_text(SOURCE)
        spec = importlib.util.spec_from_file_location(f"elsewhere.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return kernel(module.triple)

    yield made
    kernels.unkept[:] = before


def compiles(made: Any, dtype: Any = np.int64) -> bool:
    """Call a kernel, check what it does, and return whether it was compiled for that."""
    out = np.zeros(4, dtype)
    with warmup.compiling() as compiled:
        made(np.arange(4, dtype=dtype), out)
    assert out.tolist() == [0, 3, 6, 9]
    return bool(compiled)


def block(folder: Path) -> None:
    """Have nothing be written below a folder, for root neither."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_bytes(b"")


def kept(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).parts[0]) for path in folder.rglob("*.ggufx"))


# Where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["asked", "source", "users", "temporary"])
def test_the_first_folder_that_can_be_written(
    where: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "asked":
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "asked"))
    if where in ("users", "temporary"):
        block(tmp_path / "source" / "__pycache__")
    if where == "temporary":
        block(tmp_path / "users")
    assert compiles(make())
    assert kept(tmp_path) == [where]
    assert not compiles(make()), "another process compiles it again"
    if where in ("users", "temporary"):
        name = "ggufx" if where == "users" else f"ggufx-{os.geteuid()}"
        assert (tmp_path / where / name).stat().st_mode & 0o777 == 0o700
    assert kernels.unkept == []


def test_a_folder_that_can_only_be_read_serves(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiles(make())

    def read_only(path: Path, **_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(outputs, "replacing", read_only)
    assert not compiles(make())
    assert kept(tmp_path) == ["source"]


def test_a_folder_that_was_named_is_the_only_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiles(make())
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "asked"))
    block(tmp_path / "asked")
    with pytest.warns(kernels.CacheWarning, match=f"{tmp_path}/asked"):
        assert compiles(make())
    (tmp_path / "asked").unlink()
    assert compiles(make())
    assert not compiles(make())
    assert kept(tmp_path) == ["asked", "source"]


def test_nothing_can_be_written(make: Make, tmp_path: Path) -> None:
    for folder in (
        tmp_path / "source" / "__pycache__",
        tmp_path / "users",
        tmp_path / "temporary" / f"ggufx-{os.geteuid()}",
    ):
        block(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiles(make())
        assert compiles(make("other"))
    (told,) = (str(one.message) for one in caught if one.category is kernels.CacheWarning)
    assert "set NUMBA_CACHE_DIR" in told
    assert str(tmp_path / "source") in told
    assert len(kernels.unkept) == 2


def test_a_user_without_a_home(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block(tmp_path / "source" / "__pycache__")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def unknown(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.chdir(tmp_path)
    assert compiles(make())
    assert kept(tmp_path) == ["temporary"]


def test_the_command_says_that_nothing_is_kept(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ggufx", tmp_path / "ggufx", ignore=shutil.ignore_patterns("__pycache__"))
    block(tmp_path / "ggufx" / "kernels" / "__pycache__")
    environment = {key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(tmp_path), "HOME": "/dev/null", "TMPDIR": "/dev/null"}
    done = subprocess.run(
        [*PYTHON, "warmup", "q8_0"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("note: compiled kernels cannot be kept")
    assert lines[1:] == [
        "error: 2 kernels were compiled, but not kept: set NUMBA_CACHE_DIR to a folder that can be written"
    ]
    assert done.stdout.count("compiled, but not kept") == 2


# Whose ----------------------------------------------------------------------------------------------------------


class Planted:
    """Runs code of its author where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(made: Any, folder: Path, mark: Path) -> None:
    """Replace a kernel's file in a folder by a stranger's, who knows the sources, and so the digest."""
    (path,) = folder.rglob("*.ggufx")
    content = pickle.dumps((Planted(mark), 0))
    path.write_bytes(made._cache._digest(content) + content)


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("users", "mine"),
        ("users", "open to others"),
        ("temporary", "mine"),
        ("temporary", "a link"),
        ("temporary", "another's"),
        ("temporary", "replaceable"),
    ],
)
def test_only_the_users_own_folder_is_read(
    how: str, place: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(tmp_path / "source" / "__pycache__")
    if place == "temporary":
        block(tmp_path / "users")
    made, mark = make(), tmp_path / "mark"
    assert compiles(made)
    assert kept(tmp_path) == [place]
    (folder,) = (tmp_path / place).iterdir()
    plant(made, folder, mark)
    if how == "open to others":
        folder.chmod(0o770)
    elif how == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif how == "another's":
        uid = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        folder.rename(folder.with_name(folder.name.replace(str(uid - 1), str(uid))))
    elif how == "replaceable":
        folder.parent.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.CacheWarning)
        # What the planted code returns is no code; the user's own folder holds what the user has put there.
        assert compiles(make())
    assert mark.exists() == (how == "mine")


def test_nothing_is_made_in_the_home_of_another(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block(tmp_path / "source" / "__pycache__")
    (tmp_path / "users").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users" / ".cache"))
    uid = os.geteuid()
    for folder in (tmp_path / "users", tmp_path / "temporary"):
        if uid == 0:
            os.chown(folder, 12345, 12345)
    if uid:
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.warns(kernels.CacheWarning):
        assert compiles(make())
    assert [path for folder in ("users", "temporary") for path in (tmp_path / folder).iterdir()] == []


# Triton's -------------------------------------------------------------------------------------------------------


# Damaged --------------------------------------------------------------------------------------------------------


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "cut in the digest": whole[:20],
        "cut": whole[:-1],
        "garbage": os.urandom(len(whole)),
        "a bit": whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:],
    }
    path.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["empty", "cut in the digest", "cut", "garbage", "a bit"])
def test_a_damaged_file_is_made_again(how: str, make: Make, tmp_path: Path) -> None:
    assert compiles(make())
    (path,) = tmp_path.rglob("*.ggufx")
    damaged(path, how)
    assert compiles(make())
    assert list(tmp_path.rglob("*.ggufx")) == [path]
    assert not compiles(make()), "the damaged file was not replaced"


@pytest.mark.parametrize("what", ["numba", "llvmlite", "numpy", "source"])
def test_code_of_another_version_is_made_again(
    what: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiles(make())
    (path,) = tmp_path.rglob("*.ggufx")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if what == "source":
            patch.setattr(sys.modules[__name__], "SOURCE", SOURCE + "\nOTHER = 1\n")
        else:
            patch.setattr(
                {"numba": _cache.numba, "llvmlite": _cache.llvmlite, "numpy": np}[what], "__version__", "0.68.9"
            )
        for cached in (_cache._stamp, _cache._source_stamp):
            cached.cache_clear()
        assert compiles(make())
        assert not compiles(make())
    for cached in (_cache._stamp, _cache._source_stamp):
        cached.cache_clear()
    assert list(tmp_path.rglob("*.ggufx")) == [path], "files of old versions pile up"
    assert path.read_bytes() != before


def test_code_for_another_processor_is_not_run(make: Make, tmp_path: Path) -> None:
    made = make()
    assert compiles(made)
    (path,) = tmp_path.rglob("*.ggufx")
    (sig, (triple, _, features), *rest), code = pickle.loads(path.read_bytes()[32:])
    content = pickle.dumps(((sig, (triple, "z13", features), *rest), code))
    path.write_bytes(made._cache._digest(content) + content)
    assert compiles(make())
    assert not compiles(make())


def test_signatures_have_files_of_their_own(make: Make, tmp_path: Path) -> None:
    made = make()
    assert compiles(made)
    assert compiles(made, np.float32)
    assert len(list(tmp_path.rglob("*.ggufx"))) == 2
    again = make()
    assert not compiles(again, np.float32)
    assert not compiles(again)


def test_a_directory_in_a_files_place(make: Make, tmp_path: Path) -> None:
    assert compiles(make())
    (path,) = tmp_path.rglob("*.ggufx")
    path.unlink()
    path.mkdir()
    assert compiles(make())
    assert kept(tmp_path) == ["source", "users"]
    assert not compiles(make())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_does_not_fail_the_run(
    number: int, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(kernels.CacheWarning, match=os.strerror(number)):
        assert compiles(make())
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert left == []
