"""What is written: nothing planted is followed, nothing finished is lost, nothing of others is taken, nothing is left."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ggufx
from ggufx import edit, execute, outputs
from ggufx.container import Value, encode_header
from ggufx.convert import convert, plan_convert
from ggufx.edit import plan_edit, set_keys
from ggufx.errors import DiskError, GGUFError, OutputExists, PlanError
from ggufx.execute import journal_path, partial_path

from .conftest import Run, assert_one_line, start
from .oracle import Source

Cli = Callable[..., Run]
PathOf = Callable[[str], Path]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def small(path: Path, name: str = "tiny") -> Path:
    header = encode_header({"general.name": Value.string(name)}, [("a.weight", (4, 8), 0, 0)], 32)
    path.write_bytes(header + np.arange(32, dtype="<f4").tobytes())
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# What was planted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [partial_path, journal_path])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory", "file"])
@pytest.mark.parametrize("flags", [[], ["--no-resume", "--overwrite"]])
def test_what_somebody_put_there_is_neither_followed_nor_taken(
    name: Callable[[Path], Path], kind: str, flags: list[str], editable: Source, cli: Cli, tmp_path: Path
) -> None:
    out, secret = tmp_path / "out.gguf", tmp_path / "bashrc"
    secret.write_text("export PATH")
    planted = name(out)
    match kind:
        case "link":
            planted.symlink_to(secret)
        case "dangling link":
            planted.symlink_to(tmp_path / "new")
        case "pipe":
            os.mkfifo(planted)
        case "directory":
            planted.mkdir()
        case "file":
            planted.write_text("a stranger's text, line one\nand two\n")
    before = planted.lstat()
    assert_one_line(cli("convert", editable.path, "--outfile", out, *flags), planted.name)
    assert (planted.lstat().st_ino, planted.lstat().st_size) == (before.st_ino, before.st_size)
    assert secret.read_text() == "export PATH"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([editable.path.name, "bashrc", planted.name])
    if kind == "directory":
        planted.rmdir()
    else:
        planted.unlink()
    assert cli("convert", editable.path, "--outfile", out).code == 0


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_an_output_that_is_no_file_is_never_replaced(kind: str, editable: Source, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    match kind:
        case "pipe":
            os.mkfifo(out)
        case "device":
            out = Path("/dev/null")
        case "directory":
            out.mkdir()
            (out / "x").touch()
    before = out.stat().st_ino
    run = cli("rewrite", small(tmp_path / "in.gguf"), "--outfile", out, "--overwrite")
    if kind == "directory":
        assert sorted(path.name for path in out.iterdir()) == ["in.gguf", "x"]
    else:
        assert_one_line(run, str(out))
    assert out.stat().st_ino == before
    with (
        pytest.raises(GGUFError, match=r"device, a pipe or a socket|is a directory"),
        outputs.replacing(out, overwrite=True),
    ):
        pass


def test_a_file_of_a_finished_run_survives_whatever_comes_next(editable: Source, tmp_path: Path) -> None:
    """Killed between the second name and the removal of the first, as on file systems that rename in two steps."""
    out = tmp_path / "out.gguf"
    convert(editable.path, out)
    finished = out.read_bytes()
    os.link(out, partial_path(out))
    journal_path(out).write_bytes(b'{"journal": 1, "digest": "another plan"}\n')
    with pytest.raises(OutputExists):
        convert(editable.path, out, resume=False)
    assert out.read_bytes() == finished

    class Stop(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        # Everything is allocated by now: what had both names must not be what is written.
        assert out.read_bytes() == finished
        raise Stop

    with pytest.raises(Stop):
        convert(editable.path, out, resume=False, overwrite=True, dense="f32", target="llama.cpp", progress=stop)
    assert out.read_bytes() == finished


def test_a_partial_that_is_replaced_under_a_run_is_an_error(editable: Source, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for moment in ("begin", "end"):

        def replace(done: int, total: int, moment: str = moment) -> None:
            if (done == 0) == (moment == "begin") or done == total:
                nbytes = partial_path(out).stat().st_size
                partial_path(out).unlink(missing_ok=True)
                partial_path(out).write_bytes(bytes(nbytes))

        with pytest.raises(PlanError, match="moved or replaced by something else"):
            convert(editable.path, out, progress=replace)
        assert not out.exists()
        partial_path(out).unlink()
        journal_path(out).unlink(missing_ok=True)


def test_the_run_that_lost_its_files_leaves_those_of_the_next_alone(editable: Source, tmp_path: Path) -> None:
    """Stopped, its files removed, the same command given again, and the first continued."""
    out = tmp_path / "out.gguf"
    second: list[threading.Thread] = []

    def continued(done: int, total: int) -> None:
        if not second:
            partial_path(out).unlink()
            journal_path(out).unlink()
            second.append(threading.Thread(target=lambda: convert(editable.path, out)))
            second[0].start()
            second[0].join()

    with pytest.raises(PlanError, match=r"moved or replaced|came into being"):
        convert(editable.path, out, progress=continued)
    convert(editable.path, tmp_path / "alone.gguf")
    assert out.read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert not journal_path(out).exists()


def test_padding_of_a_resumed_partial_is_written_too(editable: Source, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(editable.path, tmp_path / "alone.gguf")
    plan = plan_convert(editable.path, out)
    assert list(plan.files[0].gaps())
    journal_path(out).write_bytes(b'{"journal": 1, "digest": "' + plan.digest.encode() + b'"}\n')
    partial_path(out).write_bytes(b"\xa5" * plan.files[0].nbytes)
    convert(editable.path, out)
    assert out.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


# Another plan, nothing done ---------------------------------------------------------------------------------------


def test_overwrite_starts_over_what_another_plan_left(editable: Source, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    partial_path(out).write_bytes(b"x")
    journal_path(out).write_bytes(b'{"journal": 1, "digest": "another plan"}\n')
    assert_one_line(cli("convert", editable.path, "--outfile", out), "another plan", "--overwrite")
    run = cli("convert", editable.path, "--outfile", out, "--overwrite")
    assert run.code == 0, run
    assert "another plan left unfinished; it is started over" in run.err
    assert sorted(p.name for p in tmp_path.iterdir()) == [editable.path.name, "out.gguf"]


def test_a_run_that_did_nothing_leaves_nothing(editable: Source, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    out = tmp_path / "new" / "folder" / "out.gguf"
    with pytest.raises(Stop):
        convert(editable.path, out, progress=stop)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("can't start new thread"), "starts no more threads"),
    ],
)
def test_what_the_system_refuses_is_one_error(
    error: Exception, words: str, editable: Source, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise error

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    run = cli("convert", editable.path, "--outfile", tmp_path / "o.gguf")
    assert_one_line(run, words, "fewer --threads")
    with pytest.raises(DiskError):
        convert(editable.path, tmp_path / "o.gguf")


# Locks, modes, signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_noted_and_used(
    number: int, editable: Source, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "o.gguf"
    run = cli("convert", editable.path, "--outfile", out)
    assert run.code == 0, run
    assert "note: " in run.err
    assert "this file system has no locks" in run.err
    run = cli("set", out, "general.name=str:x" * 1)
    assert run.code == 0, run
    assert ggufx.open(out).metadata["general.name"] == "x"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_outputs_have_the_mode_that_umask_leaves_from_their_beginning(
    mask: int, editable: Source, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    out, seen = tmp_path / "out.gguf", []
    convert(editable.path, out, progress=lambda done, total: seen.append(mode_of(partial_path(out))))
    assert set(seen) == {0o666 & ~mask} == {mode_of(out)}
    with outputs.replacing(tmp_path / "small", overwrite=False) as file:
        file.write(b"x")
    assert mode_of(tmp_path / "small") == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_set_keeps_the_files_mode_from_the_beginning(mode: int, tmp_path: Path) -> None:
    path, seen = small(tmp_path / "m.gguf"), []
    path.chmod(mode)
    change = plan_edit(path, {"general.name": Value.string("long " * 40)})
    assert change.plan is not None
    set_keys(change, progress=lambda done, total: seen.append(mode_of(partial_path(path))))
    assert set(seen) == {mode} == {mode_of(path)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_a_journal_that_a_kill_left_of_a_finished_set_goes_with_the_next(tmp_path: Path, cli: Cli) -> None:
    path = small(tmp_path / "m.gguf")
    journal_path(path).write_bytes(b'{"journal": 1, "digest": "x"}\n')
    assert cli("set", path, "general.name=str:tiny").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]
    journal_path(path).write_bytes(b"somebody's notes")
    assert cli("set", path, "general.name=str:tiny").code == 0
    assert journal_path(path).read_bytes() == b"somebody's notes"


@pytest.mark.parametrize("text", ["ab", "long " * 40])
def test_two_sets_of_one_file_do_not_undo_each_other(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small(tmp_path / "m.gguf")
    first = plan_edit(path, {"general.name": Value.string(text)})
    set_keys(plan_edit(path, {"general.author": Value.string("other")}))
    with pytest.raises(PlanError, match="changed since the edit was planned"):
        set_keys(first)
    assert ggufx.open(path).metadata["general.author"] == "other"
    # While one writes, the other neither writes nor "recovers".
    original, tried = edit._write_header, []

    def during(descriptor: int, header: bytes) -> None:
        with pytest.raises(PlanError, match="another process is changing its metadata"):
            plan_edit(path, {})
        tried.append(True)
        original(descriptor, header)

    monkeypatch.setattr(edit, "_write_header", during)
    set_keys(plan_edit(path, {"general.author": Value.string("again")}))
    assert tried
    assert ggufx.open(path).metadata["general.author"] == "again"


def test_sets_from_a_barrier_lose_nothing(tmp_path: Path) -> None:
    """Eight processes set a key of their own, again until it is theirs: in the end all are there."""
    path = small(tmp_path / "m.gguf")
    code = """
