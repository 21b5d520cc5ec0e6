"""What inspect shows of checkpoints and safetensors files; the safetensors library says what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Run
from safetensors import safe_open
from safetensors.torch import save_file

from ggufx.inspect import inspect, role

Cli = Callable[..., Run]

FIRST = {
    "model.embed_tokens.weight": ("bfloat16", [16, 64]),
    "model.layers.10.mlp.up_proj.weight": ("float8_e4m3fn", [128, 64]),
    "model.layers.10.mlp.up_proj.weight_scale_inv": ("float32", [1, 1]),
    "model.layers.10.input_layernorm.weight": ("bfloat16", [64]),
}
SECOND = {
    "model.layers.2.self_attn.q_proj.weight": ("float8_e4m3fn", [128, 64]),
    "model.layers.2.self_attn.q_proj.weight_scale_inv": ("float32", [1, 1]),
    "lm_head.weight": ("bfloat16", [16, 64]),
}
CONFIG = {"model_type": "llama", "hidden_size": 64, "tie_word_embeddings": False, "eos_token_id": [1, 2, 3], "x": None}


def save(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    save_file({name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in tensors.items()}, path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "model-00001-of-00002.safetensors", FIRST)
    save(folder / "model-00002-of-00002.safetensors", SECOND)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def listed(*paths: Path) -> dict[str, tuple[str, list[int], str]]:
    """Return dtype, shape and shard of every tensor, by the library."""
    found = {}
    for path in paths:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 # no mapping
                about = file.get_slice(name)
                found[name] = about.get_dtype(), about.get_shape(), path.name
    return found


def test_a_checkpoint_as_the_safetensors_library_sees_it(checkpoint: Path, cli: Cli) -> None:
    shards = sorted(checkpoint.glob("*.safetensors"))
    run = cli("inspect", checkpoint, "--json")
    assert run.code == 0, run
    found = json.loads(run.out)
    about = found["file"]
    assert {t["name"]: (t["type"], t["shape"], t["shard"]) for t in found["tensors"]} == listed(*shards)
    assert (about["format"], about["paths"]) == ("checkpoint", [str(shard) for shard in shards])
    assert about["nbytes"] == sum(shard.stat().st_size for shard in shards)
    assert (about["n_tensors"], about["data_nbytes"], about["n_weights"]) == (7, 20_616, 18_498)
    assert {name: group["nbytes"] for name, group in found["by_type"].items()} == {
        "F8_E4M3": 16_384, "BF16": 4_224, "F32": 8,
    }  # fmt: skip
    assert {name: group["n_tensors"] for name, group in found["by_role"].items()} == {
        "feed-forward": 2, "attention": 2, "embedding": 1, "output": 1, "norms": 1,
    }  # fmt: skip
    assert {key: value["value"] for key, value in found["metadata"].items()} == CONFIG
    assert [value["type"] for value in found["metadata"].values()] == ["str", "int", "bool", "array", "null"]


def test_layers_are_in_order_and_scales_beside_their_weights(checkpoint: Path, cli: Cli) -> None:
    found = inspect(checkpoint, pattern="model.layers.*")
    assert [(t["name"].removeprefix("model.layers."), t["scales"]) for t in found["tensors"]] == [
        ("2.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight_scale_inv"),
        ("2.self_attn.q_proj.weight_scale_inv", None),
        ("10.input_layernorm.weight", None),
        ("10.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight_scale_inv"),
        ("10.mlp.up_proj.weight_scale_inv", None),
    ]
    shown = cli("inspect", checkpoint, "--tensors", "*.2.*", "--limit", "1").out
    (line,) = [line for line in shown.splitlines() if line.startswith("model.layers.2.self_attn.q_proj.weight ")]
    assert line.split() == [
        "model.layers.2.self_attn.q_proj.weight", "[128,", "64]", "F8_E4M3", "8192", "8.0000",
        "model.layers.2.self_attn.q_proj.weight_scale_inv",
    ]  # fmt: skip
    assert "... 1 more" in shown
    assert "eos_token_id         array x 3  [1]" in shown
    assert shown.endswith("7 tensors, 18498 weights, 20616 bytes, 8.9160 bits per weight\n")


def test_whether_convert_takes_it_is_said(checkpoint: Path, cli: Cli) -> None:
    assert "note: ggufx convert does not take it: " in (err := cli("inspect", checkpoint).err)
    assert "model_type 'llama' is not supported" in err
    (checkpoint / "config.json").write_text('{"model_type": "gpt_oss"}')
    note = cli("inspect", checkpoint).err
    assert "is not supported" not in note


def test_safetensors_files_without_a_config(checkpoint: Path, cli: Cli) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"
    found = json.loads(cli("inspect", shard, "--json").out)
    assert {t["name"] for t in found["tensors"]} == SECOND.keys()
    assert (found["file"]["format"], found["metadata"]) == ("safetensors", {})
    (checkpoint / "config.json").unlink()
    found = json.loads(cli("inspect", checkpoint, "--json").out)
    assert {t["name"] for t in found["tensors"]} == FIRST.keys() | SECOND.keys()


def test_a_damaged_checkpoint_is_one_error(checkpoint: Path, cli: Cli) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    for path in (checkpoint, shard):
        run = cli("inspect", path)
        assert (run.code, run.out) == (1, "")
        assert run.err.startswith(f"error: {shard}: the tensors end at byte ")
    index = {"weight_map": dict.fromkeys(FIRST, "model-00001-of-00002.safetensors") | {"x": "model-9.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    run = cli("inspect", checkpoint)
    assert run.code == 1
    assert "1 of 2 shards of the index are not there" in run.err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "output"), ("model.norm.weight", "norms"),
        ("model.layers.3.post_attention_layernorm.weight", "norms"), ("model.layers.3.mlp.gate.weight", "routers"),
        ("model.layers.3.mlp.gate_proj.weight", "feed-forward"), ("model.layers.3.mlp.router.bias", "routers"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "routed experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("model.layers.3.self_attn.o_proj.weight", "attention"), ("head.weight", "output"), ("norm.weight", "norms"),
    ],
)  # fmt: skip
def test_roles_by_the_names_of_transformers(name: str, expected: str) -> None:
    assert role(name) == expected
