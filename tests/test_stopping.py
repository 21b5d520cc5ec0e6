"""A process that is told to end: its threads begin with nothing new, its second signal ends it wherever it is."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufx import plan, stopping, types, warmup
from ggufx.kernels._jit import kernel
from ggufx.stopping import Stopping

Cli = Callable[..., Any]
ROOT = Path(__file__).parent.parent


def test_threads_end_before_their_next_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, done, lock = types.get("Q8_0"), [0], threading.Lock()

    def encode_rows(values: Any, out: Any, *_: Any) -> None:
        with lock:
            done[0] += 1
            if done[0] == 3:
                stopping.begin()

    monkeypatch.setattr(codec, "encode_rows", encode_rows)
    values = np.ones((1 << 14, 1024), np.float32)
    codec.encode(values, threads=2, use_kernel=False)
