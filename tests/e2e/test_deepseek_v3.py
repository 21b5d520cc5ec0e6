"""DeepSeek-V3 through the command line: every value against numpy, for every target; what is wrong is one clear error.

The names are written down here once more, and the values come from the formats' definitions by numpy and ml_dtypes.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import ggufx
from ggufx import quantize, transforms
from ggufx.checkpoint import Checkpoint
from ggufx.convert import convert, plan_convert
from ggufx.hybrid import open as open_hybrid
from ggufx.types.f8_e4m3_b128 import decode_scaled, exponents
from ggufx.verify import verify

from .conftest import Run, assert_nothing_left, assert_one_line
from .oracle import Gguf, Source

Cli = Callable[..., Run]

SMALL = {"hidden": 256, "ffn": 384, "moe": 128, "experts": 8, "heads": 2, "merges": 40}
CASES = {
    "float": SMALL,
    "ue8m0": SMALL | {"scales": "ue8m0", "chat_template": "{{ bos_token }}"},
    "bf16": SMALL | {"weights": "bf16"},
    # Heads that end in the midst of a tile of scales; rows that no F8_E4M3_B128 divides; two MTP layers.
    "odd": SMALL | {"nope": 96, "value": 80, "heads": 4, "q_lora": 0, "mtp_layers": 2, "shards": 1},
    # Heads of whole blocks that still do not begin where a tile of scales does.
    "odd-heads-ue8m0": SMALL | {"value": 192, "scales": "ue8m0", "shards": 1},
    "odd-ue8m0": SMALL | {"nope": 96, "value": 128, "kv_lora": 192, "scales": "ue8m0", "mtp_layers": 0},
}  # fmt: skip
TARGETS = ("llama.cpp", "ik_llama.cpp", "nisparks")
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
QB = "model.layers.1.self_attn.q_b_proj.weight"
KVB = "model.layers.1.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the checkpoint of a case; not to be changed."""
    from make_tiny_v3 import make_tiny_v3

    root = tmp_path_factory.mktemp("v3")

    def get(case: str) -> Path:
        path = root / f"Tiny-V3-{case}"
        if not path.exists():
            make_tiny_v3(path, **CASES[case])
        return path

    return get


@pytest.fixture
def editable(path_of: Callable[[str], Path], tmp_path: Path) -> Source:
    """A copy, to be damaged."""
    shutil.copytree(path_of("float"), tmp_path / "Copy")
    return Source(tmp_path / "Copy")


def decode(source: Source, name: str) -> np.ndarray:
    """Values of a checkpoint tensor: float32."""
    tensor = source.tensors[name]
    if tensor.dtype == "F8_E4M3":
        scale = source.tensors[name + "_scale_inv"]
        kind = {"F32": np.dtype("<f4"), "BF16": ml_dtypes.bfloat16, "F16": np.dtype("<f2")}[scale.dtype]
        scales = scale.data.view(kind).astype(np.float32).reshape(scale.shape)
        full = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: tensor.shape[0], : tensor.shape[1]]
        return tensor.data.view(ml_dtypes.float8_e4m3fn).reshape(tensor.shape).astype(np.float32) * full
    if tensor.dtype == "BF16":
        return tensor.data.view(ml_dtypes.bfloat16).reshape(tensor.shape).astype(np.float32)
    return tensor.data.view("<f4").reshape(tensor.shape)


def wanted(source: Source, target: str) -> dict[str, np.ndarray]:
    """Names and values that an output must have; float32."""
    config = source.config
    heads, nope, value = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name in source.tensors:
        if name in GLOBAL:
            found[GLOBAL[name]] = decode(source, name)
            continue
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.e_score_correction_bias)", name)
        if match is None or int(match[1]) >= config["num_hidden_layers"]:
            continue
        block, rest, values = f"blk.{match[1]}.", match[2], decode(source, name)
        if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", rest):
            stacks.setdefault(f"{block}ffn_{expert[2]}_exps.weight", {})[int(expert[1])] = values
        elif match[3] != ".weight":
            found[f"{block}exp_probs_b.bias"] = values
        elif rest == "self_attn.kv_b_proj":
            by_head = values.reshape(heads, nope + value, -1)
            k_b, v_b = by_head[:, :nope].transpose(0, 2, 1), by_head[:, nope:]
            if target == "ik_llama.cpp":
                found[f"{block}attn_kv_b.weight"] = values
                k_b, v_b = k_b.reshape(-1, nope), v_b.reshape(heads * value, -1)
            found[f"{block}attn_k_b.weight"], found[f"{block}attn_v_b.weight"] = k_b, v_b
        else:
            found[f"{block}{NAMES[rest]}.weight"] = values
    return found | {name: np.stack([stack[e] for e in range(len(stack))]) for name, stack in stacks.items()}


