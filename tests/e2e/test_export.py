"""GGUFs taken back to checkpoints: against the checkpoint that they came from, read without any of ggufx's code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ggufx
from ggufx import execute
from ggufx import export as export_module
from ggufx.container import Value, ValueType
from ggufx.convert import convert
from ggufx.edit import plan_edit, set_keys
from ggufx.export import export, plan_export
from ggufx.file import Tensor
from ggufx.retarget import retarget

from .conftest import Run, assert_nothing_left, assert_one_line
from .oracle import Gguf, Source

Get = Callable[[str], Source]
Converted = Callable[..., Gguf]
Cli = Callable[..., Run]


def main_model(source: Source) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor but the MTP block's."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.data.tobytes())
        for name, tensor in source.tensors.items()
        if not name.startswith("mtp.")
    }


@pytest.mark.parametrize("case", ["flash", "flash-base", "pro-like", "pruned", "one-file"])
def test_there_and_back(case: str, source: Get, converted: Converted, tmp_path: Path) -> None:
    out = tmp_path / "back"
    written = export(converted(case).path, out)
    assert sorted(written) == sorted(out.iterdir())
    found = Source(out)
    assert main_model(found) == main_model(source(case))
    convert(out, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == converted(case).raw


def test_shards_are_the_official_ones_byte_for_byte(source: Get, converted: Converted, tmp_path: Path) -> None:
    export(converted("flash").path, tmp_path)
    ours = sorted(tmp_path.glob("*.safetensors"))
    theirs = sorted(source("flash").path.glob("*.safetensors"))[:-1]  # the last one is the MTP block's
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert [re.sub("-of-.*", "", path.name) for path in ours] == [re.sub("-of-.*", "", path.name) for path in theirs]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = Source(tmp_path)
    assert index["weight_map"] == {name: found.shard_of(name) for name in found.tensors}
    assert index["metadata"]["total_size"] == sum(t.data.size for t in found.tensors.values())


def test_config_and_tokenizer_are_rebuilt(source: Get, converted: Converted, tmp_path: Path) -> None:
    export(converted("flash").path, tmp_path)
    old, new = source("flash").config, Source(tmp_path).config
    absent = {"initializer_range", "transformers_version"}
    assert {key for key in old if key not in new} == absent
    differing = {key: new[key] for key in old if key not in absent and new[key] != old[key]}
    assert differing == {"num_nextn_predict_layers": 0}
    tokenizers = [json.loads((path / "tokenizer.json").read_text()) for path in (source("flash").path, tmp_path)]
    was, made = tokenizers
    assert made["pre_tokenizer"] == was["pre_tokenizer"]
    assert made["model"]["merges"] == was["model"]["merges"]
    added = {entry["content"]: entry["id"] for entry in was["added_tokens"]}
    assert made["model"]["vocab"] == was["model"]["vocab"] | added
    assert {entry["content"]: entry["id"] for entry in made["added_tokens"]} == added
    configs = [json.loads((path / "tokenizer_config.json").read_text()) for path in (source("flash").path, tmp_path)]
    for key in ("bos_token", "eos_token", "pad_token"):
        assert configs[1][key] == configs[0][key]["content"]
    assert (configs[1]["add_bos_token"], configs[1]["add_eos_token"]) == (False, False)
    assert "chat_template" not in configs[1]  # the built-in one is no part of the checkpoint


def test_a_chat_template_and_general_keys_come_back(converted: Converted, tmp_path: Path) -> None:
    path = tmp_path / "n.gguf"
    shutil.copy(converted("mini").path, path)
    texts = {"tokenizer.chat_template": "{{ 'é\n😀' }}", "general.name": 'A "name": é 😀', "general.license": "mit"}
    set_keys(plan_edit(path, {key: Value.string(text) for key, text in texts.items()}))
    export(path, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_exact_files_of_llama_cpp_export_too(source: Get, converted: Converted, tmp_path: Path) -> None:
    """Experts are native there; dense tensors are the BF16 that they became."""
    export(converted("flash", "llama.cpp", "bf16").path, tmp_path)
    found, wanted = Source(tmp_path), source("flash")
    for name, tensor in wanted.tensors.items():
        if name.startswith("mtp.") or name not in found.tensors:
            continue
        if tensor.dtype == "F8_E4M3":
            assert found.tensors[name].dtype == "BF16"
            assert np.array_equal(found.decode(name), wanted.decode(name))
        else:
            assert np.array_equal(found.tensors[name].data, tensor.data)
    assert "quantization_config" not in found.config
    convert(tmp_path, tmp_path / "again.gguf")
    retarget(converted("flash", "llama.cpp", "bf16").path, tmp_path / "moved.gguf", "nisparks")
    again, moved = Gguf(tmp_path / "again.gguf"), Gguf(tmp_path / "moved.gguf")
    assert again.raw[again.data_offset :] == moved.raw[moved.data_offset :]


def test_experts_that_are_floats(
    source: Get, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 experts as the F32 that they became; each tensor is looked through once, not once for every expert."""
    read: list[str] = []
    original = export_module.is_bfloat16

    def counting(tensor: Tensor) -> bool:
        read.append(tensor.name)
        return original(tensor)

    monkeypatch.setattr(export_module, "is_bfloat16", counting)
    export(converted("flash-base", "llama.cpp", "f32").path, tmp_path / "back")
    assert len(read) == len(set(read))
    assert any("_exps" in name for name in read)
    found, wanted = Source(tmp_path / "back"), source("flash-base")
    for name, tensor in wanted.tensors.items():
        if ".experts." in name and tensor.dtype == "F8_E4M3" and not name.startswith("mtp."):
            assert found.tensors[name].dtype == "BF16"
            assert np.array_equal(found.decode(name), wanted.decode(name))


