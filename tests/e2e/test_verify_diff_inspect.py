"""verify finds every single wrong bit, diff every difference, inspect says what is there."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from ggufx.convert import convert
from ggufx.diff import diff
from ggufx.errors import GGUFError
from ggufx.inspect import inspect, role
from ggufx.verify import Report, verify

from .conftest import Run, assert_one_line, run_process
from .oracle import TYPES, Gguf, Raw, Source, expected_of, nbytes_of, values_of

Cli = Callable[..., Run]
PathOf = Callable[[str], Path]
Converted = Callable[..., Gguf]


def damaged(file: Gguf, path: Path, change: Callable[[bytearray, Gguf], object]) -> Path:
    """Copy a file with some bytes changed."""
    raw = bytearray(file.raw)
    change(raw, file)
    path.write_bytes(raw)
    return path


def flip(name: str, offset: int, bit: int = 0) -> Callable[[bytearray, Gguf], None]:
    def change(raw: bytearray, file: Gguf) -> None:
        raw[file.tensors[name].offset + offset] ^= 1 << bit

    return change


def bad(report: Report) -> dict[str, str]:
    return {t.name: t.status for t in report.tensors if t.status not in ("exact", "rounded")}


# verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "dense"), [("nisparks", "q8_0"), ("llama.cpp", "bf16"), ("llama.cpp", "f32")])
@pytest.mark.parametrize("case", ["flash", "flash-base", "odd-96", "pruned"])
def test_exact_files_are_verified(
    case: str, target: str, dense: str, checkpoint_path: PathOf, converted: Converted
) -> None:
    file = converted(case, target, dense)
    report = verify(file.path, checkpoint_path(case))
    assert report.ok
    assert report.counts() == {"exact": len(file.tensors)}
    assert [t.name for t in report.tensors] == list(file.tensors)
    assert all(t.max_error == t.rms_error == t.differing == 0 for t in report.tensors)
    assert report.metadata == []


FLIPS = {
    "F8 code": ("nisparks", "blk.1.attn_q_b.weight", 129 * 7 + 55),
    "F8 scale": ("nisparks", "blk.1.attn_q_b.weight", 129 * 7),
    "F8 last byte": ("nisparks", "blk.1.attn_output_b.weight", -1),
    "MXFP4 nibble": ("nisparks", "blk.2.ffn_gate_exps.weight", 17 * 100 + 5),
    "MXFP4 scale": ("nisparks", "blk.2.ffn_gate_exps.weight", 17 * 100),
    "MXFP4 of the last expert": ("nisparks", "blk.2.ffn_down_exps.weight", -1),
    "BF16": ("nisparks", "output.weight", 1001),
    "F32": ("nisparks", "blk.0.hc_attn_fn", 400),
    "F32 from BF16": ("nisparks", "output_norm.weight", 40),
    "I32": ("nisparks", "blk.0.ffn_gate_tid2eid", 404),
    "Q8_0 code": ("llama.cpp", "blk.1.attn_q_b.weight", 34 * 9 + 12),
    "Q8_0 scale": ("llama.cpp", "blk.1.attn_q_b.weight", 34 * 9),
    "BF16 router": ("llama.cpp", "blk.1.ffn_gate_inp.weight", 100),
    "MXFP4 for llama.cpp": ("llama.cpp", "blk.2.ffn_up_exps.weight", 17 * 3 + 16),
}


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("case", FLIPS)
def test_a_single_flipped_bit_is_found(
    case: str, bit: int, checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    target, name, offset = FLIPS[case]
    file = converted("flash", target)
    if offset < 0:
        offset += file.tensors[name].data.size
    path = damaged(file, tmp_path / "bad.gguf", flip(name, offset, bit))
    report = verify(path, checkpoint_path("flash"))
    assert not report.ok
    assert bad(report) == {name: "different"}
    found = next(t for t in report.tensors if t.name == name)
    assert found.differing >= 1
    assert found.detail


@pytest.mark.parametrize("dense", ["bf16", "f32"])
def test_a_flipped_bit_in_an_exact_dense_tensor_is_found(
    dense: str, checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    """BF16 and F32 hold FP8 exactly, so nothing there is rounding."""
    name = "blk.1.attn_q_b.weight"
    path = damaged(converted("flash", "llama.cpp", dense), tmp_path / "bad.gguf", flip(name, 4002))
    report = verify(path, checkpoint_path("flash"))
    assert bad(report) == {name: "different"}
    assert not report.ok


def test_a_flipped_bit_where_fp8_had_to_become_bf16(
    checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    name = "blk.1.ffn_down_shexp.weight"
    file = converted("odd-96")
    assert file.tensors[name].type == "BF16"
    path = damaged(file, tmp_path / "bad.gguf", flip(name, 500))
    assert bad(verify(path, checkpoint_path("odd-96"))) == {name: "different"}


def test_the_place_of_the_first_difference_is_told(
    checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    name = "blk.1.attn_q_b.weight"
    file = converted("flash")
    blocks = file.tensors[name].shape[1] // 128
    path = damaged(file, tmp_path / "bad.gguf", flip(name, (200 * blocks) * 129 + 1 + 17))
    (found,) = [t for t in verify(path, checkpoint_path("flash")).tensors if t.name == name]
    assert found.first == "row 200, column 17"
    assert found.differing == 1
    assert found.native


def swap_nibbles(raw: bytearray, file: Gguf) -> None:
    """What a converter does that takes the high nibble for the first."""
    tensor = file.tensors["blk.2.ffn_gate_exps.weight"]
    blocks = tensor.data.reshape(-1, 17).copy()
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1).reshape(-1, 16, 2)[:, :, ::-1]
    codes = codes.reshape(-1, 32)
    blocks[:, 1:] = codes[:, :16] | codes[:, 16:] << 4
    raw[tensor.offset : tensor.offset + tensor.data.size] = blocks.tobytes()


def swap_halves(raw: bytearray, file: Gguf) -> None:
    tensor = file.tensors["blk.2.ffn_gate_exps.weight"]
    blocks = tensor.data.reshape(-1, 17).copy()
    blocks[:, 1:] = blocks[:, 1:] >> 4 | blocks[:, 1:] << 4
    raw[tensor.offset : tensor.offset + tensor.data.size] = blocks.tobytes()


def swap_experts(raw: bytearray, file: Gguf) -> None:
    tensor = file.tensors["blk.2.ffn_gate_exps.weight"]
    experts = tensor.data.reshape(tensor.shape[0], -1)[[0, 2, 1, *range(3, tensor.shape[0])]]
    raw[tensor.offset : tensor.offset + tensor.data.size] = experts.tobytes()


def transposed_scales(raw: bytearray, file: Gguf) -> None:
    tensor = file.tensors["blk.2.ffn_gate_exps.weight"]
    blocks = tensor.data.reshape(-1, 17).copy()
    blocks[:, 0] = blocks[::-1, 0]
    raw[tensor.offset : tensor.offset + tensor.data.size] = blocks.tobytes()


@pytest.mark.parametrize("change", [swap_nibbles, swap_halves, swap_experts, transposed_scales])
def test_wrong_orders_are_found(
    change: Callable[[bytearray, Gguf], None], checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    path = damaged(converted("flash"), tmp_path / "bad.gguf", change)
    report = verify(path, checkpoint_path("flash"))
    assert bad(report) == {"blk.2.ffn_gate_exps.weight": "different"}
    (found,) = [t for t in report.tensors if t.status == "different"]
    size = 8 * 128 * 256
    assert found.differing > {swap_experts: size // 20, transposed_scales: 100}.get(change, size // 5)
    assert found.max_error > 0


def test_gate_and_up_swapped_by_name_are_found(checkpoint_path: PathOf, converted: Converted, tmp_path: Path) -> None:
    def change(raw: bytearray, file: Gguf) -> None:
        gate, up = (file.tensors[f"blk.2.ffn_{which}_exps.weight"] for which in ("gate", "up"))
        raw[gate.offset : gate.offset + gate.data.size] = up.data.tobytes()
        raw[up.offset : up.offset + up.data.size] = gate.data.tobytes()

    report = verify(damaged(converted("flash"), tmp_path / "bad.gguf", change), checkpoint_path("flash"))
    assert set(bad(report)) == {"blk.2.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight"}


@pytest.mark.parametrize("dense", ["q8_0"])
def test_rounded_tensors_are_measured(dense: str, source: Callable[[str], Source], converted: Converted) -> None:
    """Maximum and RMS error equal those of the gguf package's own Q8_0."""
    checkpoint, file = source("flash"), converted("flash", "llama.cpp", dense)
    report = verify(file.path, checkpoint.path)
    assert report.ok
    found = {t.name: t for t in report.tensors}
    n_rounded = 0
    for rule in expected_of(checkpoint, "llama.cpp"):
        entry = found[rule.name]
        if rule.type != "Q8_0":
            assert entry.status == "exact"
            continue
        n_rounded += 1
        wanted = values_of(checkpoint, rule).astype(np.float64)
        kind = gguf.GGMLQuantizationType.Q8_0
        values = gguf.quants.dequantize(gguf.quants.quantize(wanted.astype(np.float32), kind), kind)
        error = np.abs(values - wanted)
        assert entry.status == "rounded"
        # By bits: Q8_0 has no minus zero.
        assert entry.differing == np.count_nonzero(values.view(np.uint32) != wanted.astype("<f4").view(np.uint32))
        assert entry.max_error == pytest.approx(error.max(), rel=1e-12)
        assert entry.rms_error == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
        assert entry.relative_rms == pytest.approx(np.sqrt((error**2).sum() / (wanted**2).sum()), rel=1e-9)
        assert 0.001 < entry.relative_rms < 0.01
    assert report.counts() == {"exact": len(file.tensors) - n_rounded, "rounded": n_rounded}


