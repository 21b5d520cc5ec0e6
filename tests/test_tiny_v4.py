"""The generated checkpoints agree with the tables of the official one and can be read by the usual libraries."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from make_fullshape_v4 import make_fullshape_v4  # noqa: E402
from make_tiny_v4 import (  # noqa: E402
    ADDED_TOKENS,
    OFFICIAL_CONFIG,
    Spec,
    main,
    make_tiny_v4,
    shapes_from_table,
)

safetensors = pytest.importorskip("safetensors")

OFFICIAL = json.loads(OFFICIAL_CONFIG.read_text())
TEXTS = (
    "A checkpoint is a set of named arrays.",
    "def f(x):\n    return x**2  # 3.14159, 1000000\n\n\n",
    "转换器读取模型的权重 and 重みを書き込みます, Преобразователь!",
    "It's DON'T we'll  two  spaces\t\ttabs \u00a0 \U0001f680\u200d\n \n",
    "",
    "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>\n</think>hi<｜end▁of▁sentence｜>",
)


def official_specs() -> dict[str, Spec]:
    """Expand fixtures/dsv4/hf_rules.tsv into every tensor of DeepSeek-V4-Flash."""
    layers = range(43)
    sets = {
        "all": list(layers),
        "hash": [0, 1, 2],
        "score": list(layers[3:]),
        "r4": list(layers[2::2]),
        "r128": list(layers[3::2]),
        "comp": list(layers[2:]),
    }
    specs: dict[str, Spec] = {}
    lines = (ROOT / "fixtures/dsv4/hf_rules.tsv").read_text().splitlines()
    rows = csv.DictReader((line for line in lines if not line.startswith("#")), delimiter="\t")
    for row in rows:
        spec = Spec(row["dtype"], tuple(json.loads(row["shape"])))
        for layer in sets.get(row["layers"], [-1]):
            for expert in range(256) if "{E}" in row["pattern"] else [-1]:
                name = row["pattern"].replace("{L}", str(layer)).replace("{E}", str(expert))
                assert name not in specs
                specs[name] = spec
    return specs


def headers(directory: Path) -> dict[str, Spec]:
    """Dtypes and shapes of all shards as the safetensors library reads them."""
    found: dict[str, Spec] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                assert name not in found
                found[name] = Spec(part.get_dtype(), tuple(part.get_shape()))
    return found


def raw_tensors(directory: Path, dtype: str) -> dict[str, np.ndarray]:
    """Bytes of all tensors of a dtype, read without a library: uint8 of the stored length."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if entry["dtype"] == dtype:
                begin, end = entry["data_offsets"]
                found[name] = np.frombuffer(data[start + begin : start + end], np.uint8)
    return found


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    make_tiny_v4(out)
    return out


def test_table_gives_the_official_checkpoint():
    specs = shapes_from_table(OFFICIAL)
    assert len(specs) == 69187
    assert sum(spec.nbytes for spec in specs.values()) == 159609485896
    assert specs == official_specs()


def test_tiny_has_every_kind_of_tensor_of_the_official_table(tiny):
    def kinds(specs):
        """Names without their numbers, with dtype and rank."""
        return {
            (".".join("#" if part.isdigit() else part for part in name.split(".")), spec.dtype, len(spec.shape))
            for name, spec in specs.items()
        }

    found = headers(tiny)
    assert kinds(found) == kinds(official_specs())
    config = json.loads((tiny / "config.json").read_text())
    assert config.keys() == OFFICIAL.keys()
    assert config["compress_ratios"] == [0, 0, 4, 128, 4, 0]
    assert found == shapes_from_table(config)


def test_shards_and_index(tiny):
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(p.name for p in tiny.glob("*.safetensors"))
    found = headers(tiny)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in found.values())
    assert index["weight_map"]["embed.weight"] == "model-00001-of-00008.safetensors"
    assert index["weight_map"]["layers.0.attn.wkv.scale"] == "model-00002-of-00008.safetensors"
    assert index["weight_map"]["hc_head_fn"] == "model-00007-of-00008.safetensors"
    assert index["weight_map"]["mtp.0.norm.weight"] == "model-00008-of-00008.safetensors"


