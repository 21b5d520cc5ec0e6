"""From files to CUDA devices, without one: a double of the driver that copies late, fails on demand and counts."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from double import Double, install
from hypothesis import given
from hypothesis import strategies as st
from test_torch_load import SHAPES, any_cut, assert_disjoint, assert_same, write_gguf

import ggufx.torch as gt
from ggufx import execute
from ggufx.errors import CheckpointError
from ggufx.torch import loading, uploading

ROOT = Path(__file__).parent.parent
PIECE = 1000
ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ggufx-upload")]


class Transfer:
    """Files of random bytes, and targets with a guard on both sides."""

    def __init__(self, folder: Path, sizes: list[list[int]], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.runs: list[uploading.Run] = []
        self.targets: list[np.ndarray] = []
        self.expected: list[np.ndarray] = []
        self.paths = [folder / f"{number}.bin" for number in range(len(sizes))]
        for path, parts in zip(self.paths, sizes, strict=True):
            data = rng.integers(0, 256, 7 + sum(parts), dtype=np.uint8)
            data.tofile(path)
            at = 7
            for nbytes in parts:
                target = np.full(nbytes + 64, 0x55, np.uint8)
                cut = loading._Cut((nbytes,), at, 1, nbytes, ((0, nbytes),))
                device = (ONE, OTHER)[len(self.targets) % 2]
                self.runs += loading._runs(str(path), cut, PIECE, target.ctypes.data + 32, device)
                self.targets.append(target)
                self.expected.append(data[at : at + nbytes])
                at += nbytes

    def go(self, driver: Double, threads: int = 4) -> list[int]:
        told: list[int] = []
        with execute.open_files():
            uploading.upload(driver, self.runs, threads, told.append)
        return told

    def check(self) -> None:
        for target, expected in zip(self.targets, self.expected, strict=True):
            assert np.array_equal(target[32:-32], expected)
            assert (target[:32] == 0x55).all()
            assert (target[-32:] == 0x55).all()


SIZES = [[0, 1, PIECE - 1, PIECE], [PIECE + 1, 0, 10 * PIECE + 5], [0], [3, 2 * PIECE]]


@pytest.fixture(autouse=True)
def several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread per few bytes, not megabytes."""
    monkeypatch.setattr(uploading, "SLOT_NBYTES", PIECE)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_all_bytes_arrive_and_are_told_once(tmp_path: Path, threads: int, native: bool) -> None:
    transfer, driver = Transfer(tmp_path, SIZES), Double()
    if native:
        driver.read_natively()
    told = transfer.go(driver, threads)
    transfer.check()
    assert sum(told) == sum(map(sum, SIZES)) == sum(driver.copied)
    assert min(told) > 0
    assert len(driver.pinned_nbytes) == min(threads, -(-sum(told) // (2 * PIECE)))
    assert driver.called["record"] == driver.called["wait"] == driver.called["copy"] == len(driver.copied) == 19
    if not native:
        assert_disjoint(driver.reads)


def test_a_piece_is_taken_once_among_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without Python's lock, which lets no two threads meet: a function that does nothing well.
    monkeypatch.setattr(sys.modules[__name__], "PIECE", 1)
    transfer, driver = Transfer(tmp_path, [[100_000]]), Double()
    driver.read_natively()
    driver.calls[3:] = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
    assert sum(transfer.go(driver, 16)) == 100_000


def test_nothing_to_do_calls_nothing(tmp_path: Path) -> None:
    driver = Double()
    assert Transfer(tmp_path, [[0, 0]]).go(driver) == []
    assert not any(driver.called.values())


def test_progress_is_told_while_it_goes_on_by_the_calling_thread(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, [[4 * PIECE]]), Double()
    driver.on_call = lambda name, number: time.sleep(0.2) if name == "copy" else None
    told: list[tuple[int, threading.Thread]] = []
    with execute.open_files():
        uploading.upload(driver, transfer.runs, 1, lambda nbytes: told.append((nbytes, threading.current_thread())))
    assert [nbytes for nbytes, _ in told] == [PIECE] * 4
    assert {thread for _, thread in told} == {threading.main_thread()}


def test_short_reads_and_interrupted_ones_go_on(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, SIZES), Double()
    turns = iter(range(10**6))
    driver.readable = lambda nbytes: -errno.EINTR if next(turns) % 3 == 0 else -(-nbytes // 2)
    assert sum(transfer.go(driver)) == sum(map(sum, SIZES))
    transfer.check()
    assert_disjoint(driver.reads)


# What fails -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("native", [False, True])
def test_a_file_that_ends_early_is_the_error_that_it_is_elsewhere(tmp_path: Path, native: bool, threads: int) -> None:
    transfer, driver = Transfer(tmp_path, [[5 * PIECE], [40 * PIECE], [50 * PIECE]]), Double()
    if native:
        driver.read_natively()
    for path, nbytes in zip(transfer.paths[1:], (7 + 12 * PIECE + 34, 100), strict=True):
        os.truncate(path, nbytes)
    with execute.open_files(), pytest.raises(CheckpointError) as here:
        execute.read_into(str(transfer.paths[1]), 7 + 12 * PIECE, np.empty(PIECE, np.uint8))
    for _ in range(5):
        with pytest.raises(CheckpointError) as there:
            transfer.go(driver, threads)
        assert str(there.value) == str(here.value)
    assert f"{transfer.paths[1]}: ends at byte {7 + 12 * PIECE + 34}" in str(there.value)
    assert not driver.pending


def test_another_error_of_reading_is_an_oserror_with_the_path(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, SIZES), Double()
    driver.readable = lambda nbytes: -errno.EIO if nbytes == PIECE - 1 else nbytes
    with pytest.raises(OSError, match="Input/output error") as found:
        transfer.go(driver)
    assert (found.value.errno, found.value.filename) == (errno.EIO, str(transfer.paths[0]))


def test_errno_is_the_systems(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, SIZES), Double()
    driver.read_natively()
    runs = [run._replace(path=str(tmp_path)) if run.path == str(transfer.paths[1]) else run for run in transfer.runs]
    with execute.open_files(), pytest.raises(IsADirectoryError) as found:
        uploading.upload(driver, runs, 4, lambda nbytes: None)
    assert found.value.filename == str(tmp_path)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("copy", "cuMemcpyHtoDAsync"),
        ("record", "cuEventRecord"),
        ("wait", "cuEventSynchronize"),
        ("enter", "cuCtxSetCurrent"),
    ],
)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_call_of_the_driver_that_fails(tmp_path: Path, call: str, name: str, later: bool, threads: int) -> None:
    transfer, driver = Transfer(tmp_path, [[PIECE] * 400]), Double()
    # Threads that take every other piece each stay with their devices: a third entering may never come.
    at = later * (1 if call == "enter" else 7)
    driver.failing = {call: (at, 719)}
    driver.on_call = lambda name, number: time.sleep(0.0005)
    with pytest.raises(RuntimeError, match=f"^{name} failed with CUDA error 719$"):
        transfer.go(driver, threads)
    assert not driver.pending
    # The others stop, too, however late this one is heard on a busy machine.
    assert driver.called["copy"] < 300


def test_waiting_that_fails_at_the_end_is_told_too(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, [[2 * PIECE]]), Double()
    driver.failing = {"wait": (1, 700)}
    with pytest.raises(RuntimeError, match="cuEventSynchronize failed with CUDA error 700"):
        transfer.go(driver)


def test_the_first_failure_is_told(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, [[2 * PIECE]]), Double()
    driver.failing = {"copy": (1, 719), "wait": (0, 700)}
    with pytest.raises(RuntimeError, match="cuMemcpyHtoDAsync failed with CUDA error 719"):
        transfer.go(driver)


def test_of_several_failures_that_of_the_first_piece_is_told(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, [[3 * PIECE, 777, 9 * PIECE]]), Double()

    def readable(nbytes: int) -> int:
        time.sleep(0.2 if nbytes == 777 else 0)
        return -errno.EIO if nbytes == 777 else -errno.ENXIO if nbytes == PIECE - 1 else nbytes

    driver.readable = readable
    (tmp_path / "late").mkdir()
    late = Transfer(tmp_path / "late", [[PIECE - 1] * 4])
    transfer.runs += late.runs
    with pytest.raises(OSError, match="Input/output error"):
        transfer.go(driver)


def test_memory_that_cannot_be_pinned_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer, driver = Transfer(tmp_path, [[400 * PIECE]]), Double()
    pinned = driver.pinned

    def pinned_once(nbytes: int) -> torch.Tensor:
        if driver.pinned_nbytes:
            raise RuntimeError("no such memory")
        return pinned(nbytes)

    monkeypatch.setattr(driver, "pinned", pinned_once)
    driver.on_call = lambda name, number: time.sleep(0.002)
    with pytest.raises(RuntimeError, match="no such memory"):
        transfer.go(driver)
    assert driver.called["copy"] < 300


# Stopping ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Have Ctrl-C interrupt, also where the shell that runs the tests in the background told it not to."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_all_threads(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, [[400 * PIECE]]), Double()

    main = threading.get_ident()

    def interrupt(name: str, number: int) -> None:
        if (name, number) == ("copy", 10):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)
            signal.pthread_kill(main, signal.SIGINT)  # while the main thread waits for this one
            time.sleep(0.2)
        time.sleep(0.002)

    driver.on_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        transfer.go(driver)
    assert not driver.pending
    assert 10 < driver.called["copy"] < 300


