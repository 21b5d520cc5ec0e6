"""Runs of bytes from files to CUDA devices: threads, page-locked slots, streams and errors around the loop of a kernel.

Every thread reads pieces into slots of its own and copies them by a stream of its own, see :mod:`ggufx.kernels._upload`.
Whoever comes first takes the next piece: the order is the file's, and a slow piece keeps nobody waiting.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ggufx import execute, kernels

__all__ = ["SLOT_NBYTES", "Cuda", "Driver", "Lanes", "Run", "cuda", "ready", "upload"]

I64: TypeAlias = npt.NDArray[np.int64]

SLOT_NBYTES: Final = 2 << 20
"""Bytes of a piece: half of it costs a tenth of the speed, twice as much gains nothing (measured on an H200)."""
_SLOTS: Final = 2
"""A thread's: one is being filled, one is being copied; a third gains nothing."""
_PINNED_NBYTES: Final = 128 << 20
"""All slots at most. Page-locking takes time, and what is locked stays with torch for the next load."""
_PAGE: Final = 4096
_POLL_S: Final = 0.05
"""Between two looks at how far the threads are."""
_WORTH_NBYTES: Final = 256 << 20
"""Bytes that pay for importing Numba, a tenth of a second."""

_SYSTEM: Final = ("pread", "__errno_location", "memmove")
_DRIVER: Final = ("cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize")


class Run(NamedTuple):
    """What comes to one place: of ``units`` that lie ``stride`` bytes apart, one or two ``spans`` (offset, bytes) each."""

    path: str
    offset: int
    address: int
    device: torch.device
    units: int
    stride: int
    spans: tuple[tuple[int, int], ...]
    step: int
    """Units in a piece."""
    through: bool
    """Whether to read a piece at once with what lies between the spans."""

    @property
    def slot_nbytes(self) -> int:
        """What a piece takes on the way."""
        return min(self.step, self.units) * (self.stride if self.through else sum(nbytes for _, nbytes in self.spans))


class Lanes(NamedTuple):
    """Handles: contexts [devices], streams [threads, devices], events [threads, devices, slots]."""

    contexts: I64
    streams: I64
    events: I64


class Driver(Protocol):
    """What copies to devices; a double of it can run without one."""

    calls: I64
    """Addresses of :data:`_SYSTEM` and :data:`_DRIVER`."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return memory that copies may read from while the caller goes on."""

    def lanes(self, devices: Sequence[torch.device], threads: int, slots: int) -> AbstractContextManager[Lanes]:
        """Return handles; at the end what the caller does on the devices comes after what was copied by them.

        After an error it waits for all of it.
        """


class Cuda:
    """The CUDA driver; raises OSError or AttributeError where it, or what else it takes, is missing."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.calls = addresses(self._library, _DRIVER)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return page-locked memory; torch keeps it for later when it is dropped."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    @contextmanager
    def lanes(self, devices: Sequence[torch.device], threads: int, slots: int) -> Iterator[Lanes]:
        """See :class:`Driver`."""
        streams = [[torch.cuda.Stream(device) for device in devices] for _ in range(threads)]
        events = [[[torch.cuda.Event() for _ in range(slots)] for _ in devices] for _ in range(threads)]
        count = len(devices)
        lanes = Lanes(*(np.zeros(shape, np.int64) for shape in (count, (threads, count), (threads, count, slots))))
        for number, device in enumerate(devices):
            current = torch.cuda.current_stream(device)
            for thread in range(threads):
                stream = streams[thread][number]
                # The memory of the targets may be in use by what was launched before they were allocated.
                stream.wait_stream(current)
                lanes.streams[thread, number] = stream.cuda_stream
                for slot, event in enumerate(events[thread][number]):
                    event.record(stream)  # it is made only now
                    lanes.events[thread, number, slot] = event.cuda_event
            lanes.contexts[number] = self._context(streams[0][number])
        try:
            yield lanes
        except BaseException:
            # What could not be recorded was not waited for.
            for stream in (stream for of_thread in streams for stream in of_thread):
                with suppress(RuntimeError):
                    stream.synchronize()
            raise
        finally:
            for of_thread in streams:
                for stream, device in zip(of_thread, devices, strict=True):
                    torch.cuda.current_stream(device).wait_stream(stream)

    def _context(self, stream: torch.cuda.Stream) -> int:
        context = ctypes.c_void_p()
        code = self._library.cuStreamGetCtx(ctypes.c_void_p(stream.cuda_stream), ctypes.byref(context))
        if code or not context.value:
            raise _failed("cuStreamGetCtx", code)
        return context.value


def addresses(driver: object, names: Sequence[str]) -> I64:
    """Return where the system's functions and those of a library with these names are; raises AttributeError."""
    system = ctypes.CDLL(None)
    functions = [*(getattr(system, name) for name in _SYSTEM), *(getattr(driver, name) for name in names)]
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in functions], np.int64)


@cache
def cuda() -> Cuda | None:
    """Return the driver, or None where this way cannot be gone: another maker's, another system, no compiler of kernels."""
    if torch.version.hip is not None or not sys.platform.startswith("linux") or not kernels.compiles():
        return None
    try:
        return Cuda()
    except (OSError, AttributeError):
        return None


_kernel: list[ModuleType] = []
_small_nbytes = 0


def ready(nbytes: int) -> bool:
    """Return whether ``nbytes`` should go this way: the kernel is there, or they and those before are worth waiting for it."""
    global _small_nbytes  # noqa: PLW0603 (how much went without: a fact of the process)
    _small_nbytes += nbytes
    return bool(_kernel) or _small_nbytes >= _WORTH_NBYTES


