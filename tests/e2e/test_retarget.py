"""Moving files between dialects: against conversions of the checkpoint, and against the tables of dsv4."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ggufx
from ggufx import types
from ggufx.container import Value, ValueType, align_up, encode_header
from ggufx.convert import convert
from ggufx.edit import plan_edit, set_keys
from ggufx.errors import PlanError
from ggufx.retarget import plan_retarget, retarget
from ggufx.verify import verify

from .conftest import Run, assert_one_line
from .oracle import FIXTURES, TYPES, Gguf, Source, expected_of, rule, values_of

Get = Callable[[str], Source]
Converted = Callable[..., Gguf]
Cli = Callable[..., Run]

ROPE = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")


def edited(path: Path, out: Path, remove: tuple[str, ...] = (), **values: Value) -> Path:
    """A copy with other metadata; ``__`` in a name stands for a dot."""
    shutil.copy(path, out)
    set_keys(plan_edit(out, {key.replace("__", "."): value for key, value in values.items()}, remove))
    return out


# Against conversions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["flash", "flash-base", "pro-like", "pruned", "one-file"])
def test_native_file_becomes_what_a_conversion_gives(case: str, converted: Converted, tmp_path: Path) -> None:
    out = tmp_path / "moved.gguf"
    assert retarget(converted(case).path, out, "llama.cpp") == [out]
    assert out.read_bytes() == converted(case, "llama.cpp", "bf16").raw


def test_rows_that_fp8_blocks_do_not_divide(converted: Converted, tmp_path: Path) -> None:
    retarget(converted("odd-96").path, tmp_path / "o.gguf", "ik_llama.cpp")
    moved, wanted = Gguf(tmp_path / "o.gguf"), converted("odd-96", "ik_llama.cpp", "bf16")
    assert moved.raw[moved.data_offset :] == wanted.raw[wanted.data_offset :]
    # The name is in title case, so the part of it that the directory spelled "odd" is not known any more.
    assert {key for key in wanted.kv if moved.kv[key] != wanted.kv[key]} == {"general.basename"}


@pytest.mark.parametrize("dense", ["q8_0", "f32"])
def test_other_types_of_fp8(dense: str, converted: Converted, tmp_path: Path) -> None:
    retarget(converted("flash").path, tmp_path / "o.gguf", "llama.cpp", dense=dense)
    assert (tmp_path / "o.gguf").read_bytes() == converted("flash", "llama.cpp", dense).raw


def test_the_issue_without_rope_scaling(converted: Converted, tmp_path: Path) -> None:
    keys = tuple(f"deepseek4.rope.scaling.{key}" for key in ROPE)
    short = edited(converted("flash").path, tmp_path / "45.gguf", keys)
    assert len(Gguf(short).kv) == len(converted("flash").kv) - 5
    with ggufx.open(short) as file:
        notes = plan_retarget(file, tmp_path / "o.gguf", "llama.cpp").notes
    assert sum("rope.scaling" in note and "not in the file" in note for note in notes) == 5
    retarget(short, tmp_path / "o.gguf", "llama.cpp")
    assert (tmp_path / "o.gguf").read_bytes() == converted("flash", "llama.cpp", "bf16").raw


def test_a_name_that_says_version_and_base(checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "DeepSeek-V4-Flash-0731"
    shutil.copytree(checkpoint_path("mini"), path)
    convert(path, tmp_path / "n.gguf")
    convert(path, tmp_path / "l.gguf", target="llama.cpp", dense="bf16")
    retarget(tmp_path / "n.gguf", tmp_path / "o.gguf", "llama.cpp")
    assert Gguf(tmp_path / "l.gguf").kv["general.version"] == (8, "0731")
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "l.gguf").read_bytes()


def test_named_chat_templates_move_along(editable: Source, tmp_path: Path) -> None:
    for name in ("tool_use", "rag-2"):
        folder = editable.path / "additional_chat_templates"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jinja").write_text(f"template of {name}")
    (editable.path / "chat_template.jinja").write_text("the default")
    convert(editable.path, tmp_path / "n.gguf")
    convert(editable.path, tmp_path / "l.gguf", target="llama.cpp", dense="bf16")
    retarget(tmp_path / "n.gguf", tmp_path / "moved.gguf", "llama.cpp")
    assert (tmp_path / "moved.gguf").read_bytes() == (tmp_path / "l.gguf").read_bytes()
    retarget(tmp_path / "l.gguf", tmp_path / "back.gguf", "nisparks")
    native, back = Gguf(tmp_path / "n.gguf").kv, Gguf(tmp_path / "back.gguf").kv
    assert list(back) == list(native)
    assert back | {"general.file_type": native["general.file_type"]} == native
    assert back["tokenizer.chat_templates"] == (9, (8, ["rag_2", "tool_use"]))
    assert back["tokenizer.chat_template.rag_2"] == (8, "template of rag-2")


@pytest.mark.parametrize("case", ["flash", "pro-like", "one-file"])
def test_back_to_nisparks_names_and_keys(case: str, converted: Converted, source: Get, tmp_path: Path) -> None:
    native = converted(case)
    retarget(converted(case, "llama.cpp", "bf16").path, tmp_path / "o.gguf", "nisparks")
    moved = Gguf(tmp_path / "o.gguf")
    assert list(moved.kv) == list(native.kv)
    assert {k: v for k, v in moved.kv.items() if native.kv[k] != v} == {"general.file_type": (4, 38)}
    assert [(t.name, t.shape) for t in moved.tensors.values()] == [(t.name, t.shape) for t in native.tensors.values()]
    for tensor in moved.tensors.values():
        wanted = native.tensors[tensor.name]
        assert tensor.type == wanted.type or (tensor.type, wanted.type) == ("BF16", "F8_E4M3_B128")
        np.testing.assert_array_equal(tensor.decode(), wanted.decode(), err_msg=tensor.name)
    # And there again: the FP8 is BF16 for good, nothing else was lost.
    retarget(tmp_path / "o.gguf", tmp_path / "again.gguf", "llama.cpp")
    assert (tmp_path / "again.gguf").read_bytes() == converted(case, "llama.cpp", "bf16").raw


def test_values_that_nisparks_has_no_key_for_survive(converted: Converted, tmp_path: Path) -> None:
    odd = {
        "deepseek4__hyper_connection__sinkhorn_iterations": Value.u32(7),
        "deepseek4__hyper_connection__epsilon": Value.f32(1e-5),
        "deepseek4__attention__compress_ratios": Value.array(ValueType.INT32, [0, 0, 4, 128, 4, 0, 0, 0]),
        "general__url": Value.string("https://example.org"),
        "quantize__imatrix__file": Value.string("x.dat"),
    }
    first = edited(converted("flash", "llama.cpp", "bf16").path, tmp_path / "odd.gguf", **odd)
    retarget(first, tmp_path / "n.gguf", "nisparks")
    assert set(Gguf(tmp_path / "n.gguf").kv) == set(converted("flash").kv) | {k.replace("__", ".") for k in odd}
    retarget(tmp_path / "n.gguf", tmp_path / "back.gguf", "llama.cpp")
    assert Gguf(tmp_path / "back.gguf").kv == Gguf(first).kv


def test_a_router_that_was_never_bfloat16_stays_float32(converted: Converted, tmp_path: Path) -> None:
    path = tmp_path / "n.gguf"
    shutil.copy(converted("mini").path, path)
    tensor = converted("mini").tensors["blk.1.ffn_gate_inp.weight"]
    with path.open("rb+") as file:
        file.seek(tensor.offset)
        file.write(np.float32(1 / 3).tobytes())
    retarget(path, tmp_path / "o.gguf", "llama.cpp")
    moved = Gguf(tmp_path / "o.gguf").tensors
    assert [moved[f"blk.{n}.ffn_gate_inp.weight"].type for n in range(3)] == ["BF16", "F32", "BF16"]
    assert moved["blk.1.ffn_gate_inp.weight"].decode().flat[0] == np.float32(1 / 3)


def test_files_of_the_same_form_keep_every_type(converted: Converted, tmp_path: Path) -> None:
    """A router in F32, which llama.cpp's own files do not have, is no reason to change it."""
    retarget(converted("mini").path, tmp_path / "d.gguf", "ds4")
    retarget(tmp_path / "d.gguf", tmp_path / "l.gguf", "llama.cpp")
    assert Gguf(tmp_path / "l.gguf").tensors["blk.0.ffn_gate_inp.weight"].type == "BF16"
    odd = tmp_path / "odd.gguf"
    with ggufx.open(tmp_path / "l.gguf") as file:
        name = "blk.0.ffn_gate_inp.weight"
        wide = file[name].numpy().tobytes()
        content = [(t.name, t.shape, 0 if t.name == name else t.type_id, wide if t.name == name else t.packed.tobytes())
                   for t in file.tensors]  # fmt: skip
        write_gguf(odd, content, **file.metadata.typed())
    retarget(odd, tmp_path / "ik.gguf", "ik_llama.cpp")
    assert (tmp_path / "ik.gguf").read_bytes() == odd.read_bytes()
    # Without a file type in the source, there is one in the result all the same.
    bare = edited(converted("mini").path, tmp_path / "bare.gguf", ("general.file_type",))
    retarget(bare, tmp_path / "o.gguf", "llama.cpp")
    assert (tmp_path / "o.gguf").read_bytes() == converted("mini", "llama.cpp", "bf16").raw


