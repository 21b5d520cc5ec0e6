"""Conversions of tiny checkpoints: every value, code, name and key against independent readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ggufx
from ggufx import chat_templates, transforms
from ggufx.convert import convert, plan_convert
from ggufx.errors import PlanError
from ggufx.retarget import retarget
from ggufx.types.codec import Codec

from .conftest import CASES, Run, assert_one_line
from .oracle import FIXTURES, Expected, Gguf, Source, expected_of, values_of

Get = Callable[[str], Source]
Converted = Callable[..., Gguf]
Cli = Callable[..., Run]

VARIANTS = sorted(set(CASES) - {"mini", "long"})


def check(source: Source, file: Gguf, target: str, *, dense: str = "Q8_0", mtp: bool = False) -> list[Expected]:
    """Names, order, shapes and types as map.tsv says; every value as the checkpoint has it."""
    rules = expected_of(source, target, dense=dense, mtp=mtp)
    found = [(t.name, t.shape, t.type) for t in file.tensors.values()]
    assert found == [(rule.name, rule.shape, rule.type) for rule in rules]
    for rule in rules:
        tensor = file.tensors[rule.name]
        wanted = values_of(source, rule)
        if tensor.type == "Q8_0":
            encoded = gguf.quants.quantize(np.ascontiguousarray(wanted, np.float32), gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(tensor.data, encoded.reshape(-1)), rule.name
        else:
            # Equal values: MXFP4 has no minus zero once decoded, everything else is equal to the bit.
            np.testing.assert_array_equal(tensor.decode(), wanted, err_msg=rule.name)
        if tensor.type in ("BF16", "F32"):
            assert np.array_equal(tensor.decode().view(np.uint32), wanted.view(np.uint32)), rule.name
    return rules


# Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIANTS)
def test_native_values_names_types_and_order(case: str, source: Get, converted: Converted) -> None:
    rules = check(source(case), converted(case), "nisparks")
    kinds = {rule.type for rule in rules}
    assert ("MXFP4" in kinds) == (case != "flash-base")
    assert "F8_E4M3_B128" in kinds


@pytest.mark.parametrize("case", ["flash", "flash-base", "odd-96"])
@pytest.mark.parametrize("dense", ["q8_0", "bf16", "f32"])
def test_llama_cpp_values_names_types_and_order(case: str, dense: str, source: Get, converted: Converted) -> None:
    check(source(case), converted(case, "llama.cpp", dense), "llama.cpp", dense=dense.upper())


def test_ik_llama_cpp_gets_what_llama_cpp_gets(converted: Converted) -> None:
    ours, theirs = converted("flash", "ik_llama.cpp"), converted("flash", "llama.cpp")
    assert ours.raw == theirs.raw


@pytest.mark.parametrize("case", ["flash", "odd-160"])
def test_native_codes_are_the_checkpoints_own(case: str, source: Get, converted: Converted) -> None:
    """Byte for byte, by index arithmetic on the formats alone."""
    checkpoint, file = source(case), converted(case)
    for rule in expected_of(checkpoint, "nisparks"):
        blocks = file.tensors[rule.name].data
        stored = [checkpoint.tensors[name] for name in rule.sources]
        if rule.type == "F8_E4M3_B128":
            rows, width = rule.shape
            blocks = blocks.reshape(rows, width // 128, 129)
            assert np.array_equal(blocks[:, :, 1:].reshape(rows, width), stored[0].data.reshape(rows, width))
            scale = checkpoint.tensors[checkpoint.scale_of(rule.sources[0])]
            for row in range(rows):
                assert np.array_equal(blocks[row, :, 0], scale.data.reshape(scale.shape)[row // 128])
        elif rule.type == "MXFP4":
            count, rows, width = rule.shape
            blocks = blocks.reshape(count, rows, width // 32, 17)
            for expert, name in enumerate(rule.sources):
                pairs = stored[expert].data.reshape(rows, width // 32, 16)
                codes = np.empty((rows, width // 32, 32), np.uint8)
                codes[..., 0::2], codes[..., 1::2] = pairs & 15, pairs >> 4
                assert np.array_equal(blocks[expert, :, :, 1:] & 15, codes[..., :16])
                assert np.array_equal(blocks[expert, :, :, 1:] >> 4, codes[..., 16:])
                scale = checkpoint.tensors[checkpoint.scale_of(name)]
                assert np.array_equal(blocks[expert, :, :, 0], scale.data.reshape(scale.shape))


def test_the_two_nibble_orders_are_told_apart(source: Get, converted: Converted) -> None:
    """The wrong order has the same statistics and nearly every value elsewhere."""
    checkpoint, file = source("flash"), converted("flash")
    rule = next(r for r in expected_of(checkpoint, "nisparks") if r.type == "MXFP4")
    right, wrong = values_of(checkpoint, rule), values_of(checkpoint, rule, high_first=True)
    found = file.tensors[rule.name].decode()
    assert np.array_equal(found, right)
    assert np.array_equal(np.sort(found, axis=None), np.sort(wrong, axis=None))
    assert np.mean(found != wrong) > 0.7


@pytest.mark.parametrize("dense", ["q8_0", "bf16"])
def test_gguf_reads_the_llama_cpp_file(dense: str, source: Get, converted: Converted) -> None:
    checkpoint, file = source("flash"), converted("flash", "llama.cpp", dense)
    reader = gguf.GGUFReader(file.path)
    rules = expected_of(checkpoint, "llama.cpp", dense=dense.upper())
    assert [t.name for t in reader.tensors] == [rule.name for rule in rules]
    for tensor, rule in zip(reader.tensors, rules, strict=True):
        assert tuple(reversed(tensor.shape.tolist())) == rule.shape
        assert tensor.tensor_type.name == rule.type
        wanted = values_of(checkpoint, rule)
        if rule.type == "I32":
            assert np.array_equal(tensor.data, wanted)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(rule.shape)
        if rule.type == "Q8_0":
            assert np.abs(values - wanted).max() <= np.abs(wanted).max() / 127
        else:
            np.testing.assert_array_equal(values, wanted, err_msg=rule.name)
    assert set(reader.fields) >= set(file.kv)


def test_ggufx_reads_what_it_wrote(source: Get, converted: Converted) -> None:
    checkpoint = source("flash")
    with ggufx.open(converted("flash").path) as file:
        assert file.dialect == "nisparks"
        for rule in expected_of(checkpoint, "nisparks"):
            np.testing.assert_array_equal(file[rule.name].numpy(), values_of(checkpoint, rule), err_msg=rule.name)


def test_no_float_on_the_native_route(
    checkpoint_path: Callable[[str], Path], converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a float on the native route")

    monkeypatch.setattr(Codec, "decode", forbidden)
    monkeypatch.setattr(Codec, "encode", forbidden)
    monkeypatch.setattr(transforms, "_encode", forbidden)
    monkeypatch.setattr(transforms, "decode_source", forbidden)
    convert(checkpoint_path("flash"), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == converted("flash").raw
    with pytest.raises(AssertionError, match="a float"):
        convert(checkpoint_path("flash"), tmp_path / "q8.gguf", target="llama.cpp")


def test_expert_dtype_is_taken_from_the_tensors(source: Get, converted: Converted) -> None:
    assert "expert_dtype" not in source("no-expert-dtype").config
    flash, without = converted("flash"), converted("no-expert-dtype")
    assert flash.raw[flash.data_offset :] == without.raw[without.data_offset :]


def test_one_unnumbered_shard_without_an_index(source: Get, converted: Converted) -> None:
    assert list(source("one-file").shards) == ["model.safetensors"]
    assert converted("one-file").kv["tokenizer.ggml.merges"] == converted("flash").kv["tokenizer.ggml.merges"]


def test_rows_that_fp8_blocks_do_not_divide_become_bf16_and_it_is_said(
    checkpoint_path: Callable[[str], Path], converted: Converted
) -> None:
    plan = plan_convert(checkpoint_path("odd-96"), "out.gguf")
    bf16 = [t.name for t in plan.tensors if t.transform.kind == "FP8" and t.type == "BF16"]
    assert bf16 == [f"blk.{layer}.ffn_down_shexp.weight" for layer in range(5)]
    for name in bf16:
        assert any(name in note and "not divisible by 128" in note and "exact" in note for note in plan.notes)
        assert converted("odd-96").tensors[name].type == "BF16"
    assert all(t.lossless for t in plan.tensors)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    knobs=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "variant": st.sampled_from(["flash", "flash-base", "pro-like"]),
            "layers": st.integers(2, 5),
            "hash_layers": st.integers(0, 2),
            "mtp_layers": st.integers(0, 1),
            "hidden": st.sampled_from([64, 128, 192, 256]),
            "moe": st.integers(1, 6).map(lambda n: 32 * n),
            "experts": st.integers(6, 9),
            "heads": st.sampled_from([2, 4]),
            "head_dim": st.sampled_from([64, 96, 128]),
            "q_lora": st.sampled_from([32, 64, 128, 160]),
            "o_groups": st.sampled_from([1, 2]),
            "o_lora": st.sampled_from([48, 128]),
            "index_heads": st.integers(1, 3),
            "merges": st.just(20),
        }
    ),
    target=st.sampled_from(["nisparks", "llama.cpp"]),
    dense=st.sampled_from(["q8_0", "bf16"]),
)
def test_any_shape(tmp_path: Path, knobs: dict[str, object], target: str, dense: str) -> None:
    from make_tiny_v4 import make_tiny_v4

    path = tmp_path / "random"
    shutil.rmtree(path, ignore_errors=True)
    make_tiny_v4(path, **knobs)
    convert(path, path / "out.gguf", target=target, dense=None if target == "nisparks" else dense)
    source = Source(path)
    check(source, Gguf(path / "out.gguf"), target, dense=dense.upper())
    if target == "llama.cpp" and knobs["mtp_layers"] == 1:
        convert(path, path / "mtp.gguf", target=target, dense=dense, mtp=True)
        check_mtp(source, Gguf(path / "mtp.gguf"), dense.upper())


# The MTP block ----------------------------------------------------------------------------------------------------


def check_mtp(source: Source, file: Gguf, dense: str) -> None:
    rules = {rule.name: rule for rule in expected_of(source, "llama.cpp", dense=dense, mtp=True)}
    assert set(file.tensors) == set(rules)
    for name, rule in rules.items():
        tensor = file.tensors[name]
        assert (tensor.shape, tensor.type) == (rule.shape, rule.type), name
        if tensor.type != "Q8_0":
            np.testing.assert_array_equal(tensor.decode(), values_of(source, rule), err_msg=name)


@pytest.mark.parametrize("dense", ["q8_0", "bf16"])
def test_mtp_file(dense: str, source: Get, converted: Converted) -> None:
    checkpoint, file = source("flash"), converted("flash", "llama.cpp", dense, mtp=True)
    check_mtp(checkpoint, file, dense.upper())
    layers = checkpoint.config["num_hidden_layers"]
    joined = file.tensors[f"blk.{layers}.nextn.eh_proj.weight"]
    e, h = (checkpoint.decode(f"mtp.0.{which}_proj.weight") for which in "eh")
    width = e.shape[1]
    values = joined.decode()
    tolerance = {"q8_0": np.abs(e).max() / 127, "bf16": 0}[dense]
    assert np.abs(values[:, :width] - e).max() <= tolerance
    assert np.abs(values[:, width:] - h).max() <= tolerance
    assert file.kv["deepseek4.block_count"] == (4, layers + 1)
    assert file.kv["deepseek4.nextn_predict_layers"] == (4, 1)
    assert np.array_equal(file.tensors["output_hc_fn.weight"].decode(), checkpoint.decode("mtp.0.hc_head_fn"))


def test_mtp_main_model_tensors_are_named_as_skipped(checkpoint_path: Callable[[str], Path], source: Get) -> None:
    plan = plan_convert(checkpoint_path("flash"), "x.gguf", target="llama.cpp", mtp=True)
    used = [name for t in plan.tensors for name in t.sources]
    assert {name for name in used if not name.startswith("mtp.")} == {"embed.weight", "head.weight", "norm.weight"}
    assert sorted(used + [name for name, _ in plan.skipped]) == sorted(source("flash").tensors)


def test_mtp_is_refused_for_nisparks(checkpoint_path: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no form for the MTP block.*target llama\.cpp"):
        plan_convert(checkpoint_path("mini"), tmp_path / "o.gguf", mtp=True)


# What is left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_used_and_skipped_are_all(editable: Source, target: str, tmp_path: Path) -> None:
    """Tensors of other releases, a router bias that a hash layer does not use, and what the user names."""
    extra = np.zeros(4, "<f4")
    for name in (
        "vision.blocks.0.attn.weight", "aligner.w", "image_newline", "layers.1.ffn.gate.bias_vl",
        "mtp.0.main_norm.weight", "layers.0.ffn.gate.bias", "my.own.tensor",
    ):  # fmt: skip
        editable.put(name, "F32", (4,), extra, shard="model-00002-of-00006.safetensors")
    editable.put("norm.scale", "F8_E8M0", (1,), np.zeros(1, np.uint8), shard="model-00002-of-00006.safetensors")
    editable.save()
    plan = plan_convert(editable.path, tmp_path / "o.gguf", target=target, skip=["my.*"])
    used = [name for t in plan.tensors for name in t.sources]
    skipped = dict(plan.skipped)
    assert len(skipped) == len(plan.skipped)
    assert all(skipped.values())
    assert sorted([*used, *skipped]) == sorted(editable.tensors)
    assert skipped["my.own.tensor"] == "left out by --skip"
    assert "hash" in skipped["layers.0.ffn.gate.bias"]
    assert "vision" in skipped["image_newline"]


def test_skipping_a_weight_skips_its_scales(editable: Source, tmp_path: Path) -> None:
    plan = plan_convert(editable.path, tmp_path / "o.gguf", skip=["layers.1.attn.wkv.weight"])
    skipped = dict(plan.skipped)
    assert {"layers.1.attn.wkv.weight", "layers.1.attn.wkv.scale"} <= skipped.keys()
    assert "blk.1.attn_kv_latent.weight" not in [t.name for t in plan.tensors]


# Metadata -------------------------------------------------------------------------------------------------------


def nisparks_keys() -> list[str]:
    lines = [line.split("\t") for line in (FIXTURES / "kv_keys.tsv").read_text(encoding="utf-8").splitlines()]
    index = lines[0].index("nisparks_idx")
    numbered = [(int(line[index]), line[0]) for line in lines[1:] if line[index] != "-"]
    return [key for _, key in sorted(numbered)]


@pytest.mark.parametrize("case", VARIANTS)
def test_the_default_file_has_exactly_the_dialects_keys(case: str, source: Get, converted: Converted) -> None:
    file, config = converted(case), source(case).config
    assert list(file.kv) == nisparks_keys()
    prefix = "deepseek4."
    for key, name in {
        "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "expert_count": "n_routed_experts",
        "expert_feed_forward_length": "moe_intermediate_size", "vocab_size": "vocab_size",
        "attention.key_length": "head_dim", "attention.q_lora_rank": "q_lora_rank",
        "attention.indexer.head_count": "index_n_heads", "expert_used_count": "num_experts_per_tok",
    }.items():  # fmt: skip
        assert file.kv[prefix + key] == (4, config[name]), key
    assert file.kv["general.file_type"] == (4, 41)
    assert file.kv[prefix + "expert_weights_scale"] == (6, np.float32(config["routed_scaling_factor"]))
    assert file.kv[prefix + "swiglu_clamp_exp"] == (9, (6, [10.0] * config["num_hidden_layers"]))


def test_without_rope_scaling_the_file_says_so(editable: Source, tmp_path: Path) -> None:
    """Readers of nisparks files without the key suppose YaRN: the published file of 45 keys needs it."""
    del editable.config["rope_scaling"]
    editable.save()
    convert(editable.path, tmp_path / "o.gguf")
    found = Gguf(tmp_path / "o.gguf").kv
    assert [key for key in found if ".rope.scaling." in key] == ["deepseek4.rope.scaling.type"]
    assert found["deepseek4.rope.scaling.type"] == (8, "none")
    assert set(found) == {key for key in nisparks_keys() if ".rope.scaling." not in key} | {
        "deepseek4.rope.scaling.type"
    }
    convert(editable.path, tmp_path / "l.gguf", target="llama.cpp", dense="bf16")
    assert not [key for key in Gguf(tmp_path / "l.gguf").kv if ".rope.scaling." in key]
    # And moved there and back nothing is supposed.
    retarget(tmp_path / "o.gguf", tmp_path / "m.gguf", "llama.cpp")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "l.gguf").read_bytes()
    retarget(tmp_path / "m.gguf", tmp_path / "b.gguf", "nisparks")
    assert {k: v for k, v in Gguf(tmp_path / "b.gguf").kv.items() if found[k] != v} == {"general.file_type": (4, 38)}


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_stamp_adds_two_keys(target: str, cli: Cli, checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("stamped", ["--stamp"])):
        run = cli(
            "convert", checkpoint_path("mini"), "--outfile", tmp_path / f"{name}.gguf", "--target", target, *flags
        )
        assert run.code == 0, run.err
    plain, stamped = Gguf(tmp_path / "plain.gguf"), Gguf(tmp_path / "stamped.gguf")
    assert {k: v for k, v in stamped.kv.items() if k in plain.kv} == plain.kv
    assert {k: v for k, v in stamped.kv.items() if k not in plain.kv} == {
        "ggufx.version": (8, ggufx.__version__),
        "ggufx.dialect": (8, target),
    }


def test_model_name_and_ftype_in_the_name(cli: Cli, checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    run = cli(
        "convert",
        checkpoint_path("mini"),
        "--outfile",
        tmp_path / "m-{ftype}-{FTYPE}.gguf",
        "--model-name",
        "My [b]Model",
    )
    assert run.code == 0, run.err
    (path,) = tmp_path.glob("*.gguf")
    assert path.name == "m-f8_e4m3_mxfp4-F8_E4M3_MXFP4.gguf"
    assert Gguf(path).kv["general.name"] == (8, "My [b]Model")
    assert str(path) in run.out


@pytest.mark.parametrize("ending", ["", "/", "/new/"])
def test_a_directory_gets_a_name_by_the_convention(
    ending: str, cli: Cli, checkpoint_path: Callable[[str], Path], tmp_path: Path
) -> None:
    run = cli("convert", checkpoint_path("mini"), "--outfile", f"{tmp_path}{ending}")
    assert run.code == 0, run.err
    (path,) = tmp_path.rglob("*.gguf")
    file = Gguf(path)
    label = file.kv["general.size_label"][1]
    assert path.name.startswith("Tiny")
    assert path.name.endswith("F8_E4M3_MXFP4.gguf")
    assert label in path.name


def test_mtp_files_have_a_name_of_their_own(checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    main = plan_convert(checkpoint_path("mini"), tmp_path, target="llama.cpp")
    mtp = plan_convert(checkpoint_path("mini"), tmp_path, target="llama.cpp", mtp=True)
    assert mtp.files[0].path.name.startswith("mtp-")
    assert main.files[0].path != mtp.files[0].path


TEMPLATE = "{% for m in messages %}{{ m['content'] }}｜{% endfor %}\n"


def test_chat_template_from_a_file_wins(cli: Cli, editable: Source, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE, encoding="utf-8")
    (editable.path / "chat_template.jinja").write_text("other", encoding="utf-8")
    run = cli(
        "convert", editable.path, "--outfile", tmp_path / "o.gguf", "--chat-template-file", tmp_path / "t.jinja"
    )  # fmt: skip
    assert run.code == 0, run.err
    assert Gguf(tmp_path / "o.gguf").kv["tokenizer.chat_template"] == (8, TEMPLATE)


def with_tokenizer_config(checkpoint: Source, **values: object) -> None:
    path = checkpoint.path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_chat_template_of_the_checkpoint(place: str, target: str, editable: Source, tmp_path: Path) -> None:
    if place == "chat_template.jinja":
        (editable.path / place).write_bytes(TEMPLATE.replace("\n", "\r\n").encode())
    elif place == "chat_template.json":
        (editable.path / place).write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    else:
        with_tokenizer_config(editable, chat_template=TEMPLATE)
    plan = plan_convert(editable.path, tmp_path / "o.gguf", target=target)
    assert plan.metadata["tokenizer.chat_template"].data == TEMPLATE
    assert not any("chat template" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("name", "code", "release"),
    [
        ("DeepSeek-V4-Flash", None, "preview"),
        ("DeepSeek-V4-Flash-0731", None, "0731"),
        ("DeepSeek-V4-Flash-0731", 'REASONING_EFFORT_MAX = "Absolute maximum"', "preview"),
        ("Mine", '"max": "Reasoning Effort: Beyond maximum — exhaustive"', "0731"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_the_releases_own_template_is_written_where_there_is_none(
    name: str, code: str | None, release: chat_templates.Release, empty: bool, editable: Source, tmp_path: Path
) -> None:
    folder = editable.path.rename(tmp_path / name)
    if code is not None:
        (folder / "encoding").mkdir()
        (folder / "encoding" / "encoding_dsv4.py").write_text(code, encoding="utf-8")
    if empty:
        (folder / "chat_template.jinja").write_text("")
    plan = plan_convert(folder, tmp_path / "o.gguf")
    assert plan.metadata["tokenizer.chat_template"].data == chat_templates.deepseek_v4(release)
    assert any(f"DeepSeek-V4's {release} release" in note for note in plan.notes)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates"])
@pytest.mark.parametrize("default", [True, False])
def test_named_chat_templates(place: str, default: bool, editable: Source, tmp_path: Path) -> None:
    if place == "tokenizer_config.json":
        named = [
            {"name": "tool_use", "template": "tools"},
            {"name": "rag-2", "template": "r"},
            {"name": "x", "template": ""},
        ]
        if default:
            named.insert(1, {"name": "default", "template": TEMPLATE})
        with_tokenizer_config(editable, chat_template=named)
    else:
        folder = editable.path / place
        folder.mkdir()
        for name, text in (("tool_use", "tools"), ("rag-2", "r"), ("x", "")):
            (folder / f"{name}.jinja").write_text(text)
        (editable.path / "chat_template.jinja").write_text(TEMPLATE if default else "")
    convert(editable.path, tmp_path / "o.gguf", target="llama.cpp")
    keys = Gguf(tmp_path / "o.gguf").kv
    assert keys["tokenizer.chat_template.tool_use"] == (8, "tools")
    assert keys["tokenizer.chat_template.rag_2"] == (8, "r")
    assert "tokenizer.chat_template.x" not in keys
    assert keys["tokenizer.chat_templates"] == (9, (8, ["rag_2", "tool_use"]))
    expected = TEMPLATE if default else chat_templates.deepseek_v4("preview")
    assert keys["tokenizer.chat_template"] == (8, expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [([1], "chat_template is [1]"), ({"a": "b"}, "expected a text"), ([{"name": "default"}], "template is missing"),
     ([{"name": 1, "template": "x"}], "name is 1"), (7, "chat_template is 7")],
)  # fmt: skip
def test_a_chat_template_of_another_kind_is_one_error(value: object, words: str, editable: Source, cli: Cli) -> None:
    with_tokenizer_config(editable, chat_template=value)
    assert_one_line(cli("convert", editable.path, "--dry-run"), "tokenizer_config.json", words)


# Ids as the tokenizers library 0.23.3 gave them to these very files.
@pytest.mark.parametrize(
    ("vocab", "added", "ids"),
    [
        ({"a": 0, "b": 1, "c": 2}, [(3, "<x>"), (4, "<y>")], {"<x>": 3, "<y>": 4}),
        ({"a": 0, "b": 1, "c": 2}, [(7, "<x>"), (9, "<y>")], {"<x>": 3, "<y>": 4}),
        ({"a": 0, "b": 1, "c": 2}, [(3, "<x>"), (3, "<y>")], {"<x>": 3, "<y>": 4}),
        ({"a": 0, "b": 1, "c": 2}, [(5, "b")], {"b": 1}),
        ({"a": 0, "b": 1, "c": 2}, [(1, "<x>")], {"<x>": 3}),
        ({"a": 0, "b": 5}, [(2, "<x>"), (3, "<y>")], {"<x>": 2, "<y>": 3}),
        ({"a": 0, "b": 1, "c": 2}, [(3, "<x>"), (4, "<x>"), (5, "<y>")], {"<x>": 3, "<y>": 4}),
        ({"a": 0, "b": 1, "c": 2}, [(4, "<y>"), (3, "<x>")], {"<y>": 3, "<x>": 4}),
        ({"a": 0, "b": 1, "c": 2}, [(3, ""), (4, "<y>")], {"<y>": 3}),
    ],
)
def test_added_tokens_have_the_ids_that_the_tokenizers_library_gives(
    vocab: dict[str, int], added: list[tuple[int, str]], ids: dict[str, int], editable: Source, tmp_path: Path
) -> None:
    path = editable.path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"] |= {"vocab": vocab, "merges": ["a b"]}
    data["added_tokens"] = [{"id": number, "content": text, "special": True} for number, text in added]
    path.write_text(json.dumps(data), encoding="utf-8")
    bos = next(iter(ids))
    with_tokenizer_config(editable, bos_token=bos)
    keys = plan_convert(editable.path, tmp_path / "o.gguf").metadata
    tokens, kinds = keys["tokenizer.ggml.tokens"].data, keys["tokenizer.ggml.token_type"].data
    for text, number in (vocab | ids).items():
        assert tokens[number] == text
        assert kinds[number] == (3 if text in ids else 1)
    assert keys["tokenizer.ggml.bos_token_id"].data == ids[bos]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["model"].update(vocab={"a": 0, "b": 0}), ["'a' and 'b' have one id, 0"]),
        (lambda d: d.update(model=d["model"] | {"vocab": {"a": 0, "b": 2}}, added_tokens=[{"id": 9, "content": "<x>"}]),
         ["'b' and '<x>' have one id, 2"]),
        (lambda d: d["model"]["vocab"].update(a=float("inf")), ["Infinity is no JSON number"]),
        (lambda d: d["model"]["vocab"].update(a=-1), ["model.vocab.a is -1"]),
        (lambda d: d["model"].update(vocab=[1]), ["model.vocab is [1]"]),
        (lambda d: d["model"].update(merges=[128]), ["model.merges is not an array of texts"]),
        (lambda d: d["model"].update(merges=[[None]]), ["model.merges is not"]),
        (lambda d: d["model"].update(merges=["a b", ["a", "b"]]), ["model.merges is not"]),
        (lambda d: d.update(added_tokens={}), ["added_tokens is {}"]),
        (lambda d: d.update(added_tokens=[1]), ["added_tokens[0] is 1"]),
        (lambda d: d.update(added_tokens=[{"id": 1}]), ["added_tokens[0].content is missing"]),
        (lambda d: d.update(model=None), ["model is null"]),
        (lambda d: d.update(decoder=[1]), ["decoder is [1]"]),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_one_error(change: object, words: list[str], editable: Source, cli: Cli) -> None:
    path = editable.path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert_one_line(cli("convert", editable.path, "--dry-run"), "tokenizer.json", *words)


@pytest.mark.parametrize("key", ["normalizer", "post_processor", "pre_tokenizer", "truncation"])
def test_a_tokenizer_nested_without_end_is_one_error(key: str, editable: Source, cli: Cli) -> None:
    path = editable.path / "tokenizer.json"
    text = path.read_text(encoding="utf-8").rstrip()[:-1]
    path.write_text(f'{text}, "{key}": {"[" * 100_000 + "]" * 100_000}}}', encoding="utf-8")
    assert_one_line(cli("convert", editable.path, "--dry-run"), "tokenizer.json", "nested too deeply")


def test_the_vocabulary_is_padded_and_its_kinds_are_told_apart(source: Get, converted: Converted) -> None:
    checkpoint, file = source("flash"), converted("flash")
    tokenizer = json.loads((checkpoint.path / "tokenizer.json").read_text(encoding="utf-8"))
    size = checkpoint.config["vocab_size"]
    tokens, kinds = (file.kv[f"tokenizer.ggml.{key}"][1][1] for key in ("tokens", "token_type"))
    assert len(tokens) == len(kinds) == size
    placed = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    unused = [i for i in range(size) if i not in placed and i not in added]
    assert unused
    for i in range(size):
        if i in unused:
            assert (tokens[i], kinds[i]) == (f"[PAD{i}]", 5)
        elif i not in added:
            assert (tokens[i], kinds[i]) == (placed[i], 1)
        else:
            assert tokens[i] == added[i]["content"]
    by_text = dict(zip(tokens, kinds, strict=True))
    # Not marked "special", but control tokens by their look; plain words stay text that the user may write.
    assert [by_text[t] for t in ("<｜User｜>", "<|EOT|>", "<mask>")] == [3, 3, 3]
    assert [by_text[t] for t in ("<think>", "</think>", "｜DSML｜")] == [4, 4, 4]
    merges = file.kv["tokenizer.ggml.merges"][1][1]
    assert merges == tokenizer["model"]["merges"]
    ids = [file.kv[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")]
    assert ids == [(4, 0), (4, 1), (4, 1)]
    assert [file.kv[f"tokenizer.ggml.add_{kind}_token"] for kind in ("bos", "eos")] == [(7, False), (7, False)]


# Splits ---------------------------------------------------------------------------------------------------------


def test_split(cli: Cli, checkpoint_path: Callable[[str], Path], converted: Converted, tmp_path: Path) -> None:
    limit = 1_000_000
    run = cli("convert", checkpoint_path("flash"), "--outfile", tmp_path / "big.gguf", "--split-max-size", "1M")
    assert run.code == 0, run.err
    paths = sorted(tmp_path.glob("*.gguf"))
    count = len(paths)
    assert count > 3
    assert [p.name for p in paths] == [f"big-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    whole, members = converted("flash"), [Gguf(path) for path in paths]
    split = {"split.no", "split.count", "split.tensors.count"}
    assert {k: v for k, v in members[0].kv.items() if k not in split} == whole.kv
    for number, member in enumerate(members):
        assert member.kv["split.no"] == (2, number)
        assert member.kv["split.count"] == (2, count)
        assert member.kv["split.tensors.count"] == (5, len(whole.tensors))
        if number:
            assert set(member.kv) == split
        assert len(member.tensors) == 1 or len(member.raw) - member.data_offset <= limit + 32 * len(member.tensors)
    assert [name for member in members for name in member.tensors] == list(whole.tensors)
    for member in members:
        for name, tensor in member.tensors.items():
            assert np.array_equal(tensor.data, whole.tensors[name].data)
    for path in (paths[0], paths[-1]):
        with ggufx.open(path) as file:
            assert list(file) == list(whole.tensors)
            last = list(whole.tensors)[-1]
            assert np.array_equal(file[last].numpy(), whole.tensors[last].decode())
            assert file.metadata["general.architecture"] == "deepseek4"
    assert all(str(path) in run.out for path in paths)


def test_split_members_are_readable_by_gguf(checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    paths = convert(checkpoint_path("mini"), tmp_path / "m.gguf", target="llama.cpp", split_max_nbytes=300_000)
    seen = []
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        assert reader.fields["split.no"].contents() == number
        seen += [t.name for t in reader.tensors]
    whole = plan_convert(checkpoint_path("mini"), tmp_path / "m.gguf", target="llama.cpp")
    assert seen == [t.name for t in whole.tensors]