def rewrite(file: Gguf, path: Path, tensors: list[Raw], *, drop: str = "", **keys: str) -> Path:
    """Write a GGUF by the gguf package: another route, with other metadata and tensors."""
    writer = gguf.GGUFWriter(path, "deepseek4")
    for key, text in keys.items():
        writer.add_string(key.replace("_", "."), text)
    for key in ("deepseek4.block_count", "deepseek4.expert_count"):
        if key != drop:
            writer.add_uint32(key, file.kv[key][1])
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        if tensor.type in ("F32", "I32"):
            data = tensor.data.view("<f4" if tensor.type == "F32" else "<i4").reshape(tensor.shape)
            writer.add_tensor(tensor.name, data)
        else:
            row_nbytes = nbytes_of(tensor.type, (1, tensor.shape[-1]))
            writer.add_tensor(tensor.name, tensor.data.reshape(*tensor.shape[:-1], row_nbytes), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_another_route_with_other_metadata(
    checkpoint_path: PathOf, converted: Converted, cli: Cli, tmp_path: Path
) -> None:
    """The same tensors in reverse order, which is well, and few keys, which is not unless it is allowed."""
    file = converted("flash", "llama.cpp")
    path = rewrite(file, tmp_path / "other.gguf", list(file.tensors.values())[::-1], general_name="Other")
    report = verify(path, checkpoint_path("flash"))
    assert not report.ok
    assert bad(report) == {}
    assert any(line.startswith("general.name: 'Other'") for line in report.metadata)
    assert any(line.startswith("tokenizer.ggml.tokens: missing") for line in report.metadata)
    run = cli("verify", path, "--against", checkpoint_path("flash"))
    assert run.code == 1
    assert "key general.name" in run.out
    assert "NOT VERIFIED (llama.cpp)" in run.out
    run = cli("verify", path, "--against", checkpoint_path("flash"), "--ignore-metadata")
    assert run.code == 0
    assert "allowed to differ: key general.name" in run.out
    assert "rounded within the bounds of its types (llama.cpp)" in run.out


def test_missing_extra_and_reshaped_tensors(
    checkpoint_path: PathOf, converted: Converted, cli: Cli, tmp_path: Path
) -> None:
    file = converted("flash", "llama.cpp")
    tensors = dict(file.tensors)
    gone = tensors.pop("blk.1.ffn_up_exps.weight")
    norm = tensors["output.weight"]
    tensors["output.weight"] = Raw(norm.name, norm.shape[::-1], norm.type, 0, norm.data)
    extra = Raw("blk.9.extra", (4,), "F32", 0, np.zeros(16, np.uint8))
    path = rewrite(file, tmp_path / "bad.gguf", [*tensors.values(), extra])
    report = verify(path, checkpoint_path("flash"))
    assert bad(report) == {gone.name: "missing", "blk.9.extra": "extra", "output.weight": "different"}
    (shaped,) = [t for t in report.tensors if t.status == "different"]
    assert str(list(norm.shape)) in shaped.detail
    assert str(list(norm.shape[::-1])) in shaped.detail
    run = cli("verify", path, "--against", checkpoint_path("flash"))
    assert run.code == 1
    assert run.err == ""
    assert "NOT VERIFIED" in run.out
    for name in bad(report):
        assert name in run.out


@pytest.mark.parametrize(("target", "mtp"), [("nisparks", False), ("llama.cpp", False), ("llama.cpp", True)])
def test_split_and_mtp_files(target: str, mtp: bool, checkpoint_path: PathOf, tmp_path: Path) -> None:
    paths = convert(
        checkpoint_path("mini"), tmp_path / "m.gguf", target=target, mtp=mtp, split_max_nbytes=300_000
    )  # fmt: skip
    assert len(paths) > 2
    for path in (paths[0], paths[-1]):
        report = verify(path, checkpoint_path("mini"))
        assert report.ok
        assert report.target == (f"{target} --mtp" if mtp else target)
        assert report.metadata == []
    raw = bytearray(paths[-1].read_bytes())
    raw[-100] ^= 1
    paths[-1].write_bytes(raw)
    assert not verify(paths[0], checkpoint_path("mini")).ok


def test_another_checkpoint(checkpoint_path: PathOf, converted: Converted, cli: Cli, tmp_path: Path) -> None:
    report = verify(converted("flash").path, checkpoint_path("pruned"))
    assert not report.ok
    other = rewrite(converted("flash"), tmp_path / "o.gguf", [Raw("x", (1,), "F32", 0, np.zeros(4, np.uint8))])
    with pytest.raises(GGUFError, match="none of its 1 tensors"):
        verify(other, checkpoint_path("flash"))
    assert_one_line(cli("verify", other, "--against", checkpoint_path("flash")), "o.gguf", "none of its", code=2)
    assert_one_line(
        cli("verify", tmp_path / "nowhere.gguf", "--against", checkpoint_path("flash")), "nowhere.gguf", code=2
    )
    assert_one_line(cli("verify", converted("flash").path, "--against", tmp_path), "config.json", code=2)


def test_verify_json(checkpoint_path: PathOf, converted: Converted, cli: Cli, tmp_path: Path) -> None:
    """As programs run it: JSON on stdout, nothing on stderr, the exit code."""
    good = run_process("verify", converted("flash").path, "--against", checkpoint_path("flash"), "--json")
    assert (good.code, good.err) == (0, "")
    data = json.loads(good.out)
    assert {"ok", "counts", "path", "checkpoint", "target", "tensors", "metadata", "skipped"} <= data.keys()
    assert data["ok"] is True
    assert data["target"] == "nisparks"
    assert len(data["tensors"]) == len(converted("flash").tensors)
    keys = {
        "name",
        "type",
        "status",
        "native",
        "differing",
        "first",
        "max_error",
        "rms_error",
        "relative_rms",
        "detail",
    }
    assert all(entry.keys() == keys for entry in data["tensors"])
    native = {entry["name"] for entry in data["tensors"] if entry["native"]}
    assert native == {t.name for t in converted("flash").tensors.values() if t.type in ("F8_E4M3_B128", "MXFP4")}
    path = damaged(converted("flash"), tmp_path / "bad.gguf", flip("output.weight", 0))
    broken = cli("verify", path, "--against", checkpoint_path("flash"), "--json")
    assert (broken.code, broken.err) == (1, "")
    assert json.loads(broken.out)["ok"] is False
    assert json.loads(broken.out)["counts"]["different"] == 1


# diff -----------------------------------------------------------------------------------------------------------


def test_diff_of_the_same(converted: Converted, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(converted("flash").path, path)
    assert diff(converted("flash").path, path).same
    run = cli("diff", converted("flash").path, path)
    assert (run.code, run.out.strip(), run.err) == (0, "the same", "")


def test_diff_of_a_split_and_the_whole(checkpoint_path: PathOf, tmp_path: Path) -> None:
    (whole,) = convert(checkpoint_path("mini"), tmp_path / "w.gguf")
    members = convert(checkpoint_path("mini"), tmp_path / "s.gguf", split_max_nbytes=300_000)
    assert diff(whole, members[-1]).same


def test_diff_finds_keys_names_order_shapes_types_and_values(converted: Converted, cli: Cli, tmp_path: Path) -> None:
    file = converted("flash", "llama.cpp")
    tensors = {name: t for name, t in list(file.tensors.items())[-30:] if t.type in ("F32", "BF16", "Q8_0")}
    names = list(tensors)
    flat = (n for n in names if tensors[n].type == "F32" and len(tensors[n].shape) == 1)
    shaped, value, gone = (next(flat) for _ in range(3))
    kind = next(n for n in names if tensors[n].type == "Q8_0")
    first = rewrite(file, tmp_path / "a.gguf", list(tensors.values()), general_name="A", general_license="mit")
    other = dict(tensors)
    del other[gone]
    changed = tensors[value].decode().copy()
    changed[3] += 0.25
    other[value] = Raw(value, tensors[value].shape, "F32", 0, changed.view(np.uint8))
    other[shaped] = Raw(shaped, (*tensors[shaped].shape, 1), "F32", 0, tensors[shaped].data)
    exact = tensors[kind].decode().astype("<f4")
    other[kind] = Raw(kind, exact.shape, "F32", 0, exact.reshape(-1).view(np.uint8))
    other["new"] = Raw("new", (1,), "F32", 0, np.zeros(4, np.uint8))
    second = rewrite(
        file, tmp_path / "b.gguf", list(other.values())[::-1], general_name="B", general_author="me",
        drop="deepseek4.expert_count",
    )  # fmt: skip
    found = diff(first, second)
    assert not found.same
    assert found.only_first == [gone]
    assert found.only_second == ["new"]
    assert found.reordered
    assert {line[:2] + line[2:].split(" ")[0].rstrip(":") for line in found.keys} == {
        "- general.license", "- deepseek4.expert_count", "+ general.author", "~ general.name",
    }  # fmt: skip
    by_name = {t.name: t for t in found.tensors}
    assert by_name.keys() == {value, shaped, kind}
    assert by_name[value].differing == 1
    assert by_name[value].max_error == pytest.approx(0.25, rel=1e-6)
    size = tensors[value].shape[0]
    assert by_name[value].rms_error == pytest.approx(0.25 / np.sqrt(size), rel=1e-6)
    assert by_name[shaped].shapes == (tensors[shaped].shape, (*tensors[shaped].shape, 1))
    assert by_name[kind].types == ("Q8_0", "F32")
    assert by_name[kind].differing == 0
    run = cli("diff", first, second)
    assert (run.code, run.err) == (1, "")
    for text in (gone, "new", value, shaped, "Q8_0 -> F32", "general.name", "another order", "different"):
        assert text in run.out
    data = json.loads(cli("diff", first, second, "--json").out)
    assert data["same"] is False
    assert {"paths", "keys", "only_first", "only_second", "reordered", "tensors"} <= data.keys()


def test_diff_of_native_and_rounded(converted: Converted) -> None:
    """Across dialects the names differ; the experts, which both have, are equal to the bit."""
    found = diff(converted("flash").path, converted("flash", "llama.cpp").path)
    assert not any("_exps" in t.name for t in found.tensors)
    rounded = [t for t in found.tensors if t.types == ("F8_E4M3_B128", "Q8_0")]
    assert rounded
    assert all(0 < t.relative_rms < 0.01 for t in rounded)


# inspect --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_inspect_json(target: str, converted: Converted, cli: Cli) -> None:
    file = converted("flash", target)
    run = cli("inspect", file.path, "--json")
    assert (run.code, run.err) == (0, "")
    data = json.loads(run.out)
    assert {"file", "metadata", "tensors", "by_type", "by_role"} <= data.keys()
    about = data["file"]
    assert about["dialect"] == target or target in about["equivalent_dialects"]
    assert about["nbytes"] == len(file.raw)
    assert about["data_offset"] == file.data_offset
    assert about["n_tensors"] == len(file.tensors) == len(data["tensors"])
    assert about["file_type"] == {"nisparks": "F8_E4M3_MXFP4", "llama.cpp": "MXFP4_MOE"}[target]
    assert list(data["metadata"]) == list(file.kv)
    for key, (kind, value) in file.kv.items():
        shown = data["metadata"][key]["value"]
        if kind == 6:
            assert np.float32(shown) == np.float32(value), key
            assert len(str(shown)) < 12, key
        else:
            assert shown == (value[1] if kind == 9 else value), key
    total = 0
    for entry, tensor in zip(data["tensors"], file.tensors.values(), strict=True):
        assert (entry["name"], tuple(entry["shape"]), entry["type"]) == (tensor.name, tensor.shape, tensor.type)
        assert entry["type_id"] == TYPES[tensor.type][0]
        assert entry["nbytes"] == tensor.data.size
        assert entry["file_offset"] == tensor.offset
        total += tensor.data.size
    for groups in ("by_type", "by_role"):
        assert sum(group["nbytes"] for group in data[groups].values()) == total
        assert sum(group["n_tensors"] for group in data[groups].values()) == len(file.tensors)
    mxfp4 = data["by_type"]["MXFP4"]
    assert mxfp4["bits_per_weight"] == 4.25
    assert {t.type for t in file.tensors.values()} == data["by_type"].keys()
    assert data["by_role"]["routed experts"]["n_tensors"] == 15
    assert data["by_role"]["embedding"]["n_tensors"] == data["by_role"]["output"]["n_tensors"] == 1
    assert "other" not in data["by_role"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "embedding"), ("output.weight", "output"), ("output_norm.weight", "norms"),
        ("blk.3.ffn_gate_exps.weight", "routed experts"), ("blk.3.ffn_up_shexp.weight", "shared experts"),
        ("blk.3.hc_attn_fn", "hyper-connections"), ("output_hc_fn.weight", "hyper-connections"),
        ("blk.2.indexer.attn_q_b.weight", "indexer"), ("blk.2.indexer_compressor_ape.weight", "indexer"),
        ("blk.2.ffn_gate_inp.weight", "routers"), ("blk.2.ffn_gate_tid2eid", "routers"),
        ("blk.2.exp_probs_b.bias", "routers"), ("blk.2.attn_kv_latent.weight", "attention"),
        ("blk.5.nextn.eh_proj.weight", "next-token heads"), ("what.ever", "other"),
    ],
)  # fmt: skip
def test_roles(name: str, expected: str) -> None:
    assert role(name) == expected


