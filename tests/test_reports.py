"""What a user sees of a measurement and of results: pictures are checked first, and no result is printed whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from command import Run

import ggufx
from ggufx import measure
from ggufx.diff import Difference, TensorDifference
from ggufx.errors import GGUFError
from ggufx.plan import Plan
from ggufx.recipe import Recipe
from ggufx.verify import Report, TensorReport

Cli = Callable[..., Run]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One matrix as Q8_0, and one as F32."""
    path = tmp_path / "m.gguf"
    values = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("a.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("b.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measure, "measure", work)
    pytest.importorskip("matplotlib")
    for name, what in (("none/x.png", "does not exist"), ("x.txt", "suffix"), ("x", "suffix")):
        run = cli("measure", model, "--types", "q4_0", "--plot", tmp_path / name)
        assert (run.code, run.out, len(run.err.splitlines())) == (1, "", 1)
        assert what in run.err


def test_a_missing_matplotlib_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GGUFError, match="pip install matplotlib"):
        measure.check_plot(tmp_path / "x.png")


def test_the_table_comes_before_the_picture(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    def full(*_: object) -> None:
        raise GGUFError("the disk is full")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "plot", full)
    run = cli("measure", model, "--types", "q4_0", "--plot", tmp_path / "x.png")
    assert run.code == 1
    assert "Q4_0" in run.out


def test_a_type_measured_against_itself_is_left_out(model: Path, cli: Cli) -> None:
    """Its error of nothing says nothing, and made the mean over tensors infinite."""
    found = measure.measure(model, ["q8_0"])
    assert [(item.tensor, item.quality is None) for item in found] == [("a.weight", True), ("b.weight", False)]
    (line,) = measure.summary(found)
    assert (line["tensors"], line["left_out"]) == (1, 1)
    assert 40 < line["mean_sqnr"] < 55
    assert "left out: Q8_0: the source has this type already" in cli("measure", model, "--types", "q8_0").out


def test_an_open_file_is_measured_and_stays_open(model: Path) -> None:
    with ggufx.open(model) as file:
        (found,) = measure.measure(file, ["q4_0"], pattern="b.*")
        assert found.quality is not None
        assert file["b.weight"].numpy().shape == (8, 256)


@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_a_pattern_that_matches_nothing_is_an_error(flag: tuple[str, ...], model: Path, cli: Cli) -> None:
    run = cli("inspect", model, "--tensors", "zzz*", *flag)
    assert run.code == 1
    assert run.err == f"error: {model}: 'zzz*' matches none of the 2 tensors\n"
    assert "general.architecture" in run.out
    assert cli("inspect", model, "--tensors", "a*", *flag).code == 0


def test_results_are_short_in_a_notebook() -> None:
    report = Report("m.gguf", "model", "llama.cpp", [TensorReport("a" * 99, "F32", "exact")] * 1000)
    assert repr(report) == "<Report 'm.gguf': verified (llama.cpp), {'exact': 1000}, 0 keys differ>"
    found = Difference(("a", "b"), tensors=[TensorDifference("a" * 99, ("F32", "F32"), ((1,), (1,)))] * 1000)
    assert repr(found) == "<Difference of 'a' and 'b': 0 keys, 1000 tensors, 0 only in the first, 0 only in the second>"
    assert repr(Difference(("a", "b"))) == "<Difference of 'a' and 'b': the same>"
    assert repr(Recipe.parse("blk=q8_0\n" * 3, "x")).endswith(": 3 rules>")
    assert repr(Plan((), ("a" * 99,) * 1000, ((1, 1),) * 1000, "nisparks")) == "<Plan '': 0 files, 0 tensors, nisparks>"
