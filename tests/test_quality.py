"""Error measures against plain NumPy, and `measure` on files of the gguf package."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from command import Run

import ggufx
from ggufx import types
from ggufx.errors import CodecError
from ggufx.measure import measure, summary

Cli = Callable[..., Run]
RNG = np.random.default_rng(5)


def test_quality_is_what_numpy_says() -> None:
    x = RNG.standard_normal((7, 128)).astype(np.float32)
    w = RNG.random(128).astype(np.float32)
    codec = types.get("Q8_0")
    y = codec.decode(codec.encode(x, w)).astype(np.float64)
    error = x - y
    found = ggufx.quality(x, "q8_0", w)
    assert found.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-12)
    assert found.relative_rmse == pytest.approx(np.linalg.norm(error) / np.linalg.norm(x), rel=1e-6)
    assert found.weighted_rmse == pytest.approx(np.sqrt(np.average(error**2, weights=np.tile(w, (7, 1)))), rel=1e-6)
    assert found.max_error == np.abs(error).max()
    assert found.sqnr == pytest.approx(-20 * np.log10(np.linalg.norm(error) / np.linalg.norm(x)), rel=1e-6)
    assert found.cosine == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1], abs=1e-4)
    assert found.bits_per_weight == 8.5
    assert found.n_weights == x.size


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.standard_normal((33, 64)).astype(np.float32)
    whole = ggufx.quality(x, "Q4_0")
    monkeypatch.setattr(sys.modules["ggufx.distortion"], "_CHUNK_LEN", 64 * 5)
    parts = ggufx.quality(x, "Q4_0")
    assert parts.max_error == whole.max_error
    assert parts.rmse == pytest.approx(whole.rmse, rel=1e-12)


def test_an_exact_type_has_no_error() -> None:
    x = RNG.standard_normal((2, 32)).astype(np.float16)
    found = ggufx.quality(x, "F16")
    assert (found.rmse, found.max_error, found.sqnr) == (0.0, 0.0, float("inf"))
    assert found.cosine == pytest.approx(1.0, rel=1e-15)
    assert found.to_json()["sqnr"] is None


def test_zeros_and_nothing() -> None:
    assert ggufx.quality(np.zeros((2, 32), np.float32), "Q8_0").relative_rmse == 0.0
    with pytest.raises(CodecError, match="nothing to measure"):
        ggufx.quality(np.zeros((0, 32), np.float32), "Q8_0")


# Measure --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("a.weight", RNG.standard_normal((40, 256)).astype(np.float32))
    writer.add_tensor("b.weight", RNG.standard_normal((8, 96)).astype(np.float32))
    writer.add_tensor("norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_measure_agrees_with_quality_and_leaves_out_what_does_not_fit(model: Path) -> None:
    found = measure(model, ["q8_0", "f8_e4m3_b128"])
    assert [(m.tensor, m.type, m.quality is None) for m in found] == [
        ("a.weight", "Q8_0", False),
        ("a.weight", "F8_E4M3_B128", False),
        ("b.weight", "Q8_0", False),
        ("b.weight", "F8_E4M3_B128", True),
    ]
    assert found[3].note == "rows of 96 are not divisible by 128"
    with ggufx.open(model) as f:
        assert found[0].quality == ggufx.quality(f["a.weight"].numpy(), "Q8_0")
    lines = {line["type"]: line for line in summary(found)}
    assert lines["Q8_0"]["tensors"] == 2
    assert lines["F8_E4M3_B128"]["left_out"] == 1


def test_measure_samples_rows_evenly(model: Path) -> None:
    (found,) = measure(model, ["Q8_0"], pattern="a.*", max_rows=10)
    with ggufx.open(model) as f:
        rows = f["a.weight"].numpy()[np.linspace(0, 39, 10).astype(int)]
    assert found.quality == ggufx.quality(rows, "Q8_0")


def test_the_command(model: Path, cli: Cli) -> None:
    found = json.loads(cli("measure", model, "--types", "q8_0,Q4_0", "--json").out)
    assert [line["type"] for line in found["summary"]] == ["Q8_0", "Q4_0"]
    assert len(found["tensors"]) == 4
    rows = list(csv.DictReader(io.StringIO(cli("measure", model, "--types", "q8_0", "--csv").out)))
    assert [row["tensor"] for row in rows] == ["a.weight", "b.weight"]
    assert float(rows[0]["rmse"]) > 0
    table = cli("measure", model, "--types", "f8_e4m3_b128").out
    assert "left out: F8_E4M3_B128: rows of 96 are not divisible by 128" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "nope"], "'nope' is not a known type"),
        (["--types", "q8_0", "--tensors", "zzz*"], "'zzz*' matches none of the 3 tensors"),
        (["--types", "q8_0", "--imatrix", "/nonexistent"], "No such file"),
    ],
)
def test_its_errors_are_one_line(model: Path, arguments: list[str], message: str, cli: Cli) -> None:
    done = cli("measure", model, *arguments)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