def test_inspect_patterns_and_limits(converted: Converted, cli: Cli) -> None:
    path = converted("flash").path
    found = inspect(path, pattern="blk.2.ffn_*_exps.weight", limit=2, elements=3)
    assert [t["name"] for t in found["tensors"]] == ["blk.2.ffn_down_exps.weight", "blk.2.ffn_gate_exps.weight"]
    assert found["n_matching"] == 3
    assert found["file"]["n_tensors"] == len(converted("flash").tensors)
    tokens = found["metadata"]["tokenizer.ggml.tokens"]
    assert len(tokens["value"]) == 3
    assert tokens["length"] == len(converted("flash").kv["tokenizer.ggml.tokens"][1][1])
    assert inspect(path, pattern="nothing")["tensors"] == []
    run = cli("inspect", path, "--tensors", "blk.2.ffn_*_exps.weight", "--limit", "1")
    assert run.code == 0
    assert "blk.2.ffn_down_exps.weight" in run.out
    assert "blk.2.ffn_up_exps.weight" not in run.out
    assert "... 2 more" in run.out
    assert "dialect: nisparks" in run.out
    assert len(cli("inspect", path, "--limit", "0").out) < len(run.out) + 400


def test_inspect_opens_types_that_nobody_knows(converted: Converted, cli: Cli, tmp_path: Path) -> None:
    """The most reported failure of readers: one unknown id and nothing is shown."""

    def change(raw: bytearray, file: Gguf) -> None:
        at = file.raw.index(b"blk.2.ffn_gate_exps.weight") + len(b"blk.2.ffn_gate_exps.weight") + 4 + 3 * 8
        assert raw[at : at + 4] == (39).to_bytes(4, "little")
        raw[at : at + 4] = (9999).to_bytes(4, "little")

    path = damaged(converted("flash"), tmp_path / "odd.gguf", change)
    for flags in ([], ["--dialect", "nisparks"]):
        run = cli("inspect", path, "--json", *flags)
        assert run.code == 0, run.err
        (entry,) = [t for t in json.loads(run.out)["tensors"] if t["name"] == "blk.2.ffn_gate_exps.weight"]
        assert entry["type_id"] == 9999
        assert "9999" in entry["type"]
    run = cli("inspect", path)
    assert run.code == 0
    assert "9999" in run.out


