"""Where compiled kernels are kept, and what happens to files of theirs that are not whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufx.kernels import _cache

ROOT = Path(__file__).parent.parent

DECODE = """
import numpy as np
from ggufx import types, warmup
codec = types.get("Q8_0")
row = np.arange(34, dtype=np.uint8)[None]
with warmup.compiling() as compiled:
    values = codec.decode(row)
expected = codec.decode(row, use_kernel=False)
assert np.array_equal(values, expected)
print("compiled" if compiled else "loaded", warmup.kept())
"""
WARMUP = """
import sys
from ggufx.cli import main
sys.argv = ["ggufx", "warmup", "Q8_0"]
main()
"""
# Root may write everywhere, but neither below /proc.
NO_TREE = """
from ggufx.kernels import _cache
def refuse(self):
    raise PermissionError(13, "Permission denied")
_cache._InTree.ensure_cache_path = refuse
"""
NO_TEMPORARY = """
import tempfile
tempfile.tempdir = "/proc"
"""
NO_HOME = {"HOME": "/proc/home"}


def run(code: str, **environment: object) -> subprocess.CompletedProcess[str]:
    keep = ("PATH", "LD_LIBRARY_PATH", "LANG")
    return subprocess.run(
        [sys.executable, "-c", code],
        env={key: os.environ[key] for key in keep if key in os.environ} | {k: str(v) for k, v in environment.items()},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without compiled kernels."""
    shutil.copytree(ROOT / "ggufx", tmp_path / "install" / "ggufx", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "install"


def damaged(change: Callable[[bytes], bytes], folder: Path, suffix: str) -> int:
    paths = [path for path in folder.rglob(f"*{suffix}") if path.is_file()]
    for path in paths:
        path.write_bytes(change(path.read_bytes()))
    return len(paths)


def flipped(data: bytes) -> bytes:
    at = len(data) * 3 // 4
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_files_that_are_not_whole_are_compiled_again(tmp_path: Path) -> None:
    where = {"PYTHONPATH": ROOT, "NUMBA_CACHE_DIR": tmp_path}
    assert run(DECODE, **where).stdout == "compiled True\n"
    assert run(DECODE, **where).stdout == "loaded True\n"
    changes: list[Callable[[bytes], bytes]] = [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        flipped,  # a bit of machine code, which unpickles all the same
    ]
    for change, suffix in zip(changes, (".nbi", ".nbc", ".nbc"), strict=True):
        assert damaged(change, tmp_path, suffix)
        done = run(DECODE, **where)
        assert (done.stdout, done.stderr) == ("compiled True\n", ""), suffix
    assert run(DECODE, **where).stdout == "loaded True\n"


def forget(package: Path) -> None:
    """Remove what was compiled beside the source, where root may write after all."""
    for path in package.rglob("*.nb?"):
        path.unlink()


def test_the_last_resort_is_a_private_folder_for_temporary_files(package: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    where = NO_HOME | {"PYTHONPATH": package, "TMPDIR": temporary}
    assert run(NO_TREE + DECODE, **where).stdout == "compiled True\n"
    assert run(NO_TREE + DECODE, **where).stdout == "loaded True\n"
    (private,) = temporary.iterdir()
    assert private.name == f"ggufx-kernels-{os.geteuid()}"
    assert (private.stat().st_mode & 0o777, private.stat().st_uid) == (0o700, os.geteuid())
    # What is in the folder is run: one that others may write to, a link, and one of somebody else's are not trusted.
    moved = private.rename(temporary / "moved")
    plants: list[Callable[[], object]] = [lambda: private.symlink_to(moved), lambda: private.mkdir(mode=0o700)]
    for plant in plants:
        forget(package)
        plant()
        if not private.is_symlink():
            private.chmod(0o770)
        done = run(NO_TREE + DECODE, **where)
        assert done.stdout.startswith("compiled ")
        assert private.is_symlink() or not list(private.iterdir())
        private.unlink() if private.is_symlink() else private.rmdir()
    if os.geteuid() == 0:
        forget(package)
        moved.rename(private)
        os.chown(private, 65534, 65534)
        assert run(NO_TREE + DECODE, **where).stdout.startswith("compiled ")


def test_kernels_that_cannot_be_kept_are_told_once(package: Path) -> None:
    # The folder of the package is there, and is none.
    (package / "ggufx" / "kernels" / "__pycache__").write_bytes(b"")
    where = NO_HOME | {"PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": 1}
    done = run(NO_TEMPORARY + DECODE, **where)
    assert done.stdout == "compiled False\n"
    assert done.stderr.count("cannot be kept") == 1
    warmed = run(NO_TEMPORARY + WARMUP, **where)
    assert warmed.returncode == 1
    assert warmed.stdout.splitlines()[-1].startswith("2 kernels, ")
    note, error = warmed.stderr.splitlines()[-2:]
    assert note.startswith("note: compiled kernels cannot be kept on disk, so that every run compiles them again (")
    assert note.endswith("); set NUMBA_CACHE_DIR to a folder that can be written")
    assert error == (
        "error: the kernels were compiled, but not kept: set NUMBA_CACHE_DIR to a folder that can be written"
    )


def test_what_was_compiled_beside_the_source_serves_those_who_may_not_write_there(
    package: Path, tmp_path: Path
) -> None:
    assert run(WARMUP, PYTHONPATH=package).returncode == 0
    for home in (NO_HOME, {"HOME": tmp_path / "home"}):
        done = run(NO_TEMPORARY + NO_TREE + WARMUP, PYTHONPATH=package, **home)
        assert (done.returncode, done.stderr) == (0, "")
        assert "compiled" not in done.stdout
        assert done.stdout.count("from the cache") == 2


def test_a_full_disk_does_not_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache, "_unkept", [])
    monkeypatch.setattr(_cache.caching.FunctionCache, "save_overload", full)
    kept = _cache.KernelCache(DECODE_NOTHING, None)
    with pytest.warns(UserWarning, match=r"cannot be kept on disk.*No space left on device"):
        kept.save_overload(None, None)
    kept.save_overload(None, None)  # said once
    assert not _cache.kept()


def DECODE_NOTHING() -> None:
    """Stand for a kernel."""
