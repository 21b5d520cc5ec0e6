"""Types for a size: measured errors against those of a run, sizes against files, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import ggufx
from ggufx import budget as budget_module
from ggufx import quantize, types
from ggufx.budget import Budget
from ggufx.errors import PlanError, RecipeError
from ggufx.execute import execute
from ggufx.recipe import Recipe

from .conftest import Run, assert_one_line

Cli = Callable[..., Run]
PathOf = Callable[[str], Path]
ALL = 1 << 40
"""Weights to sample: all."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of unlike tensors, by the gguf package: one of heavy tails, one of zeros, stacked experts."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    tensors = {"token_embd.weight": rng.standard_normal((96, 256)), "output_norm.weight": np.ones(256)}
    for layer in range(4):
        tensors |= {
            f"blk.{layer}.attn_q.weight": rng.standard_normal((64, 256)) * 0.02,
            f"blk.{layer}.attn_v.weight": rng.standard_t(3, (32, 256)),
            f"blk.{layer}.ffn_gate_inp.weight": rng.standard_normal((4, 256)),
            f"blk.{layer}.ffn_up_exps.weight": rng.standard_normal((4, 48, 256)) * (layer + 1),
            f"blk.{layer}.ffn_down.weight": rng.standard_normal((64, 96)) * (layer > 0),
        }
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def imatrix_of(path: Path, sums: dict[str, np.ndarray]) -> Path:
    """An importance matrix, by the gguf package; one count for every row of sums."""
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.full((values.shape[0], 1), 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("target", ["ik_llama.cpp", "nisparks"])
def test_errors_of_a_full_sample_are_those_of_a_run(target: str, checkpoint_path: PathOf, tmp_path: Path) -> None:
    """FP8, FP4 and BF16 of a checkpoint, split tensors and transposed ones: read row by row as the engine reads tiles."""
    path = checkpoint_path("flash")
    budget = Budget(path, type_names=["q4_0", "q8_0"], target=target, per="tensor", sample_len=ALL)
    budget.measure(threads=2)
    for limit in (budget.smallest_nbytes, budget.largest_nbytes):
        fit = budget.fit(limit)
        assert fit.nbytes == limit
        again = quantize.prepare(path, recipe=fit.recipe, target=target, effort="fast", measure=True)
        plan = again.plan(tmp_path / f"{limit}.gguf")
        tally = quantize.Tally(again, plan)
        (out,) = execute(plan, observer=tally)
        assert out.stat().st_size == limit
        single = [name for name in fit.types if not name.endswith("_exps.weight")]
        assert len(single) > 20
        for name, kind in fit.types.items():
            error = tally.relative_error(name)
            # Of experts it is the mean of their own errors, of a run that of all their weights.
            assert fit.errors[name] ** 0.5 == pytest.approx(error, rel=1e-6 if name in single else 0.02), (name, kind)


def test_errors_are_weighed_by_recorded_importance(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    recorded = {
        "blk.0.attn_q.weight": rng.lognormal(0, 2, (1, 256)), "blk.1.ffn_up_exps.weight": rng.lognormal(0, 2, (4, 256)),
    }  # fmt: skip
    imatrix = imatrix_of(tmp_path / "imatrix.gguf", recorded)
    budget = Budget(model, type_names=["iq2_xxs", "q4_0"], imatrix=imatrix, per="tensor", sample_len=ALL)
    assert budget.left_out == {"IQ2_XXS": 11}
    budget.measure()
    fit = budget.fit(budget.smallest_nbytes)
    for name, sums in recorded.items():
        assert fit.types[name] == "IQ2_XXS"
        with ggufx.open(model) as file:
            stack = file[name].numpy().reshape(len(sums), -1, 256)
        codec, ratios = types.get("IQ2_XXS"), []
        for values, weights in zip(stack, (sums / 2).astype(np.float32), strict=True):
            again = codec.decode(codec.encode(values, weights, effort="fast")).astype(np.float64)
            ratios.append(
                (np.square(values - again) * weights).sum() / (np.square(values.astype(np.float64)) * weights).sum()
            )
        assert fit.errors[name] == pytest.approx(np.mean(ratios), rel=1e-5)


def test_a_sample_does_not_depend_on_threads_and_is_close(model: Path) -> None:
    found = []
    for threads, sample_len in ((1, 4096), (3, 4096), (2, ALL)):
        budget = Budget(model, type_names=["q4_0", "iq4_nl", "native"], sample_len=sample_len)
        budget.measure(threads=threads)
        found.append(budget.fit(budget.smallest_nbytes).errors)
    assert found[0] == found[1]
    assert found[0]["blk.0.ffn_down.weight"] == 0.0  # all zero: nothing is lost
    for name, error in found[2].items():
        assert found[0][name] == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize("per", ["family", "tensor"])
def test_sizes_are_met_and_more_room_is_less_error(per: str, model: Path) -> None:
    budget = Budget(model, per=per, imatrix="ones", target="ik_llama.cpp")  # type: ignore[arg-type]
    budget.measure()
    errors = []
    limits = [
        budget.smallest_nbytes,
        *(budget.nbytes_at(bits) for bits in (3.5, 4.3, 5, 6.1, 8)),
        budget.largest_nbytes,
    ]
    for limit in limits:
        fit = budget.fit(limit)
        assert 0.97 * limit <= fit.nbytes <= limit  # one tensor is a seventh of the model
        # What is printed is what quantize takes.
        read = Recipe.parse(fit.text())
        again = quantize.prepare(model, recipe=read, target="ik_llama.cpp", imatrix="ones")
        assert {finding.code for finding in again.findings} <= {"no-effect"}  # that of the makeshift, which only chose
        assert again.plan("out.gguf").nbytes == fit.nbytes
        # The embeddings count four times for each of the four layers, being the head, too: they get the bits first.
        bits = {record["family"]: record["bits_per_weight"] for record in fit.families()}
        assert bits["token_embd.weight"] >= bits["blk.N.attn_q.weight"]
        weights = {"token_embd": 16.0, "attn_q": 0.25}
        errors.append(sum(error * weights.get(name.split(".")[-2], 1.0) for name, error in fit.errors.items()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == sum(budget.fit(10 * limit).errors.values()) == 0.0  # all native but what is zero
    with pytest.raises(PlanError, match=f"from {budget.smallest_nbytes} bytes .* to {budget.largest_nbytes} bytes"):
        budget.fit(budget.smallest_nbytes - 1)
    assert 4.85 < budget.fit(budget.nbytes_at(5)).bits_per_weight <= 5


def test_rules_and_ends_stay_as_they_are(model: Path) -> None:
    budget = Budget(
        model, type_names=["q4_0", "q8_0"], rules=Recipe.parse("attn_q=q5_0\n!ffn_gate_inp=bf16"), output_type="q6_k",
    )  # fmt: skip
    budget.measure()
    fit = budget.fit(budget.nbytes_at(5))
    kinds = {tensor.name: tensor.type for tensor in fit.quantization.tensors}
    assert kinds["token_embd.weight"] == "Q6_K"  # there is no other head
    assert {kinds[f"blk.{n}.attn_q.weight"] for n in range(4)} == {"Q5_0"}
    assert {kinds[f"blk.{n}.ffn_gate_inp.weight"] for n in range(4)} == {"BF16"}
    assert set(fit.types) == {
        f"blk.{n}.{kind}.weight" for n in range(4) for kind in ("attn_v", "ffn_up_exps", "ffn_down")
    }


def test_a_type_that_a_tensor_has_already_is_its_own_bits(model: Path, tmp_path: Path) -> None:
    lossy = tmp_path / "lossy.gguf"
    quantize.quantize(model, lossy, recipe=Recipe.parse("token_embd=q8_0\nffn_down=native\n.=q4_0"))
    budget = Budget(lossy, type_names=["q4_0", "q8_0", "f32"], per="tensor", sample_len=4096, allow_requantize=True)
    budget.measure()
    # With room for it, nothing changes and nothing is lost; but zeros (ffn_down of the first layer) are so in any type.
    fit = budget.fit(lossy.stat().st_size)
    own = {c.source.name: c.source.kind for c in fit.quantization.choices if c.source.name in fit.types}
    assert fit.types == own | {"blk.0.ffn_down.weight": "Q4_0"}
    assert set(own.values()) == {"Q4_0", "Q8_0", "F32"}
    assert not any(fit.errors.values())
    out = tmp_path / "out.gguf"
    execute(fit.quantization.plan(out))
    assert fit.nbytes == out.stat().st_size
    with ggufx.open(lossy) as before, ggufx.open(out) as after:
        assert all(
            np.array_equal(before[name].packed, after[name].packed) for name in own if name != "blk.0.ffn_down.weight"
        )


def test_importance_of_some_of_a_group_only(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's types are those that all of it may have: so are the sizes that can be reached."""
    imatrix = imatrix_of(tmp_path / "imatrix.gguf", {f"blk.{n}.attn_q.weight": np.ones((1, 256)) for n in (0, 1, 2)})
    for runs, n_able in ((8, 3), (2, 2), (1, 0)):
        monkeypatch.setattr(budget_module, "_LAYER_RUNS", runs)
        budget = Budget(model, type_names=["iq2_xxs", "q4_0"], imatrix=imatrix, sample_len=256)
        assert budget.left_out == {"IQ2_XXS": 13 - n_able}  # the rows of ffn_down do not fit
        budget.measure()
        fit = budget.fit(budget.smallest_nbytes)
        assert fit.nbytes == budget.smallest_nbytes
        assert list(fit.types.values()).count("IQ2_XXS") == n_able


def test_what_cannot_be_chosen_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no tensor whose type is left"):
        Budget(model, rules=Recipe.parse(".=q8_0"))
    with pytest.raises(PlanError, match=r"blk.0.ffn_down.weight \[64, 96\]: none of Q4_K fits"):
        Budget(model, type_names=["q4_k"])
    with pytest.raises(RecipeError, match="cannot hold IQ4_KS"):
        Budget(model, type_names=["iq4_ks"], target="llama.cpp")
    with pytest.raises(RecipeError, match="Invalid quantization type 'q4_9'"):
        Budget(model, type_names=["q4_9"])
    lossy = tmp_path / "lossy.gguf"
    quantize.quantize(model, lossy, default="q8_0")
    with pytest.raises(RecipeError, match="requantizing from type Q8_0 is disabled"):
        Budget(lossy, type_names=["q4_0"])
    assert Budget(lossy, type_names=["q4_0"], allow_requantize=True).n_tensors == 17


def test_commands(model: Path, tmp_path: Path, cli: Cli) -> None:
    choice = ["--types", "q4_0,q5_0,q8_0", "--custom-q", "attn_v=q8_0"]
    shown = cli("recipe", "fit", model, "--target-bpw", "5.5", *choice, "--dry-run", "--json")
    data = json.loads(shown.out)
    assert (data["n_tensors"], data["candidates"]) == (13, ["Q4_0", "Q5_0", "Q8_0"])
    assert data["smallest_nbytes"] < data["limit"] < data["largest_nbytes"]
    out, again = tmp_path / "out.gguf", tmp_path / "again.gguf"
    size = f"{data['limit'] / 1000:.3f}K"
    run = cli("quantize", model, "--target-size", size, *choice, "--outfile", out)
    assert run.code == 0, run.err
    assert "blk.N.ffn_up_exps.weight" in run.out
    assert 0.99 * data["limit"] <= out.stat().st_size <= data["limit"]
    path = tmp_path / "my.recipe"
    fitted = cli("recipe", "fit", model, "--target-bpw", "5.5", *choice)
    assert "% of" in fitted.err
    path.write_text(fitted.out)
    assert fitted.out.splitlines()[1] == "attn_v=q8_0"
    assert cli("quantize", model, "--recipe", path, "--outfile", again).code == 0
    assert again.read_bytes() == out.read_bytes()
    run = cli(
        "quantize",
        model,
        "--target-bpw",
        "5",
        "--types",
        "q4_0,q5_0",
        "--split-max-size",
        "50K",
        "--outfile",
        tmp_path / "s.gguf",
    )
    assert run.code == 0, run.err
    nbytes = sum(path.stat().st_size for path in tmp_path.glob("s-*.gguf"))
    assert f"\n{nbytes} bytes (" in run.out
    # Keys that are added count, too.
    stated = tmp_path / "stated.gguf"
    run = cli(
        "quantize", model, stated, "--target-size", size, *choice, "--override-kv", f"general.name=str:{'x' * 5000}"
    )
    assert run.code == 0, run.err
    assert stated.stat().st_size <= data["limit"]
    shown = cli("quantize", model, "--target-size", "1GiB", "--dry-run")
    assert "reachable: " in shown.out
    assert "note: IQ2_XXS demands importance and is no choice for 13 tensors; --imatrix gives it" in shown.out
    for wrong, message in (
        (["--target-size", "90Q"], "--target-size 90Q: expected a size such as 50G, 7.5G or 12GiB"),
        (["--target-size", "0"], "--target-size 0: expected a size"),
        (["--target-bpw", "inf"], "--target-bpw inf: expected a number"),
        (["--target-size", "1G", "--types", ","], "--types names no type"),
        (["--target-size", "1G", "--types", "attn=q4_0"], "--types: 'attn=q4_0' is no type"),
        (["--target-size", "1G", "--types", "q4_9"], "--types: Invalid quantization type 'q4_9'; did you mean"),
        (["--target-size", "1G", "--pure"], "--pure and a size exclude each other"),
        (["q4_0", "--types", "q4_0"], "--types, --per and --sample-len go with --target-size or --target-bpw"),
        (["q4_0", "--per", "tensor"], "go with --target-size"), (["q4_0", "--sample-len", "9"], "go with --target-size"),
        (["--target-size", "1K"], "1000 bytes cannot be reached"), (["--target-bpw", "0.5"], "bits per weight) to"),
        (["--target-size", "1G", "--target-bpw", "3"], "give one of --target-size and --target-bpw"),
        (["--target-size", "1G", "q4_0"], "TYPE and a size exclude each other; --types names"),
    ):  # fmt: skip
        assert_one_line(cli("quantize", model, *wrong, "--outfile", tmp_path / "never.gguf"), message)
    assert_one_line(cli("recipe", "fit", model), "give one of")
    # A word beside a size, and an output that is there, are told before anything is measured.
    assert_one_line(cli("quantize", model, "word", "--target-size", "1G"), "TYPE and a size exclude each other")
    run = cli("quantize", model, "--target-size", size, *choice, "--outfile", out)
    assert_one_line(run, "exists; choose another")