def test_header_is_in_the_official_order(tiny):
    order = ["I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"]
    for path in sorted(tiny.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert length % 8 == 0
        assert "__metadata__" not in header
        assert list(header) == sorted(header, key=lambda name: (order.index(header[name]["dtype"]), name))
        assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length


def test_values_are_sane(tiny):
    codes = np.concatenate(list(raw_tensors(tiny, "F8_E4M3").values()))
    counts = np.bincount(codes, minlength=256)
    assert counts[0x7F] == counts[0xFF] == 0
    assert np.all(np.delete(counts, [0x7F, 0xFF]) > 0)  # 0x80, the minus zero, among them
    pairs = np.concatenate(list(raw_tensors(tiny, "I8").values()))
    assert np.all(np.bincount(pairs & 15, minlength=16) > 0)
    assert np.all(np.bincount(pairs >> 4, minlength=16) > 0)
    for name, scale in raw_tensors(tiny, "F8_E8M0").items():
        assert scale.max() < 255, name
        assert scale.size < 32 or np.unique(scale).size > 2, name
    for name, data in raw_tensors(tiny, "F32").items():
        assert np.all(np.isfinite(data.view("<f4"))), name
        assert np.abs(data.view("<f4")).max() < 10, name
    for name, data in raw_tensors(tiny, "I64").items():
        experts = data.view("<i8").reshape(-1, 6)
        assert experts.min() == 0, name
        assert experts.max() == 15, name
        assert all(len(set(row)) == 6 for row in experts.tolist()), name


def test_same_arguments_same_bytes(tiny, tmp_path):
    make_tiny_v4(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(tiny)
    make_tiny_v4(tmp_path / "other", seed=1)
    other = digest(tmp_path / "other")
    assert all(other[name] != value for name, value in digest(tiny).items() if name.endswith(".safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "flash-base"},
        {"variant": "pro-like", "shards": 2},
        {"experts": 13, "experts_per_token": 4},
        {"moe": 96, "shards": 1},
        {"moe": 160, "expert_dtype": "fp8"},
        {"layers": 3, "hash_layers": 0, "mtp_layers": 0},
        {"omit_expert_dtype": True, "hash_layers": 5, "merge_pairs": True},
    ],
    ids=str,
)
def test_knobs(tmp_path, changes):
    config = make_tiny_v4(tmp_path, **changes)
    assert headers(tmp_path) == shapes_from_table(config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert ("expert_dtype" in written) is not changes.get("omit_expert_dtype", False)
    assert written == {key: config[key] for key in written}
    shards = changes.get("shards") or config["num_hidden_layers"] + 2 + config["num_nextn_predict_layers"]
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert (tmp_path / "model.safetensors.index.json").exists() is (shards > 1)


def test_scale_shapes_are_rounded_up():
    specs = shapes_from_table(OFFICIAL | {"moe_intermediate_size": 160, "expert_dtype": "fp8"})
    assert specs["layers.0.ffn.experts.0.w2.weight"] == Spec("F8_E4M3", (4096, 160))
    assert specs["layers.0.ffn.experts.0.w2.scale"] == Spec("F8_E8M0", (32, 2))
    assert specs["layers.0.ffn.shared_experts.w1.scale"] == Spec("F8_E8M0", (2, 32))


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "flesh"},
        {"experts": 5},
        {"moe": 80},
        {"heads": 9},
        {"vocab_size": 100},
        {"layers": 1},
        {"shards": 9},
        {"expert_dtype": "int8"},
    ],
    ids=str,
)
def test_impossible_knobs_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"\w"):
        make_tiny_v4(tmp_path, **changes)


def test_gigabytes_adds_experts(tmp_path, capsys):
    assert main([str(tmp_path), "--gigabytes", "0.25", "--merges", "100"]) == 0
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert abs(size - 250e6) < 20e6
    assert "MB of weights" in capsys.readouterr().out


def test_fullshape(tmp_path):
    started = time.process_time()
    make_fullshape_v4(tmp_path, tokenizer="full")
    assert time.process_time() - started < 30
    assert (tmp_path / "config.json").read_bytes() == OFFICIAL_CONFIG.read_bytes()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-{i:05d}-of-00046.safetensors" for i in range(1, 47)]
    assert sum(path.stat().st_blocks for path in shards) * 512 < 100e6
    found = headers(tmp_path)
    assert found == official_specs()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 159609485896
    assert len(index["weight_map"]) == 69187
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    assert len(merges) == 127741
    assert sorted(vocab.values()) == list(range(128000))
    assert all("".join(merge.split(" ")) in vocab for merge in merges)
    assert sorted(t["id"] for t in tokenizer["added_tokens"]) == [0, 1, 2, *range(128000, 128815)]
    assert len({t["content"] for t in tokenizer["added_tokens"]}) == 818


def test_tokenizer_round_trips(tiny):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == 1
    assert len(tokenizer.encode("A checkpoint is", add_special_tokens=False).ids) < 8  # the merges are used
    config = json.loads((tiny / "config.json").read_text())
    assert config["vocab_size"] >= tokenizer.get_vocab_size() + 16
    for text, _special in ADDED_TOKENS:
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 1