def _module() -> ModuleType:
    """Return the kernel's module, with its code compiled or loaded: not by all threads at a time."""
    if not _kernel:
        module = kernels.load("_upload")
        numbers, table = np.zeros(8, np.int64), np.zeros((1, 13), np.int64)
        # No pieces, no slots: nothing is called.
        none = numbers[:0]
        module.upload(numbers, table, numbers, none, none, none, table[:, :0].copy(), none, numbers.copy())
        _kernel.append(module)
    return _kernel[0]


def _failed(call: str, code: int) -> RuntimeError:
    return RuntimeError(f"{call.removesuffix('_v2')} failed with CUDA error {code}")


def upload(driver: Driver, runs: Sequence[Run], threads: int, told: Callable[[int], None]) -> None:
    """Bring runs to their devices, and tell how many bytes more are on their way or there, from this thread.

    They are there when this returns or raises: nothing reads the slots or writes to the devices any more.

    Raises
    ------
    CheckpointError
        A file ends early.
    OSError
        A file cannot be read.
    RuntimeError
        A call of the driver failed.
    """
    files = {path: execute.descriptor(path) for path in dict.fromkeys(run.path for run in runs)}
    try:
        _upload(driver, runs, files, threads, told)
    finally:
        for descriptor in files.values():
            execute.let_go(descriptor)


def _upload(
    driver: Driver, runs: Sequence[Run], files: Mapping[str, int], threads: int, told: Callable[[int], None]
) -> None:
    module = _module()
    devices = list(dict.fromkeys(run.device for run in runs))
    table, pieces, total = _table(runs, devices, files)
    if not pieces:
        return
    slot_nbytes = -(-max(run.slot_nbytes for run in runs) // _PAGE) * _PAGE
    # A thread for every few pieces: starting and page-locking take time, too.
    threads = min(threads, pieces, -(-total // (_SLOTS * SLOT_NBYTES)), _PINNED_NBYTES // (_SLOTS * slot_nbytes))
    threads = max(threads, 1)
    shared = np.zeros(1, np.int64)
    reports = np.zeros((threads, 8), np.int64)  # a cache line each
    reports[:, 1] = -1
    seen = 0

    def work(number: int) -> None:
        try:
            # Here, so that the first ones read while the others are still page-locking.
            memory = driver.pinned(_SLOTS * slot_nbytes)
            slots = memory.data_ptr() + slot_nbytes * np.arange(_SLOTS, dtype=np.int64)
            busy = np.full(_SLOTS, -1, np.int64)
            handles = lanes.contexts, lanes.streams[number], lanes.events[number]
            module.upload(driver.calls, table, shared, slots, *handles, busy, reports[number])
        except BaseException:
            shared[0] = module.STOP
            raise

    def tell() -> None:
        nonlocal seen
        moved = int(reports[:, 0].sum())
        if moved > seen:
            nbytes, seen = moved - seen, moved
            told(nbytes)

    with (
        driver.lanes(devices, threads, _SLOTS) as lanes,
        ThreadPoolExecutor(threads, thread_name_prefix="ggufx-upload") as pool,
    ):
        working: list[Future[None]] = []
        try:
            for number in range(threads):
                working.append(pool.submit(work, number))  # noqa: PERF401 (an interrupt must find those that run)
            while wait(working, _POLL_S).not_done:
                tell()
        except BaseException:
            shared[0] = module.STOP
            raise
        finally:
            _wait(working)
        for done in working:
            done.result()
        _check(reports, runs, table)
        tell()


def _wait(working: Sequence[Future[None]]) -> None:
    """Wait for the end of threads that end soon; an impatient Ctrl-C is heard afterwards: they still use this one's memory.

    Not by joining them: Python 3.11 takes a thread for ended once Ctrl-C has interrupted joining it.
    """
    interrupt = None
    while True:
        try:
            wait(working)
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _table(runs: Sequence[Run], devices: Sequence[torch.device], files: Mapping[str, int]) -> tuple[I64, int, int]:
    """Return the kernel's table of runs, how many pieces they are and how many bytes."""
    numbers = {device: number for number, device in enumerate(devices)}
    rows: list[tuple[int, ...]] = []
    pieces = total = 0
    for run in runs:
        spans = (*run.spans[0], *(run.spans[1] if len(run.spans) > 1 else (0, 0)))
        place = files[run.path], run.offset, run.address, numbers[run.device]
        rows.append((pieces, *place, run.units, run.stride, run.step, run.through, *spans))
        pieces += -(-run.units // run.step)
        total += run.units * (spans[1] + spans[3])
    rows.append((pieces, *[0] * 12))
    return np.array(rows, np.int64), pieces, total


def _check(reports: I64, runs: Sequence[Run], table: I64) -> None:
    """Raise the error of the first piece that failed: those before it were taken before it, and came through."""
    failures = [report for report in reports.tolist() if report[1] >= 0]
    if not failures:
        return
    _, call, code, piece, offset, nbytes, got, _ = min(failures, key=lambda report: report[3])
    if call:
        raise _failed((*_SYSTEM, *_DRIVER)[call], code)
    run = runs[int(np.searchsorted(table[:, 0], piece, side="right")) - 1]
    if code < 0:
        raise execute.ended_early(run.path, offset, nbytes, got)
    raise OSError(code, os.strerror(code), run.path)