def test_inspect_of_split_files(checkpoint_path: PathOf, tmp_path: Path) -> None:
    paths = convert(checkpoint_path("mini"), tmp_path / "s.gguf", split_max_nbytes=300_000)
    found = inspect(paths[1])
    assert found["file"]["paths"] == [str(p) for p in paths]
    assert found["file"]["nbytes"] == sum(p.stat().st_size for p in paths)
    paths[0].unlink()
    with pytest.raises(GGUFError, match=paths[0].name):
        inspect(paths[1])


def test_what_was_left_out_on_purpose_is_not_missing(checkpoint_path: PathOf, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "o.gguf"
    convert(checkpoint_path("flash"), out, skip=["layers.1.hc_*"])
    assert {t.status for t in verify(out, checkpoint_path("flash")).tensors} == {"exact", "missing"}
    assert verify(out, checkpoint_path("flash"), skip=["layers.1.hc_*"]).ok
    assert cli("verify", out, "--against", checkpoint_path("flash"), "--skip", "layers.1.hc_*").code == 0


def test_noise_in_a_type_whose_encoder_is_not_ours_is_not_rounding(
    checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    """A dense tensor stored as Q5_0 by another tool passes when it is near the source, and not when it is noise."""
    source = converted("flash", "llama.cpp", "f32")
    name = "blk.1.attn_output_a.weight"
    reader = gguf.GGUFReader(source.path)
    rng = np.random.default_rng(0)
    for seed, ok in ((None, True), (1, False), ("nan", False)):
        out = tmp_path / f"{seed}.gguf"
        writer = gguf.GGUFWriter(out, "deepseek4")
        for tensor in reader.tensors:
            if tensor.name != name:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if seed == 1:
                values = rng.standard_normal(values.shape).astype(np.float32) * values.std()
            # The gguf package writes Q5_0; ggufx does not promise its bytes, so there is nothing to compare them with.
            kind = gguf.GGMLQuantizationType.Q5_0
            packed = gguf.quants.quantize(values, kind)
            if seed == "nan":
                packed[0, :2] = (0x00, 0x7E)  # one block's scale
            writer.add_tensor(name, packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        report = verify(out, checkpoint_path("flash"), ignore_metadata=True)
        status = next(t for t in report.tensors if t.name == name)
        assert (report.ok, status.status) == ((True, "rounded") if ok else (False, "different"))


def test_native_codes_that_were_requantized_do_not_pass(
    checkpoint_path: PathOf, converted: Converted, tmp_path: Path
) -> None:
    """Experts as Q8_0 are near enough, but their FP4 codes are gone, and that is what verify is asked about."""
    source = converted("flash", "nisparks", "q8_0")
    out, name = tmp_path / "o.gguf", "blk.1.ffn_up_exps.weight"
    reader = gguf.GGUFReader(converted("flash", "llama.cpp", "q8_0").path)
    writer = gguf.GGUFWriter(out, "deepseek4")
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name == name:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(gguf.quants.dequantize(tensor.data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert name in source.tensors
    report = verify(out, checkpoint_path("flash"), ignore_metadata=True)
    found = next(t for t in report.tensors if t.name == name)
    assert (found.native, found.status, report.ok) == (True, "rounded", False)


def test_a_file_of_another_fork_is_listed_and_copied(tmp_path: Path, cli: Cli) -> None:
    """Id 42 as another fork has it: 34 bytes per 128 values."""
    path = tmp_path / "o.gguf"
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
    header += struct.pack("<Q6sIQQIQ", 6, b"w\x1b[31m", 2, 4096, 2, 42, 0)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(4096 * 2 // 128 * 34))
    assert_one_line(cli("inspect", path, "--dialect", "llama.cpp"), "id 42", "--dialect opaque")
    run = cli("inspect", path)
    assert run.code == 0
    assert "Q2_0_G128 (id 42)" in run.out
    assert "note: type id 42 of tensor" in run.out
    assert "\x1b" not in run.out
    assert cli("rewrite", path, "--outfile", tmp_path / "r.gguf").code == 0
    assert (tmp_path / "r.gguf").read_bytes() == path.read_bytes()
    run = cli("inspect", path, "--dialect", "opaque")
    assert run.code == 0
    assert "id 42" in run.out
    assert "\x1b" not in run.out
    assert "w\\x1b" in run.out
    assert cli("rewrite", path, "--outfile", tmp_path / "c.gguf", "--dialect", "opaque").code == 0
    assert (tmp_path / "c.gguf").read_bytes() == path.read_bytes()


def test_json_has_no_nan(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "o.gguf"
    writer = gguf.GGUFWriter(path, "x")
    writer.add_float32("x.nan", float("nan"))
    writer.add_array("x.inf", [1.0, float("inf")])
    writer.add_tensor("t", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(cli("inspect", path, "--json").out, parse_constant=refuse)
    assert found["metadata"]["x.nan"]["value"] is None
    assert found["metadata"]["x.inf"]["value"] == [1.0, None]
