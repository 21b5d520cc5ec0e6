"""gpt-oss through the command line: every value and every MXFP4 code against numpy; what is wrong is one clear error."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import ggufx
from ggufx.convert import convert, plan_convert
from ggufx.verify import verify

from .conftest import Run, assert_nothing_left, assert_one_line
from .oracle import E2M1, Gguf, Source

Cli = Callable[..., Run]

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}  # fmt: skip
GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; not to be changed."""
    from make_tiny_gpt_oss import make_tiny_gpt_oss

    out = tmp_path_factory.mktemp("gpt_oss") / "Tiny-gpt-oss"
    make_tiny_gpt_oss(out, layers=2, experts=5, merges=40)
    return out


@pytest.fixture
def editable(path: Path, tmp_path: Path) -> Source:
    """A copy, to be damaged."""
    shutil.copytree(path, tmp_path / "Copy")
    return Source(tmp_path / "Copy")


def bf16(source: Source, name: str) -> np.ndarray:
    tensor = source.tensors[name]
    return tensor.data.view(ml_dtypes.bfloat16).reshape(tensor.shape).astype(np.float32)


def experts(source: Source, name: str) -> np.ndarray:
    """Values of a layer's experts: float32 [experts, rows, row length]."""
    blocks, scales = source.tensors[f"{name}_blocks"], source.tensors[f"{name}_scales"]
    pairs = blocks.data.reshape(blocks.shape)
    values = np.stack([E2M1[pairs & 15], E2M1[pairs >> 4]], axis=-1).reshape(*blocks.shape[:3], 32)
    factors = np.ldexp(np.float32(1), scales.data.reshape(scales.shape).astype(np.int32) - 127)
    return (values * factors[..., None]).reshape(*blocks.shape[:2], -1)


def wanted(source: Source) -> dict[str, np.ndarray]:
    """Names and values that an output must have; float32."""
    found: dict[str, np.ndarray] = {}
    for name in source.tensors:
        if name in GLOBAL:
            found[GLOBAL[name]] = bf16(source, name)
            continue
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
        block = f"blk.{layer}."
        if rest.endswith("_scales"):
            continue
        if rest == "self_attn.sinks":
            found[f"{block}attn_sinks.weight"] = bf16(source, name)
        elif rest.startswith("mlp.experts."):
            biased = rest.endswith("_bias")
            values = bf16(source, name) if biased else experts(source, name.removesuffix("_blocks"))
            suffix = "bias" if biased else "weight"
            if "gate_up" in rest:
                found[f"{block}ffn_gate_exps.{suffix}"] = values[:, 0::2]
                found[f"{block}ffn_up_exps.{suffix}"] = values[:, 1::2]
            else:
                found[f"{block}ffn_down_exps.{suffix}"] = values
        else:
            base, _, suffix = rest.rpartition(".")
            found[f"{block}{NAMES[base]}.{suffix}"] = bf16(source, name)
    return found


@pytest.mark.parametrize("target", ["llama.cpp", "ik_llama.cpp", "nisparks"])
def test_values_and_proof(target: str, path: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    run = cli("convert", path, "--target", target, "--outfile", out)
    assert run.code == 0, run
    file, expected = Gguf(out), wanted(Source(path))
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        tensor = file.tensors[name]
        assert tensor.shape == values.shape, name
        np.testing.assert_array_equal(tensor.decode(), values, err_msg=name)
        experts_kind = "F32" if name.endswith("bias") else "MXFP4"
        matrix = re.search(r"attn_(q|k|v|output)\.weight|token_embd|^output\.weight", name)
        assert tensor.type == (experts_kind if "_exps." in name else "BF16" if matrix else "F32"), name
    assert file.kv["general.architecture"][1] == "gpt-oss"
    assert file.kv["tokenizer.ggml.pre"][1] == "gpt-4o"
    assert file.kv["general.file_type"][1] == 38
    assert file.kv["gpt-oss.attention.sliding_window"][1] == 32
    proof = cli("verify", out, "--against", path)
    assert proof.code == 0, proof
    report = verify(out, path)
    assert {tensor.status for tensor in report.tensors} == {"exact"}
    assert report.metadata == []


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
def test_quantized_experts(kind: str, path: Path, cli: Cli, tmp_path: Path) -> None:
    """Every other row of gate_up, from codes to another type, and nothing else touched."""
    out = tmp_path / "out.gguf"
    run = cli("quantize", path, "--custom-q", f"_exps.weight={kind}", "--target", "llama.cpp", "--outfile", out)
    assert run.code == 0, run.err
    codec = ggufx.types.get(kind)
    with ggufx.open(out) as file:
        expected = wanted(Source(path))
        assert set(file) == set(expected)
        for name, values in expected.items():
            if "_exps.weight" in name:
                assert file[name].type == kind.upper()
                values = codec.decode(codec.encode(np.ascontiguousarray(values)), values.shape)
            assert np.array_equal(file[name].numpy(), values), name


def test_codes_are_the_checkpoints_own(path: Path, tmp_path: Path) -> None:
    """Byte for byte, minus zeros among them: even elements in the first half of a block's low nibbles, and so on."""
    source = Source(path)
    file = Gguf(convert(path, tmp_path / "out.gguf", target="llama.cpp")[0])
    blocks = source.tensors[f"{GATE_UP}_blocks"]
    pairs, scales = blocks.data.reshape(blocks.shape), source.tensors[f"{GATE_UP}_scales"]
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*blocks.shape[:3], 32)
    for first, proj in enumerate(("gate", "up")):
        mine = codes[:, first::2]
        packed = file.tensors[f"blk.1.ffn_{proj}_exps.weight"].data.reshape(*mine.shape[:3], 17)
        assert np.array_equal(packed[..., 0], scales.data.reshape(scales.shape)[:, first::2])
        assert np.array_equal(packed[..., 1:] & 15, mine[..., :16])
        assert np.array_equal(packed[..., 1:] >> 4, mine[..., 16:])


