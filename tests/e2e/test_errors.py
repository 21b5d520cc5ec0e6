"""Every way a checkpoint can be wrong ends in one error: file, tensor and numbers in one line, and no output."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ggufx.convert import convert, plan_convert
from ggufx.errors import GGUFError, OutputExists, SourceCodesError

from .conftest import Run, assert_nothing_left, assert_one_line, run_process
from .oracle import Source

Cli = Callable[..., Run]
Damage = Callable[[Source], object]

FP8 = "layers.1.attn.wq_b.weight"  # [256, 128]
FP4 = "layers.2.ffn.experts.3.w1.weight"  # [128, 64] bytes
INDEX = "model.safetensors.index.json"


def shard_path(source: Source, name: str) -> Path:
    return source.path / source.shard_of(name)


def set_config(**changes: object) -> Damage:
    def damage(source: Source) -> None:
        for key, value in changes.items():
            if value is None:
                del source.config[key]
            else:
                source.config[key] = value
        source.save()

    return damage


def put(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> Damage:
    def damage(source: Source) -> None:
        shard = None if name in source.tensors else next(iter(source.shards))
        source.put(name, dtype, shape, np.zeros(nbytes, np.uint8), shard=shard)
        source.save()

    return damage


def drop(*names: str) -> Damage:
    def damage(source: Source) -> None:
        source.drop(*names)
        source.save()

    return damage


def codes(name: str, *values: int) -> Damage:
    def damage(source: Source) -> None:
        source.bytes_of(name)[1000 : 1000 + len(values)] = values
        source.save()

    return damage


def header(text: bytes | Callable[[dict[str, object]], object], length: int | None = None) -> Damage:
    """Replace the first shard's header, or write a false length before it."""

    def damage(source: Source) -> None:
        path = source.path / next(iter(source.shards))
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        new = text
        if not isinstance(new, bytes):
            old = json.loads(raw[8:end])
            new = json.dumps(new(old) or old).encode()
        path.write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + raw[end:])

    return damage


def entry(**changes: object) -> Damage:
    """Change the entry of embed.weight in the first shard's header."""
    return header(lambda old: old["embed.weight"].update(changes))  # type: ignore[attr-defined]


def remove(name: str) -> Damage:
    return lambda source: (source.path / name).unlink()


def write(name: str, data: bytes | str) -> Damage:
    return lambda source: (source.path / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def truncate(name: str, count: int) -> Damage:
    def damage(source: Source) -> None:
        path = shard_path(source, name)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - count)

    return damage


def move_in_index(source: Source) -> None:
    index = json.loads((source.path / INDEX).read_text())
    index["weight_map"]["norm.weight"] = source.shard_of("embed.weight")
    (source.path / INDEX).write_text(json.dumps(index))


def extra_in_index(source: Source) -> None:
    index = json.loads((source.path / INDEX).read_text())
    index["weight_map"]["layers.9.gone"] = source.shard_of("embed.weight")
    (source.path / INDEX).write_text(json.dumps(index))


def transformers_names(source: Source) -> None:
    source.put("model.embed_tokens.weight", "BF16", (4,), np.zeros(8, np.uint8), shard=next(iter(source.shards)))
    source.drop("embed.weight")
    source.save()


def expert_again(source: Source) -> None:
    """A second expert 3 by another spelling: one of them would be lost."""
    for part in ("weight", "scale"):
        tensor = source.tensors[f"layers.0.ffn.experts.3.w1.{part}"]
        name = f"layers.0.ffn.experts.03.w1.{part}"
        source.put(name, tensor.dtype, tensor.shape, tensor.data, shard=next(iter(source.shards)))
    source.save()


def twice(source: Source) -> None:
    first, second = list(source.shards)[:2]
    source.shards[second]["embed.weight"] = source.shards[first]["embed.weight"]
    source.save()
    (source.path / INDEX).unlink()  # a shard that the index does not name is not looked at


def big_vocabulary(source: Source) -> None:
    path = source.path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["beyond"] = 5000
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def tokenizer(change: Callable[[dict[str, dict[str, object]]], object]) -> Damage:
    def damage(source: Source) -> None:
        path = source.path / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return damage