import sys
from ggufx.container import Value
from ggufx.edit import plan_edit, set_keys
from ggufx.errors import PlanError
while True:
    try:
        set_keys(plan_edit(sys.argv[1], {"user." + sys.argv[2]: Value.string(sys.argv[2] * 9)}))
        break
    except PlanError as error:
        assert "changing its metadata" in str(error) or "changed since" in str(error) or "replaced" in str(error) or (
            "another process is writing" in str(error)), error
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(n)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for n in range(4)
    ]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    keys = ggufx.open(path).metadata
    assert [keys[f"user.{n}"] for n in range(4)] == [str(n) * 9 for n in range(4)]
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_in_a_row_are_one_wish(number: signal.Signals, checkpoint_path: PathOf, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    process = start("convert", checkpoint_path("long"), "--outfile", out, "--threads", 1)
    while not journal_path(out).exists():
        assert process.poll() is None
        time.sleep(0.001)
    for _ in range(5):
        process.send_signal(number)
        time.sleep(0.01)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert err.count("stopping") == 1


def test_the_system_may_lack_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_renameat2", lambda: None)
    for name, text in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(text)
    outputs.give_name(tmp_path / "a", tmp_path / "c", overwrite=False)
    with pytest.raises(OutputExists):
        outputs.give_name(tmp_path / "b", tmp_path / "c", overwrite=False)
    assert (tmp_path / "c").read_bytes() == b"1"
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()
    monkeypatch.undo()
    with pytest.raises(OutputExists):
        outputs.give_name(tmp_path / "b", tmp_path / "c", overwrite=False)
    outputs.give_name(tmp_path / "b", tmp_path / "c", overwrite=True)
    assert (tmp_path / "c").read_bytes() == b"2"


def test_a_small_output_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")

    def write() -> None:
        with outputs.replacing(path, overwrite=True) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert execute.partial_path(path).name == "m.gguf.partial"
