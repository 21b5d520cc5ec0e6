"""A driver without a device: it copies as late as it may, so that whoever does not wait gets the wrong bytes."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ggufx.torch import loading, uploading

INT, SIZE, HANDLE = ctypes.c_int, ctypes.c_int64, ctypes.c_int64
DRIVER = ("enter", "copy", "record", "wait")


class Double:
    """Its devices are the CPU's memory. A copy is made when its event is waited for, from what the slot holds then."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.here = threading.local()
        self.queued: dict[int, list[tuple[int, int, int]]] = {}
        self.recorded: dict[int, list[tuple[int, int, int]]] = {}
        self.reads: list[tuple[str, int, int]] = []
        self.copied: list[int] = []
        self.pinned_nbytes: list[int] = []
        self.failing: dict[str, tuple[int, int]] = {}
        """Of functions that fail, the number of the call that does, and the code."""
        self.called = dict.fromkeys((*DRIVER, "read"), 0)
        self.on_call: Callable[[str, int], None] = lambda name, number: None
        self.readable: Callable[[int], int] = lambda nbytes: nbytes
        """What a read of so many bytes reads; the negative of an errno is an error."""
        pointers = {
            "enter": ctypes.CFUNCTYPE(INT, HANDLE)(self._enter),
            "copy": ctypes.CFUNCTYPE(INT, SIZE, SIZE, SIZE, HANDLE)(self._copy),
            "record": ctypes.CFUNCTYPE(INT, HANDLE, HANDLE)(self._record),
            "wait": ctypes.CFUNCTYPE(INT, HANDLE)(self._wait),
            "read": ctypes.CFUNCTYPE(ctypes.c_ssize_t, INT, SIZE, ctypes.c_size_t, SIZE)(self._read),
            "errno": ctypes.CFUNCTYPE(ctypes.c_void_p)(self._errno),
        }
        self.kept = pointers
        address = {name: ctypes.cast(pointer, ctypes.c_void_p).value for name, pointer in pointers.items()}
        move = ctypes.cast(ctypes.CDLL(None).memmove, ctypes.c_void_p).value
        names = ("read", "errno", *DRIVER)
        read, code, *driver = (address[name] for name in names)
        self.calls = np.array([read, code, move, *driver], np.int64)

    def read_natively(self) -> None:
        self.calls[:3] = uploading.addresses(None, ())

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.pinned_nbytes.append(nbytes)
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    @contextmanager
    def lanes(self, devices: Sequence[torch.device], threads: int, slots: int) -> Iterator[uploading.Lanes]:
        # A handle tells whose it is: a context's number times a million, and its own.
        contexts = 1_000_000 * np.arange(1, len(devices) + 1, dtype=np.int64)
        streams = contexts + 1000 * np.arange(1, threads + 1)[:, None]
        events = streams[:, :, None] + np.arange(1, slots + 1)
        try:
            yield uploading.Lanes(contexts, np.ascontiguousarray(streams), np.ascontiguousarray(events))
        except BaseException:
            self.queued.clear()  # as a stream does that is waited for
            raise
        finally:
            assert not self.pending, "left on its way"

    @property
    def pending(self) -> int:
        return sum(map(len, self.queued.values())) + sum(map(len, self.recorded.values()))

    def _fails(self, name: str) -> int:
        with self.lock:
            number = self.called[name]
            self.called[name] += 1
        self.on_call(name, number)
        at, code = self.failing.get(name, (None, 0))
        return code if number == at else 0

    def _enter(self, context: int) -> int:
        self.here.context = context
        return self._fails("enter")

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        if stream // 1_000_000 * 1_000_000 != getattr(self.here, "context", None):
            return 201
        if code := self._fails("copy"):
            return code
        with self.lock:
            self.queued.setdefault(stream, []).append((target, source, nbytes))
        return 0

    def _record(self, event: int, stream: int) -> int:
        if event // 1000 != stream // 1000 or self.recorded.get(event):
            return 400
        if code := self._fails("record"):
            return code
        with self.lock:
            self.recorded[event] = self.queued.pop(stream, [])
        return 0

    def _wait(self, event: int) -> int:
        with self.lock:
            copies = self.recorded.pop(event, [])
        for target, source, nbytes in copies:
            ctypes.memmove(target, source, nbytes)
            self.copied.append(nbytes)
        return self._fails("wait")

    def _read(self, descriptor: int, buffer: int, nbytes: int, offset: int) -> int:
        self._fails("read")
        count = self.readable(nbytes)
        if count < 0:
            self._errno_here().value = -count
            return -1
        part = (ctypes.c_char * count).from_address(buffer)
        try:
            got = os.preadv(descriptor, [part], offset)
        except OSError as error:
            self._errno_here().value = error.errno or errno.EIO
            return -1
        with self.lock:
            self.reads.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, got))
        return got

    def _errno_here(self) -> ctypes.c_int:
        if not hasattr(self.here, "errno"):
            self.here.errno = ctypes.c_int()
        number: ctypes.c_int = self.here.errno
        return number

    def _errno(self) -> int:
        return ctypes.addressof(self._errno_here())


def install(monkeypatch: pytest.MonkeyPatch) -> Double:
    """Have tensors for the CPU loaded as those for a CUDA device are."""
    driver = Double()
    monkeypatch.setattr(loading, "_way", lambda device: loading._Way.UPLOADED)
    monkeypatch.setattr(uploading, "cuda", lambda: driver)
    monkeypatch.setattr(uploading, "ready", lambda nbytes: True)
    return driver
