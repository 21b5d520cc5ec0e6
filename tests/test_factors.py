"""Factors beside weights (NVFP4's second level of scales): values have them, bytes do not, and none gets lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from command import Run

import ggufx
import ggufx.torch
from ggufx import budget, plan, quantize
from ggufx.container import Value, align_up, encode_header
from ggufx.diff import diff
from ggufx.errors import CodecError, PlanError, RecipeError
from ggufx.measure import measure
from ggufx.recipe import Recipe, Rule
from ggufx.retarget import plan_retarget
from ggufx.rewrite import rewrite

F32, F16, NVFP4 = 0, 1, 40
FACTOR = np.float32(2.0**-12)


def nvfp4(rows: int, code: int) -> bytes:
    """Rows of 64 values: UE4M3 scales of 1.0 (0x38) and one code in every nibble."""
    return (b"\x38" * 4 + bytes([code << 4 | code]) * 32) * rows


def write(path: Path, *tensors: tuple[str, tuple[int, ...], int, bytes], architecture: str = "llama") -> Path:
    directory, data = [], b""
    for name, shape, type_id, raw in tensors:
        directory.append((name, shape, type_id, len(data)))
        data += raw + bytes(align_up(len(raw), 32) - len(raw))
    path.write_bytes(encode_header({"general.architecture": Value.string(architecture)}, directory, 32) + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # Code 7 is 6.0 and code 2 is 1.0 (E2M1), and the scales are 1.0 as ggml halves doubled values.
    experts = nvfp4(4, 7) + nvfp4(4, 2)
    return write(
        tmp_path / "m.gguf",
        ("blk.0.ffn_up.weight", (4, 64), NVFP4, nvfp4(4, 7)),
        ("blk.0.ffn_up.scale", (1,), F32, FACTOR.tobytes()),
        ("blk.0.ffn_up_exps.weight", (2, 4, 64), NVFP4, experts),
        ("blk.0.ffn_up_exps.scale", (2,), F32, np.array([0.5, 0.25], np.float32).tobytes()),
        ("blk.0.attn_q.weight", (4, 64), NVFP4, nvfp4(4, 7)),
        ("blk.0.ffn_gate_inp.weight", (4, 64), F32, np.ones((4, 64), np.float32).tobytes()),
        ("blk.0.ffn_gate_inp.scale", (64,), F32, np.full(64, 2, np.float32).tobytes()),
    )


def test_values_have_the_factor_and_bytes_do_not(path: Path) -> None:
    with ggufx.open(path) as f:
        w = f["blk.0.ffn_up.weight"]
        np.testing.assert_array_equal(w.scale, [FACTOR])
        np.testing.assert_array_equal(w.numpy(), np.full((4, 64), 6 * FACTOR))
        np.testing.assert_array_equal(w.numpy(np.float16), np.full((4, 64), 6 * FACTOR).astype(np.float16))
        np.testing.assert_array_equal(w[1:3, 5], np.full(2, 6 * FACTOR))
        assert w[2, 3] == 6 * FACTOR
        out = np.empty((4, 64), np.float32)
        assert w.numpy(out=out) is out
        assert out[0, 0] == 6 * FACTOR
        assert w.packed.tobytes() == nvfp4(4, 7)
        np.testing.assert_array_equal(w.codec.decode(w.packed), np.full((4, 64), 6))
        assert "'blk.0.ffn_up.weight' and 1 more have a factor" in f.notes[0]


def test_experts_have_one_each(path: Path) -> None:
    with ggufx.open(path) as f:
        w = f["blk.0.ffn_up_exps.weight"]
        wanted = np.concatenate([np.full((1, 4, 64), 3), np.full((1, 4, 64), 0.25)])
        np.testing.assert_array_equal(w.numpy(), wanted)
        np.testing.assert_array_equal(w[1], wanted[1])
        np.testing.assert_array_equal(w[..., 7], wanted[..., 7])
        np.testing.assert_array_equal(w[[1, 0], [2, 3]], wanted[[1, 0], [2, 3]])


def test_no_loader_multiplies_others(path: Path) -> None:
    with ggufx.open(path) as f:
        assert f["blk.0.attn_q.weight"].scale is None
        assert f["blk.0.ffn_gate_inp.weight"].scale is None  # gemma's, of the router's inputs
        np.testing.assert_array_equal(f["blk.0.ffn_gate_inp.weight"].numpy(), np.ones((4, 64)))


def test_torch_values_and_products_have_it(path: Path) -> None:
    held = ggufx.torch.load(path)
    w = held["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(w.dequantize().numpy(), np.full((4, 64), 6 * FACTOR))
    np.testing.assert_array_equal(w[1:3].dequantize(torch.float16).numpy(), np.full((2, 64), 6 * FACTOR, np.float16))
    experts = held["blk.0.ffn_up_exps.weight"]
    np.testing.assert_array_equal(experts[1].dequantize().numpy(), np.full((4, 64), 0.25))
    np.testing.assert_array_equal(experts[:, 2].dequantize().numpy()[:, 0], [3, 0.25])
    # 64 * 6 * 512 is beyond a half float; with the factor it is 48.
    x, bias = torch.full((2, 64), 512.0, dtype=torch.float16), torch.ones(4, dtype=torch.float16)
    np.testing.assert_array_equal(ggufx.torch.linear(x, w, bias).numpy(), np.full((2, 4), 49, np.float16))
    plain = held["blk.0.attn_q.weight"]
    ys = ggufx.torch.linears(x.float(), [w, plain, experts[0]])
    assert [y[0, 0].item() for y in ys] == [48, 64 * 6 * 512, 64 * 3 * 512]
    for module in (ggufx.torch.GGUFLinear, ggufx.torch.GGUFEmbedding):
        with pytest.raises(CodecError, match="has a factor of its own"):
            module(w)


def test_a_shard_has_its_experts_factors(path: Path) -> None:
    held = ggufx.torch.load(path, shard=(1, 2), names=["blk.0.ffn_up_exps.weight"])
    np.testing.assert_array_equal(held["blk.0.ffn_up_exps.weight"].dequantize().numpy(), np.full((1, 4, 64), 0.25))


def test_requantizing_neither_loses_the_factor_nor_applies_it_twice(path: Path, tmp_path: Path) -> None:
    quantize.quantize(path, tmp_path / "o.gguf", default="q8_0", allow_requantize=True)
    with ggufx.open(path) as before, ggufx.open(tmp_path / "o.gguf") as after:
        assert after["blk.0.ffn_up.weight"].type == "Q8_0"
        for name in before:
            # q8_0 of equal values is exact but for a scale in a half float
            np.testing.assert_allclose(after[name].numpy(), before[name].numpy(), rtol=1e-3)


def test_programs_that_do_not_apply_it_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ik_llama\.cpp reads such factors for BitNet only"):
        quantize.plan_quantize(
            path, tmp_path / "o.gguf", default="q8_0", allow_requantize=True, target="ik_llama.cpp", pure=True
        )
    with ggufx.open(path) as file, pytest.raises(PlanError, match="for BitNet only"):
        plan_retarget(file, tmp_path / "o.gguf", "ik_llama.cpp", dense="f32")
    head = write(
        tmp_path / "h.gguf",
        ("output.weight", (4, 64), NVFP4, nvfp4(4, 7)),
        ("output.scale", (1,), F32, FACTOR.tobytes()),
    )
    with pytest.raises(RecipeError, match="only where the head is NVFP4, here it would be Q8_0"):
        quantize.plan_quantize(head, tmp_path / "o.gguf", default="q8_0", allow_requantize=True)
    bitnet = write(
        tmp_path / "b.gguf",
        ("blk.0.ffn_up.weight", (4, 64), F16, np.ones((4, 64), np.float16).tobytes()),
        ("blk.0.ffn_up.scale", (1,), F32, FACTOR.tobytes()),
        architecture="bitnet",
    )
    plan = quantize.plan_quantize(bitnet, tmp_path / "o.gguf", default="q8_0", target="ik_llama.cpp")
    assert [tensor.type for tensor in plan.tensors] == ["Q8_0", "F32"]


def weights(path: Path, sd: float, architecture: str = "llama") -> Path:
    """A file of Gaussian weights: a matrix, a stack of two matrices of which one is ten times the other, and a router."""
    rng = np.random.default_rng(7)
    matrix = rng.normal(0, sd, (64, 256)).astype(np.float32)
    stack = rng.normal(0, sd, (2, 32, 256)).astype(np.float32) * np.float32([[[1]], [[10]]])
    return write(
        path,
        ("blk.0.ffn_up.weight", matrix.shape, F32, matrix.tobytes()),
        ("blk.0.ffn_up_exps.weight", stack.shape, F32, stack.tobytes()),
        ("blk.0.ffn_gate_inp.weight", (2, 256), F32, np.ones((2, 256), np.float32).tobytes()),
        architecture=architecture,
    )


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - wanted).sum() / np.square(wanted).sum()))


@pytest.mark.parametrize("sd", [0.02, 0.005, 1e-3, 1e-4, 1e-20])
def test_nvfp4_gets_a_factor(sd: float, tmp_path: Path) -> None:
    source, out = weights(tmp_path / "f.gguf", sd), tmp_path / "o.gguf"
    quantize.quantize(source, out, default="nvfp4", threads=2)
    reader = gguf.GGUFReader(out)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert list(by_name) == [
        "blk.0.ffn_up.weight", "blk.0.ffn_up.scale", "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.scale",
        "blk.0.ffn_gate_inp.weight",
    ]  # fmt: skip
    with ggufx.open(source) as before, ggufx.open(out) as after:
        for name, count in (("blk.0.ffn_up.weight", 1), ("blk.0.ffn_up_exps.weight", 2)):
            x, packed = before[name].numpy(), by_name[name]
            factor = by_name[name.replace("weight", "scale")].data
            assert (factor.shape, factor.dtype) == ((count,), np.float32)
            wanted = np.abs(x.reshape(count, -1)).max(axis=1).astype(np.float64) / (448 * 6)
            np.testing.assert_allclose(factor, wanted, rtol=1e-6)
            # Another library decodes, and the loader's product is the factor's.
            theirs = gguf.quants.dequantize(packed.data, gguf.GGMLQuantizationType.NVFP4).reshape(x.shape)
            theirs = theirs * factor.reshape(-1, *[1] * (x.ndim - 1))
            np.testing.assert_array_equal(after[name].numpy(), theirs)
            for one, other in zip(theirs.reshape(count, -1), x.reshape(count, -1), strict=True):
                assert 0.05 < error(one, other) < 0.084


def test_a_factor_is_the_same_whatever_the_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = weights(tmp_path / "f.gguf", 1e-3)
    quantize.quantize(source, tmp_path / "a.gguf", default="nvfp4", threads=1)
    monkeypatch.setattr(plan, "TILE_LEN", 512)
    quantize.quantize(source, tmp_path / "b.gguf", default="nvfp4", threads=3)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_zeros_have_the_factor_one(tmp_path: Path) -> None:
    source = write(tmp_path / "z.gguf", ("blk.0.ffn_up.weight", (4, 64), F32, bytes(1024)))
    quantize.quantize(source, tmp_path / "o.gguf", default="nvfp4")
    with ggufx.open(tmp_path / "o.gguf") as f:
        assert f["blk.0.ffn_up.weight"].scale == [1]
        assert not f["blk.0.ffn_up.weight"].numpy().any()


@pytest.mark.parametrize(
    ("name", "architecture", "target", "written"),
    [
        ("blk.0.ffn_up.weight", "llama", "llama.cpp", True),
        ("blk.0.attn_q.weight", "minimax-m3", "llama.cpp", True),
        ("blk.0.ffn_up_exps.weight", "minimax-m2", "llama.cpp", False),  # loads .scale, multiplies by none
        ("blk.0.ffn_up.weight", "qwen2", "llama.cpp", False),
        ("blk.0.ffn_up.weight", "nobody-knows", "llama.cpp", False),
        ("blk.0.ffn_up.weight", "llama", "nisparks", False),
        ("output.weight", "llama", "llama.cpp", True),
        ("output.weight", "bert", "llama.cpp", False),
        ("blk.0.attn_kv_a_mqa.weight", "deepseek2", "llama.cpp", False),
    ],
)
def test_factors_are_written_where_graphs_multiply_by_them(
    name: str, architecture: str, target: str, written: bool, tmp_path: Path
) -> None:
    shape = (2, 4, 64) if "_exps" in name else (4, 64)
    values = np.random.default_rng(0).normal(0, 1e-3, shape).astype(np.float32)
    path = write(tmp_path / "f.gguf", (name, shape, F32, values.tobytes()), architecture=architecture)
    prepared = quantize.prepare(path, recipe=Recipe((Rule(f"^{name}$", ("NVFP4",)),)), target=target)
    assert [f.severity for f in prepared.findings if f.code == "factor"] == ([] if written else ["warning"])
    assert [t.name for t in prepared.tensors] == [name, name.replace("weight", "scale")][: 1 + written]


def test_verify_and_diff_take_the_factor_for_what_it_is(tmp_path: Path, cli: Callable[..., Run]) -> None:
    source, out = weights(tmp_path / "f.gguf", 1e-3), tmp_path / "o.gguf"
    quantize.quantize(source, out, default="nvfp4")
    run = cli("verify", out, "--against", source)
    assert run.code == 0, run
    assert "rounded within the bounds" in run.out
    found = {t.name: t for t in diff(source, out).tensors}
    assert found.keys() == {"blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight"}
    assert all(0.05 < t.relative_rms < 0.085 for t in found.values())
    with ggufx.open(out) as f:
        places = [f[name].position for name in ("blk.0.ffn_up.scale", "blk.0.ffn_up_exps.scale")]
    for place in (places[0], places[1] + 4):
        whole = out.read_bytes()
        for change in (b"\0\0\0\0", b"\0\0\xc0\x7f", whole[place : place + 3] + bytes([whole[place + 3] ^ 1])):
            raw = whole[:place] + change + whole[place + 4 :]
            (tmp_path / "bad.gguf").write_bytes(raw)
            run = cli("verify", tmp_path / "bad.gguf", "--against", source)
            assert run.code == 1, run
    # A factor that only one of two files has changes all values, though no byte of the weight.
    (only,) = rewrite(out, tmp_path / "only.gguf", keep=["blk.0.ffn_up.*"])
    (bare,) = rewrite(source, tmp_path / "bare.gguf", keep=["blk.0.ffn_up.weight"])
    quantize.quantize(bare, tmp_path / "raw.gguf", default="nvfp4", target="nisparks")
    (raw_one,) = rewrite(tmp_path / "raw.gguf", tmp_path / "r2.gguf")
    assert cli("verify", only, "--against", raw_one).code == 1


def test_quantizing_nvfp4_again_keeps_codes_and_factor(tmp_path: Path) -> None:
    source, once, twice = weights(tmp_path / "f.gguf", 1e-3), tmp_path / "1.gguf", tmp_path / "2.gguf"
    quantize.quantize(source, once, default="nvfp4")
    quantize.quantize(once, twice, default="nvfp4")
    with ggufx.open(once) as a, ggufx.open(twice) as b:
        assert list(a) == list(b)
        assert all(a[name].packed.tobytes() == b[name].packed.tobytes() for name in a)


def test_a_size_counts_factors_and_measuring_applies_them(tmp_path: Path) -> None:
    source = weights(tmp_path / "f.gguf", 1e-4)
    quantize.quantize(source, tmp_path / "o.gguf", default="nvfp4")
    nbytes = (tmp_path / "o.gguf").stat().st_size
    held = budget.Budget(source, type_names=["nvfp4", "native"], target="llama.cpp")
    assert held.smallest_nbytes == nbytes
    held.measure()
    fit = held.fit(nbytes)
    assert fit.nbytes == nbytes
    assert all(0.002 < found < 0.008 for found in fit.errors.values())  # squares of what test_nvfp4_gets_a_factor has
    (found,) = measure(source, ["nvfp4"], pattern="blk.0.ffn_up.weight")
    assert found.quality is not None
    with ggufx.open(source) as before, ggufx.open(tmp_path / "o.gguf") as after:
        name = "blk.0.ffn_up.weight"
        wanted = error(after[name].numpy(), before[name].numpy())
    assert found.quality.relative_rmse == pytest.approx(wanted, rel=1e-5)


def test_a_packed_tensor_takes_the_name_of_its_type() -> None:
    packed = torch.zeros((2, 18), dtype=torch.uint8)
    assert ggufx.torch.GGUFTensor(packed, "q4_0").shape == (2, 32)


def test_a_file_without_tensors_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "vocab.gguf")
    found = quantize.prepare(path, default="q8_0").findings
    assert [(f.severity, f.code) for f in found] == [("warning", "no-tensors")]