def bad_table(source: Source) -> None:
    source.bytes_of("layers.0.ffn.gate.tid2eid").view("<i8")[7] = 6
    source.save()


def mixed_experts(source: Source) -> None:
    source.put(FP4, "F8_E4M3", (128, 128), np.zeros(128 * 128, np.uint8))
    source.put(source.scale_of(FP4), "F8_E8M0", (1, 1), np.zeros(1, np.uint8))
    source.save()


E4M3 = "runtimes disagree"
# What is done to the checkpoint, and what the error must name.
CASES: dict[str, tuple[Damage, list[str]]] = {
    "no config": (remove("config.json"), ["config.json", "missing"]),
    "config is not JSON": (write("config.json", "{"), ["config.json", "JSON"]),
    "config is a list": (write("config.json", "[]"), ["config.json", "list"]),
    "config is not UTF-8": (write("config.json", b"\xff\xfe"), ["config.json"]),
    "config is a bomb": (write("config.json", "[" * 200_000), ["config.json"]),
    "no model_type": (set_config(model_type=None), ["config.json", "model_type", "deepseek_v4"]),
    "other model_type": (set_config(model_type="llama"), ["'llama'", "deepseek_v4"]),
    "model_type is a list": (set_config(model_type=["a"]), ["model_type"]),
    "no hidden size": (set_config(hidden_size=None), ["config.json", "hidden_size", "missing"]),
    "hidden size is text": (set_config(hidden_size="128"), ["hidden_size", "'128'"]),
    "hidden size is true": (set_config(hidden_size=True), ["hidden_size", "True"]),
    "negative size": (set_config(head_dim=-1), ["head_dim", "-1"]),
    "hash layers is text": (set_config(num_hash_layers="few"), ["num_hash_layers", "few"]),
    "MTP layers is text": (set_config(num_nextn_predict_layers="one"), ["num_nextn_predict_layers", "one"]),
    "ratios too few": (set_config(compress_ratios=[0]), ["compress_ratios", "3 layers"]),
    "ratio unknown": (set_config(compress_ratios=[0, 0, 8, 0]), ["compress_ratios", "8"]),
    "ratio is a list": (set_config(compress_ratios=[0, 0, [], 0]), ["compress_ratios"]),
    "rope scaling is text": (set_config(rope_scaling="yarn"), ["rope_scaling"]),
    "rope scaling lacks": (set_config(rope_scaling={"type": "yarn"}), ["rope_scaling", "factor"]),
    "rope scaling other": (set_config(rope_scaling={"type": "linear"}), ["rope_scaling", "linear"]),
    "context beyond 32 bits": (set_config(max_position_embeddings=2**40), ["max_position_embeddings", str(2**40)]),
    "theta beyond float32": (set_config(rope_theta=1e300), ["rope_theta", "1e+300"]),
    "theta is NaN": (set_config(rope_theta=float("nan")), ["rope_theta", "nan"]),
    "yarn beyond 32 bits": (
        set_config(rope_scaling={"type": "yarn", "factor": 16, "original_max_position_embeddings": 2**32}),
        ["rope_scaling.original_max_position_embeddings", str(2**32)],
    ),
    "theta is text": (set_config(rope_theta="big"), ["rope_theta", "'big'"]),
    "more layers than weights": (
        set_config(num_hidden_layers=4, compress_ratios=[0, 0, 4, 128, 0]), ["Missing tensors", "layers.3."],
    ),
    "fewer layers than weights": (
        set_config(num_hidden_layers=2, compress_ratios=[0, 0, 0]), ["Can not map tensor", "layers.2.", "--skip"],
    ),
    "more experts than weights": (set_config(n_routed_experts=7), ["7"]),
    "fewer experts than weights": (set_config(n_routed_experts=5), ["5"]),
    "config of a wider model": (set_config(hidden_size=256), ["shape", "128", "256", "config.json"]),
    "missing shard": (remove("model-00003-of-00006.safetensors"), ["model-00003-of-00006", "1 of 6", "download"]),
    "no shards at all": (lambda s: [(s.path / f).unlink() for f in [*s.shards, INDEX]], ["no safetensors"]),
    "index says another shard": (move_in_index, ["Mismatch between weight map", "norm.weight", "model-00005"]),
    "index names a tensor that is nowhere": (extra_in_index, ["Missing tensors", "layers.9.gone"]),
    "index without a map": (write(INDEX, '{"metadata": {}}'), [INDEX, "weight_map"]),
    "index is not JSON": (write(INDEX, "nonsense"), [INDEX, "JSON"]),
    "index leaves the directory": (write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'), ["../x.safetensors"]),
    "index maps to numbers": (write(INDEX, '{"weight_map": {"a": 5}}'), [INDEX]),
    "index maps to lists": (write(INDEX, '{"weight_map": {"a": ["b"]}}'), [INDEX]),
    "expert by two names": (expert_again, ["Can not map tensor", "experts.03.w1"]),
    "tensor in two shards": (twice, ["embed.weight", "model-00001"]),
    "missing tensor": (drop("layers.1.attn.kv_norm.weight"), ["Missing tensors", "layers.1.attn.kv_norm.weight", "1 of"]),
    "missing expert": (drop(FP4, FP4.replace("weight", "scale")), ["experts", "3"]),
    "unknown tensor": (
        put("layers.0.attn.k_proj.bias", "F32", (1,), 4), ["Can not map tensor 'layers.0.attn.k_proj.bias'", "--skip"],
    ),
    "expert beyond the count": (put("layers.0.ffn.experts.x.w1.weight", "I8", (1, 1), 1), ["experts.x.w1"]),
    "wrong shape": (
        put("norm.weight", "BF16", (64,), 128), ["norm.weight", "[64]", "[128]", "config.json", "model-00005"],
    ),
    "transposed": (put(FP8, "F8_E4M3", (128, 256), 128 * 256), [FP8, "[128, 256]", "[256, 128]"]),
    "scalar expert": (put(FP4, "I8", (), 1), [FP4]),
    "flat expert": (put(FP4, "I8", (8192,), 8192), [FP4, "16384"]),
    "wrong dtype": (put(FP8, "F8_E5M2", (256, 128), 256 * 128), [FP8, "F8_E5M2", "F8_E4M3", "model-00003"]),
    "integer norm": (put("norm.weight", "I32", (128,), 512), ["norm.weight", "I32", "BF16"]),
    "missing scale": (drop(FP8.replace("weight", "scale")), [FP8, "FP8", "scales", "missing", "model-00003"]),
    "missing FP4 scale": (drop(FP4.replace("weight", "scale")), [FP4, "FP4", "scales", "missing"]),
    "scale of a 32x32 model": (
        put(FP8.replace("weight", "scale"), "F8_E8M0", (8, 4), 32), ["[8, 4]", "[2, 1]", "128x128", "wq_b.scale"],
    ),
    "float scale": (put(FP8.replace("weight", "scale"), "F32", (2, 1), 8), ["wq_b.scale", "F32", "F8_E8M0"]),
    "FP4 scale of wrong shape": (put(FP4.replace("weight", "scale"), "F8_E8M0", (4, 128), 512), ["[4, 128]", "[128, 4]"]),
    "mixed experts": (mixed_experts, ["mix", "FP4", "FP8"]),
    "E4M3 NaN": (codes(FP8, 0x7F, 0x7F, 0x7F), [FP8, "3 E4M3 NaN", E4M3, "model-00003"]),
    "negative E4M3 NaN": (codes(FP8, 0xFF, 0x7F), [FP8, "2 E4M3 NaN"]),
    "E8M0 255 of FP8": (
        lambda s: (s.bytes_of("layers.1.attn.wq_b.scale").__setitem__(1, 255), s.save()),
        ["layers.1.attn.wq_b.scale", "1 E8M0", "255"],
    ),
    "E8M0 255 of FP4": (
        lambda s: (s.bytes_of(s.scale_of(FP4)).__setitem__(slice(5, 9), 255), s.save()),
        ["layers.2.ffn.experts.3.w1.scale", "4 E8M0", "255", "model-00004"],
    ),
    "truncated shard": (truncate(FP8, 100), ["model-00003", "incomplete", "download"]),
    "empty shard": (lambda s: shard_path(s, FP8).write_bytes(b""), ["model-00003", "0 bytes"]),
    "git LFS pointer": (
        lambda s: shard_path(s, FP8).write_text("version https://git-lfs.github.com/spec/v1\n"), ["model-00003"],
    ),
    "header of 2^63 bytes": (header(b"{}", 2**63), ["model-00001", str(2**63)]),
    "header longer than the file": (header(b"{}", 10**9), ["model-00001", str(10**9)]),
    "header is not JSON": (header(b"nonsense"), ["model-00001", "JSON"]),
    "header is a list": (header(b"[]"), ["model-00001"]),
    "header is a bomb": (header(b"[" * 200_000), ["model-00001"]),
    "header is an object bomb": (header(b'{"a":' * 100_000), ["model-00001"]),
    "header is not UTF-8": (header(b'{"\xff": 1}'), ["model-00001"]),
    "entry is a number": (header(lambda old: old | {"x": 1}), ["'x'"]),
    "negative shape": (entry(shape=[-1, -128]), ["embed.weight", "malformed"]),
    "boolean shape": (entry(shape=[True, True]), ["embed.weight", "malformed"]),
    "float shape": (entry(shape=[1.5]), ["embed.weight", "malformed"]),
    "text shape": (entry(shape="12"), ["embed.weight", "malformed"]),
    "no shape": (entry(shape=None), ["embed.weight", "malformed"]),
    "overflowing shape": (entry(shape=[2**62, 2**62, 2**62]), ["embed.weight"]),
    "shape of endless digits": (entry(shape=[10**4000, 10**4000]), ["embed.weight"]),
    "a million axes": (entry(shape=[2] * 100_000), ["embed.weight"]),
    "boolean offsets": (entry(data_offsets=[False, True]), ["embed.weight", "malformed"]),
    "reversed offsets": (entry(data_offsets=[100, 0]), ["embed.weight", "malformed"]),
    "three offsets": (entry(data_offsets=[0, 1, 2]), ["embed.weight", "malformed"]),
    "offsets past the end": (entry(data_offsets=[2**40, 2**40 + 8], shape=[4]), ["embed.weight"]),
    "unknown dtype": (entry(dtype="F3"), ["embed.weight", "F3", "BF16"]),
    "dtype is a list": (entry(dtype=["BF16"]), ["embed.weight"]),
    "overlapping tensors": (
        header(lambda old: old | {"twin": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}), ["overlaps"],
    ),
    "transformers' names": (transformers_names, ["model.embed_tokens.weight", "transformers", "official"]),
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer.json", "missing"]),
    "tokenizer is not JSON": (write("tokenizer.json", "{"), ["tokenizer.json"]),
    "tokenizer is of another kind": (tokenizer(lambda t: t["model"].update(type="Unigram")), ["Unigram", "BPE"]),
    "tokenizer without merges": (tokenizer(lambda t: t["model"].update(merges=[])), ["tokenizer.json", "merges"]),
    "vocabulary too large": (big_vocabulary, ["5000", "vocab_size", "tokenizer.json"]),
    "tokenizer_config is a list": (write("tokenizer_config.json", "[]"), ["tokenizer"]),
    "generation_config is not JSON": (write("generation_config.json", "{"), ["generation_config.json"]),
    "model card with broken YAML": (write("README.md", "---\nlicense: [mit\n---\n"), ["README.md"]),
    "half a surrogate pair": (
        tokenizer(lambda t: t["added_tokens"].append({"id": 300, "content": "a\ud800"})), ["Unicode", "'a\\ud800'"],
    ),
    "template with half a surrogate pair": (write("tokenizer_config.json", '{"chat_template": "\\ud800"}'), ["Unicode"]),
    "table names an expert that is not there": (
        bad_table, ["layers.0.ffn.gate.tid2eid", "6", "0 to 5", "model-00002"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_checkpoint(case: str, editable: Source, cli: Cli, tmp_path: Path) -> None:
    damage, needed = CASES[case]
    damage(editable)
    run = cli("convert", editable.path, "--outfile", tmp_path / "out.gguf")
    assert_one_line(run, *needed)
    # Refused codes are found on the way: what is done is kept, under another name than the final one.
    late = "E4M3 NaN" in run.err or "E8M0" in run.err or "tid2eid" in run.err
    assert_nothing_left(tmp_path, partial=late)
    with pytest.raises(GGUFError) as caught:
        convert(editable.path, tmp_path / "out.gguf", resume=False)
    assert f"error: {caught.value}\n" == run.err.splitlines(keepends=True)[-1]


@pytest.mark.parametrize(("dtype", "nbytes"), [("F6_E2M3", 96), ("C64", 1024), ("F8_E4M3FNUZ", 128), ("F9", 7)])
def test_a_tensor_of_another_dtype_can_be_left_out(
    dtype: str, nbytes: int, editable: Source, cli: Cli, tmp_path: Path
) -> None:
    """It is known by its name and bytes: only who needs its values refuses it."""
    put("extra.weight", dtype, (128,), nbytes)(editable)
    assert_one_line(cli("convert", editable.path, "--outfile", tmp_path / "o.gguf"), "extra.weight", "--skip")
    run = cli("convert", editable.path, "--outfile", tmp_path / "o.gguf", "--skip", "extra.*")
    assert run.code == 0, run.err
    put("norm.weight", dtype, (128,), nbytes)(editable)
    run = cli("convert", editable.path, "--outfile", tmp_path / "p.gguf", "--skip", "extra.*")
    assert_one_line(run, f"'norm.weight' has dtype {dtype}; expected BF16 or F16 or F32")


def test_the_errors_of_a_process(editable: Source, tmp_path: Path) -> None:
    """The same through a real process: nothing is printed that the tests above would not see."""
    drop("norm.weight")(editable)
    run = run_process("convert", editable.path, "--outfile", tmp_path / "out.gguf")
    assert_one_line(run, "Missing tensors", "norm.weight")
    assert run.out == ""


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_counted_over_the_whole_tensor(
    target: str, code: int, editable: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggufx.plan.TILE_LEN", 128 * 128)
    data = editable.bytes_of(FP8)
    data[5] = data[20_000] = code  # in both tiles
    editable.save()
    with pytest.raises(SourceCodesError, match="2 E4M3 NaN codes"):
        convert(editable.path, tmp_path / "o.gguf", target=target)


def test_nan_codes_are_copied_when_asked_for(editable: Source, cli: Cli, tmp_path: Path) -> None:
    from .oracle import Gguf

    codes(FP8, 0x7F, 0xFF)(editable)
    run = cli("convert", editable.path, "--outfile", tmp_path / "o.gguf", "--allow-nan")
    assert run.code == 0, run.err
    found = Gguf(tmp_path / "o.gguf").tensors["blk.1.attn_q_b.weight"].decode()
    assert np.argwhere(np.isnan(found)).tolist() == [[7, 104], [7, 105]]
    run = cli("convert", editable.path, "--outfile", tmp_path / "q.gguf", "--allow-nan", "--target", "llama.cpp")
    assert_one_line(run, FP8, "2 E4M3 NaN")
    assert not (tmp_path / "q.gguf").exists()


def test_every_e4m3_code_but_nan_and_every_scale_but_255_goes_through(editable: Source, tmp_path: Path) -> None:
    from .oracle import Gguf

    data = editable.bytes_of(FP8)
    finite = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    data[: 254 * 100] = np.tile(finite, 100)
    experts = [f"layers.2.ffn.experts.{e}.w1.scale" for e in range(6)]
    for number, name in enumerate(experts):
        scales = editable.bytes_of(name)
        scales[:] = (np.arange(scales.size) + number) % 255
    for number, row in enumerate(editable.bytes_of(FP4).reshape(128, 64)):
        row[:] = number  # both nibbles' every code
    editable.save()
    convert(editable.path, tmp_path / "o.gguf")
    file = Gguf(tmp_path / "o.gguf")
    assert np.array_equal(file.tensors["blk.1.attn_q_b.weight"].decode(), editable.decode(FP8))
    stacked = np.stack([editable.decode(name.replace("scale", "weight")) for name in experts])
    assert np.array_equal(file.tensors["blk.2.ffn_gate_exps.weight"].decode(), stacked)


def test_a_shard_that_shrinks_after_planning(editable: Source, tmp_path: Path) -> None:
    from ggufx.execute import execute

    plan = plan_convert(editable.path, tmp_path / "o.gguf")
    truncate("norm.weight", 5000)(editable)
    with pytest.raises(GGUFError, match=r"model-00005.*(changed|incomplete)"):
        execute(plan)
    assert_nothing_left(tmp_path, partial=True)


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--split-max-size", "huge"], ["--split-max-size", "huge", "50G"]),
        (["--split-max-size", "0"], ["--split-max-size", "0"]),
        (["--outtype", "q4_k"], ["--outtype", "q4_k", "native"]),
        (["--json"], ["--dry-run"]),
        (["--mtp"], ["MTP", "llama.cpp"]),
        (["--chat-template-file", "/nowhere/t.jinja"], ["/nowhere/t.jinja"]),
        (["--chat-template-file", "/"], ["/"]),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], needed: list[str], editable: Source, cli: Cli, tmp_path: Path
) -> None:
    run = cli("convert", editable.path, "--outfile", tmp_path / "out.gguf", *arguments)
    assert_one_line(run, *needed)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["{nope}.gguf", "{ftype.nope}.gguf", "{ftype", "{ftype!z}.gguf"])
def test_placeholders_that_do_not_exist(name: str, editable: Source, cli: Cli, tmp_path: Path) -> None:
    assert_one_line(cli("convert", editable.path, "--outfile", tmp_path / name), "{ftype}", "--outfile")
    assert_nothing_left(tmp_path)


def test_paths_that_cannot_be_written(editable: Source, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(cli("convert", editable.path, "--outfile", tmp_path / "file" / "o.gguf"), str(tmp_path / "file"))
    assert_one_line(cli("convert", editable.path, "--outfile", tmp_path / f"{'x' * 300}.gguf"), "xxx")
    assert_one_line(
        cli("convert", tmp_path / "nowhere", "--outfile", tmp_path / "o.gguf"), "nowhere", "not a checkpoint"
    )
    assert_one_line(cli("convert", tmp_path / "file", "--outfile", tmp_path / "o.gguf"), "file", "config.json")


def test_a_chat_template_that_is_not_text(editable: Source, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe\xfd")
    run = cli("convert", editable.path, "--outfile", tmp_path / "o.gguf", "--chat-template-file", tmp_path / "t.jinja")
    assert_one_line(run, "UTF-8")


# An output that exists ------------------------------------------------------------------------------------------


def test_an_existing_output_is_not_touched_without_overwrite(editable: Source, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    run = cli("convert", editable.path, "--outfile", out)
    assert_one_line(run, str(out), "exists", "--overwrite")
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Mini", "out.gguf"]
    with pytest.raises(OutputExists):
        convert(editable.path, out)


def test_overwrite_replaces_only_at_the_end(editable: Source, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    codes(FP8, 0x7F)(editable)
    assert_one_line(cli("convert", editable.path, "--outfile", out, "--overwrite"), "NaN")
    assert out.read_text() == "precious"
    codes(FP8, 0x7E)(editable)
    seen = []
    convert(
        editable.path, out, overwrite=True, resume=False, progress=lambda done, total: seen.append(out.read_text())
    )  # fmt: skip
    assert set(seen) == {"precious"}
    assert out.read_bytes()[:4] == b"GGUF"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Mini", "out.gguf"]


def test_an_existing_member_of_a_split_is_not_touched(editable: Source, cli: Cli, tmp_path: Path) -> None:
    convert(editable.path, tmp_path / "o.gguf", split_max_nbytes=300_000)
    paths = sorted(tmp_path.glob("*.gguf"))
    for path in paths[:-1]:
        path.unlink()
    paths[-1].write_text("precious")
    run = cli("convert", editable.path, "--outfile", tmp_path / "o.gguf", "--split-max-size", "300K")
    assert_one_line(run, paths[-1].name, "--overwrite")
    assert paths[-1].read_text() == "precious"
    assert sorted(tmp_path.glob("o*")) == [paths[-1]]


def test_several_mtp_blocks_are_refused_where_the_form_holds_one(editable: Source, tmp_path: Path) -> None:
    set_config(num_nextn_predict_layers=2, compress_ratios=[*editable.config["compress_ratios"], 0])(editable)
    with pytest.raises(GGUFError, match=r"config.json counts 2 MTP blocks .* holds one"):
        plan_convert(editable.path, tmp_path / "o.gguf", target="llama.cpp", mtp=True)