NAMES_OF_OTHERS = {
    "attn_kv_a_mqa": ("llama.cpp", lambda name: name.replace("attn_kv.weight", "attn_kv_a_mqa.weight")),
    "nisparks' compressors": (
        "llama.cpp",
        lambda name: name.replace("attn_kv.", "attn_kv_latent.").replace("attn_compressor_", "attn_compress_"),
    ),
    "bare": ("llama.cpp", lambda name: re.sub(r"(ape|_fn|_base|_scale|tid2eid)\.weight$", r"\1", name)),
    "suffixed": (
        "nisparks",
        lambda name: name.replace("exp_probs_b", "exp_probs_b.bias") if "." in name[-14:] and "probs" in name
        else re.sub(r"(ape|_fn|_base|_scale|tid2eid|_sinks)$", r"\1.weight", name),
    ),
    "upstream's kv": ("nisparks", lambda name: name.replace("attn_kv_latent", "attn_kv")),
}  # fmt: skip
"""Names that third-party files mix: the form, and how they spell it."""


@pytest.mark.parametrize("who", NAMES_OF_OTHERS)
def test_names_of_other_writers_become_the_targets(who: str, converted: Converted, tmp_path: Path) -> None:
    form, rename = NAMES_OF_OTHERS[who]
    plain = converted("flash", form, "bf16")
    mixed = remade(plain.path, tmp_path / "mixed.gguf", rename=rename)
    assert Gguf(mixed).tensors.keys() != plain.tensors.keys()
    for target in ("llama.cpp", "nisparks"):
        out = tmp_path / f"{target}.gguf"
        retarget(mixed, out, target)
        wanted = converted("flash", target, "bf16").tensors
        moved = Gguf(out).tensors
        assert [(t.name, t.shape) for t in moved.values()] == [(t.name, t.shape) for t in wanted.values()]
        assert all(np.array_equal(moved[name].decode(), wanted[name].decode()) for name in wanted)
        assert verify(out, mixed).ok
    assert (tmp_path / "llama.cpp.gguf").read_bytes() == converted("flash", "llama.cpp", "bf16").raw


