"""A process that is told to end: its threads begin with nothing new, its second signal ends it wherever it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numba.extending import overload

from ggufx import quantize, stopping, types
from ggufx.execute import execute
from ggufx.kernels._jit import kernel, subroutine
from ggufx.plan import Plan
from ggufx.stopping import Stopping

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with stopping.possible():
        yield
    stopping.check()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_end_before_their_next_chunk(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, begun, lock = types.get("Q8_0"), [0], threading.Lock()

    def encode_rows(*_: Any) -> None:
        with lock:
            begun[0] += 1
            if begun[0] == 3:
                stopping.begin()

    monkeypatch.setattr(codec, "encode_rows", encode_rows)
    values = np.ones((1 << 12, 1024), np.float32)
    with pytest.raises(Stopping):
        codec.encode(values, threads=threads, use_kernel=False)
    assert 3 <= begun[0] < 3 + threads  # of 32
    with pytest.raises(Stopping):
        codec.decode(np.zeros(34, np.uint8), use_kernel=False)


def test_nothing_more_is_compiled() -> None:
    def stops() -> None: ...

    @overload(stops)
    def _typed_with_the_first() -> Any:
        stopping.begin()
        return lambda: None

    @subroutine
    def first(value):  # type: ignore[no-untyped-def]
        stops()
        return value

    @subroutine
    def second(value):  # type: ignore[no-untyped-def]
        return value + 1

    @kernel
    def both(value):  # type: ignore[no-untyped-def]
        return second(first(value))

    @kernel
    def other(value):  # type: ignore[no-untyped-def]
        return value

    with pytest.raises(Stopping):
        both(1)
    assert first.signatures
    assert not second.signatures
    with pytest.raises(Stopping):
        other(1)


# What is left ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_run_that_is_stopped_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of a hundred thousand tensors takes seconds to be told from others, after the journal is there."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", np.ones((8, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "new" / "folder" / "out.gguf"
    plan = quantize.prepare(tmp_path / "m.gguf", default="Q8_0", pure=True).plan(out)
    found: list[Path] = []

    def stopped(_: Plan) -> str:
        found.extend(out.parent.iterdir())
        raise Stopping

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "digest", property(stopped))
        with pytest.raises(Stopping):
            execute(plan)
    assert [path.name for path in found] == ["out.gguf.journal"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    execute(plan)
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]


# Signals --------------------------------------------------------------------------------------------------------

IN_C = """
import ctypes, sys
from ggufx import cli
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
with cli._Stopper() as stop:
    library.pthread_mutex_lock(mutex)
    sys.stderr.write("begun\\n")
    sys.stderr.flush()
    library.pthread_mutex_lock(mutex)  # as a compiler, it does not come back, and no handler is run
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_heard_while_the_main_thread_is_in_compiled_code(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IN_C], env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == "begun\n"
        time.sleep(0.3)  # for the call
        process.send_signal(number)
        assert process.stderr.readline().startswith("stopping")
        process.send_signal(number)  # within a second: the same wish
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.1)
        process.send_signal(number)
        start = time.monotonic()
        assert process.wait(30) == 128 + number
        assert time.monotonic() - start < 5
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_command_hears_signals_after_another_in_the_same_process(cli: Callable[..., Any]) -> None:
    before, threads = signal.set_wakeup_fd(-1), threading.active_count()
    signal.set_wakeup_fd(before)
    for _ in range(2):
        assert cli("--version").code == 0
        assert signal.set_wakeup_fd(before) == before
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)
