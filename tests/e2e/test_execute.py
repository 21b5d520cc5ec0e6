"""The engine under kill -9, signals, full disks, damage and company: the bytes are always those of an undisturbed run."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from ggufx import execute, outputs, plan
from ggufx.container import Value
from ggufx.convert import convert, plan_convert
from ggufx.errors import CheckpointError, DiskError, OutputExists, PlanError
from ggufx.execute import journal_path, partial_path

from .conftest import Run, assert_nothing_left, assert_one_line, run_process, start
from .oracle import ROOT, Gguf, Source

Cli = Callable[..., Run]
PathOf = Callable[[str], Path]

RECORD = 16  # bytes of a journal entry: tile u32, checksum u64, check u32


@pytest.fixture(scope="module")
def undisturbed(checkpoint_path: PathOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion of the long checkpoint, without trouble."""
    path = tmp_path_factory.mktemp("undisturbed") / "out.gguf"
    convert(checkpoint_path("long"), path)
    return path


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets of the tiles that are transformed or copied (and not found done) in this process, in order."""
    seen: list[str] = []
    original = execute._run_tile

    def spy(job: execute._Job, opened: dict[tuple[str, int], int]) -> execute._Done:
        done = original(job, opened)
        if not done.resumed:
            seen.append(job.transform.target)
        return done

    monkeypatch.setattr(execute, "_run_tile", spy)
    return seen


def same(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


def records(out: Path) -> int:
    """Number of finished tiles in the journal beside an output."""
    try:
        raw = journal_path(out).read_bytes()
    except FileNotFoundError:
        return 0
    return (len(raw) - raw.find(b"\n") - 1) // RECORD if b"\n" in raw else 0


def wait_for_records(process: subprocess.Popen[str], out: Path, count: int) -> bool:
    """Wait until the journal has so many entries; False when the process ended first."""
    while process.poll() is None:
        if records(out) >= count:
            return True
        time.sleep(0.0005)
    return False


# Interrupted ----------------------------------------------------------------------------------------------------


def test_kill_9_at_random_moments(
    checkpoint_path: PathOf, undisturbed: Path, cli: Cli, applied: list[str], tmp_path: Path
) -> None:
    """Killed again and again, the same command comes to the same bytes, and does no tile twice that was journalled."""
    checkpoint, out = checkpoint_path("long"), tmp_path / "out.gguf"
    total = plan_convert(checkpoint, out).n_tiles
    assert total > 1000
    rng, killed, before = random.Random(7), 0, 0
    for _ in range(4):
        process = start("convert", checkpoint, "--outfile", out, "--threads", 1)
        wanted = min(before + rng.randrange(1, total // 5), total - 100)
        if wait_for_records(process, out, wanted):
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        killed += 1
        assert not out.exists()
        found = records(out)
        assert found >= max(before, wanted), "the journal lost what an earlier run did"
        before = found
    assert killed == 4
    run = cli("convert", checkpoint, "--outfile", out)
    assert run.code == 0, run.err
    assert same(out, undisturbed)
    assert len(applied) == total - before
    assert sorted(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_what_can_be_resumed(
    number: signal.Signals, checkpoint_path: PathOf, undisturbed: Path, cli: Cli, tmp_path: Path
) -> None:
    checkpoint, out = checkpoint_path("long"), tmp_path / "out.gguf"
    process = start("convert", checkpoint, "--outfile", out, "--threads", 1)
    assert wait_for_records(process, out, 40)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2
    assert lines[0].startswith("stopping")
    assert "same command goes on" in lines[1]
    assert not out.exists()
    assert partial_path(out).exists()
    assert records(out) >= 40
    run = cli("convert", checkpoint, "--outfile", out)
    assert run.code == 0, run.err
    assert same(out, undisturbed)


class Stop(BaseException):
    """Not an Exception: what an interpreter that is going down raises."""


@pytest.fixture
def half_done(editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, int]:
    """(checkpoint, output, tiles journalled) of a run that stopped in the middle."""
    out = tmp_path / "out.gguf"
    half = plan_convert(editable.path, out).n_tiles // 2
    original, count = execute._Journal.add, [0]

    def add(self: execute._Journal, number: int, checksum: int) -> None:
        if count[0] == half:
            raise Stop
        count[0] += 1
        original(self, number, checksum)

    with monkeypatch.context() as patch:
        patch.setattr(execute._Journal, "add", add)
        with pytest.raises(Stop):
            convert(editable.path, out, threads=2)
    assert records(out) == half
    return editable.path, out, half


@pytest.fixture
def undamaged(half_done: tuple[Path, Path, int], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the half-done run must come to."""
    path = tmp_path_factory.mktemp("undamaged") / "out.gguf"
    convert(half_done[0], path)
    return path.read_bytes()