# ds4 --------------------------------------------------------------------------------------------------------------


def _ds4_accepts(name: str) -> set[str]:
    """What NOTES.md says that ds4 loads, and map.tsv's published type of a tensor."""
    listed = {rule(name)[0]["antirez_mxfp4_type"]}
    if re.search(r"hc_\w*fn$|compressor\.(ape|wkv|wgate)|gate\.weight$", name):
        listed |= {"F16", "F32"}
    if name.endswith("indexer.wq_b.weight"):
        listed |= {"F16", "Q8_0"}
    return listed


@pytest.mark.parametrize("start", ["nisparks", "llama.cpp"])
def test_ds4_types_names_and_keys(start: str, source: Get, converted: Converted, tmp_path: Path) -> None:
    checkpoint = source("flash")
    retarget(converted("flash", start, "bf16").path, tmp_path / "o.gguf", "ds4")
    moved = Gguf(tmp_path / "o.gguf")
    rules = expected_of(checkpoint, "llama.cpp")
    assert [(t.name, t.shape) for t in moved.tensors.values()] == [(r.name, r.shape) for r in rules]
    for each in rules:
        tensor = moved.tensors[each.name]
        assert tensor.type in _ds4_accepts(each.sources[0]), each.name
        wanted = values_of(checkpoint, each)
        if tensor.type in ("F16", "Q8_0"):
            decoded = types.get(tensor.type).decode(tensor.data, tensor.shape)
            error = np.abs(decoded - wanted).max() / np.abs(wanted).max()
            assert error < (0.005 if tensor.type == "Q8_0" else 1e-6), each.name
        else:
            np.testing.assert_array_equal(tensor.decode(), wanted, err_msg=each.name)
    with (FIXTURES / "kv_keys.tsv").open(encoding="utf-8") as file:
        column = {row["key"]: row["antirez"] for row in csv.DictReader(file, delimiter="\t")}
    assert [key for key, need in column.items() if need == "required" and key not in moved.kv] == []
    assert [key for key in moved.kv if column[key] == "n"] == []
    assert moved.kv["deepseek4.vocab_size"] == (4, checkpoint.config["vocab_size"])


