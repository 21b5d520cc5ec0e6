"""What ``ggufx`` has: names, arrays in memory, dicts of arrays and tensors, notebooks; and the examples of its docstrings."""

from __future__ import annotations

import doctest
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import ggufx
import ggufx.torch
from ggufx.errors import CodecError, OutOfRangeError, PlanError, UnknownType


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Names -------------------------------------------------------------------------------------------------------------------


def test_dir_shows_public_names_and_nothing_else() -> None:
    code = (
        "import ggufx\n"
        "before = dir(ggufx)\n"
        "assert all(getattr(ggufx, name) is not None for name in before if name not in ('torch', 'testing'))\n"
        "assert dir(ggufx) == before\n"
        "print(*before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [
        "File", "GGUFError", "Lazy", "Packed", "Quality", "Tensor", "Writer", "__version__", "budget", "convert",
        "dequantize", "dialects", "diff", "edit", "errors", "export", "imatrix", "inspect", "load_file", "measure", "merge",
        "open", "quality", "quantize", "quantize_array", "recipe", "retarget", "rewrite", "save", "save_file", "testing",
        "torch", "types", "values", "verify",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'lode_file'"):
        _ = ggufx.lode_file


def test_saving_loads_neither_a_compiler_nor_torch(workplace: Path) -> None:
    code = (
        "import sys, numpy as np, ggufx\n"
        "ggufx.save('a.gguf', {'w': np.ones((2, 32), np.float16)})\n"
        "assert ggufx.load_file('a.gguf')['w'].sum() == 64\n"
        "print([name for name in ('numba', 'llvmlite', 'torch', 'triton', 'typer', 'rich') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["arrays", "saving", "writer", "values", "torch.saving"])
def test_examples_of_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ggufx.{module}"))
    assert found.attempted > 3
    assert found.failed == 0


# Arrays in memory --------------------------------------------------------------------------------------------------------


def test_dequantize_is_the_gguf_packages() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (4, 3 * 34), np.uint8).reshape(4, 3, 34)
    rows[..., :2] = np.float16(0.25).tobytes()[0], np.float16(0.25).tobytes()[1]
    rows = rows.reshape(4, 102)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)
    packed = ggufx.Packed(rows, "q8_0")
    assert np.array_equal(ggufx.dequantize(rows, "Q8_0"), expected)
    assert np.array_equal(ggufx.dequantize(rows.tobytes(), "Q8_0", (2, 2, 96)), expected.reshape(2, 2, 96))
    assert np.array_equal(ggufx.dequantize(packed), expected)
    assert ggufx.dequantize(packed, dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
    assert (packed.type, packed.shape, packed.nbytes) == ("Q8_0", (4, 96), 408)
    with pytest.raises(CodecError, match="name it"):
        ggufx.dequantize(rows)
    with pytest.raises(UnknownType):
        ggufx.dequantize(rows, "Q8")
    with pytest.raises(CodecError, match=r"Q8_0\[4, 64\] takes 272 bytes, got 408"):
        ggufx.Packed(rows, "Q8_0", (4, 64))
    with pytest.raises(CodecError, match="must be uint8, got int8"):
        ggufx.Packed(rows.view(np.int8), "Q8_0")
    with pytest.raises(CodecError, match="give one"):
        ggufx.Packed(rows.tobytes(), "Q8_0")


def test_quantize_array() -> None:
    values = np.arange(-16, 16, dtype=np.float32)[None] * 8
    scale = np.float32(128 / 127)
    codes = np.round(values / scale).astype(np.int8)
    assert ggufx.quantize_array(values, "Q8_0").tobytes() == np.float16(scale).tobytes() + codes.tobytes()
    with pytest.raises(OutOfRangeError):
        ggufx.quantize_array(values * np.float32(1e30), "Q8_0")
    assert ggufx.quantize_array(values * np.float32(1e30), "Q8_0", saturate=True).shape == (1, 34)
    on_torch = ggufx.quantize_array(torch.from_numpy(values), "Q8_0")
    assert isinstance(on_torch, torch.Tensor)


# Dicts of arrays and tensors ---------------------------------------------------------------------------------------------


def test_the_way_of_safetensors(workplace: Path) -> None:
    tensors = {
        "f": numbers(2, 3),
        "h": numbers(4).astype(np.float16),
        "d": numbers(2, 2, 2).astype(np.float64),
        "i": np.array([[1, -2]], np.int64),
    }
    safetensors.numpy.save_file(tensors, workplace / "a.safetensors")
    theirs = safetensors.numpy.load_file(workplace / "a.safetensors")
    ggufx.save_file(tensors, workplace / "a.gguf", metadata={"format": "np"})
    ours = ggufx.load_file(workplace / "a.gguf")
    assert list(ours) == list(tensors)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        assert np.array_equal(ours[name], values)
        assert ours[name].flags.writeable
    halved = ggufx.load_file("a.gguf", dtype="float16")
    assert {name: values.dtype.name for name, values in halved.items()} == {
        "f": "float16", "h": "float16", "d": "float16", "i": "int64"
    }  # fmt: skip
    assert np.array_equal(halved["f"], tensors["f"].astype(np.float16))
    with ggufx.open("a.gguf") as f:
        assert dict(f.metadata) == {"format": "np"}


def test_torch_tensors_and_back(workplace: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 64, generator=generator)
    tensors = {
        "f": base,
        "b": base.bfloat16(),
        "h": base.half(),
        "turned": base.T,
        "part": base[::2, ::2],
        "parameter": torch.nn.Parameter(base[:2].bfloat16()),
        "i": torch.arange(5),
        "conjugate": torch.zeros(2, 0, 3),
    }
    ggufx.torch.save_file(tensors, workplace / "t.gguf")
    ours = ggufx.torch.load_file(workplace / "t.gguf")
    assert list(ours) == list(tensors)
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    narrowed = ggufx.torch.load_file(workplace / "t.gguf", dtype=torch.bfloat16)
    assert narrowed["f"].dtype == torch.bfloat16
    assert narrowed["i"].dtype == torch.int64
    assert np.array_equal(ggufx.load_file("t.gguf")["b"].astype(np.float32), base.bfloat16().float().numpy())


def test_packed_torch_tensors_and_types() -> None:
    base = torch.from_numpy(numbers(4, 64))
    rows = ggufx.quantize_array(numbers(4, 64), "Q4_0")
    fp8 = base.to(torch.float8_e4m3fn)
    held = ggufx.torch.GGUFTensor(torch.from_numpy(rows), "Q4_0")
    ggufx.save("p.gguf", {"packed": held, "w": base, "fp8": fp8}, types={"w": "Q8_0", "fp8": "BF16"})
    loaded = ggufx.torch.load_file("p.gguf")
    with ggufx.open("p.gguf") as f:
        assert [tensor.type for tensor in f.tensors] == ["Q4_0", "Q8_0", "BF16"]
        assert f["packed"].packed.tobytes() == rows.tobytes()
    assert torch.equal(loaded["fp8"].float(), fp8.float())
    assert torch.equal(loaded["packed"], held.dequantize())
    for odd in (
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.uint8),
    ):
        with pytest.raises((PlanError, CodecError), match="'w'"):
            ggufx.save("q.gguf", {"w": odd})