def test_an_error_of_who_is_told_stops_all_threads(tmp_path: Path) -> None:
    transfer, driver = Transfer(tmp_path, [[400 * PIECE]]), Double()
    driver.on_call = lambda name, number: time.sleep(0.002)

    def told(nbytes: int) -> None:
        raise ZeroDivisionError

    with execute.open_files(), pytest.raises(ZeroDivisionError):
        uploading.upload(driver, transfer.runs, 4, told)
    assert not driver.pending
    assert driver.called["copy"] < 300


@pytest.mark.usefixtures("ctrl_c")
def test_an_impatient_ctrl_c_waits_for_the_threads() -> None:
    slept: list[bool] = []
    main = threading.get_ident()

    def slow() -> None:
        time.sleep(0.1)
        if not slept:
            slept.append(True)
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.3)

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(slow) for _ in range(2)]
        with pytest.raises(KeyboardInterrupt):
            uploading._wait(working)
        assert all(done.done() for done in working)


# Cuts -------------------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_shard_is_that_slice(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path, whole, world, dim = any_cut(data, tmp_path_factory.mktemp("shard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_PIECE_NBYTES", data.draw(st.integers(1, 2000)))
        patch.setattr(uploading, "SLOT_NBYTES", 10**6)
        patch.setattr(loading, "_THROUGH_NBYTES", data.draw(st.sampled_from([-1, 0, 4096])))
        driver = install(patch)
        for rank in range(world):
            told: list[tuple[int, int]] = []
            options = {"shard": (rank, world), "dim": dim, "threads": 3}
            shard = gt.load(path, names=["w"], progress=lambda *done, told=told: told.append(done), **options)["w"]
            assert told[-1] == (shard.nbytes, shard.nbytes)
            assert_same(shard, np.split(whole, world, axis=dim)[rank])
            assert_disjoint(driver.reads)
            driver.reads.clear()