def test_ds4_in_half_floats_as_the_published_files(converted: Converted, tmp_path: Path) -> None:
    start = converted("flash", "llama.cpp", "bf16")
    paths = retarget(start.path, tmp_path / "o.gguf", "ds4", plain="f16")
    moved = Gguf(paths[0])
    with (FIXTURES / "map.tsv").open(encoding="utf-8") as file:
        column = {row["antirez_ds4_name"]: row["antirez_mxfp4_type"] for row in csv.DictReader(file, delimiter="\t")}
    for tensor in moved.tensors.values():
        wanted = column[re.sub(r"^blk\.\d+\.", "blk.{L}.", tensor.name)]
        assert tensor.type == wanted, tensor.name
    for name in ("output_hc_fn.weight", "blk.0.hc_attn_fn.weight", "blk.2.attn_compressor_ape.weight"):
        assert start.tensors[name].type == "F32"
        exact = start.tensors[name].decode()
        halves = np.frombuffer(moved.tensors[name].data, "<f2").reshape(exact.shape)
        np.testing.assert_array_equal(halves, exact.astype(np.float16))
    with ggufx.open(start.path) as file:
        notes = plan_retarget(file, tmp_path / "p.gguf", "ds4", plain="f16").notes
    assert "type of output_hc_fn.weight: F32 -> F16, rounded (1 tensor)" in notes


def test_ds4_back_to_llama_cpp_has_its_keys(converted: Converted, tmp_path: Path) -> None:
    retarget(converted("flash").path, tmp_path / "d.gguf", "ds4")
    retarget(tmp_path / "d.gguf", tmp_path / "o.gguf", "llama.cpp")
    wanted = converted("flash", "llama.cpp", "bf16")
    moved = Gguf(tmp_path / "o.gguf")
    assert moved.kv == wanted.kv
    assert list(moved.tensors) == list(wanted.tensors)


# Other models -----------------------------------------------------------------------------------------------------


def write_gguf(path: Path, tensors: list[tuple[str, tuple[int, ...], int, bytes]], **keys: Value) -> Path:
    """Write a small file, tensor ids and bytes as given."""
    offset, directory, data = 0, [], b""
    for name, shape, number, content in tensors:
        directory.append((name, shape, number, offset))
        data += content + bytes(-len(content) % 32)
        offset = align_up(offset + len(content), 32)
    metadata = {"general.architecture": Value.string("llama")}
    metadata |= {key.replace("__", "."): value for key, value in keys.items()}
    path.write_bytes(encode_header(metadata, directory, 32) + data)
    return path


def remade(
    path: Path,
    out: Path,
    tensors: dict[str, tuple[tuple[int, ...], int, bytes] | None] | None = None,
    rename: Callable[[str], str] = str,
    **keys: Value,
) -> Path:
    """A copy with other keys, other names, and of some tensors another shape, id and bytes, or none of them at all."""
    with ggufx.open(path) as file:
        lines = {t.name: (t.shape, t.type_id, t.packed.tobytes()) for t in file.tensors} | (tensors or {})
        content = [(rename(name), *line) for name, line in lines.items() if line is not None]
        return write_gguf(out, content, **file.metadata.typed(), **keys)