@pytest.mark.parametrize("tail", [b"x", b"\0" * 19, b"\xff" * RECORD, b"\0" * 500])
def test_a_torn_journal_tail(
    tail: bytes, half_done: tuple[Path, Path, int], undamaged: bytes, applied: list[str]
) -> None:
    checkpoint, out, half = half_done
    with journal_path(out).open("ab") as file:
        file.write(tail)
    convert(checkpoint, out)
    assert out.read_bytes() == undamaged
    assert len(applied) == plan_convert(checkpoint, out).n_tiles - half


def test_a_torn_record_is_done_again(half_done: tuple[Path, Path, int], undamaged: bytes, applied: list[str]) -> None:
    checkpoint, out, half = half_done
    os.truncate(journal_path(out), journal_path(out).stat().st_size - 5)
    convert(checkpoint, out)
    assert out.read_bytes() == undamaged
    assert len(applied) == plan_convert(checkpoint, out).n_tiles - half + 1


@pytest.mark.parametrize("left", [0, 30])
def test_a_torn_first_line_starts_over(
    left: int, half_done: tuple[Path, Path, int], undamaged: bytes, applied: list[str]
) -> None:
    checkpoint, out, _ = half_done
    os.truncate(journal_path(out), left)
    convert(checkpoint, out)
    assert out.read_bytes() == undamaged
    assert len(applied) == plan_convert(checkpoint, out).n_tiles


def test_a_partial_without_a_journal_is_not_ours_to_take(half_done: tuple[Path, Path, int], undamaged: bytes) -> None:
    checkpoint, out, _ = half_done
    journal_path(out).unlink()
    found = partial_path(out).read_bytes()
    for options in ({}, {"resume": False}, {"overwrite": True}, {"resume": False, "overwrite": True}):
        with pytest.raises(PlanError, match=r"out.gguf.partial: exists, but the journal.*move it away"):
            convert(checkpoint, out, **options)
        assert partial_path(out).read_bytes() == found
        assert not journal_path(out).exists()
    partial_path(out).unlink()
    convert(checkpoint, out)
    assert out.read_bytes() == undamaged


def test_a_partial_that_is_gone_is_made_again(half_done: tuple[Path, Path, int], undamaged: bytes) -> None:
    checkpoint, out, _ = half_done
    partial_path(out).unlink()
    convert(checkpoint, out)
    assert out.read_bytes() == undamaged


def test_bytes_that_a_power_cut_lost_are_found_and_written_again(
    half_done: tuple[Path, Path, int], undamaged: bytes, applied: list[str]
) -> None:
    """The journal counts three tiles whose bytes are not what was written."""
    checkpoint, out, half = half_done
    made = plan_convert(checkpoint, out)
    jobs = list(made.jobs())
    raw = journal_path(out).read_bytes()
    first = raw.find(b"\n") + 1
    done = [int.from_bytes(raw[at : at + 4], "little") for at in range(first, len(raw), RECORD)]
    with partial_path(out).open("r+b") as file:
        for number, length in zip(done[:3], (64, 1, 8), strict=True):
            _, tensor, tile = jobs[number]
            length = min(length, tile.nbytes)
            file.seek(len(made.files[0].header) + tensor.offset + tile.offset + tile.nbytes - length)
            lost = bytes(byte ^ 0xA5 for byte in file.read(length))
            file.seek(-length, os.SEEK_CUR)
            file.write(lost)
    convert(checkpoint, out)
    assert out.read_bytes() == undamaged
    assert len(applied) == made.n_tiles - half + 3


def test_another_plan_does_not_go_on_with_it(half_done: tuple[Path, Path, int], cli: Cli, undamaged: bytes) -> None:
    checkpoint, out, _ = half_done
    before = partial_path(out).read_bytes(), journal_path(out).read_bytes()
    run = cli("convert", checkpoint, "--outfile", out, "--stamp")
    assert_one_line(run, "another plan", "--no-resume", partial_path(out).name)
    os.utime(next(checkpoint.glob("*.safetensors")), (1, 1))  # a source that was downloaded again
    assert_one_line(cli("convert", checkpoint, "--outfile", out), "another plan", "sources")
    assert before == (partial_path(out).read_bytes(), journal_path(out).read_bytes())
    run = cli("convert", checkpoint, "--outfile", out, "--no-resume")
    assert run.code == 0, run.err
    assert out.read_bytes() == undamaged
    assert not partial_path(out).exists()
    assert not journal_path(out).exists()


