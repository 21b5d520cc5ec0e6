"""``quantize --device``: the device's bytes are the CPU's, whatever the source; without a GPU the answer is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import ggufx
from ggufx import quantize, recipe
from ggufx.errors import GGUFError

pytest.importorskip("torch")
pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

# Triton's interpreter must be chosen before Triton is imported, so the device runs in a process of its own, and on one thread,
# as it has only one; "cpu:0" is torch's name for the CPU as a device among others.
RUN = """
import sys
import interpreting
from ggufx import quantize, recipe
interpreting.quicken()
options = {"recipe": recipe.load(sys.argv[2]), "imatrix": "energy", "allow_requantize": True, "measure": True}
quantize.quantize(sys.argv[1], sys.argv[3], device="cpu:0", threads=1, **options)
"""
RULES = "f32=q8_0\nf16=q8_0\nbf16=q8_0\nmxfp4=q8_0\nexperts=q8_0\nq5=q8_0\nonly_cpu=q5_0\n"
SEARCHES = "f32=q4_0\nf16=iq4_ks\nbf16=mxfp4\nmxfp4=q4_0\nexperts=iq2_xxs\n"


def model(path: Path) -> Path:
    """Write a file with a tensor of each kind of source."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    kinds = gguf.GGMLQuantizationType

    def put(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType | None = None, offset: int = 0) -> None:
        values = rng.standard_normal(shape, np.float32) + np.float32(offset)
        if kind is None:
            writer.add_tensor(f"blk.0.{name}.weight", values)
        else:
            writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    put("f32", (6, 64), offset=3)  # unlike weights: efforts are compared
    put("f16", (2, 256), kinds.F16)
    put("bf16", (6, 64), kinds.BF16)
    put("mxfp4", (6, 64), kinds.MXFP4)
    put("experts", (2, 1, 256))
    put("q5", (6, 64), kinds.Q5_1)  # no CUDA decoder: values go up
    put("only_cpu", (6, 64))  # no CUDA encoder
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_devices_bytes_are_the_cpus(tmp_path: Path) -> None:
    same_bytes(RULES, tmp_path)


def test_searches_on_the_device(tmp_path: Path) -> None:
    same_bytes(SEARCHES, tmp_path)


def same_bytes(text: str, tmp_path: Path) -> None:
    """Quantize on the device and on the CPU, and compare."""
    source, rules = model(tmp_path / "model.gguf"), tmp_path / "all.recipe"
    rules.write_text(text)
    done = run(source, rules, tmp_path / "device.gguf")
    assert done.returncode == 0, done.stderr
    options = {"imatrix": "energy", "allow_requantize": True}
    quantize.quantize(source, tmp_path / "cpu.gguf", recipe=recipe.Recipe.parse(text), **options)
    with ggufx.open(tmp_path / "device.gguf") as a, ggufx.open(tmp_path / "cpu.gguf") as b:
        assert list(a) == list(b)
        for name in a:
            assert a[name].type == b[name].type
            assert np.array_equal(a[name].packed, b[name].packed), name


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path, rules = tmp_path / "nan.gguf", tmp_path / "all.recipe"
    values = np.ones((6, 64), np.float32)
    values[4, 7] = np.nan
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.f32.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rules.write_text("f32=q8_0\n")
    done = run(path, rules, tmp_path / "out.gguf")
    assert "found nan at row 4, column 7: Q8_0 encodes finite values only" in done.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "^device cuda:99"), ("tpu", "is no device"), ("meta", "run on")]
)
def test_devices_that_are_not_there(device: str, message: str, tmp_path: Path) -> None:
    source = model(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match=message):
        quantize.prepare(source, default="q8_0", device=device)


@pytest.mark.cuda
def test_on_a_gpu(tmp_path: Path) -> None:
    source = model(tmp_path / "model.gguf")
    options = {"imatrix": "energy", "allow_requantize": True, "recipe": recipe.Recipe.parse(SEARCHES + RULES)}
    quantize.quantize(source, tmp_path / "device.gguf", device="cuda", **options)
    quantize.quantize(source, tmp_path / "cpu.gguf", **options)
    assert (tmp_path / "device.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