def _values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_other_architectures_keep_names_and_change_only_what_must_change(tmp_path: Path) -> None:
    fp8, f32 = types.get("F8_E4M3_B128").encode(_values((4, 256))), _values((3,))
    path = write_gguf(
        tmp_path / "n.gguf",
        [("a.weight", (4, 256), 42, fp8.tobytes()), ("b.weight", (3,), 0, f32.tobytes())],
        general__file_type=Value.u32(41),
        ggufx__dialect=Value.string("nisparks"),
    )
    retarget(path, tmp_path / "o.gguf", "llama.cpp")
    with ggufx.open(path) as old, ggufx.open(tmp_path / "o.gguf") as new:
        assert [(t.name, t.type) for t in new.tensors] == [("a.weight", "BF16"), ("b.weight", "F32")]
        assert np.array_equal(new["a.weight"].numpy(), old["a.weight"].numpy())
        assert (new.dialect, new.metadata["general.file_type"]) == ("llama.cpp", 32)
    assert verify(tmp_path / "o.gguf", path).ok


@pytest.mark.parametrize("kind", ["IQ2_XXS", "Q2_K"])
def test_the_file_type_is_that_of_most_weights(kind: str, converted: Converted, tmp_path: Path) -> None:
    """Quantized experts make the file what it is, whatever becomes of FP8."""
    number = {"IQ2_XXS": 19, "Q2_K": 10}[kind]
    codec = types.get(kind)
    values = np.random.default_rng(0).normal(size=(64, 128, 256)).astype(np.float32)
    experts = (values.shape, codec.ids["llama.cpp"], codec.encode(values, np.ones(256, np.float32)).tobytes())
    path = tmp_path / "n.gguf"
    with ggufx.open(converted("mini").path) as file:
        fp8 = file["blk.0.attn_q_b.weight"]
        content = [("blk.0.ffn_up_exps.weight", *experts),
                   ("blk.0.attn_q_b.weight", fp8.shape, fp8.type_id, fp8.packed.tobytes())]  # fmt: skip
        write_gguf(path, content, general__file_type=Value.u32(number))  # type: ignore[arg-type]
    for target in ("llama.cpp", "nisparks"):
        retarget(path, tmp_path / f"{target}.gguf", target)
        with ggufx.open(tmp_path / f"{target}.gguf") as moved:
            assert moved.metadata["general.file_type"] == number


def test_a_form_of_ik_that_others_do_not_load_is_told(tmp_path: Path) -> None:
    names = [f"blk.0.attn_{part}.weight" for part in ("kv_b", "k_b", "v_b")]
    keys = {"general__architecture": Value.string("deepseek2")}
    both = write_gguf(tmp_path / "ik.gguf", [(name, (4, 2), 0, bytes(32)) for name in names], **keys)
    upstream = write_gguf(tmp_path / "l.gguf", [(name, (2, 2, 2), 0, bytes(32)) for name in names[1:]], **keys)
    for path, target, told in (
        (both, "llama.cpp", True),
        (both, "ik_llama.cpp", False),
        (upstream, "llama.cpp", False),
    ):
        with ggufx.open(path) as file:
            notes = plan_retarget(file, tmp_path / "o.gguf", target).notes
        assert any("start from the checkpoint" in note for note in notes) is told


def test_types_of_ik_need_a_word(tmp_path: Path) -> None:
    iq = types.get("IQ4_KS").encode(_values((4, 256)))
    path = write_gguf(tmp_path / "ik.gguf", [("a.weight", (4, 256), 144, iq.tobytes())])
    retarget(path, tmp_path / "same.gguf", "ik_llama.cpp")
    assert (tmp_path / "same.gguf").read_bytes() == path.read_bytes()
    with pytest.raises(PlanError, match=r"'a\.weight' is IQ4_KS, which llama\.cpp cannot hold; --dense f32"):
        retarget(path, tmp_path / "o.gguf", "llama.cpp")
    retarget(path, tmp_path / "o.gguf", "llama.cpp", dense="f32")
    report = verify(tmp_path / "o.gguf", path)
    assert [(t.type, t.status) for t in report.tensors] == [("F32", "exact")]