# Open files --------------------------------------------------------------------------------------------------------------


def test_torch_tensors_need_no_import_of_ours(workplace: Path) -> None:
    code = (
        "import sys, torch, ggufx\n"
        "ggufx.save('a.gguf', {'w': torch.ones(2, 32, dtype=torch.bfloat16)}, types='Q8_0')\n"
        "print(ggufx.load_file('a.gguf')['w'].round(2).sum(), 'ggufx.torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["64.0", "False"]


def test_a_wrong_name_is_told_the_right_one() -> None:
    ggufx.save("a.gguf", {"blk.0.attn_q.weight": numbers(2), "output.weight": numbers(2)})
    with ggufx.open("a.gguf") as f:
        with pytest.raises(KeyError, match=r"did you mean 'blk\.0\.attn_q\.weight'\?"):
            _ = f["blk.0.attn_q"]
        with pytest.raises(KeyError, match=r"\(it has 2\)'?\"?$"):
            _ = f["zzz"]
        assert "blk.0.attn_q" not in f
        assert f.get("blk.0.attn_q") is None
        assert f.get("output.weight", 5) is f["output.weight"]


def test_a_file_in_a_notebook() -> None:
    names = [f"t{n}<b>&" for n in range(201)]
    ggufx.save("a.gguf", {name: np.ones((3, 5), np.float32) for name in names})
    with ggufx.open("a.gguf") as f:
        text = f._repr_html_()
    assert text.count("<tr>") == 202
    assert "<td>t0&lt;b&gt;&amp;</td><td>F32</td><td>3 × 5</td>" in text
    assert "<b>a.gguf</b>: 201 tensors, 12,060 bytes" in text
    assert "and 1 more tensors" in text
    assert "t200" not in text


def test_packed_bytes_pickle() -> None:
    packed = ggufx.Packed(ggufx.quantize_array(numbers(2, 32), "Q8_0"), "Q8_0")
    again = pickle.loads(pickle.dumps(packed))
    assert again.type == "Q8_0"
    assert again.data.tobytes() == packed.data.tobytes()
