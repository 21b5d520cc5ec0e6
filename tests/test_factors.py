"""Factors beside weights (NVFP4's second level of scales): values have them, bytes do not, and none gets lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ggufx
import ggufx.torch
from ggufx import quantize
from ggufx.container import Value, align_up, encode_header
from ggufx.errors import CodecError, PlanError, RecipeError
from ggufx.retarget import plan_retarget

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


def test_nvfp4_without_a_factor_is_told(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 1e-3, (4, 64)).astype(np.float32)
    path = write(tmp_path / "f.gguf", ("blk.0.ffn_up.weight", (4, 64), F32, values.tobytes()))
    found = quantize.prepare(path, default="nvfp4").findings
    assert [f.severity for f in found if f.code == "factor"] == ["warning"]


def test_a_packed_tensor_takes_the_name_of_its_type() -> None:
    packed = torch.zeros((2, 18), dtype=torch.uint8)
    assert ggufx.torch.GGUFTensor(packed, "q4_0").shape == (2, 32)


def test_a_file_without_tensors_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "vocab.gguf")
    found = quantize.prepare(path, default="q8_0").findings
    assert [(f.severity, f.code) for f in found] == [("warning", "no-tensors")]