@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.weight", "blk.0.ffn_gate_exps.bias", "blk.0.attn_sinks.weight"])
def test_verify_finds_a_changed_byte(name: str, path: Path, cli: Cli, tmp_path: Path) -> None:
    out = convert(path, tmp_path / "out.gguf", target="llama.cpp")[0]
    tensor = Gguf(out).tensors[name]
    with out.open("r+b") as file:
        file.seek(tensor.offset + tensor.data.size - 2)
        file.write(bytes([tensor.data[-2] ^ 1]))
    assert cli("verify", out, "--against", path).code == 1
    assert [t.name for t in verify(out, path).tensors if t.status == "different"] == [name]


@pytest.mark.parametrize(
    ("damage", "needed"),
    [
        (lambda s: s.drop(f"{GATE_UP}_scales"), [f"{GATE_UP}_blocks", "scales", "are missing"]),
        (lambda s: s.drop(f"{GATE_UP}_blocks", f"{GATE_UP}_scales"), ["Missing tensors", f"{GATE_UP}_blocks"]),
        (
            lambda s: s.put(f"{GATE_UP}_scales", "U8", (5, 448, 8), np.zeros(5 * 448 * 8, np.uint8)),
            ["U8[5, 448, 8]", "expected U8[5, 448, 9]"],
        ),
        (lambda s: s.config.update(intermediate_size=192), ["config.json says", "[5, 288, 6, 16]"]),
        (lambda s: s.config.update(num_local_experts=6), ["config.json says", "6"]),
        (lambda s: s.config.pop("sliding_window"), ["sliding_window is missing"]),
        (lambda s: s.bytes_of(f"{GATE_UP}_scales").__setitem__(0, 255), ["E8M0 scales 255", f"{GATE_UP}_scales"]),
        (
            lambda s: (
                s.drop(f"{GATE_UP}_scales", f"{GATE_UP}_blocks"),
                s.put(GATE_UP, "BF16", (5, 288, 448), np.zeros(5 * 288 * 448, "<u2"), shard=next(iter(s.shards))),
            ),
            [GATE_UP, "BF16", "not in MXFP4"],
        ),
    ],
    ids=lambda value: "" if callable(value) else value[0][:20],
)
def test_errors_are_one_line_and_leave_nothing(
    damage: Callable[[Source], object], needed: list[str], editable: Source, cli: Cli, tmp_path: Path
) -> None:
    damage(editable)
    editable.save()
    run = cli("convert", editable.path, "--target", "llama.cpp", "--outfile", tmp_path / "out.gguf")
    assert_one_line(run, *needed)
    assert_nothing_left(tmp_path, partial=True)


def test_what_is_left_out_is_named(path: Path, tmp_path: Path, cli: Cli) -> None:
    plan = plan_convert(path, tmp_path / "out.gguf", target="llama.cpp", skip=["*layers.1.mlp.experts.down*"])
    names = [f"model.layers.1.mlp.experts.down_proj_{part}" for part in ("bias", "blocks", "scales")]
    assert sorted(name for name, _ in plan.skipped) == names
    assert_one_line(cli("convert", path, "--mtp", "--target", "llama.cpp"), "gpt-oss has no MTP block")
