"""The plan of the full DeepSeek-V4-Flash (46 sparse files with the official headers) against the real files' facts."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufx import chat_templates, checkpoint
from ggufx import open as open_gguf
from ggufx.container import Value, ValueType
from ggufx.convert import plan_convert
from ggufx.export import plan_export
from ggufx.plan import Plan
from ggufx.retarget import plan_retarget

from .conftest import Run, run_process
from .oracle import FIXTURES, KV_TYPES, TYPES, Expected, expected, nbytes_of

LAYERS = {
    "-": [-1], "mtp": [-1], "all": range(43), "hash": range(3), "score": range(3, 43), "r4": range(2, 43, 2),
    "r128": range(3, 43, 2), "comp": range(2, 43),
}  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sparse checkpoint, in a directory of the official name, from which general.name comes."""
    from make_fullshape_v4 import make_fullshape_v4

    path = tmp_path_factory.mktemp("full") / "DeepSeek-V4-Flash"
    make_fullshape_v4(path, tokenizer="full")
    return path


@dataclass
class ReadBytes:
    """Two witnesses: where every opened shard was read to, and the bytes that the kernel counts for this process."""

    furthest: dict[str, int]
    nbytes: int


@contextmanager
def reading() -> Iterator[ReadBytes]:
    """Note what is read."""
    found = ReadBytes({}, 0)
    path_open, open_regular = Path.open, checkpoint.open_regular

    class Spy:
        """A file, noting how far it is read."""

        def __init__(self, file: Any, name: str) -> None:
            self.file, self.name = file, name

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()  # type: ignore[no-any-return]

        def read(self, count: int) -> bytes:
            data = self.file.read(count)
            found.furthest[self.name] = max(found.furthest.get(self.name, 0), self.file.tell())
            return data  # type: ignore[no-any-return]

    def spying(self: Path, *arguments: object, **options: object) -> object:
        file = path_open(self, *arguments, **options)  # type: ignore[arg-type]
        return Spy(file, str(self)) if self.suffix == ".safetensors" else file

    def counted() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", spying)
        patch.setattr(checkpoint, "open_regular", lambda path: Spy(open_regular(path), str(path)))
        before = counted()
        yield found
        found.nbytes = counted() - before


class Plans(dict[str, Plan]):
    """Plans for the two dialects, each made when it is first asked for."""

    def __init__(self, full: Path) -> None:
        super().__init__()
        self.full = full
        self.read_for: dict[str, ReadBytes] = {}

    def __missing__(self, target: str) -> Plan:
        with reading() as self.read_for[target]:
            self[target] = plan_convert(self.full, self.full / "out.gguf", target=target)
        return self[target]


@pytest.fixture(scope="module")
def plans(full: Path) -> Plans:
    """Plans for the two dialects."""
    return Plans(full)


@cache
def official() -> tuple[list[str], dict[str, tuple[int, ...]], dict[str, str]]:
    """Names of hf_rules.tsv in shard order and sorted within, their logical shapes, and dtypes."""
    shards: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    lines = (FIXTURES / "hf_rules.tsv").read_text().splitlines()
    for row in csv.DictReader((line for line in lines if not line.startswith("#")), delimiter="\t"):
        shape = tuple(json.loads(row["shape"]))
        if row["dtype"] == "I8":
            shape = (shape[0], shape[1] * 2)
        for layer in LAYERS[row["layers"]]:
            shard = {"embed.": 1, "mtp.": 46, "layers.": layer + 2}
            for expert in range(256) if "{E}" in row["pattern"] else [0]:
                name = row["pattern"].replace("{L}", str(layer)).replace("{E}", str(expert))
                shards[name] = next((n for prefix, n in shard.items() if name.startswith(prefix)), 45)
                shapes[name], dtypes[name] = shape, row["dtype"]
    return sorted(shapes, key=lambda name: (shards[name], name)), shapes, dtypes


@cache
def wanted(target: str) -> list[Expected]:
    """Expand map.tsv over hf_rules.tsv."""
    return expected(*official(), target)


def test_the_rules_give_the_official_number_of_tensors() -> None:
    assert len(official()[0]) == 69187


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_names_shapes_types_and_order(plans: dict[str, Plan], target: str) -> None:
    found = [(t.name, t.shape, t.type, t.type_id) for t in plans[target].tensors]
    rules = wanted(target)
    assert len(rules) == 1328
    assert found == [(e.name, e.shape, e.type, TYPES[e.type][0]) for e in rules]