def test_no_resume_does_every_tile(half_done: tuple[Path, Path, int], undamaged: bytes, applied: list[str]) -> None:
    checkpoint, out, _ = half_done
    convert(checkpoint, out, resume=False)
    assert out.read_bytes() == undamaged
    assert len(applied) == plan_convert(checkpoint, out).n_tiles


def test_a_second_process_is_refused(checkpoint_path: PathOf, undisturbed: Path, cli: Cli, tmp_path: Path) -> None:
    checkpoint, out = checkpoint_path("long"), tmp_path / "out.gguf"
    process = start("convert", checkpoint, "--outfile", out, "--threads", 1)
    assert wait_for_records(process, out, 10)
    process.send_signal(signal.SIGSTOP)
    try:
        for flags in ([], ["--no-resume"], ["--overwrite"]):
            assert_one_line(cli("convert", checkpoint, "--outfile", out, *flags), "another process", str(out))
    finally:
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert same(out, undisturbed)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_between_the_renames_of_a_split(
    at: int, editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, applied: list[str]
) -> None:
    options = {"split_max_nbytes": 300_000}
    wanted = [p.read_bytes() for p in convert(editable.path, tmp_path / "whole" / "o.gguf", **options)]  # type: ignore[arg-type]
    assert len(wanted) > 3
    applied.clear()
    original, count = outputs.give_name, [0]

    def rename(partial: Path, path: Path, *, overwrite: bool) -> None:
        if count[0] == at:
            raise Stop
        count[0] += 1
        original(partial, path, overwrite=overwrite)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "give_name", rename)
        with pytest.raises(Stop):
            convert(editable.path, tmp_path / "o.gguf", **options)  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("o-*.gguf"))) == at
    done = len(applied)
    paths = convert(editable.path, tmp_path / "o.gguf", **options)  # type: ignore[arg-type]
    assert len(applied) == done, "all was done but the renames"
    assert [p.read_bytes() for p in paths] == wanted
    assert sorted(tmp_path.glob("o*")) == paths


def test_killed_between_the_rename_and_the_end(
    editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, applied: list[str]
) -> None:
    out = tmp_path / "o.gguf"

    def stop(self: execute._Journal) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(execute._Journal, "remove", stop)
        with pytest.raises(Stop):
            convert(editable.path, out)
    assert out.exists()
    before, done = out.read_bytes(), len(applied)
    assert convert(editable.path, out) == [out]
    assert (out.read_bytes(), len(applied)) == (before, done)
    assert not journal_path(out).exists()


# A full disk ----------------------------------------------------------------------------------------------------