def test_types_that_the_target_does_not_have_are_refused(tmp_path: Path) -> None:
    for number, label in ((999, "id 999"), (337, r"IQ2_K_R4 \(id 337\)")):
        path = write_gguf(tmp_path / "u.gguf", [("a.weight", (4, 256), number, bytes(4 * 76))])
        with pytest.raises(PlanError, match=rf"'a\.weight' has type {label}.*llama\.cpp would not load the file"):
            retarget(path, tmp_path / "o.gguf", "llama.cpp")
    retarget(path, tmp_path / "ik.gguf", "ik_llama.cpp")
    assert (tmp_path / "ik.gguf").read_bytes() == path.read_bytes()
    path = write_gguf(tmp_path / "u.gguf", [("a.weight", (4, 256), 42, bytes(range(256)))])
    with ggufx.open(path, dialect="opaque") as file, pytest.raises(PlanError, match="type id 42"):
        plan_retarget(file, tmp_path / "p.gguf", "llama.cpp")


def test_the_outfile_is_named_after_the_file_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "u.gguf", [("a.weight", (4, 256), 1, bytes(2048))], general__file_type=Value.u32(1))
    assert retarget(path, tmp_path / "m-{ftype}.gguf", "ik_llama.cpp") == [tmp_path / "m-f16.gguf"]


def test_plain_is_a_choice_of_ds4_only(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "u.gguf", [("a.weight", (4, 256), 1, bytes(2048))])
    with ggufx.open(path) as file, pytest.raises(PlanError, match=r"--plain f16: is a choice that ds4's readers need"):
        plan_retarget(file, tmp_path / "p.gguf", "nisparks", plain="f16")


# Verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["llama.cpp", "ds4", "nisparks"])
def test_verify_against_the_gguf(target: str, converted: Converted, tmp_path: Path, cli: Cli) -> None:
    source = converted("flash").path
    out = tmp_path / "o.gguf"
    retarget(source, out, target)
    report = verify(out, source)
    assert report.ok
    assert report.metadata == []
    assert set(report.counts()) == ({"exact", "rounded"} if target == "ds4" else {"exact"})
    run = cli("verify", out, "--against", source)
    assert run.code == 0
    assert (
        f"{'rounded within the bounds of its types' if target == 'ds4' else 'verified'} ({report.target}): " in run.out
    )