def test_cut_rows_that_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "cut.gguf", {"a": ("F32", (4, 100))})
    install(monkeypatch)
    for through in (-1, 4096):
        monkeypatch.setattr(loading, "_THROUGH_NBYTES", through)
        with gt.open(path, shard=(1, 2), dim=1) as f:
            with path.open("r+b") as stream:
                stream.truncate(path.stat().st_size - 100)
            with pytest.raises(CheckpointError, match=f"cut.gguf: ends at byte {path.stat().st_size}, expected"):
                f["a"]
        write_gguf(path, {"a": ("F32", (4, 100))})


# How much, and when -----------------------------------------------------------------------------------------------------


def test_a_small_load_pins_little_and_a_large_one_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "SLOT_NBYTES", 2 << 20)
    path = write_gguf(tmp_path / "small.gguf", SHAPES)
    driver = install(monkeypatch)
    gt.load(path, threads=100)
    assert sum(driver.pinned_nbytes) <= 2 * (-(-max(t.nbytes for t in gt.load(path).values()) // 4096) * 4096)
    large = write_gguf(tmp_path / "large.gguf", {"a": ("F32", (1 << 26,))}, real=False)
    driver.pinned_nbytes.clear()
    driver.read_natively()
    assert not gt.load(large, threads=100)["a"].packed.any()
    assert sum(driver.pinned_nbytes) == 128 << 20


def test_cut_rows_take_no_larger_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "SLOT_NBYTES", 2 << 20)
    path = write_gguf(tmp_path / "rows.gguf", {"a": ("MXFP4", (4096, 8192))}, real=False)
    driver = install(monkeypatch)
    gt.load(path, shard=(1, 2), dim=1)
    assert max(driver.pinned_nbytes) == 2 * (2 << 20)


def test_numba_is_waited_for_when_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "_kernel", [])
    monkeypatch.setattr(uploading, "_small_nbytes", 0)
    assert not uploading.ready(100 << 20)
    assert not uploading.ready(100 << 20)
    assert uploading.ready(100 << 20)
    monkeypatch.setattr(uploading, "_small_nbytes", 0)
    monkeypatch.setattr(uploading, "_kernel", [object()])
    assert uploading.ready(1)


def test_without_the_driver_loads_go_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", SHAPES)
    install(monkeypatch)
    expected = gt.load(path)
    for missing in ({"cuda": lambda: None}, {"ready": lambda nbytes: False}):
        driver = install(monkeypatch)
        for name, value in missing.items():
            monkeypatch.setattr(uploading, name, value)
        assert all(torch.equal(tensor.packed, expected[name].packed) for name, tensor in gt.load(path).items())
        assert not any(driver.called.values())


