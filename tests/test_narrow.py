"""Decoding to binary16 and bfloat16, which kernels store themselves, against NumPy's and ml_dtypes' rounding of float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracle import assert_same_bits

from ggufx import testing, types

NARROW = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PLAIN_NAN = {"float16": 0x7E00, "bfloat16": 0x7FC0}
KERNELS = sorted(c.name for c in types.all_codecs() if c.can_decode and c.has_kernel)

# Infinities, NaN (quiet and signalling, with the payloads that a careless rounding carries into the sign), zeros, subnormals,
# and sizes that take products to the ends of both narrow formats.
HALVES = "7C00 FC00 7E00 7FFF FFFF 7C01 FD55 0000 8000 0001 83FF 0400 7BFF FBFF 6400 1234"
SINGLES = (
    "7F800000 FF800000 7FC00000 7FFFFFFF FFFFFFFF 7F800001 FF812345 00000000 80000000 00000001 807FFFFF 00800000 "
    "7F7FFFFF FF7FFFFF 7B000000 33000000 35800001 42480000 3F801234"
)
EDGES = {
    np.dtype(np.float16): np.frombuffer(bytes.fromhex(HALVES), ">u2").astype(np.uint16).view(np.float16),
    np.dtype(np.float32): np.frombuffer(bytes.fromhex(SINGLES), ">u4").astype(np.uint32).view(np.float32),
}


def extreme_rows(codec: types.Codec, n_rows: int, n_blocks: int) -> np.ndarray:
    """Random bytes whose float scales, and one in four E8M0 scales, are at the edges of their format."""
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 256, (n_rows, codec.layout.row_nbytes(n_blocks * codec.layout.block_len)), np.uint8)
    for part in codec.layout.split(rows):
        for name in () if part is None else part.dtype.names or ():
            field = part[name]
            if field.dtype in EDGES:
                field[...] = np.where(rng.random(field.shape) < 0.8, rng.choice(EDGES[field.dtype], field.shape), field)
            elif name == "e":
                edges = np.array([0, 1, 2, 102, 103, 142, 143, 253, 254, 255], np.uint8)
                field[...] = np.where(rng.random(field.shape) < 0.25, rng.choice(edges, field.shape), field)
    return rows


def narrowed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_rounds_as_astype(name: str, dtype: str) -> None:
    codec = types.get(name)
    rng = np.random.default_rng(1)
    n_blocks = 37 if codec.layout.block_len == 1 else 3  # not all rows are whole vectors of 16
    for rows in (
        extreme_rows(codec, 257, n_blocks),
        testing.random_rows(codec, rng, 15, n_blocks),
        testing.random_rows(codec, rng, 1, 1),
    ):
        wide = codec.decode(rows, use_kernel=False)
        found = codec.decode(rows, dtype=NARROW[dtype])
        assert_same_bits(found, narrowed(wide, NARROW[dtype]))
        # One NaN, on every CPU.
        nan = found.view(np.uint16)[np.isnan(wide)]
        assert np.isin(nan & 0x7FFF, PLAIN_NAN[dtype]).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", KERNELS)
def test_only_the_output_is_written(name: str, dtype: str) -> None:
    codec = types.get(name)
    rows = testing.random_rows(codec, np.random.default_rng(2), 3, 5)
    rows.flags.writeable = False
    expected = codec.decode(rows, dtype=NARROW[dtype])
    length = expected.nbytes
    for offset in (2, 5):  # aligned, and not
        memory = np.full(length + 16, 0xAB, np.uint8)
        out = memory[offset : offset + length].view(NARROW[dtype]).reshape(expected.shape)
        assert codec.decode(rows, out=out, threads=2) is out
        assert_same_bits(out, expected)
        assert (memory[:offset] == 0xAB).all()
        assert (memory[offset + length :] == 0xAB).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_of_any_float(dtype: str) -> None:
    # By way of a type whose scale is a float32: times sub-scale 1 and code 1 it is the value.
    points = np.arange(1 << 16, dtype=np.uint16).view(NARROW[dtype]).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = (points[:-1].astype(np.float64) + points[1:]).astype(np.float32) / 2
        near = np.nextafter(np.concatenate([points, ties]), np.float32(np.inf))
    scales = np.concatenate(
        [points, ties, near, np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32).view("f4")]
    )
    codec = types.get("IQ4_KS")
    for start in range(0, scales.size, 1 << 14):  # a row decodes to 256 values, of which 64 are looked at
        part = scales[start : start + (1 << 14)]
        rows = np.zeros((part.size, codec.layout.row_nbytes(256)), np.uint8)
        rows[:, :4] = part.view(np.uint8).reshape(-1, 4)
        # Sub-scale bytes 128 and 126 are 1 and -1; nibble 8 is the table's 1.
        rows[:, 4:12] = np.tile(np.array([128, 126], np.uint8), 4)
        rows[:, 12:] = 0x88
        expected = narrowed(np.repeat(np.stack([part, -part], 1), 32, axis=1), NARROW[dtype])
        assert_same_bits(codec.decode(rows, dtype=NARROW[dtype])[:, :64], expected)


DIGESTED = ("F16", "BF16", "Q8_0", "Q4_K", "IQ2_S", "F8_E4M3_B128")
_DIGESTS = """
import hashlib, sys
import ml_dtypes, numpy as np
sys.path.insert(0, "tests")
from test_narrow import extreme_rows
from ggufx import types
for name in sys.argv[1:]:
    codec = types.get(name)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        found = codec.decode(extreme_rows(codec, 64, 2), dtype=dtype)
        print(name, hashlib.sha256(found.tobytes()).hexdigest())
"""


def digests(**extra: str) -> str:
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", _DIGESTS, *DIGESTED],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **extra},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def digests_of_this_cpu() -> str:
    return digests()


@pytest.mark.parametrize(("cpu", "features"), [("haswell", "+avx2,+f16c,+fma"), ("generic", "")])
def test_every_cpu_model_gives_the_same_bits(cpu: str, features: str, digests_of_this_cpu: str, tmp_path: Path) -> None:
    # A cache of its own, as in test_encoders.py.
    other = digests(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path))
    assert other == digests_of_this_cpu
    assert len(other.split()) == 4 * len(DIGESTED)
