"""Warming up compiles what later calls need: not one signature more, and nothing in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Every way in which callers hand data to the verbs; prints how many signatures each kernel has, before and after.
USE = """
import json, sys, tempfile, warnings
import ml_dtypes, numpy as np
from ggufx import testing, types, warmup
warnings.simplefilter("ignore")
names = sys.argv[2:]
if sys.argv[1] == "warm":
    assert [w.compiled for w in warmup.warm_up(names)] == [True] * len(warmup.kernels_of(names))
kernels = [(c, v) for c, v in warmup.kernels_of(names) if v in c._kernels]
signatures = lambda: {f"{c.name}.{v}": len(c._kernels[v].signatures) for c, v in kernels}
before = signatures()
listening = warmup.compiling()
compiled = listening.__enter__()
for name in names:
    codec = types.get(name)
    testing.check(codec)
    rng = np.random.default_rng(0)
    rows, values = testing.random_rows(codec, rng, 6, 4), testing.random_values(codec, rng, 6, 4)
    with tempfile.NamedTemporaryFile() as file:
        rows.tofile(file.name)
        mapped = np.memmap(file.name, np.uint8, "r", shape=rows.shape)
        for array in (mapped, rows.reshape(2, 3, -1), rows[::2], np.asfortranarray(rows)):
            codec.decode(array, threads=2)
    if codec.can_encode:
        weights = np.ones(values.shape[1], np.float32)
        for array in (values, values.astype(np.float64), values.astype(ml_dtypes.bfloat16), values.tolist(), values[::2]):
            with np.errstate(all="ignore"):
                codec.encode(np.nan_to_num(np.asarray(array), posinf=0, neginf=0))
                codec.encode(np.nan_to_num(np.asarray(array), posinf=0, neginf=0), weights, objective="mse", effort="fast")
    if codec.can_pack:
        codes, scales = codec.unpack(rows)
        for r in (1, 3, np.int32(2), np.int64(6)):
            codec.pack(codes, scales[: -(-6 // int(r))], rows_per_scale=r)
listening.__exit__(None, None, None)
print(json.dumps([before, signatures(), compiled]))
"""
NAMES = ["Q8_0", "MXFP4", "F8_E4M3_B128"]


def overloads(kernel: str) -> int:
    """Signatures of a kernel: one, but decoders have one for each of float32, float16 and bfloat16."""
    return 3 if kernel.endswith(".decode") else 1


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_no_call_compiles_after_warming_up(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", USE, "warm", *NAMES)
    assert done.returncode == 0, done.stderr
    before, after, compiled = json.loads(done.stdout)
    assert compiled == []
    assert {name.rpartition(".")[0] for name in before} == set(NAMES)
    assert before == {name: overloads(name) for name in before}
    assert after == before
    # Another process finds all of it on disk.
    done = run(tmp_path, "-c", USE, "use", *NAMES)
    assert done.returncode == 0, done.stderr
    before, after, compiled = json.loads(done.stdout)
    assert set(before.values()) == {0}
    assert after == {name: overloads(name) for name in after}
    assert compiled == []


def test_the_engine_compiles_nothing_after_warming_up(tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, "tools")
from pathlib import Path
from make_tiny_v4 import make_tiny_v4
from ggufx import convert, execute, types, verify, warmup
out = Path(sys.argv[1])
make_tiny_v4(out)
names = [c.name for c in types.all_codecs() if not c.can_encode or c.name in ("MXFP4", "F8_E4M3_B128", "Q8_0", "F32")]
list(warmup.warm_up(names))
for target in ("nisparks", "llama.cpp"):
    path = out / f"{target}.gguf"
    execute.execute(convert.plan_convert(out, path, target=target), threads=2)
    assert verify.verify(path, out).ok
for codec, verb in warmup.kernels_of(names):
    if verb not in codec._kernels:
        continue  # a search
    expected = 1 if verb != "decode" else 2 if codec.name == "F32" else 3  # F32 to float32 is a copy
    assert len(codec._kernels[verb].signatures) == expected, (codec, verb)
"""
    done = run(tmp_path / "cache", "-c", code, str(tmp_path / "checkpoint"))
    assert done.returncode == 0, done.stderr


def test_the_command_compiles_once(tmp_path: Path) -> None:
    for word in ("compiled", "from the cache"):
        done = run(tmp_path, "-m", "ggufx", "warmup", "q8_0")
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
        assert "Q8_0" in done.stdout
    assert "2 kernels" in done.stdout  # the decoder and the encoder
    assert run(tmp_path, "-m", "ggufx", "warmup", "Q4_7").returncode == 1


def test_code_from_the_cache_and_code_made_now_work_together(tmp_path: Path) -> None:
    code = """
import numpy as np
from ggufx import types
for name in ("Q8_0", "MXFP4"):  # one is on disk, the other is compiled after it was loaded
    codec = types.get(name)
    rows = np.arange(2 * codec.layout.row_nbytes(32), dtype=np.uint8).reshape(2, -1)
    assert np.array_equal(codec.decode(rows), codec.decode(rows, use_kernel=False), equal_nan=True)
"""
    assert run(tmp_path, "-m", "ggufx", "warmup", "Q8_0").returncode == 0
    for _ in range(2):
        done = run(tmp_path, "-c", code)
        assert done.returncode == 0, done.stderr


def test_jit_may_be_off(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ggufx", "warmup", "NVFP4"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