def check(source: Source, file: Gguf, target: str) -> dict[str, str]:
    """Every tensor there and no other; every value exact, or rounded to BF16 once. Returns the types."""
    expected = wanted(source, target)
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        tensor = file.tensors[name]
        assert tensor.shape == values.shape, name
        if tensor.type == "BF16":
            values = np.ascontiguousarray(values).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(tensor.decode().view(np.uint32), np.ascontiguousarray(values).view(np.uint32)), name
    return {name: tensor.type for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_proof(case: str, target: str, path_of: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    path, out = path_of(case), tmp_path / "out.gguf"
    run = cli("convert", path, "--target", target, "--outfile", out)
    assert run.code == 0, run
    source, file = Source(path), Gguf(out)
    kinds = check(source, file, target)
    vectors = re.compile(r"_norm\.weight|\.bias|ffn_gate_inp")
    assert all((kind == "F32") == bool(vectors.search(name)) for name, kind in kinds.items())
    native = {name for name, kind in kinds.items() if kind == "F8_E4M3_B128"}
    if target == "nisparks" and "ue8m0" in case:
        # The output projections are the ones with other scales, embeddings are BF16 as ever.
        excepted = {name for name, kind in kinds.items() if kind == "BF16"}
        families = {name.split(".")[-2] for name in excepted}
        rest = {"attn_k_b", "attn_kv_a_mqa"} if case.startswith("odd") else set()
        assert families - rest - {"attn_v_b"} == {"attn_output", "token_embd", "output"}
        assert "attn_output.weight of 3 layers" in run.err
        assert len(native) > 20
        assert file.kv["general.file_type"][1] == 41
    else:
        assert not native
        assert file.kv["general.file_type"][1] == 32
    proof = cli("verify", out, "--against", path)
    assert proof.code == 0, proof
    report = verify(out, path)
    status = {tensor.name: tensor.status for tensor in report.tensors}
    assert report.metadata == []
    if case == "bf16":
        assert set(status.values()) == {"exact"}
    elif "ue8m0" in case:
        assert {name.split(".")[2] for name, found in status.items() if found != "exact"} == {"attn_output"}
    assert all(status[name] == "exact" for name in native)


@pytest.mark.parametrize("dense", ["q8_0", "f32"])
def test_dense_is_llama_cpps_outtype(dense: str, path_of: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    """F32 is the exact product; Q8_0 takes the embeddings along; both are proven."""
    path, out = path_of("odd"), tmp_path / "out.gguf"
    assert cli("convert", path, "--target", "llama.cpp", "--dense", dense, "--outfile", out).code == 0
    file = Gguf(out)
    if dense == "f32":
        assert set(check(Source(path), file, "llama.cpp").values()) == {"F32"}
    else:
        assert {name for name, t in file.tensors.items() if t.type != "Q8_0"} == {
            name for name in file.tensors if re.search(r"_norm\.weight|\.bias|ffn_gate_inp", name)
        }
    assert cli("verify", out, "--against", path).code == 0


def test_keys(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """What the targets' loaders ask for, as they count it."""
    path = path_of("ue8m0")
    files = {t: Gguf(convert(path, tmp_path / f"{t}.gguf", target=t)[0]) for t in ("llama.cpp", "ik_llama.cpp")}
    found = {t: {k.removeprefix("deepseek2."): v for k, (_, v) in file.kv.items()} for t, file in files.items()}
    for keys in found.values():
        assert keys["general.architecture"] == "deepseek2"
        assert keys["tokenizer.ggml.pre"] == "deepseek-v3"
        assert keys["tokenizer.chat_template"] == "{{ bos_token }}"
        assert (keys["block_count"], keys["leading_dense_block_count"], keys["expert_count"]) == (3, 1, 8)
        assert (keys["attention.q_lora_rank"], keys["attention.kv_lora_rank"]) == (640, 384)
        assert (keys["expert_gating_func"], keys["expert_weights_norm"], keys["expert_weights_scale"]) == (2, True, 2.5)
        assert keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    upstream, ik = found["llama.cpp"], found["ik_llama.cpp"]
    lens = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    assert [upstream[k] for k in lens] == [1, 384 + 64, 384]
    assert [ik[k] for k in lens] == [2, 128 + 64, 256]
    assert (upstream["attention.key_length_mla"], upstream["attention.value_length_mla"]) == (192, 256)
    assert "attention.key_length_mla" not in ik
    assert (upstream["expert_group_count"], upstream["expert_group_used_count"]) == (4, 2)


def test_k_b_turns_the_very_codes(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """F8_E4M3_B128 of a transposed matrix under square tiles: codes and scales change places, nothing is computed."""
    source = Source(path_of("ue8m0"))
    file = Gguf(convert(source.path, tmp_path / "out.gguf", target="nisparks")[0])
    codes = source.tensors[KVB].data.reshape(2, 128 + 256, 384)
    scales = source.tensors[KVB + "_scale_inv"].data.view("<f4").reshape(2, 3, 3)
    blocks = file.tensors["blk.1.attn_k_b.weight"].data.reshape(2, 384, 129)
    assert np.array_equal(blocks[:, :, 1:], codes[:, :128].transpose(0, 2, 1))
    assert np.array_equal(np.exp2(blocks[:, :, 0] - 127.0), np.repeat(scales[:, 0], 128, axis=1))


@pytest.mark.parametrize("target", ["llama.cpp", "nisparks"])
@pytest.mark.parametrize("name", ["blk.1.attn_k_b.weight", "blk.2.attn_v_b.weight", "blk.2.ffn_up_exps.weight"])
def test_verify_finds_a_changed_byte(
    name: str, target: str, path_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    path = path_of("ue8m0")
    out = convert(path, tmp_path / "out.gguf", target=target)[0]
    tensor = Gguf(out).tensors[name]
    with out.open("r+b") as file:
        file.seek(tensor.offset + tensor.data.size - 3)
        file.write(bytes([tensor.data[-3] ^ 1]))
    run = cli("verify", out, "--against", path)
    assert run.code == 1
    assert [t.name for t in verify(out, path).tensors if t.status == "different"] == [name]


def test_the_mtp_layers_number_comes_from_the_config(path_of: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    plan = plan_convert(path_of("odd"), tmp_path / "out.gguf", target="llama.cpp")
    layers = {re.match(r"model\.layers\.(\d+)\.", name)[1] for name, _ in plan.skipped}  # type: ignore[index]
    assert layers == {"3", "4"}
    assert all("of the 2 MTP blocks" in reason for _, reason in plan.skipped)
    assert not [t for t in plan.tensors if t.name.startswith(("blk.3.", "blk.4."))]
    assert_one_line(cli("convert", path_of("odd"), "--mtp", "--target", "llama.cpp"), "no form for the MTP block")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}),
        ({"beta_fast": None, "beta_slow": None}, {}),
        (
            {"attention_factor": 1.25, "extrapolation_factor": 0.5, "beta_slow": None},
            {"yarn_ext_factor": 0.5, "yarn_attn_factor": 1.25, "yarn_beta_fast": 32.0},
        ),
        (
            {"attn_factor": 1.5, "attention_factor": None},
            {"yarn_attn_factor": 1.5, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0},
        ),
    ],
)
def test_yarn_as_the_config_has_it(
    changes: dict[str, float | None], expected: dict[str, float], editable: Source, tmp_path: Path
) -> None:
    """Keys and their order are those of llama.cpp's converter: what the config leaves to the program stays out."""
    editable.config["rope_scaling"] |= changes
    editable.save()
    keys = Gguf(convert(editable.path, tmp_path / "out.gguf", target="llama.cpp")[0]).kv
    prefix = "deepseek2.rope.scaling."
    found = {k.removeprefix(prefix): v for k, (_, v) in keys.items() if k.startswith(prefix)}
    del found["yarn_log_multiplier"]
    expected = {"type": "yarn", "factor": 40.0, "original_context_length": 4096} | expected
    assert list(found.items()) == list(expected.items())


def test_scales_are_read_for_a_plan_only_where_they_matter(
    path_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a target without the type; for one with it the first scales that are none decide."""
    read: list[str] = []
    own = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or own(self, name))
    plan_convert(path_of("float"), tmp_path / "out.gguf", target="llama.cpp")
    assert not read
    plan = plan_convert(path_of("float"), tmp_path / "out.gguf", target="nisparks")
    assert all(name.endswith("_scale_inv") for name in read)
    assert len(read) <= sum(t.type == "BF16" for t in plan.tensors)
    assert [note for note in plan.notes if "FP8" in note] == [
        "none of the 33 FP8 tensors has scales that are all powers of two; stored as BF16, not as F8_E4M3_B128"
    ]


def test_a_stopped_run_goes_on(path_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = path_of("odd"), tmp_path / "out.gguf"
    whole = convert(path, tmp_path / "whole.gguf", target="llama.cpp")[0].read_bytes()

    class Stop(Exception):
        """Not an error of ours."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert(path, out, target="llama.cpp", threads=1, progress=stop)
    assert not out.exists()
    again: list[object] = []
    own = transforms.apply
    monkeypatch.setattr("ggufx.execute.apply", lambda *args: again.append(args) or own(*args))
    convert(path, out, target="llama.cpp")
    assert out.read_bytes() == whole
    plan = plan_convert(path, tmp_path / "third.gguf", target="llama.cpp")
    assert 0 < len(again) < plan.n_tiles


def as_e8m0(source: Source) -> None:
    """Store the scales that are powers of two in one byte each."""
    for name, tensor in source.tensors.items():
        if name.endswith("_scale_inv") and ".o_proj." not in name:
            exponent = np.frexp(tensor.data.view("<f4"))[1] + 126
            source.put(name, "F8_E8M0", tensor.shape, exponent.astype(np.uint8))
    source.save()


def test_e8m0_scales_as_such(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The same powers of two in one byte each give the same tensors, and none has to be looked at for the plan."""
    shutil.copytree(path_of("ue8m0"), tmp_path / "Copy")
    source = Source(tmp_path / "Copy")
    as_e8m0(source)
    one, other = (
        Gguf(convert(path, tmp_path / f"{path.name}.gguf", target="nisparks")[0]).tensors
        for path in (source.path, path_of("ue8m0"))
    )
    assert {name: t.data.tobytes() for name, t in one.items()} == {n: t.data.tobytes() for n, t in other.items()}
    assert {tensor.status for tensor in verify(tmp_path / "Copy.gguf", source.path).tensors} == {"exact", "rounded"}


# What can be wrong ----------------------------------------------------------------------------------------------


def again(source: Source, name: str) -> None:
    source.put(name, "BF16", (4, 4), np.zeros(16, "<u2"), shard=next(iter(source.shards)))


def _scale(value: float) -> Callable[[Source], None]:
    def damage(source: Source) -> None:
        source.bytes_of(QB + "_scale_inv").view("<f4")[1] = value

    return damage


def _config(**changes: object) -> Callable[[Source], None]:
    return lambda source: source.config.update(changes)


@pytest.mark.parametrize(
    ("damage", "needed"),
    [
        (lambda s: s.drop(QB + "_scale_inv"), [QB, "its scales", "are missing"]),
        (lambda s: s.drop(EXPERT, EXPERT + "_scale_inv"), ["Missing tensors", EXPERT]),
        (lambda s: s.drop("lm_head.weight"), ["Missing tensors", "lm_head.weight"]),
        (
            lambda s: s.put(QB + "_scale_inv", "F32", (3, 4), np.zeros(12, "<f4")),
            [QB, "F32[3, 4]", "F32 or F8_E8M0[3, 5]", "128x128"],
        ),
        (
            lambda s: s.put("model.layers.1.odd.weight", "F32", (4,), np.zeros(4, "<f4"), shard=next(iter(s.shards))),
            ["Can not map tensor 'model.layers.1.odd.weight'"],
        ),
        # 03 would be a second expert 3, which one of them would be lost for.
        (lambda s: again(s, EXPERT.replace(".3.", ".03.")), ["Can not map tensor", "experts.03."]),
        (lambda s: again(s, QB.replace(".1.", ".01.")), ["Can not map tensor", "layers.01."]),
        (lambda s: s.bytes_of(KVB).__setitem__(7, 0x7F), ["E4M3 NaN codes", KVB, "1 "]),
        (_scale(float("inf")), ["1 float32 scales that are not finite", QB + "_scale_inv"]),
        (_scale(float("nan")), ["1 float32 scales that are not finite", QB + "_scale_inv"]),
        (_config(quantization_config={"quant_method": "gptq"}), ["config.json", "'gptq'", "fp8 with [128, 128]"]),
        (
            _config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
            ["config.json", "[64, 64]"],
        ),
        (_config(kv_lora_rank=256), ["has shape", "config.json says", "kv_lora"]),
        (_config(scoring_func="tanh"), ["scoring_func is 'tanh'", "sigmoid"]),
        (_config(n_routed_experts=9), ["config.json"]),
        (_config(n_routed_experts=2**32 - 1), ["n_routed_experts is 4294967295", "tensors in all"]),
        (_config(num_hidden_layers=2**32 - 1), ["num_hidden_layers is 4294967295", "tensors in all"]),
        (_config(first_k_dense_replace=2), ["Can not map tensor 'model.layers.1.mlp."]),
        (_config(scoring_func=["sigmoid"]), ["scoring_func is ['sigmoid']", "softmax"]),
        (_config(rope_scaling={"type": "linear", "factor": 2}), ["rope_scaling", "'linear'", "yarn"]),
        (
            _config(num_hidden_layers=2),
            ["num_hidden_layers is 2", "'model.layers.2.", "layer 2 is no MTP block", "eh_proj", "--skip"],
        ),
    ],
    ids=lambda value: "" if callable(value) else value[0][:30],
)
def test_errors_are_one_line_and_leave_nothing(
    damage: Callable[[Source], object], needed: list[str], editable: Source, cli: Cli, tmp_path: Path
) -> None:
    damage(editable)
    editable.save()
    run = cli("convert", editable.path, "--target", "llama.cpp", "--outfile", tmp_path / "out.gguf")
    assert_one_line(run, *needed)
    assert_nothing_left(tmp_path, partial=True)


def test_other_spellings_of_the_config(editable: Source, tmp_path: Path) -> None:
    """Transformers 5 writes rope_parameters and leaves out what the class says; tied embeddings need no head."""
    expected = plan_convert(editable.path, tmp_path / "a.gguf", target="llama.cpp").metadata
    config = editable.config
    config["rope_parameters"] = config.pop("rope_scaling") | {
        "rope_type": "yarn",
        "rope_theta": config.pop("rope_theta"),
    }
    for key in ("scoring_func", "topk_method"):
        del config[key]
    config["tie_word_embeddings"] = True
    editable.drop("lm_head.weight")
    editable.save()
    plan = plan_convert(editable.path, tmp_path / "b.gguf", target="llama.cpp")
    assert "output.weight" not in {t.name for t in plan.tensors}
    assert list(plan.metadata) == list(expected)
    differing = {key for key, value in plan.metadata.items() if not value.same(expected[key])}
    assert differing <= {"general.size_label", "general.name"}


# Codes and scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "row_len", "phase"), [(256, 256, 0), (300, 200, 100), (1, 1, 127), (130, 129, 1)])
def test_kernel_and_specification_agree(rows: int, row_len: int, phase: int) -> None:
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 256, (rows, row_len), np.uint8)
    scales = rng.integers(0, 2**32, (-(-(phase + rows) // 128), -(-row_len // 128)), np.uint32).view("<f4")
    fast, slow = (decode_scaled(codes, scales, 128, phase, use_kernel=use) for use in (True, False))
    assert fast[1:] == slow[1:]
    assert fast[1] == np.count_nonzero((codes & 0x7F) == 0x7F)
    both_nan = np.isnan(fast[0]) & np.isnan(slow[0])
    assert np.array_equal(fast[0].view(np.uint32)[~both_nan], slow[0].view(np.uint32)[~both_nan])
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    full = np.repeat(np.repeat(scales, 128, 0), 128, 1)[phase : phase + rows, :row_len]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(fast[0], values * full)


def test_every_code_under_many_scales() -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    scales = np.random.default_rng(0).integers(0, 0x7F800000, (64, 2), np.uint32).view("<f4")
    fast, slow = (decode_scaled(codes, scales, 1, use_kernel=use)[0] for use in (True, False))
    number = ~np.isnan(slow)
    assert np.array_equal(np.isnan(fast), ~number)
    assert np.array_equal(fast.view(np.uint32)[number], slow.view(np.uint32)[number])


def test_every_e8m0_scale_is_found_again() -> None:
    powers = np.exp2(np.arange(-127, 128, dtype=np.float64)).astype("<f4")
    found, bad = exponents(powers)
    assert bad == 0
    assert np.array_equal(found, np.arange(255))
    others = np.array([0, -1, 3, np.inf, np.nan, 2.0**-128, 1.0000001], np.float64).astype("<f4")
    assert exponents(others)[1] == others.size


def test_the_plan_as_json(path_of: Callable[[str], Path], cli: Cli) -> None:
    run = cli("convert", path_of("ue8m0"), "--target", "nisparks", "--dry-run", "--json")
    plan = json.loads(run.out)
    by_name = {tensor["name"]: tensor for tensor in plan["tensors"]}
    assert by_name["blk.1.attn_k_b.weight"]["sources"] == [KVB, KVB + "_scale_inv"]
    assert by_name["blk.1.attn_k_b.weight"]["lossless"]
    assert not by_name["blk.1.attn_output.weight"]["lossless"]
    assert "attn_output.weight of 3 layers" in " ".join(plan["notes"])


@pytest.mark.parametrize("target", ["llama.cpp", "ik_llama.cpp"])
def test_quantize_from_the_checkpoint(target: str, path_of: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    """The turned keys, the values and the experts are what the type's encoder makes of the very values."""
    path, out = path_of("float"), tmp_path / "out.gguf"
    run = cli("quantize", path, "q8_0", "--custom-q", "attn_k_b=q4_0", "--target", target, "--outfile", out)
    assert run.code == 0, run
    expected = wanted(Source(path), target)
    with ggufx.open(out) as file:
        assert set(file) == set(expected)
        for name, kind in (
            ("blk.1.attn_k_b.weight", "Q4_0"),
            ("blk.2.attn_v_b.weight", "Q8_0"),
            ("blk.1.ffn_up_exps.weight", "Q8_0"),
        ):
            tensor, codec = file[name], ggufx.types.get(kind)
            values = np.ascontiguousarray(expected[name])
            assert (tensor.type, tensor.shape) == (kind, values.shape)
            assert np.array_equal(tensor.numpy(), codec.decode(codec.encode(values), values.shape))


@pytest.mark.parametrize("heads", ["each", "all"])
@pytest.mark.parametrize("target", ["llama.cpp", "ik_llama.cpp"])
@pytest.mark.parametrize("given", ["checkpoint", "gguf"])
def test_importance_of_latent_projections(
    given: str, target: str, heads: str, path_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    """llama-imatrix records a row of weights for every head of k_b and v_b; ik_llama.cpp's files have heads in one matrix."""
    path, out = path_of("float"), tmp_path / "out.gguf"
    rng = np.random.default_rng(5)
    weights = {
        f"blk.{layer}.attn_{letter}_b.weight": rng.uniform(0.1, 9, (2 if heads == "each" else 1, length)).astype("<f4")
        for layer in range(3)
        for letter, length in (("k", 128), ("v", 384))
    }
    raw = struct.pack("<i", len(weights))
    for name, values in weights.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, values.size) + values.tobytes()
    (tmp_path / "imatrix.dat").write_bytes(raw)
    source = path
    if given == "gguf":
        (source,) = convert(path, tmp_path / "f32.gguf", target=target, dense="f32")
    rules = "attn_[kv]_b\\.weight=q4_0"
    run = cli("quantize", source, "--custom-q", rules, "--imatrix", tmp_path / "imatrix.dat", "--target", target,
              "--outfile", out)  # fmt: skip
    assert run.code == 0, run.err
    expected, codec = wanted(Source(path), target), ggufx.types.get("Q4_0")
    with ggufx.open(out) as file:
        for name, rows in weights.items():
            values = np.ascontiguousarray(expected[name]).reshape(2, -1, rows.shape[-1])
            packed = np.stack([codec.encode(values[head], rows[head % len(rows)]) for head in range(2)])
            assert file[name].type == "Q4_0"
            assert np.array_equal(file[name].packed.reshape(packed.shape), packed), name
            assert not np.array_equal(packed, np.stack([codec.encode(values[head]) for head in range(2)]))


def test_importance_by_head_of_a_file_without_their_number(
    path_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    (file,) = convert(path_of("float"), tmp_path / "f32.gguf", target="ik_llama.cpp", dense="f32")
    assert cli("set", file, "--remove", "deepseek2.attention.head_count").code == 0
    name, values = b"blk.1.attn_k_b.weight", np.ones(256, "<f4")
    raw = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, values.size) + values.tobytes()
    (tmp_path / "imatrix.dat").write_bytes(raw)
    arguments = ("--custom-q", "attn_k_b=q4_0", "--imatrix", tmp_path / "imatrix.dat", "--outfile", tmp_path / "o.gguf")
    run = cli("quantize", file, *arguments)
    assert run.code == 1
    assert "has weights of 2 heads for blk.1.attn_k_b.weight, whose file does not say" in run.err
    assert not (tmp_path / "o.gguf").exists()


def test_routing_by_groups_that_a_program_has_not_is_told(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    groups = json.loads((path_of("float") / "config.json").read_text())["n_group"]
    assert groups > 1
    for target, told in (("llama.cpp", False), ("ik_llama.cpp", True)):
        notes = plan_convert(path_of("float"), tmp_path / "o.gguf", target=target).notes
        assert any(f"does not route by groups of experts (n_group is {groups})" in note for note in notes) is told


def test_ik_llama_cpps_form_is_no_others(path_of: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    """Moving or quantizing a GGUF does not turn one form of latent attention into the other: it says so."""
    files = {t: convert(path_of("float"), tmp_path / f"{t}.gguf", target=t)[0] for t in ("llama.cpp", "ik_llama.cpp")}
    for own, target, told in (
        ("ik_llama.cpp", "llama.cpp", True), ("ik_llama.cpp", "nisparks", True), ("ik_llama.cpp", "ik_llama.cpp", False),
        ("llama.cpp", "ik_llama.cpp", False), ("llama.cpp", "llama.cpp", False),
    ):  # fmt: skip
        for command in (["retarget", files[own]], ["quantize", files[own], "q8_0"]):
            run = cli(*command, "--target", target, "--dry-run", "--outfile", tmp_path / "o.gguf")
            assert run.code == 0, run.err
            found = f"programs for {target} do not load that" in run.out + run.err
            assert found == told, (command, target)


def test_a_pointer_in_a_shards_place(path_of: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    """A clone without git-lfs has these: the words that help, not a header of 2336927755350992246 bytes."""
    shutil.copytree(path_of("float"), tmp_path / "Copy")
    shard = sorted((tmp_path / "Copy").glob("*.safetensors"))[1]
    shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4302317817\n")
    assert_one_line(cli("convert", tmp_path / "Copy"), shard.name, "git lfs pull")


def test_a_tokenizer_of_another_kind_is_noted(editable: Source, tmp_path: Path) -> None:
    """Line ends may be spelled out or not; other expressions are another way to split text."""

    def noted() -> bool:
        notes = plan_convert(editable.path, tmp_path / "o.gguf", target="llama.cpp").notes
        return any("does not split text as deepseek-v3" in note for note in notes)

    path = editable.path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    stages = tokenizer["pre_tokenizer"]["pretokenizers"]
    assert not noted()
    expression = stages[2]["pattern"]["Regex"]
    assert r"[\r\n]" in expression
    stages[2]["pattern"]["Regex"] = expression.replace(r"\r", "\r").replace(r"\n", "\n")
    path.write_text(json.dumps(tokenizer))
    assert not noted()
    stages[0]["pattern"]["Regex"] = r"\p{N}"
    path.write_text(json.dumps(tokenizer))
    assert noted()
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel"}
    path.write_text(json.dumps(tokenizer))
    assert noted()


@pytest.mark.parametrize("scales", ["float32", "e8m0"])
@pytest.mark.parametrize("case", ["ue8m0", "odd-heads-ue8m0", "odd-ue8m0"])
def test_quantize_packs_fp8_natively(
    case: str, scales: str, path_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    """F8_E4M3_B128 asked for: the checkpoint's codes under power-of-two scales; the rest is rounded, which is told."""
    shutil.copytree(path_of(case), tmp_path / "Copy")
    source, out = Source(tmp_path / "Copy"), tmp_path / "out.gguf"
    if scales == "e8m0":
        as_e8m0(source)
    run = cli("quantize", source.path, "f8_e4m3_b128", "--target", "nisparks", "--outfile", out)
    assert run.code == 0, run.err
    found, expected = Gguf(out).tensors, wanted(Source(path_of(case)), "nisparks")
    assert set(found) == set(expected)
    checkpoint = Source(path_of(case)).tensors
    rounded = set()
    for name, values in expected.items():
        if found[name].type != "F8_E4M3_B128":
            assert found[name].type == "F32" or values.shape[-1] % 128, name
            continue
        # The code of a value under a scale that is a power of two is that of the checkpoint, zeros and all.
        if not np.array_equal(found[name].decode(), values):
            rounded.add(name.split(".")[-2])
            assert np.square(found[name].decode() - values).mean() < 0.04**2 * np.square(values).mean(), name
    turned = {"attn_k_b"} if case == "odd-heads-ue8m0" else set()
    assert rounded - turned == {"attn_output", "token_embd", "output"}
    codes = checkpoint[QB].data.reshape(checkpoint[QB].shape)
    blocks = found["blk.1.attn_q_b.weight"].data.reshape(codes.shape[0], -1, 129)
    assert np.array_equal(blocks[:, :, 1:].reshape(codes.shape), codes)
    assert f"(and {5 if turned else 2} more): its FP8 scales are not one power of two for each block of 128" in run.err
    proof = cli("verify", out, "--against", source.path)
    assert proof.code == 0, proof.out


@pytest.mark.parametrize("target", ["llama.cpp", "nisparks"])
def test_native_in_a_recipe_tells_what_is_rounded(
    target: str, path_of: Callable[[str], Path], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with float32 scales are no BF16 numbers; scales that were read are read once."""
    read: list[str] = []
    own = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or own(self, name))
    arguments = ["native", "--target", target, "--dry-run"]
    run = cli("quantize", path_of("float"), *arguments)
    assert run.code == 0, run.err
    if target == "llama.cpp":
        assert (
            "33 FP8 tensors (first blk.0.ffn_down.weight) have scales that need not be powers of two; their products are "
            "rounded to BF16" in (run.out + run.err)
        )
        assert not read
    else:
        assert "none of the 33 FP8 tensors has scales that are all powers of two; stored as BF16" in run.out + run.err
    assert len(read) == len(set(read))
    run = cli("quantize", path_of("ue8m0"), *arguments)
    assert "attn_output.weight of 3 layers (first blk.0.attn_output.weight)" in run.out + run.err
    run = cli("quantize", path_of("bf16"), *arguments)
    assert "rounded" not in run.out + run.err
    assert "none of" not in run.out + run.err


def test_notes_of_many_layers_are_one(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Scales in one byte count as powers of two, too."""
    shutil.copytree(path_of("odd-heads-ue8m0"), tmp_path / "Copy")
    source = Source(tmp_path / "Copy")
    as_e8m0(source)
    notes = [
        note for note in plan_convert(source.path, tmp_path / "o.gguf", target="nisparks").notes if "scales" in note
    ]
    assert len(notes) == 2
    assert notes[0].startswith("attn_output.weight of 3 layers (first blk.0.attn_output.weight): not all FP8 scales")
    assert notes[1].startswith("attn_k_b.weight of 3 layers (first blk.0.attn_k_b.weight): tiles of 128x128")


@pytest.mark.parametrize("target", ["llama.cpp", "ik_llama.cpp"])
def test_mixes_choose_for_a_checkpoint_as_for_its_gguf(
    target: str, path_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = path_of("float"), tmp_path / "out.gguf"
    convert(source, out, target=target)
    for mix in ("q4_k_m", "q3_k_l", "q2_k_s"):
        of_both = [quantize.prepare(path, default=mix, target=target).choices for path in (source, out)]
        ours, theirs = ({choice.source.name: choice.type for choice in choices} for choices in of_both)
        assert ours == theirs
        assert ours["output.weight"] == "Q6_K"


# Scales of 16 bits ------------------------------------------------------------------------------------------------


def as_halves(source: Source, dtype: str) -> None:
    """Store every scale in 16 bits; BF16's are powers of two but for the output projections', as V3.1's float32 ones."""
    kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}[dtype]
    for name, tensor in source.tensors.items():
        if name.endswith("_scale_inv"):
            scales = tensor.data.view("<f4").astype(np.float32)
            if dtype == "BF16" and "o_proj" not in name:
                scales = np.exp2(np.round(np.log2(scales)))
            source.put(name, dtype, tensor.shape, scales.astype(kind))
    source.save()


@pytest.mark.parametrize(("dtype", "target"), [("BF16", "llama.cpp"), ("F16", "llama.cpp"), ("BF16", "nisparks")])
def test_scales_of_16_bits(dtype: str, target: str, editable: Source, cli: Cli, tmp_path: Path) -> None:
    """They are exact in float32, and so is the product: the values are those of the same scales in float32."""
    as_halves(editable, dtype)
    out = tmp_path / "out.gguf"
    run = cli("convert", editable.path, "--target", target, "--dense", "f32", "--outfile", out)
    assert run.code == 0, run.err
    types = check(editable, Gguf(out), target)
    assert types["blk.0.attn_output.weight"] == "F32"
    assert types["blk.0.attn_q_a.weight"] == ("F8_E4M3_B128" if target == "nisparks" else "F32")
    assert cli("verify", out, "--against", editable.path).code == 0
    assert cli("quantize", editable.path, tmp_path / "q.gguf", "q8_0", "--target", target).code == 0
    # A hybrid holds the scales as they are.
    paths = ("--safetensor-path", editable.path, "--gguf-path", out, "--output-path", tmp_path / "hybrid")
    run = cli("merge", *paths)
    assert run.code == 0, run.err
    with open_hybrid(tmp_path / "hybrid") as hybrid:
        found = hybrid["blk.0.attn_output.weight"]
        wanted_values = decode(editable, "model.layers.0.self_attn.o_proj.weight")
        assert np.array_equal(found.numpy().view(np.uint32), wanted_values.view(np.uint32))
        assert np.array_equal(found[5:9, 3:7], wanted_values[5:9, 3:7])
    assert cli("verify", tmp_path / "hybrid", "--against", editable.path).code == 0
