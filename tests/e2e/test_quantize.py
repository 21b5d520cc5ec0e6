"""``ggufx quantize`` end to end: against the gguf package's encoders, codecs over decoded sources, the field's tables."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import ggufx
from ggufx import execute, quantize, recipe, retarget, rewrite, types
from ggufx.container import Value, encode_header
from ggufx.errors import FallbackError, GGUFError, PlanError, RecipeError

from .conftest import Run, assert_nothing_left, assert_one_line, start
from .oracle import ROOT, Gguf, Source

Cli = Callable[..., Run]
PathOf = Callable[[str], Path]
NAMES = {
    "token_embd.weight": (96, 256), "output.weight": (96, 256), "output_norm.weight": (256,),
    "blk.0.attn_norm.weight": (256,), "blk.0.attn_q.weight": (64, 256), "blk.0.attn_output.weight": (64, 96),
    "blk.0.ffn_gate_inp.weight": (4, 256), "blk.0.ffn_up_exps.weight": (4, 32, 256), "blk.0.ffn_down_exps.weight": (4, 64, 512),
    "blk.1.ffn_up.weight": (32, 256), "blk.1.odd.weight": (8, 33),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small F32/F16/BF16 model, written by the gguf package."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Small")
    writer.add_file_type(1)
    for name, shape in NAMES.items():
        values = rng.standard_normal(shape, np.float32) * 0.02
        if name == "blk.1.ffn_up.weight":
            values = values.astype(np.float16)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kinds(path: Path) -> dict[str, str]:
    """Type names by tensor."""
    with ggufx.open(path) as file:
        return {tensor.name: tensor.type for tensor in file.tensors}


def written(path: Path, name: str) -> np.ndarray:
    """Packed bytes of a tensor."""
    with ggufx.open(path) as file:
        return np.array(file[name].packed)


def values_of(path: Path, name: str) -> np.ndarray:
    """Values of a tensor by the gguf package."""
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(NAMES[name])


# Bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4"])
def test_reference_effort_gives_the_gguf_packages_bytes(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize.quantize(model, out, default=kind, pure=True, effort="reference")
    for name in ("token_embd.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_up.weight"):
        expected = gguf.quants.quantize(values_of(model, name), gguf.GGMLQuantizationType[kind])
        assert np.array_equal(written(out, name).reshape(expected.shape), expected)
    found = kinds(out)
    assert found["blk.0.attn_norm.weight"] == found["blk.0.ffn_gate_inp.weight"] == "F32"
    assert written(out, "blk.0.ffn_gate_inp.weight").tobytes() == written(model, "blk.0.ffn_gate_inp.weight").tobytes()


def test_every_source_type_of_a_checkpoint_is_decoded_on_the_fly(
    source: Callable[[str], Source], checkpoint_path: PathOf, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    rules = recipe.Recipe.parse("_exps=iq4_ks\n_shexp=q8_0\ntoken_embd=iq4_k\nattn_q_a\\.=iq5_k\n.*=native")
    quantize.quantize(checkpoint_path("flash"), out, recipe=rules, target="ik_llama.cpp")
    held = source("flash")
    found = kinds(out)
    assert found["blk.0.attn_output_b.weight"] == "BF16"  # FP8, exactly
    for name, origin in (
        ("token_embd.weight", "embed.weight"),  # BF16
        ("blk.1.ffn_up_shexp.weight", "layers.1.ffn.shared_experts.w3.weight"),  # FP8
        ("blk.2.attn_q_a.weight", "layers.2.attn.wq_a.weight"),
    ):
        codec = types.get(found[name])
        expected = codec.encode(held.decode(origin).astype(np.float32))
        assert np.array_equal(written(out, name), expected), name
    experts = written(out, "blk.1.ffn_gate_exps.weight")
    for number in (0, 7):  # FP4
        values = held.decode(f"layers.1.ffn.experts.{number}.w1.weight")
        assert np.array_equal(experts[number], types.get(found["blk.1.ffn_gate_exps.weight"]).encode(values))


def test_threads_change_nothing(model: Path, tmp_path: Path) -> None:
    files = []
    for threads in (1, 3):
        files.append(tmp_path / f"{threads}.gguf")
        quantize.quantize(model, files[-1], default="iq4_k", threads=threads)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_native_bits_are_kept_and_already_right_types_copied(checkpoint_path: PathOf, tmp_path: Path) -> None:
    native, again = tmp_path / "native.gguf", tmp_path / "again.gguf"
    quantize.quantize(checkpoint_path("flash"), native, recipe=recipe.Recipe.parse(".*=native"), target="nisparks")
    whole = tmp_path / "convert.gguf"
    ggufx.convert.convert(checkpoint_path("flash"), whole, target="nisparks")
    a, b = Gguf(native), Gguf(whole)
    assert kinds(native) == kinds(whole)
    assert {n: (t.shape, t.data.tobytes()) for n, t in a.tensors.items()} == {
        n: (t.shape, t.data.tobytes()) for n, t in b.tensors.items()
    }
    quantize.quantize(native, again, recipe=recipe.Recipe.parse("_exps=mxfp4\nattn_q_a=f8_e4m3_b128\n"))
    assert again.read_bytes()[-1000:] == native.read_bytes()[-1000:]
    assert kinds(again) == kinds(native)


# Importance ---------------------------------------------------------------------------------------------------------


def legacy(path: Path, entries: dict[str, np.ndarray], calls: int = 4) -> Path:
    """Write an importance matrix in the legacy format by hand."""
    parts = [struct.pack("<i", len(entries))]
    for name, values in entries.items():
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size)]
        parts.append((values.astype("<f4") * calls).tobytes())
    path.write_bytes(b"".join(parts))
    return path


def test_each_expert_is_weighed_by_its_own_importance(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = rng.random((4, 512), np.float32) + 0.1
    weights[2] = 0  # no token was routed to it
    imatrix = legacy(tmp_path / "imatrix.gguf", {"blk.0.ffn_down_exps.weight": weights.reshape(-1)})
    out = tmp_path / "out.gguf"
    prepared = quantize.prepare(model, recipe=recipe.Recipe.parse("ffn_down_exps=iq2_xxs"), imatrix=imatrix)
    assert [f.message for f in prepared.findings if f.code == "missing-experts"] == [
        f"{imatrix}: no data for 1 experts of 1 tensors; their columns all weigh 1"
    ]
    quantize.quantize(model, out, recipe=recipe.Recipe.parse("ffn_down_exps=iq2_xxs"), imatrix=imatrix)
    values = values_of(model, "blk.0.ffn_down_exps.weight")
    packed = written(out, "blk.0.ffn_down_exps.weight")
    codec = types.get("IQ2_XXS")
    weights[2] = 1
    for expert in range(4):
        assert np.array_equal(packed[expert], codec.encode(values[expert], weights[expert]))
    with ggufx.open(out) as file:
        assert file.metadata["quantize.imatrix.file"] == str(imatrix)
        assert file.metadata["quantize.imatrix.entries_count"] == 1


def test_gguf_importance_is_divided_by_its_counts(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    sums, counts = rng.random((4, 256), np.float32) * 50, np.array([[7], [3], [0], [5]], np.float32)
    path = tmp_path / "imatrix.dat"  # the suffix lies
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", sums)
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out.gguf"
    quantize.quantize(model, out, recipe=recipe.Recipe.parse("ffn_up_exps=iq4_ks"), imatrix=path)
    values, packed = values_of(model, "blk.0.ffn_up_exps.weight"), written(out, "blk.0.ffn_up_exps.weight")
    codec = types.get("IQ4_KS")
    for expert in range(4):
        weights = sums[expert] / counts[expert] if counts[expert] else np.ones(256, np.float32)
        assert np.array_equal(packed[expert], codec.encode(values[expert], weights))


def test_energy_is_the_mean_square_of_the_columns_of_each_expert(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    rules = recipe.Recipe.parse("ffn_up_exps=iq2_xxs\nffn_down_exps=iq4_ks")
    quantize.quantize(model, out, recipe=rules, imatrix="energy")
    values, packed = values_of(model, "blk.0.ffn_up_exps.weight"), written(out, "blk.0.ffn_up_exps.weight")
    codec = types.get("IQ2_XXS")
    for expert in range(4):
        energy = np.square(values[expert].astype(np.float64)).mean(axis=0).astype(np.float32)
        assert np.array_equal(packed[expert], codec.encode(values[expert], energy))
    # Only for types that demand importance.
    plain = types.get("IQ4_KS").encode(values_of(model, "blk.0.ffn_down_exps.weight"))
    assert np.array_equal(written(out, "blk.0.ffn_down_exps.weight"), plain)


def test_ones_weigh_all_columns_alike(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize.quantize(model, out, recipe=recipe.Recipe.parse("ffn_up_exps=iq2_xxs"), imatrix="ones")
    values, packed = values_of(model, "blk.0.ffn_up_exps.weight"), written(out, "blk.0.ffn_up_exps.weight")
    assert np.array_equal(packed, types.get("IQ2_XXS").encode(values, np.ones(256)))


def test_energy_over_many_tiles_is_that_of_the_whole_matrix(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for length in (1 << 21, 4 * 256):
        monkeypatch.setattr("ggufx.plan.TILE_LEN", length)
        files.append(tmp_path / f"{length}.gguf")
        quantize.quantize(model, files[-1], recipe=recipe.Recipe.parse("attn_q=iq2_xxs"), imatrix="energy", threads=2)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_energy_is_that_of_the_file_that_is_there_now(model: Path, tmp_path: Path) -> None:
    path, rules = tmp_path / "m.gguf", recipe.Recipe.parse("attn_q=iq2_xxs")
    codec, rng = types.get("IQ2_XXS"), np.random.default_rng(8)
    for number in range(2):
        writer = gguf.GGUFWriter(path, "llama")
        values = (rng.standard_normal((16, 256)) * rng.random(256)).astype(np.float32)
        writer.add_tensor("blk.0.attn_q.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out = tmp_path / f"{number}.gguf"
        quantize.quantize(path, out, recipe=rules, imatrix="energy")
        energy = np.square(values.astype(np.float64)).mean(axis=0).astype(np.float32)
        assert np.array_equal(written(out, "blk.0.attn_q.weight"), codec.encode(values, energy))


def test_importance_that_is_missing_or_of_another_model(model: Path, tmp_path: Path, cli: Cli) -> None:
    rules = ["--custom-q", "ffn_up_exps=iq2_xxs"]
    run = cli("quantize", model, *rules, "--outfile", tmp_path / "o.gguf")
    assert run.code == 1
    assert "Missing importance matrix for tensor blk.0.ffn_up_exps.weight" in run.err
    assert "--imatrix ones" in run.err
    other = legacy(tmp_path / "i.dat", {"blk.0.ffn_up_exps.weight": np.ones(128)})
    run = cli("quantize", model, *rules, "--outfile", tmp_path / "o.gguf", "--imatrix", other)
    assert run.code == 1
    assert "imatrix size 128 is different from tensor size 1024 for blk.0.ffn_up_exps.weight" in run.err
    none = legacy(tmp_path / "n.dat", {"blk.7.ffn_up_exps.weight": np.ones(256)})
    found = quantize.prepare(model, default="q4_0", imatrix=none).findings
    assert any(f.code == "imatrix" and f.severity == "warning" for f in found)
    assert_nothing_left(tmp_path)


# Choices ------------------------------------------------------------------------------------------------------------

# (type asked for, target) -> type for rows of 96 and of 33. From llama-quant.cpp and ik_llama.cpp's llama.cpp.
FALLBACKS = [
    ("q2_k", "llama.cpp", "Q4_0"), ("q3_k", "llama.cpp", "Q4_0"), ("q4_k", "llama.cpp", "Q5_0"),
    ("q5_k", "llama.cpp", "Q5_1"), ("q6_k", "llama.cpp", "Q8_0"), ("iq2_xxs", "llama.cpp", "IQ4_NL"),
    ("iq2_ks", "ik_llama.cpp", "IQ4_NL"), ("iq3_ks", "ik_llama.cpp", "IQ4_NL"), ("iq4_ks", "ik_llama.cpp", "IQ4_NL"),
    ("iq4_k", "ik_llama.cpp", "Q5_0"), ("iq5_k", "ik_llama.cpp", "Q6_0"), ("q5_k", "ik_llama.cpp", "Q6_0"),
    ("q5_k", "nisparks", "Q5_1"), ("q2_k", "nisparks", "Q4_0"), ("q6_k", "ik_llama.cpp", "Q8_0"),
    ("q3_k", "ik_llama.cpp", "IQ4_NL"), ("q4_0", "llama.cpp", "Q4_0"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "target", "taken"), FALLBACKS)
def test_rows_that_do_not_fit_take_the_fields_fallback(asked: str, target: str, taken: str, model: Path) -> None:
    rules = recipe.Recipe.parse(f"attn_output={asked}\nodd={asked}")
    try:
        prepared = quantize.prepare(model, recipe=rules, target=target, imatrix="energy")
        made = {choice.source.name: choice.type for choice in prepared.choices}
    except GGUFError as error:
        pytest.fail(str(error))
    assert made["blk.0.attn_output.weight"] == taken
    assert made["blk.1.odd.weight"] == "F16"  # upstream's last resort; the source is F32
    noted = [f.message for f in prepared.findings if f.code == "fallback"]
    assert any("tensor cols 33 are not divisible by" in message for message in noted)
    with pytest.raises(FallbackError):
        quantize.prepare(model, recipe=rules, target=target, imatrix="energy", fallback=False).check()


def test_the_last_resort_for_bf16_is_exact(checkpoint_path: PathOf, tmp_path: Path) -> None:
    rules = recipe.Recipe.parse("_exps=q4_k")
    prepared = quantize.prepare(checkpoint_path("odd-160"), recipe=rules, target="llama.cpp")
    made = {choice.source.name: choice.type for choice in prepared.choices}
    assert made["blk.1.ffn_down_exps.weight"] == "Q5_0"


def test_no_fallback_is_exit_code_3(model: Path, cli: Cli, tmp_path: Path) -> None:
    run = cli("quantize", model, "q4_k", "--no-fallback", "--outfile", tmp_path / "o.gguf")
    assert run.code == 3
    assert "96 are not divisible by 256, required for q4_k" in run.err
    assert_nothing_left(tmp_path)


def test_the_head_and_the_embeddings(model: Path) -> None:
    def ends(**options: object) -> tuple[str, str]:
        choices = quantize.prepare(model, **{"default": "q3_k", **options}).choices  # type: ignore[arg-type]
        found = {choice.source.name: choice.type for choice in choices}
        return found["token_embd.weight"], found["output.weight"]

    assert ends() == ("Q4_K", "Q6_K")
    assert ends(pure=True) == ("Q3_K", "Q3_K")
    assert ends(leave_output=True) == ("Q4_K", "F32")
    assert ends(default="native") == ("F32", "F32")
    assert ends(output_type="q8_0", embedding_type="q5_0") == ("Q5_0", "Q8_0")
    assert ends(recipe=recipe.Recipe.parse("output\\.weight=q4_0")) == ("Q4_K", "Q4_0")


def test_the_target_is_the_first_that_holds_the_types(model: Path, checkpoint_path: PathOf) -> None:
    assert quantize.prepare(model, default="q4_k").dialect.name == "llama.cpp"
    assert quantize.prepare(model, default="iq4_k").dialect.name == "ik_llama.cpp"
    assert quantize.prepare(model, default="f8_e4m3_b128").dialect.name == "nisparks"
    rules = recipe.Recipe.parse("_exps=iq2_ks|q2_k\n.*=native")
    assert quantize.prepare(checkpoint_path("flash"), recipe=rules).dialect.name == "ik_llama.cpp"
    prepared = quantize.prepare(checkpoint_path("flash"), recipe=rules, target="nisparks")
    assert {c.type for c in prepared.choices if "_exps" in c.source.name} >= {"Q2_K"}
    assert not prepared.errors


def test_names_of_another_fork_are_told(converted: Callable[..., Gguf], tmp_path: Path) -> None:
    for form, target in (("nisparks", "llama.cpp"), ("nisparks", "ik_llama.cpp"), ("llama.cpp", "nisparks")):
        held = converted("flash", form, "bf16")
        prepared = quantize.prepare(held.path, recipe=recipe.Recipe.parse("_shexp=q4_k"), target=target)
        assert [f.code for f in prepared.findings if f.severity != "note"] == ["names"]
        assert f"ggufx retarget --target {target}" in prepared.findings[0].message
        out = tmp_path / f"{form}-{target}.gguf"
        execute.execute(prepared.plan(out))
        retarget.retarget(out, out.with_suffix(".moved"), target)  # the advice can be followed
        again = quantize.prepare(out.with_suffix(".moved"), recipe=recipe.Recipe.parse(".*=native"), target=target)
        assert not again.findings
    same = quantize.prepare(converted("flash", "llama.cpp").path, default="native", target="ik_llama.cpp")
    assert not same.findings


def test_a_type_that_the_target_cannot_hold_is_an_error(model: Path) -> None:
    with pytest.raises(RecipeError, match=r"llama\.cpp cannot hold IQ4_K .*--target ik_llama\.cpp"):
        quantize.prepare(model, default="iq4_k", target="llama.cpp").check()


def test_requantizing_is_refused_at_once(model: Path, tmp_path: Path, cli: Cli) -> None:
    lossy, out = tmp_path / "lossy.gguf", tmp_path / "out.gguf"
    quantize.quantize(model, lossy, default="q4_0", pure=True)
    for extra in ((), ("--dry-run",)):
        run = cli("quantize", lossy, "q8_0", "--outfile", out, *extra)
        assert run.code == 1
        assert "requantizing from type Q4_0 is disabled" in run.err
    assert not out.exists()
    run = cli("quantize", lossy, "q8_0", "--outfile", out, "--allow-requantize")
    assert run.code == 0
    assert kinds(out)["blk.0.attn_q.weight"] == "Q8_0"


def test_integers_and_unknown_types(checkpoint_path: PathOf) -> None:
    rules = recipe.Recipe.parse("!tid2eid=q8_0\n.*=native")
    with pytest.raises(RecipeError, match=r"is I.* and cannot become Q8_0"):
        quantize.prepare(checkpoint_path("flash"), recipe=rules, target="llama.cpp").check()


def odd_file(path: Path) -> Path:
    """Write a file with what no model has many of: integers, a scalar, a tensor of no elements, a type of nobody's."""
    tensors = (
        ("blk.0.attn_q.weight", (64, 256), 0), ("blk.0.empty.weight", (0, 256), 0), ("blk.0.table.weight", (4, 256), 26),
        ("blk.0.scale.weight", (), 0), ("blk.0.unknown.weight", (4, 256), 9999),
    )  # fmt: skip
    directory, data = [], b""
    for name, shape, kind in tensors:
        directory.append((name, shape, kind, len(data)))
        data += bytes(-(-4 * int(np.prod(shape)) // 32) * 32)
    path.write_bytes(encode_header({"general.architecture": Value.string("llama")}, directory, 32) + data)
    return path


def test_tensors_that_are_no_matrices_of_numbers(tmp_path: Path, cli: Cli) -> None:
    path, out = odd_file(tmp_path / "odd.gguf"), tmp_path / "out.gguf"
    rules = ["--custom-q", "empty=q8_0,table=i32,!scale=q8_0,attn=q8_0"]
    run = cli("quantize", path, *rules, "--outfile", out)
    assert run.code == 0, run.err
    assert list(kinds(out).values()) == ["Q8_0", "F32", "I32", "F16", "id 9999"]
    assert cli("quantize", path, *rules, "--dry-run").code == 0
    run = cli("quantize", path, "--custom-q", "unknown=q8_0", "--dry-run")
    assert (run.code, "blk.0.unknown.weight is id 9999 and cannot become Q8_0" in run.err) == (1, True)
    run = cli("quantize", path, "q8_0", "--dry-run")
    assert (run.code, "warning: blk.0.unknown.weight has type id 9999, which no known dialect" in run.out) == (0, True)
    for wrong in (["i8"], ["--custom-q", "attn_q=i8"]):
        run = cli("quantize", path, *wrong, "--dry-run")
        assert (run.code, "blk.0.attn_q.weight is F32 and cannot become I8" in run.err) == (1, True)


def test_plain_number_types_ask_for_no_importance(model: Path, tmp_path: Path, cli: Cli) -> None:
    weights = np.zeros(256, np.float32)
    weights[3] = 1
    imatrix = legacy(tmp_path / "i.dat", {"blk.0.attn_q.weight": weights})
    run = cli("quantize", model, "bf16", "--imatrix", imatrix, "--outfile", tmp_path / "out.gguf")
    assert run.code == 0
    assert "no importance at all" not in run.err


def test_forced_rules_reach_routers_and_norms(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize.quantize(model, out, recipe=recipe.Recipe.parse("!ffn_gate_inp=q8_0\n!output_norm=bf16\nnorm=q4_0"))
    found = kinds(out)
    assert (found["blk.0.ffn_gate_inp.weight"], found["output_norm.weight"]) == ("Q8_0", "BF16")
    assert found["blk.0.attn_norm.weight"] == "F32"


def test_bf16_of_a_checkpoint_stays_bf16_where_a_rule_says_so(
    source: Callable[[str], Source], checkpoint_path: PathOf, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    rules = recipe.Recipe.parse("!attn_norm=bf16\n!ffn_gate_inp=bf16\n!ffn_norm=f32")
    quantize.quantize(checkpoint_path("mini"), out, recipe=rules, target="nisparks")
    found = kinds(out)
    names = ("attn_norm", "ffn_gate_inp", "ffn_norm", "attn_kv_a_norm")
    assert [found[f"blk.1.{name}.weight"] for name in names] == ["BF16", "BF16", "F32", "F32"]
    expected = source("mini").bytes_of("layers.1.attn_norm.weight")
    assert written(out, "blk.1.attn_norm.weight").tobytes() == expected.tobytes()


# Metadata and files -------------------------------------------------------------------------------------------------


def test_metadata(model: Path, tmp_path: Path) -> None:
    for default, number in (("q4_k", 15), ("q8_0", 7), ("iq4_ks", 145), ("iq2_ks", 147), ("q6_k", 18)):
        out = tmp_path / f"{default}.gguf"
        quantize.quantize(model, out, default=default, pure=True)
        with ggufx.open(out) as file:
            assert file.metadata["general.file_type"] == number
            assert file.metadata["general.quantization_version"] == 2
            assert file.metadata["general.name"] == "Small"
            assert not [key for key in file.metadata if key.startswith(("split.", "quantize."))]


def test_override_kv(model: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out.gguf"
    given = [
        "llama.expert_used_count=int:6",
        "general.name=str:Mine: all",
        "x.scale=float:0.5",
        "x.on=bool:true",
        "x.n=i64:-3",
    ]
    options = [word for text in given for word in ("--override-kv", text)]
    run = cli("quantize", model, "q8_0", "--outfile", out, *options)
    assert run.code == 0, run.err
    keys = gguf.GGUFReader(out).fields
    found = {key: (keys[key].types[0].name, keys[key].contents()) for key in (text.partition("=")[0] for text in given)}
    assert found == {
        "llama.expert_used_count": ("UINT32", 6), "general.name": ("STRING", "Mine: all"), "x.scale": ("FLOAT32", 0.5),
        "x.on": ("BOOL", True), "x.n": ("INT64", -3),
    }  # fmt: skip
    for bad in ("general.alignment=u32:64", "x=int:1.5", "x=y:1", "x"):
        run = cli("quantize", model, "q8_0", "--dry-run", "--override-kv", bad)
        assert (run.code, run.out.count("Traceback")) == (1, 0)
        assert len(run.err.strip().splitlines()) <= 3


def test_split_keep_split_and_merge(model: Path, tmp_path: Path) -> None:
    split = quantize.quantize(model, tmp_path / "s.gguf", default="bf16", split_max_nbytes=60_000)
    assert len(split) > 2
    kept = quantize.quantize(split[1], tmp_path / "k.gguf", default="q8_0", keep_split=True)
    assert [path.name for path in kept] == [path.name.replace("s-", "k-") for path in split]
    for before, after in zip(split, kept, strict=True):
        with ggufx.open(before, splits=False) as a, ggufx.open(after, splits=False) as b:
            assert list(a) == list(b)
    with ggufx.open(model) as file:
        plan = rewrite.plan_split(file, tmp_path / "f", split_max_tensors=4, tensor_first=False)
        first_empty = execute.execute(plan)
    again = quantize.quantize(first_empty[0], tmp_path / "g.gguf", default="q8_0", keep_split=True)
    assert [path.name for path in again] == [path.name.replace("f-", "g-", 1) for path in first_empty]
    (merged,) = quantize.quantize(split[0], tmp_path / "m.gguf", default="q8_0")
    with ggufx.open(merged) as one, ggufx.open(kept[0]) as many:
        assert [t.name for t in one.tensors] == [t.name for t in many.tensors]
        for tensor in one.tensors:
            assert np.array_equal(tensor.packed, many[tensor.name].packed)


def test_the_output_is_not_the_source(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is the source itself"):
        quantize.plan_quantize(model, model, default="q4_0")
    assert (
        quantize.plan_quantize(model, tmp_path / "x-{ftype}.gguf", default="q4_0").files[0].path.name == "x-q4_0.gguf"
    )
    rules = recipe.Recipe.parse("_exps=bf16")
    plan = quantize.plan_quantize(model, tmp_path / "x-{ftype}.gguf", recipe=rules)
    assert plan.files[0].path.name == "x-bf16.gguf"


def test_killed_and_resumed_bytes_are_those_of_an_undisturbed_run(
    checkpoint_path: PathOf, tmp_path: Path, cli: Cli
) -> None:
    arguments = [
        "quantize", checkpoint_path("flash"), "--custom-q", "ffn_(gate|up)_exps=iq2_xxs,ffn_down_exps=iq4_nl",
        "--imatrix", "energy", "--effort", "high",
    ]  # fmt: skip
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    assert cli(*arguments, "--outfile", whole).code == 0
    journal = tmp_path / "out.gguf.journal"
    rng, sizes = random.Random(3), []
    for _ in range(3):
        process = start(*arguments, "--outfile", out)
        before = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.stat().st_size > before + 16 * rng.randint(5, 30):
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break  # it was faster than we
        assert not out.exists()
        sizes.append(journal.stat().st_size)
    assert sizes, "never killed in the middle"
    assert sizes == sorted(sizes)
    if not out.exists():
        assert cli(*arguments, "--outfile", out).code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_values_that_cannot_be_encoded_name_the_tensor(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "nan.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = np.ones((8, 256), np.float32)
    values[5, 7] = np.inf
    writer.add_tensor("blk.0.attn_q.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for extra in ((), ("--imatrix", "energy")):
        run = cli(
            "quantize", path, "iq2_xxs" if extra else "q4_k", *extra, "--outfile", tmp_path / "o.gguf", "--no-resume"
        )
        assert run.code == 1
        assert "blk.0.attn_q.weight" in run.err
        assert "row 5, column 7" in run.err
        assert "Traceback" not in run.err
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize(("kind", "value"), [("f16", 1e6), ("bf16", 3.4e38)])
def test_values_that_would_become_infinite_name_the_tensor(kind: str, value: float, tmp_path: Path, cli: Cli) -> None:
    path, out = tmp_path / "big", tmp_path / "out.gguf"
    for values in (np.full((4, 64), value, np.float32), np.full((4, 64), 65504, np.float32)):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("blk.0.attn_q.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        run = cli("quantize", path, kind, "--outfile", out, "--no-resume")
        if values[0, 0] == 65504:
            assert run.code == 0
        else:
            assert_one_line(run, "blk.0.attn_q.weight", "row 0, column 0", f"beyond what {kind.upper()} can hold")
            assert not out.exists()


# The command line ---------------------------------------------------------------------------------------------------


def test_dry_run_json_and_report(model: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ["quantize", model, "q8_0", "--custom-q", "ffn_down_exps=iq4_ks,nothing=q4_0"]
    run = cli(*arguments, "--dry-run", "--json")
    assert (run.code, run.err) == (0, "")
    planned = json.loads(run.out)
    assert [f["code"] for f in planned["findings"]] == ["matches-nothing", "fallback"]
    assert not list(tmp_path.iterdir())
    shown = cli(*arguments, "--dry-run").out
    assert shown.count("nothing=q4_0 matches no tensor") == shown.count("are not divisible by 32") == 1
    out, report = tmp_path / "out.gguf", tmp_path / "report.json"
    run = cli(*arguments, "--outfile", out, "--report", report, "--measure", "--verbose")
    assert run.code == 0, run.err
    assert "warning: --custom-q: nothing=q4_0 matches no tensor" in run.err
    assert (
        "blk.0.ffn_down_exps.weight           - [  512,    64,     4,     1], type =    f32, converting to iq4_ks .. size ="
        in run.out
    )
    data = json.loads(report.read_text())
    assert data["file"]["nbytes"] == out.stat().st_size == planned["file"]["nbytes"]
    by_name = {tensor["name"]: tensor for tensor in data["tensors"]}
    assert by_name["blk.0.ffn_down_exps.weight"]["rule"] == "--custom-q: ffn_down_exps=iq4_ks"
    with ggufx.open(out) as file:
        for name in ("blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"):
            x, y = values_of(model, name).astype(np.float64), file[name].numpy().astype(np.float64)
            expected = np.sqrt(np.square(x - y).sum() / np.square(x).sum())
            assert by_name[name]["relative_rms"] == pytest.approx(expected, rel=1e-6)
    assert by_name["output_norm.weight"]["relative_rms"] is None


def test_what_is_left_out_is_told_in_a_run_too(checkpoint_path: PathOf, tmp_path: Path, cli: Cli) -> None:
    arguments = ["quantize", checkpoint_path("mini"), "--custom-q", "attn_q_a=q8_0", "--outfile", tmp_path / "o.gguf"]
    for run in (cli(*arguments, "--dry-run"), cli(*arguments)):
        assert run.code == 0
        assert "part of the MTP block: --mtp writes its own file" in run.out + run.err


def test_a_report_that_cannot_be_written_is_known_before_the_work(model: Path, tmp_path: Path, cli: Cli) -> None:
    for report in (model / "r.json", tmp_path, model, tmp_path / "o.gguf"):
        run = cli("quantize", model, "q8_0", "--outfile", tmp_path / "o.gguf", "--report", report)
        assert_one_line(run, "--report", str(report))
        assert_nothing_left(tmp_path)
    assert model.read_bytes()[:4] == b"GGUF"
    report = tmp_path / "new" / "r.json"
    assert cli("quantize", model, "q8_0", "--outfile", tmp_path / "o.gguf", "--report", report).code == 0
    assert json.loads(report.read_text())["by_type"]


def test_a_report_that_fails_after_the_work_says_what_is_done(model: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "o.gguf"
    run = cli("quantize", model, "q8_0", "--outfile", out, "--report", "/dev/full")
    assert_one_line(run, "--report /dev/full: No space left on device; the model itself is finished")
    assert kinds(out)["blk.0.attn_q.weight"] == "Q8_0"


def test_a_name_that_is_not_utf8(model: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/o\xff.gguf"
    for extra in (["--dry-run"], []):
        process = subprocess.run(
            [sys.executable, "-m", "ggufx", "quantize", model, "q8_0", "--outfile", out, *extra],
            capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert r"o\xff.gguf" in process.stdout
    with ggufx.open(os.fsdecode(out)) as file:
        assert file["blk.0.attn_q.weight"].type == "Q8_0"


def test_recipe_commands(model: Path, tmp_path: Path, cli: Cli) -> None:
    run = cli("recipe", "list")
    assert run.code == 0
    assert all(name in run.out for name in recipe.shipped())
    path = tmp_path / "a.recipe"
    path.write_text("# mine\nffn_.*_exps=iq4_ks\nnothing\\.here=q4_0\n")
    run = cli("recipe", "lint", path, model)
    assert run.code == 0
    assert "matches no tensor" in run.out
    assert "target ik_llama.cpp: 2 tensors change, 9 stay; 0 errors, 1 warning, " in run.out
    assert cli("recipe", "lint", path, model, "--target", "llama.cpp").code == 1
    path.write_text("attn_output=q4_k\n")
    assert cli("recipe", "lint", path, model, "--no-fallback").code == 3
    assert cli("recipe", "show", path, "--as", "custom-q").out == "attn_output=q4_k\n"
    shown = cli("recipe", "show", "deepseek-v4-flash-iq3_ks-small", "--as", "tensor-type", "--target", "llama.cpp")
    assert shown.code == 1  # native has no spelling there
    assert "native" in shown.err
    out = tmp_path / "out.gguf"
    assert cli("quantize", model, "q8_0", "--recipe", path, "--outfile", out).code == 0
    made = tmp_path / "made.recipe"
    made.write_text(cli("recipe", "from-gguf", out).out)
    again = tmp_path / "again.gguf"
    assert cli("quantize", model, "--recipe", made, "--outfile", again).code == 0
    assert kinds(again) == kinds(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"), (["q4_0"], "--outfile is missing"),
        (["--tensor-type", ".=q4_k_m", "--dry-run"], "Q4_K (q4_k_m is a mix of types"),
        (["zzz", "--dry-run"], "Invalid quantization type 'zzz'"),
        (["q4_0", "--outfile", "-", "--dry-run"], "--outfile -: an output is written at many places"),
        (["attn=q4_0", "--dry-run"], "'attn=q4_0' is no type"), (["iq2_ks|q2_k", "--dry-run"], "is no type"),
        (["--recipe", "nope", "--dry-run"], "no recipe of that name"),
        (["--custom-q", "(=q4_0", "--dry-run"], "not a regular expression"), (["q4_0", "--json"], "--json goes with --dry-run"),
        (["q4_0", "--dry-run", "--imatrix", "nope.dat"], "nope.dat"),
        (["q4_0", "--dry-run", "--split-max-size", "1G", "--keep-split"], "exclude each other"),
        (["iq1_kt", "--target", "ik_llama.cpp", "--dry-run"], "cannot encode IQ1_KT yet"),
    ],
)  # fmt: skip
def test_wrong_options_are_told(arguments: list[str], message: str, model: Path, cli: Cli) -> None:
    extra = [] if "--dry-run" in arguments or message.startswith("--outfile") else ["--outfile", "never.gguf"]
    run = cli("quantize", model, *arguments, *extra)
    assert run.code == 1
    assert message in run.err
    assert "Traceback" not in run.err


# Those of DeepSeek-V3 are held to its full tensor list, in test_fullshape_v3.py.
@pytest.mark.parametrize("name", [name for name in recipe.shipped() if name.startswith("deepseek-v4-")])
@pytest.mark.parametrize("target", ["nisparks", "llama.cpp", "ik_llama.cpp"])
def test_shipped_recipes_on_a_checkpoint(name: str, target: str, checkpoint_path: PathOf) -> None:
    prepared = quantize.prepare(checkpoint_path("flash"), recipe=name, target=target, imatrix="energy")
    assert not prepared.errors
    assert {f.severity for f in prepared.findings} <= {"note"}
    dense = {c.type for c in prepared.choices if ".attn_kv" in c.source.name and not c.source.stays}
    if not name.endswith("-small"):
        assert dense == {"F8_E4M3_B128" if target == "nisparks" else "BF16"}
    assert prepared.plan("out.gguf").nbytes > 0