def test_without_its_library_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str | None) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    uploading.cuda.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(uploading.ctypes, "CDLL", missing)
        assert uploading.cuda() is None
    uploading.cuda.cache_clear()


class Streams:
    """What torch has of streams and events: numbers, and notes of who waits for whom."""

    def __init__(self, double: Double) -> None:
        self.notes: list[str] = []
        streams = self
        numbers = iter(range(1, 1000))

        class Stream:
            def __init__(self, device: object, name: str = "side") -> None:
                self.cuda_stream, self.name = 1_000_000 * (1 + (device == OTHER)) + 1000 * next(numbers), name

            def wait_stream(self, other: Stream) -> None:
                streams.notes.append(f"{self.name} waits for {other.name}")

            def synchronize(self) -> None:
                streams.notes.append("synchronized")
                double.queued.clear()

        class Event:
            def record(self, stream: Stream) -> None:
                self.cuda_event = stream.cuda_stream + next(numbers)

        self.Stream, self.Event = Stream, Event
        self.current_stream = lambda device: Stream(device, "current")

        def context_of(stream: int, out: ctypes.Array[ctypes.c_int64]) -> int:
            out[0] = stream // 1_000_000 * 1_000_000
            return 0

        kept = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))(context_of)
        enter, copy, record, wait_for = (double.kept[name] for name in ("enter", "copy", "record", "wait"))
        self.cuCtxSetCurrent, self.cuMemcpyHtoDAsync_v2, self.cuEventRecord = enter, copy, record
        self.cuEventSynchronize, self.cuStreamGetCtx = wait_for, lambda stream, out: kept(stream.value, out_of(out))


def out_of(reference: object) -> object:
    return ctypes.cast(reference, ctypes.POINTER(ctypes.c_int64))  # type: ignore[arg-type]


@pytest.mark.parametrize("failing", [False, True])
def test_streams_wait_for_those_of_the_caller_and_they_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    transfer, double = Transfer(tmp_path, SIZES), Double()
    streams = Streams(double)
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    library = ctypes.CDLL
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: library(name) if name is None else streams)
        driver = uploading.Cuda()
    monkeypatch.setattr(driver, "pinned", double.pinned)
    if failing:
        double.failing = {"record": (3, 719)}
        with pytest.raises(RuntimeError, match="cuEventRecord failed with CUDA error 719"):
            transfer.go(driver, 3)
    else:
        transfer.go(driver, 3)
        transfer.check()
    assert not double.pending
    before, after = ["side waits for current"] * 6, ["current waits for side"] * 6
    assert streams.notes == [*before, *(["synchronized"] * 6 if failing else []), *after]


def test_the_kernel_is_cached_whatever_the_addresses(tmp_path: Path) -> None:
    code = """
import sys, tempfile, pathlib
sys.path.insert(0, "tests")
from ggufx import warmup
from test_torch_upload import Transfer, Double
with warmup.compiling() as compiled, tempfile.TemporaryDirectory() as folder:
    transfer = Transfer(pathlib.Path(folder), [[5000, 17]])
    transfer.go(Double())
    transfer.check()
from ggufx.torch import uploading
assert len(uploading._kernel[0].upload.signatures) == 1
print(bool(compiled))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        said.append(done.stdout.strip())
    assert said == ["True", "False"]


# GPUs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_gpu_gets_what_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "ready", lambda nbytes: True)
    assert uploading.cuda() is not None
    path = write_gguf(tmp_path / "model.gguf", {**SHAPES, "wide": ("Q8_0", (4096, 8192))})
    for slot, dim in ((2 << 20, None), (100_000, 0), (2 << 20, 1)):
        monkeypatch.setattr(uploading, "SLOT_NBYTES", slot)
        shard = None if dim is None else (1, 2)
        names = None if dim is None else ["wide", "ks"]
        here, there = (gt.load(path, device, names=names, shard=shard, dim=dim or 0) for device in ("cpu", "cuda"))
        for name, tensor in there.items():
            assert torch.equal(tensor.packed.cpu(), here[name].packed)


@pytest.mark.cuda
def test_a_gpu_after_an_error_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "ready", lambda nbytes: True)
    path = write_gguf(tmp_path / "model.gguf", {"wide": ("Q8_0", (4096, 8192))})
    nbytes = path.stat().st_size
    with gt.open(path, "cuda") as f:
        os.truncate(path, nbytes - 100)
        with pytest.raises(CheckpointError, match="ends at byte"):
            f["wide"]
        os.truncate(path, nbytes)
        assert not f["wide"].packed[-1, -90:].any()