@pytest.mark.parametrize("name", ["blk.2.ffn_up_exps.weight", "blk.0.attn_q_a.weight", "blk.1.ffn_gate_tid2eid.weight"])
def test_verify_finds_a_changed_bit(name: str, converted: Converted, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    retarget(converted("flash").path, out, "llama.cpp")
    tensor = Gguf(out).tensors[name]
    with out.open("rb+") as file:
        file.seek(tensor.offset + 1)
        byte = file.read(1)[0]
        file.seek(tensor.offset + 1)
        file.write(bytes([byte ^ 1]))
    report = verify(out, converted("flash").path)
    assert not report.ok
    assert [(t.name, t.status, t.differing) for t in report.tensors if t.status != "exact"] == [(name, "different", 1)]


def test_verify_tells_keys_and_tensors_that_are_not_right(converted: Converted, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    retarget(converted("flash").path, out, "llama.cpp")
    edited(out, tmp_path / "e.gguf", ("deepseek4.expert_gating_func",), general__name=Value.string("Other"))
    report = verify(tmp_path / "e.gguf", converted("flash").path)
    assert not report.ok
    assert report.counts().keys() == {"exact"}
    assert sorted(line.split(":")[0] for line in report.metadata) == ["deepseek4.expert_gating_func", "general.name"]
    report = verify(out, converted("pruned").path)
    assert not report.ok
    with pytest.raises(PlanError, match="none of its"):
        verify(write_gguf(tmp_path / "x.gguf", [("x", (1,), 0, bytes(4))]), converted("flash").path)


def test_verify_takes_a_copy_of_what_it_cannot_read_as_a_model(converted: Converted, tmp_path: Path) -> None:
    """A key that was missing, set in a copy: the source alone says too little to be moved."""
    key = "deepseek4.expert_used_count"
    short = edited(converted("mini").path, tmp_path / "short.gguf", (key,))
    mended = edited(short, tmp_path / "mended.gguf", **{key: Value.u32(6)})
    report = verify(mended, short)
    assert (report.ok, report.target, report.metadata) == (False, "a copy", [f"{key}: not expected"])
    assert verify(mended, short, allow_keys=[key]).ok


# Errors, and the command ------------------------------------------------------------------------------------------


def _without(path: Path, out: Path, name: str) -> Path:
    return remade(path, out, {name: None})


def test_errors_name_file_tensor_and_rule(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    native, out = converted("mini").path, tmp_path / "o.gguf"

    def fails(path: Path, target: str, *needed: str, flags: tuple[str, ...] = ()) -> None:
        assert_one_line(cli("retarget", path, "--outfile", out, "--target", target, *flags), *needed)
        assert not out.exists()

    gone = tmp_path / "gone.gguf"
    fails(
        _without(native, gone, "blk.1.attn_q_a.weight"), "llama.cpp", str(gone), "layers.1.attn.wq_a.weight", "Missing"
    )
    fails(_without(native, gone, "hc_head_base"), "ds4", str(gone), "hc_head_base")
    wrong = edited(native, tmp_path / "w.gguf", deepseek4__attention__q_lora_rank=Value.u32(96))
    fails(wrong, "llama.cpp", str(wrong), "metadata says")
    wrong = edited(native, tmp_path / "w.gguf", ("deepseek4.expert_used_count",))
    fails(wrong, "llama.cpp", str(wrong), "deepseek4.expert_used_count is missing", "ggufx set")
    wrong = edited(native, tmp_path / "w.gguf", deepseek4__expert_count=Value.string("many"))
    fails(wrong, "llama.cpp", str(wrong), "deepseek4.expert_count is 'many', expected an integer", "ggufx set")
    ratios = Value.array(ValueType.INT32, [0, 4, 4])
    wrong = edited(
        converted("mini", "llama.cpp").path, tmp_path / "w.gguf", deepseek4__attention__compress_ratios=ratios
    )
    fails(wrong, "nisparks", str(wrong), "[0, 4, 4]", "[0, 0, 4]")
    fails(converted("flash", "llama.cpp", mtp=True).path, "nisparks", "MTP block", "no form")
    other = write_gguf(tmp_path / "x.gguf", [("x", (1,), 0, bytes(4))])
    fails(other, "ds4", str(other), "'llama'", "no form")
    fails(native, "ds4", "q8_0", flags=("--dense", "bf16"))
    assert_one_line(cli("retarget", native, "--outfile", native, "--target", "ds4"), str(native), "source")


@pytest.mark.parametrize(
    ("name", "shape", "number", "nbytes"),
    [
        ("hc_head_base", (), 0, 4),
        ("token_embd.weight", (128,), 0, 512),
        ("blk.0.attn_output_a.weight", (512,), 0, 2048),
        ("blk.0.attn_output_a.weight", (512, 0), 0, 0),
        ("blk.2.attn_compress_ape", (), 0, 4),
        ("blk.0.ffn_gate_exps.weight", (6, 32), 39, 102),
        # Nothing is counted to a number that a file only claims: these would take hours, and all memory.
        ("blk.0.ffn_gate_exps.weight", (2**50, 0, 32), 39, 0),
        ("blk.0.ffn_gate_exps.weight", (2**50, 1, 32), 999, 32),
    ],
)
def test_shapes_that_no_model_has(
    name: str, shape: tuple[int, ...], number: int, nbytes: int, converted: Converted, tmp_path: Path, cli: Cli
) -> None:
    odd = remade(converted("mini").path, tmp_path / "odd.gguf", {name: (shape, number, bytes(nbytes))})
    for command in (("retarget", "--target", "llama.cpp"), ("export",)):
        run = cli(command[0], odd, "--outfile", tmp_path / "o", *command[1:])
        assert_one_line(run, str(odd), repr(name), f"is {list(shape)}", "expected")
        assert not (tmp_path / "o").exists()


def test_keys_that_contradict_the_tensors(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    def fails(*needed: str, **keys: Value) -> None:
        odd = edited(converted("mini").path, tmp_path / "odd.gguf", **keys)
        for command in (("retarget", "--target", "llama.cpp"), ("export",)):
            run = cli(command[0], odd, "--outfile", tmp_path / "o", *command[1:])
            assert_one_line(run, str(odd), *needed)
            assert "--skip" not in run.err  # a flag of other commands

    for count in (2, 4, 2**32 - 1):
        fails(f"deepseek4.block_count is {count}", "tensors of 3 blocks", deepseek4__block_count=Value.u32(count))
    fails("[6, 128]", "[4294967295, 128]", deepseek4__expert_count=Value.u32(2**32 - 1))
    for number in (float("inf"), float("nan")):
        fails(f"rope.freq_base is {number}", "expected a number", deepseek4__rope__freq_base=Value.f32(number))


def test_a_block_number_beyond_the_count(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    odd = remade(converted("mini").path, tmp_path / "odd.gguf", rename=lambda name: name.replace("blk.2.", "blk.7."))
    run = cli("retarget", odd, "--outfile", tmp_path / "o.gguf", "--target", "llama.cpp")
    assert_one_line(run, str(odd), "'layers.7.attn.attn_sink'")
    assert "--skip" not in run.err


def test_a_name_that_is_no_text(converted: Converted, tmp_path: Path) -> None:
    odd = edited(converted("mini").path, tmp_path / "odd.gguf", general__name=Value.u32(7))
    retarget(odd, tmp_path / "o.gguf", "llama.cpp")
    assert Gguf(tmp_path / "o.gguf").kv["general.name"] == (4, 7)


def test_mtp_files_move_between_the_two_that_share_names(converted: Converted, tmp_path: Path) -> None:
    mtp = converted("flash", "llama.cpp", mtp=True)
    retarget(mtp.path, tmp_path / "o.gguf", "ik_llama.cpp")
    assert (tmp_path / "o.gguf").read_bytes() == mtp.raw


def test_dry_run_and_split(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    native = converted("flash").path
    out = tmp_path / "o.gguf"
    arguments = ("retarget", native, "--outfile", out, "--target", "llama.cpp")
    data: dict[str, Any] = json.loads(cli(*arguments, "--dry-run", "--json").out)
    assert data["file"]["nbytes"] == len(converted("flash", "llama.cpp", "bf16").raw)
    first = next(t for t in data["tensors"] if t["name"] == "blk.0.attn_kv.weight")
    assert (first["type"], first["sources"], first["lossless"]) == ("BF16", ["blk.0.attn_kv_latent.weight"], True)
    run = cli(*arguments, "--dry-run")
    for text in (
        "attn_kv_latent.weight -> blk.N.attn_kv.weight (5",
        "F8_E4M3_B128 -> BF16, exact",
        "gating_func = 4: not in",
    ):
        assert text in run.out
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, "--split-max-size", "1M").code == 0
    members = sorted(tmp_path.iterdir())
    assert len(members) > 3
    assert verify(members[1], native).ok
    assert cli("merge-splits", members[0], "--outfile", out).code == 0
    assert out.read_bytes() == converted("flash", "llama.cpp", "bf16").raw


def test_outputs_below_a_file(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("mine")
    for out in ("file/o.gguf", "file/deeper/o.gguf"):
        run = cli("retarget", converted("mini").path, "--outfile", tmp_path / out, "--target", "llama.cpp")
        assert_one_line(run, str(tmp_path / out), "is no directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_existing_outputs_are_kept(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "o.gguf"
    out.write_bytes(b"mine")
    arguments = ("retarget", converted("mini").path, "--outfile", out, "--target", "llama.cpp")
    assert_one_line(cli(*arguments), str(out), "--overwrite")
    assert out.read_bytes() == b"mine"
    assert cli(*arguments, "--overwrite").code == 0
    assert out.read_bytes() == converted("mini", "llama.cpp", "bf16").raw


def test_bf16_oracle_is_not_ours() -> None:
    """F8 to BF16 is exact for every code and the scales that checkpoints have, by ml_dtypes alone."""
    codes = (
        np.array([c for c in range(256) if c & 127 != 127], np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    for scale in (-30, -8, 0, 8):
        values = np.ldexp(codes, scale)
        assert np.array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), values)
    assert TYPES["BF16"][2] == 2