@pytest.mark.parametrize(
    ("target", "digest", "data_nbytes", "counts"),
    [
        ("nisparks", "77fa2861", 156142864448, None),
        (
            "llama.cpp", "0d7226bd", 156373010496,
            {"BF16": 190, "F32": 641, "Q8_0": 365, "I32": 3, "MXFP4": 129},
        ),
    ],
)  # fmt: skip
def test_the_published_files_facts(
    plans: dict[str, Plan], target: str, digest: str, data_nbytes: int, counts: dict[str, int] | None
) -> None:
    plan = plans[target]
    text = "".join(f"{name}\n" for name in sorted(t.name for t in plan.tensors))
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)
    assert plan.data_nbytes == data_nbytes
    types = Counter(t.type for t in plan.tensors)
    # BF16 in the nisparks file but for the 43 router matrices, which are F32 there; 365 FP8 tensors either way.
    assert types == (counts or {"BF16": 147, "F32": 684, "F8_E4M3_B128": 365, "I32": 3, "MXFP4": 129})


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_offsets_lengths_and_sources(plans: dict[str, Plan], target: str) -> None:
    plan, end = plans[target], 0
    for tensor, rule in zip(plan.tensors, wanted(target), strict=True):
        assert tensor.offset == end
        assert tensor.offset % 32 == 0
        assert tensor.nbytes == nbytes_of(rule.type, rule.shape)
        end = -(-(tensor.offset + tensor.nbytes) // 32) * 32
        assert [name for name in tensor.sources if not name.endswith(".scale")] == list(rule.sources)
        scales = [name for name in tensor.sources if name.endswith(".scale")]
        native = rule.type in ("F8_E4M3_B128", "Q8_0", "MXFP4")
        assert scales == ([name.removesuffix("weight") + "scale" for name in rule.sources] if native else [])
    assert plan.data_nbytes == end


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_tiles_read_every_source_byte_once_and_write_every_output_byte_once(
    plans: dict[str, Plan], target: str
) -> None:
    plan = plans[target]
    read = Counter(dict.fromkeys(range(46), 0))
    for tensor in plan.tensors:
        end = 0
        for tile in tensor.tiles:
            assert tile.offset == end
            end += tile.nbytes
            assert tile.nbytes <= 48 << 20, "a tile is at most a few tens of MB"
            for span in tile.spans:
                read[span.file] += span.nbytes
        assert end == tensor.nbytes
    _, shapes, dtypes = official()
    bits = {"I64": 64, "F32": 32, "BF16": 16, "F8_E8M0": 8, "F8_E4M3": 8, "I8": 4}  # shapes are logical: 4 bits of FP4
    used = sum(prod(shapes[n]) * bits[dtypes[n]] // 8 for n in shapes if not n.startswith("mtp."))
    assert sum(read.values()) == used
    assert read[45] == 0, "nothing of the MTP block is read"


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_every_tensor_is_used_or_named_as_skipped(plans: dict[str, Plan], target: str) -> None:
    plan = plans[target]
    used = [name for tensor in plan.tensors for name in tensor.sources]
    skipped = [name for name, reason in plan.skipped if reason]
    assert len(used) == len(set(used))
    assert sorted(used + skipped) == sorted(official()[0])
    assert all(name.startswith("mtp.") for name in skipped)
    assert all("MTP block" in reason for _, reason in plan.skipped)


# Keys -----------------------------------------------------------------------------------------------------------


def key_rows() -> list[dict[str, str]]:
    with (FIXTURES / "kv_keys.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def check_value(plan: Plan, row: dict[str, str], target: str) -> None:
    key, text = row["key"], row["flash_value"]
    value = plan.metadata[key]
    match = re.fullmatch(r"arr\[(\w+)\]", row["value_type"])
    if match:
        assert value.type is ValueType.ARRAY
        assert value.element == KV_TYPES[match[1]]
        exact = {
            "deepseek4.swiglu_clamp_exp": [10.0] * 43,
            "deepseek4.swiglu_clamp_shexp": [10.0] * 43,
            "deepseek4.attention.compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
        }
        if key in exact:
            assert list(value.data) == exact[key]
        else:
            assert len(value.data) == int(text)
        return
    assert value.type == KV_TYPES[row["value_type"]], key
    if key == "tokenizer.chat_template":
        assert value.data == chat_templates.deepseek_v4("preview")
    elif key == "general.file_type":
        assert value.data == {"nisparks": 41, "llama.cpp": 38}[target]
    elif row["value_type"] == "f32":
        assert np.float32(value.data) == np.float32(float(text))
    elif row["value_type"] == "bool":
        assert value.data is (text == "true")
    elif row["value_type"] == "str":
        assert value.data == text
    else:
        assert value.data == int(re.match(r"\d+", text)[0])  # type: ignore[index]


def test_the_fifty_keys_of_nisparks(plans: dict[str, Plan]) -> None:
    rows = sorted((r for r in key_rows() if r["nisparks_idx"] != "-"), key=lambda r: int(r["nisparks_idx"]))
    assert len(rows) == 50
    assert list(plans["nisparks"].metadata) == [row["key"] for row in rows]
    for row in rows:
        check_value(plans["nisparks"], row, "nisparks")


def test_the_keys_of_llama_cpp(plans: dict[str, Plan]) -> None:
    def order(row: dict[str, str]) -> tuple[int, str]:
        text = row["upstream_ord"]
        number = {"tok": 101, "last-general": 100}.get(text)
        return (number, "") if number else (int(re.match(r"\d+", text)[0]), text)  # type: ignore[index]

    # general.version and basename come from the model card or the directory's name where these have them.
    optional = {"general.version", "general.basename", "deepseek4.nextn_predict_layers"}
    rows = [r for r in key_rows() if r["upstream"] in ("required", "y") and r["upstream_ord"] != "-"]
    rows = sorted(rows, key=order)
    found = list(plans["llama.cpp"].metadata)
    assert [key for key in found if key not in optional] == [r["key"] for r in rows if r["key"] not in optional]
    assert "deepseek4.nextn_predict_layers" not in found
    for row in rows:
        if row["key"] not in optional:
            check_value(plans["llama.cpp"], row, "llama.cpp")


# Reading headers only ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_a_plan_reads_headers_only(full: Path, plans: Plans, target: str) -> None:
    _ = plans[target]
    headers = {}
    for shard in full.glob("*.safetensors"):
        with shard.open("rb") as file:
            headers[str(shard)] = 8 + int.from_bytes(file.read(8), "little")
    read = plans.read_for[target]
    assert read.furthest == headers
    # The tokenizer has some 8 MB and is parsed twice.
    assert read.nbytes < sum(headers.values()) + 40_000_000


def test_dry_run_json(full: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_process("convert", full, "--outfile", tmp_path / "out.gguf", "--dry-run", "--json")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's seconds: a busy machine is no slower program.
    seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    assert run.code == 0, run.err
    assert run.err == ""
    assert seconds < 10
    assert list(tmp_path.iterdir()) == []
    data = json.loads(run.out)
    assert {"file", "metadata", "tensors", "data_nbytes"} <= data.keys()
    assert data["data_nbytes"] == 156142864448
    assert data["file"]["path"] == str(tmp_path / "out.gguf")
    assert data["file"]["n_tensors"] == len(data["tensors"]) == 1328
    assert list(data["metadata"]) == list(plans["nisparks"].metadata)
    rules, end = wanted("nisparks"), 0
    for entry, rule in zip(data["tensors"], rules, strict=True):
        assert {"name", "shape", "type", "type_id", "offset", "nbytes", "sources"} <= entry.keys()
        assert (entry["name"], tuple(entry["shape"]), entry["type"]) == (rule.name, rule.shape, rule.type)
        assert entry["type_id"] == TYPES[rule.type][0]
        assert entry["offset"] == end
        assert entry["nbytes"] == nbytes_of(rule.type, rule.shape)
        assert set(rule.sources) <= set(entry["sources"])
        end = -(-(end + entry["nbytes"]) // 32) * 32
    assert end == data["data_nbytes"]
    assert data["file"]["nbytes"] == data["file"]["data_offset"] + end


def test_dry_run_table(full: Path, cli: Callable[..., Run], tmp_path: Path) -> None:
    run = cli("convert", full, "--outfile", tmp_path / "out.gguf", "--dry-run")
    assert run.code == 0
    for text in ("156142864448 bytes of data", "1328 tensors", "50 keys", "bits per weight", "disk:", "memory:"):
        assert text in run.out
    assert "blk.N.ffn_down_exps.weight" in run.out
    assert list(tmp_path.iterdir()) == []


def test_the_published_file_with_45_keys(plans: dict[str, Plan]) -> None:
    """The other issue of the published file lacks the five rope.scaling keys: its data start 256 bytes earlier."""
    whole = dict(plans["nisparks"].files[0].metadata)
    # Its template is one line; what is padded depends on the length.
    whole["tokenizer.chat_template"] = Value.string("x" * 363)
    planned = replace(plans["nisparks"].files[0], metadata=whole)
    keys = {key: value for key, value in whole.items() if ".rope.scaling." not in key}
    assert len(keys) == 45
    assert len(planned.header) - len(replace(planned, metadata=keys).header) == 256


def test_the_native_file_moved_and_exported(full: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    """The published native file, sparse: moved, it has the header of the conversion; exported, the official tensors."""
    planned = plans["nisparks"].files[0]
    with (tmp_path / "n.gguf").open("wb") as file:
        file.write(planned.header)
        file.truncate(planned.nbytes)
    exact = plan_convert(full, tmp_path / "o.gguf", target="llama.cpp", dense="bf16")
    with open_gguf(tmp_path / "n.gguf") as native:
        moved = plan_retarget(native, tmp_path / "o.gguf", "llama.cpp")
        assert moved.files[0].header == exact.files[0].header
        assert moved.nbytes == exact.nbytes
        exported = plan_export(native, tmp_path / "back")
    names, shapes, dtypes = official()
    wanted = {name: dtypes[name] for name in names if not name.startswith("mtp.")}
    assert {t.name: t.type for t in exported.tensors} == wanted
    for tensor in exported.tensors:
        shape = shapes[tensor.name]
        assert tensor.shape == ((shape[0], shape[1] // 2) if tensor.type == "I8" else shape)
    assert len([file for file in exported.files if file.path.suffix == ".safetensors"]) == 45