def test_too_little_space_is_known_before_the_first_byte(
    editable: Source, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    need = plan_convert(editable.path, out).nbytes
    original = os.statvfs

    def small(path: object) -> object:
        found = list(original(path))  # type: ignore[call-overload]
        found[1], found[4] = 1, 100_000  # f_frsize, f_bavail
        return os.statvfs_result(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", small)
        run = cli("convert", editable.path, "--outfile", out)
    assert_one_line(run, f"{need} bytes are needed", "100000 are free", "disk is full")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", [1, 30])
def test_a_write_that_fails_in_the_middle(
    number: int, after: int, editable: Source, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk does where space cannot be reserved: a short write first, then the error."""
    out = tmp_path / "out.gguf"
    convert(editable.path, tmp_path / "whole" / "o.gguf")
    original, left = os.pwrite, [after]

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == partial_path(out).name:
            left[0] -= 1
            if left[0] == 0:
                return original(descriptor, bytes(data)[: len(data) // 2], offset)
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
        return original(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        run = cli("convert", editable.path, "--outfile", out)
    assert_one_line(run, "same command", "disk is full" if number != errno.EIO else os.strerror(number))
    assert not out.exists()
    # What no tile was recorded of is not worth keeping.
    assert partial_path(out).exists() == journal_path(out).exists()
    run = cli("convert", editable.path, "--outfile", out)
    assert run.code == 0, run.err
    assert same(out, tmp_path / "whole" / "o.gguf")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB, where this sandbox may mount one; the tests above fail writes without it."""
    path = tmp_path / "disk"
    path.mkdir()
    options = {"capture_output": True, "text": True}
    if not shutil.which("mount"):
        pytest.skip("no mount command")
    found = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=False, **options)  # type: ignore[call-overload]
    if found.returncode:
        pytest.skip(f"mounting is not permitted here: {found.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


def test_a_small_disk_is_refused_at_once(small_disk: Path, checkpoint_path: PathOf, tmp_path: Path) -> None:
    run = run_process("convert", checkpoint_path("flash"), "--outfile", small_disk / "out.gguf")
    need = plan_convert(checkpoint_path("flash"), small_disk / "out.gguf").nbytes
    assert_one_line(run, f"{need} bytes are needed", "are free", "same command")
    assert_nothing_left(small_disk)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_in_the_middle(
    small_disk: Path,
    checkpoint_path: PathOf,
    converted: Callable[..., Gguf],
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    applied: list[str],
) -> None:
    """No check and no reservation, as on a network share that others fill meanwhile."""
    checkpoint, out, whole = checkpoint_path("flash"), small_disk / "out.gguf", converted("flash").raw
    original = os.statvfs

    def large(path: object) -> object:
        found = list(original(path))  # type: ignore[call-overload]
        found[4] = 1 << 40
        return os.statvfs_result(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", large)
        patch.setattr(outputs, "reserve", lambda descriptor, nbytes: None)
        for _ in range(2):  # the second time nothing has changed: the same error, not another one
            # One thread: how many tiles of how many batches several finish before the disk is full is a matter of chance.
            run = cli("convert", checkpoint, "--outfile", out, "--threads", 1)
            assert_one_line(run, "disk is full", "same command")
            assert not out.exists()
    done = records(out)
    assert done > 10
    enlarge(small_disk)
    applied.clear()
    run = cli("convert", checkpoint, "--outfile", out)
    assert run.code == 0, run.err
    assert out.read_bytes() == whole
    assert len(applied) <= plan_convert(checkpoint, out).n_tiles - done
    assert sorted(small_disk.iterdir()) == [out]


# Executors, threads, sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_any_number_of_threads(
    threads: int, target: str, checkpoint_path: PathOf, converted: Callable[..., Gguf], tmp_path: Path
) -> None:
    convert(checkpoint_path("flash"), tmp_path / "o.gguf", threads=threads, target=target)
    assert (tmp_path / "o.gguf").read_bytes() == converted("flash", target).raw


def test_processes_instead_of_threads(
    checkpoint_path: PathOf, converted: Callable[..., Gguf], editable: Source, tmp_path: Path
) -> None:
    """And again to the same output with the same workers, which must not write into the file of before."""
    out = tmp_path / "o.gguf"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        convert(checkpoint_path("flash"), out, executor=pool)
        assert out.read_bytes() == converted("flash").raw
        convert(checkpoint_path("flash"), out, executor=pool, target="llama.cpp", overwrite=True)
        assert out.read_bytes() == converted("flash", "llama.cpp").raw
        # Sources change as well: another checkpoint in the same place.
        convert(editable.path, tmp_path / "a.gguf", executor=pool)
        path = next(iter(sorted(editable.path.glob("*.safetensors"))))
        raw = path.read_bytes()
        changed = tmp_path / "changed"
        changed.write_bytes(raw[:-2] + bytes(2))
        changed.replace(path)
        convert(editable.path, tmp_path / "b.gguf", executor=pool)
    values = Gguf(tmp_path / "b.gguf").tensors["token_embd.weight"].decode()
    assert values[-1, -1] == 0


def test_two_conversions_at_a_time_in_one_process(
    checkpoint_path: PathOf, converted: Callable[..., Gguf], tmp_path: Path
) -> None:
    """The one that ends first must not close the other's files."""
    from concurrent.futures import ThreadPoolExecutor

    def work(number: int) -> bytes:
        case = "flash" if number % 2 else "mini"
        convert(checkpoint_path(case), tmp_path / f"{number}.gguf", threads=2)
        return (tmp_path / f"{number}.gguf").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(work, range(12))):
            assert found == converted("flash" if number % 2 else "mini").raw


def test_progress_ends_at_the_total(checkpoint_path: PathOf, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(checkpoint_path("mini"), tmp_path / "o.gguf", progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in plan_convert(checkpoint_path("mini"), tmp_path / "o.gguf").tensors)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_sources_that_change_while_they_are_read(editable: Source, cli: Cli, tmp_path: Path) -> None:
    """A download that goes on: half of the old file and half of the new one is no model."""
    out, shard = tmp_path / "o.gguf", max(editable.path.glob("*.safetensors"))

    def change(done: int, total: int) -> None:
        if done == 0:
            os.utime(shard, (1, 1))

    with pytest.raises(CheckpointError, match=r"changed since it was planned with.*--no-resume"):
        convert(editable.path, out, progress=change)
    assert not out.exists()
    assert_one_line(cli("convert", editable.path, "--outfile", out), "another plan", "--no-resume")
    assert cli("convert", editable.path, "--outfile", out, "--no-resume").code == 0


def test_a_partial_that_is_a_directory(editable: Source, cli: Cli, tmp_path: Path) -> None:
    partial_path(tmp_path / "o.gguf").mkdir()
    assert_one_line(
        cli("convert", editable.path, "--outfile", tmp_path / "o.gguf"), "o.gguf.partial", "journal", "move it away"
    )
    assert not journal_path(tmp_path / "o.gguf").exists()


def test_an_output_that_becomes_a_directory(editable: Source, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    planned = plan_convert(editable.path, out)
    out.mkdir()
    with pytest.raises(PlanError, match=r"out\.gguf: is a directory"):
        execute.execute(planned, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path != editable.path] == ["out.gguf"]


def test_zero_size_tensors_and_an_empty_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(np.arange(8, dtype="<f4").tobytes())
    copy = plan.Transform("copy", "F32", "F32", (4,))
    empty = plan.Matrix("none", "F32", 0, 4, plan.Span(0, 0, 0))
    full = plan.Matrix("some", "F32", 2, 4, plan.Span(0, 0, 32))
    tensors = [
        plan.plan_tensor("a", (0, 4), "F32", 0, copy, [[empty]]),
        plan.plan_tensor("b", (2, 4), "F32", 0, copy, [[full]]),
        plan.plan_tensor("c", (0, 4), "F32", 0, copy, [[empty]]),
    ]
    keys = {"general.architecture": Value.string("x")}
    for count in (3, 1, 0):
        made = plan.build(
            tmp_path / f"{count}.gguf", keys, tensors[:count], source_files=[str(source)], dialect="llama.cpp"
        )  # fmt: skip
        assert execute.execute(made) == [tmp_path / f"{count}.gguf"]
        file = Gguf(tmp_path / f"{count}.gguf")
        assert list(file.tensors) == ["a", "b", "c"][:count]
        if count == 3:
            assert file.tensors["b"].decode().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
            assert file.tensors["a"].shape == (0, 4)


def test_plans_refuse_what_does_not_add_up(tmp_path: Path) -> None:
    copy = plan.Transform("copy", "F32", "F32", (4,))
    matrix = plan.Matrix("some", "F32", 2, 4, plan.Span(0, 0, 32))
    with pytest.raises(PlanError, match="do not add up"):
        plan.plan_tensor("t", (2, 5), "F32", 0, copy, [[matrix]])
    with pytest.raises(PlanError, match="takes 48 bytes, its sources give 32"):
        plan.plan_tensor("t", (3, 4), "F32", 0, copy, [[matrix]])
    tensor = plan.plan_tensor("t", (2, 4), "F32", 0, copy, [[matrix]])
    with pytest.raises(PlanError, match="'t'"):
        plan.build(tmp_path / "o", {}, [tensor, tensor], source_files=[], dialect="llama.cpp")


def test_plan_to_json_is_json(checkpoint_path: PathOf, tmp_path: Path) -> None:
    import json

    made = plan_convert(checkpoint_path("mini"), tmp_path / "o.gguf", split_max_nbytes=500_000)
    data = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert data["file"]["nbytes"] == made.nbytes == sum(p.stat().st_size for p in execute.execute(made))
    assert {t["file"] for t in data["tensors"]} == set(range(len(made.files)))
    assert data["skipped"][0].keys() == {"name", "reason"}


def test_a_source_that_cannot_be_opened_any_more(editable: Source, tmp_path: Path) -> None:
    made = plan_convert(editable.path, tmp_path / "o.gguf")
    _ = made.digest
    next(iter(sorted(editable.path.glob("*.safetensors")))).unlink()
    with pytest.raises(DiskError, match="No such file"):
        execute.execute(made)
    assert_nothing_left(tmp_path, partial=True)


# Memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from ggufx.convert import convert
convert(sys.argv[1], sys.argv[2], target=sys.argv[3])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """At two lengths, by the kernel's own high-water mark."""
    from make_tiny_v4 import make_tiny_v4

    peaks, lengths = [], []
    for experts in (6, 40):
        checkpoint = tmp_path / f"c{experts}"
        make_tiny_v4(checkpoint, hidden=1024, moe=1024, layers=4, experts=experts, merges=20, mtp_layers=0)
        for target in ("nisparks", "llama.cpp"):
            out = tmp_path / "o.gguf"
            command = [sys.executable, "-c", MEASURE, str(checkpoint), str(out), target]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            peaks.append(int(re.search(r"(\d+) kB", run.stdout)[1]) * 1024)  # type: ignore[index]
            lengths.append(out.stat().st_size)
            out.unlink()
        shutil.rmtree(checkpoint)
    assert lengths[2] > 200_000_000
    assert lengths[2] > 3 * lengths[0]
    assert max(peaks) < 700_000_000
    assert peaks[2] - peaks[0] < 40_000_000
    assert peaks[3] - peaks[1] < 40_000_000


def test_an_output_that_is_a_link_stays_one(checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "real.gguf", tmp_path / "link.gguf"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    convert(checkpoint_path("flash"), link, overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_finished_looking_file_of_before_is_not_taken_for_ours(
    editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tiles journalled, the partial deleted by hand, and an old OUT of the very length that is planned."""
    out = tmp_path / "o.gguf"
    (wanted,) = convert(editable.path, tmp_path / "wanted" / "o.gguf")
    out.write_bytes(bytes(wanted.stat().st_size))

    def rename(partial: Path, path: Path, *, overwrite: bool) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "give_name", rename)
        with pytest.raises(Stop):
            convert(editable.path, out, overwrite=True)
    partial_path(out).unlink()
    convert(editable.path, out, overwrite=True)
    assert out.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_is_not_replaced(
    editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    out = tmp_path / "o.gguf"

    def come(done: int, total: int) -> None:
        out.write_bytes(b"somebody else's")

    if not links:

        def link(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "no hard links here")

        monkeypatch.setattr(os, "link", link)
    with pytest.raises(OutputExists, match="came into being"):
        convert(editable.path, out, progress=come)
    assert out.read_bytes() == b"somebody else's"
    out.unlink()
    (again,) = convert(editable.path, out)
    assert again.read_bytes()[:4] == b"GGUF"
    assert sorted(tmp_path.glob("o*")) == [out]


def test_a_source_that_changes_after_planning_is_noticed(editable: Source, tmp_path: Path) -> None:
    planned = plan_convert(editable.path, tmp_path / "o.gguf")
    shard = max(editable.path.glob("*.safetensors"))
    os.utime(shard, (1, 1))
    with pytest.raises(CheckpointError, match=f"{shard.name}: changed since it was planned with"):
        execute.execute(planned)


def test_an_output_that_is_a_source_is_refused(editable: Source, cli: Cli, tmp_path: Path) -> None:
    shard = max(editable.path.glob("*.safetensors"))
    before = shard.read_bytes()
    run = cli("convert", editable.path, "--outfile", shard, "--overwrite")
    assert_one_line(run, shard.name, "is one of the sources")
    assert shard.read_bytes() == before
    members = convert(editable.path, tmp_path / "s.gguf", split_max_nbytes=300_000)
    held = [member.read_bytes() for member in members]
    run = cli("rewrite", members[0], "--outfile", tmp_path / "s.gguf", "--split-max-size", "300K", "--overwrite")
    assert_one_line(run, "is one of the sources")
    assert [member.read_bytes() for member in members] == held


def test_a_run_goes_on_from_another_directory(
    half_done: tuple[Path, Path, int], undamaged: bytes, applied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out, half = half_done
    monkeypatch.chdir(checkpoint.parent)
    applied.clear()
    convert(checkpoint.name, os.path.relpath(out))
    assert out.read_bytes() == undamaged
    assert len(applied) <= plan_convert(checkpoint, out).n_tiles - half


def test_a_failed_sync_forgets_what_it_cannot_know(
    editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.gguf"

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskError, match="Input/output error"):
            convert(editable.path, out)
    assert records(out) == 0
    convert(editable.path, out)
    assert out.read_bytes()[:4] == b"GGUF"