def _flip_scale(path: Path, name: str, row: int, block: int) -> None:
    tensor = Gguf(path).tensors[name]
    at = tensor.offset + row * (tensor.shape[-1] // 128 * 129) + block * 129
    with path.open("rb+") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_scales_that_are_not_of_tiles_are_an_error(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "n.gguf"
    shutil.copy(converted("mini").path, path)
    _flip_scale(path, "blk.1.attn_q_b.weight", 130, 0)
    run = cli("export", path, "--outfile", tmp_path / "back")
    assert_one_line(run, str(path), "'blk.1.attn_q_b.weight'", "128x128 tiles", "columns 0 to 127", "2 rows further")
    assert not list((tmp_path / "back").glob("*.safetensors"))
    assert not (tmp_path / "back" / "config.json").exists()


def test_errors_name_tensor_and_rule(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    def fails(path: Path, *needed: str) -> None:
        assert_one_line(cli("export", path, "--outfile", tmp_path / "back"), str(path), *needed)
        assert not (tmp_path / "back").exists()

    fails(converted("flash", "llama.cpp").path, "is Q8_0", "no form", "native")
    fails(converted("flash", "llama.cpp", mtp=True).path, "MTP block")
    native = converted("mini").path
    (tmp_path / "file").write_text("")
    assert_one_line(cli("export", native, "--outfile", tmp_path / "file"), "is a file")
    clamp = tmp_path / "clamp.gguf"
    shutil.copy(native, clamp)
    with clamp.open("rb+") as file:
        found = Gguf(clamp).raw
        at = found.index(b"deepseek4.swiglu_clamp_exp") + len(b"deepseek4.swiglu_clamp_exp") + 16
        file.seek(at)
        file.write(np.float32(9).tobytes())
    fails(clamp, "swiglu_clamp_exp is [9.0, 10.0, 10.0]", "config.json has no place")


def test_values_that_config_json_cannot_say(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    """They would be lost without a word: config.json has one clamp, and one length of a head."""
    whole = converted("flash", "llama.cpp", "bf16").path
    clamps = Value.array(ValueType.FLOAT32, [7.0] * 5)
    for key, value in (
        ("swiglu_clamp_shexp", clamps), ("attention.value_length", Value.u32(64)), ("embedding_length_out", Value.u32(7)),
    ):  # fmt: skip
        path = Path(shutil.copy(whole, tmp_path / "odd.gguf"))
        set_keys(plan_edit(path, {f"deepseek4.{key}": value}))
        run = cli("export", path, "--outfile", tmp_path / "back")
        assert_one_line(run, str(path), f"deepseek4.{key} is", "config.json has no place for")
        assert not (tmp_path / "back").exists()


def test_a_directory_of_another_checkpoint(converted: Converted, checkpoint_path: Callable[[str], Path],
                                           tmp_path: Path, cli: Cli) -> None:  # fmt: skip
    out = tmp_path / "back"
    shutil.copytree(checkpoint_path("flash"), out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for case in ("flash", "mini", "one-file"):
        run = cli("export", converted(case).path, "--outfile", out, "--overwrite")
        assert_one_line(run, str(out), "files of another checkpoint")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    # An earlier export of the same model is none.
    export(converted("mini").path, tmp_path / "mini")
    export(converted("mini").path, tmp_path / "mini", overwrite=True)


def test_tables_of_experts_that_do_not_exist(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    path = Path(shutil.copy(converted("mini").path, tmp_path / "n.gguf"))
    tensor = Gguf(path).tensors["blk.0.ffn_gate_tid2eid"]
    with path.open("rb+") as file:
        file.seek(tensor.offset)
        file.write((6).to_bytes(4, "little"))  # of 6 experts
    run = cli("export", path, "--outfile", tmp_path / "back")
    assert_one_line(run, str(path), "'blk.0.ffn_gate_tid2eid'", "outside 0 to 5")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", Value.array(ValueType.INT32, [1, 2])),
        ("tokens", Value.array(ValueType.STRING, ["one"])),
        ("token_type", Value.string("normal")),
        ("merges", Value.u32(5)),
    ],
)
def test_a_tokenizer_that_is_none(key: str, value: Value, converted: Converted, tmp_path: Path, cli: Cli) -> None:
    path = Path(shutil.copy(converted("mini").path, tmp_path / "n.gguf"))
    set_keys(plan_edit(path, {f"tokenizer.ggml.{key}": value}))
    run = cli("export", path, "--outfile", tmp_path / "back")
    if value.element is ValueType.STRING:  # of one token, for types of many
        assert (run.code, "no tokenizer is written" in run.err) == (0, True), run.err
        assert not (tmp_path / "back" / "tokenizer.json").exists()
    else:
        assert_one_line(run, str(path), f"key tokenizer.ggml.{key} is", "expected an array of", "ggufx set")


def test_a_key_that_config_json_has_no_place_for_is_told(converted: Converted, tmp_path: Path) -> None:
    path = Path(shutil.copy(converted("mini").path, tmp_path / "n.gguf"))
    set_keys(plan_edit(path, {"deepseek4.rope.scaling.yarn_attn_factor": Value.f32(1.5)}))
    with ggufx.open(path) as file:
        notes = [note for note in plan_export(file, tmp_path / "back").notes if "left out" in note]
    assert notes == ["key deepseek4.rope.scaling.yarn_attn_factor is left out: config.json has no place for it"]
    with ggufx.open(converted("mini").path) as file:
        assert not [note for note in plan_export(file, tmp_path / "back").notes if "left out" in note]


def test_an_interrupted_export_goes_on(converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    out = tmp_path / "back"
    with pytest.raises(Stop):
        export(converted("long").path, out, progress=stop, threads=1)
    assert not list(out.glob("*.safetensors")) + list(out.glob("*.json"))
    assert list(out.glob("*.safetensors.partial"))
    resumed = []
    original = execute._run_tile

    def counting(job: execute._Job, opened: dict[tuple[str, int], int]) -> execute._Done:
        done = original(job, opened)
        resumed.append(done.resumed)
        return done

    monkeypatch.setattr(execute, "_run_tile", counting)
    export(converted("long").path, out)
    assert resumed.count(True) > len(resumed) // 4
    assert not list(out.glob("*.partial")) + list(out.glob("*.journal"))
    convert(out, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == converted("long").raw


def test_existing_files_are_kept_and_a_dry_run_writes_nothing(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "back"
    arguments = ("export", converted("mini").path, "--outfile", out)
    data = json.loads(cli(*arguments, "--dry-run", "--json").out)
    assert {t["type"] for t in data["tensors"]} >= {"F8_E4M3", "F8_E8M0", "I8", "BF16", "F32", "I64"}
    assert not out.exists()
    lines = [line.split() for line in cli(*arguments, "--dry-run").out.splitlines()]
    # 3 layers of 6 experts, of the same shape and type: one line, not 18.
    assert [line[1] for line in lines if line[0] == "layers.N.ffn.experts.N.w1.weight"] == ["18"]
    roles = {" ".join(line[:-4]): int(line[-4]) for line in lines[[line[0] for line in lines].index("role") + 1 :][:9]}
    assert roles["routed experts"] == 3 * 6 * 6  # three matrices each, with scales
    assert roles["embedding"] == roles["output"] == 1
    assert "other" not in roles
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert_one_line(cli(*arguments), "config.json", "--overwrite")
    assert (out / "config.json").read_text() == "mine"
    assert_nothing_left(out)
    run = cli(*arguments, "--overwrite")
    assert run.code == 0
    assert "num_nextn_predict_layers is 0" in run.err
    assert json.loads((out / "config.json").read_text())["model_type"] == "deepseek_v4"
