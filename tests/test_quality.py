"""Error measures against plain NumPy, importance matrices built by hand and by the gguf package, and `measure`."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import ggufx
from ggufx import imatrix, types
from ggufx.errors import CodecError, GGUFError
from ggufx.measure import measure, summary

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
    monkeypatch.setattr(sys.modules["ggufx.quality"], "_CHUNK_LEN", 64 * 5)  # the function hides the module
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


# Importance matrices --------------------------------------------------------------------------------------------


def legacy(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = struct.pack("<ii", 7, 4) + b"wiki") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, values.size)]
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + tail


@pytest.fixture
def sums() -> np.ndarray:
    return (RNG.random(64) * 10).astype(np.float32)


def test_the_legacy_format(tmp_path: Path, sums: np.ndarray) -> None:
    path = tmp_path / "imatrix.gguf"  # the suffix says nothing
    path.write_bytes(legacy({"blk.0.ffn_down.weight": (4, sums)}))
    found = imatrix.load(path)
    assert found.chunk_count == 7
    assert found.datasets == ("wiki",)
    assert np.array_equal(found["blk.0.ffn_down.weight"], (sums / np.float32(4)).reshape(1, -1))
    assert np.array_equal(found.columns("blk.0.ffn_down.weight", (8, 64)), found["blk.0.ffn_down.weight"])
    assert found.columns("blk.0.ffn_down.weight", (2, 8, 32)).shape == (2, 32)
    assert found.columns("other.weight", (8, 64)) is None
    with pytest.raises(GGUFError, match="imatrix size 64 is different from tensor size 128"):
        found.columns("blk.0.ffn_down.weight", (8, 128))


def test_the_gguf_format_with_an_expert_that_saw_nothing(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    sums, counts = RNG.random((3, 32)).astype(np.float32), np.array([[2.0], [0.0], [5.0]], np.float32)
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 12)
    writer.add_tensor("blk.1.ffn_up_exps.weight.in_sum2", sums)
    writer.add_tensor("blk.1.ffn_up_exps.weight.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = imatrix.load(path)
    assert found.datasets == ("a", "b")
    assert found.chunk_count == 12
    values = found["blk.1.ffn_up_exps.weight"]
    assert np.array_equal(values[[0, 2]], sums[[0, 2]] / counts[[0, 2]])
    assert not values[1].any()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "failed reading the number of entries"),
        (b"\xff\xff\xff\x7f", "not an importance matrix"),
        (struct.pack("<iii", 1, 2**30, 0) + bytes(99), "failed reading name"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**30) + bytes(99), "failed reading data for entry 0"),
        (legacy({"x": (1, np.array([np.nan, 1], "f4"))}), "1 values that are NaN"),
        (legacy({"x": (1, np.array([-1, 1], "f4"))}), "negative"),
    ],
)
def test_damaged_importance_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=message):
        imatrix.load(path)


def test_every_truncation_is_one_clear_error(tmp_path: Path, sums: np.ndarray) -> None:
    whole = legacy({"a": (1, sums), "bb": (2, sums[:5])}, tail=b"")
    path = tmp_path / "imatrix.dat"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            imatrix.load(path)


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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggufx", "measure", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command(model: Path) -> None:
    found = json.loads(run(model, "--types", "q8_0,Q4_0", "--json").stdout)
    assert [line["type"] for line in found["summary"]] == ["Q8_0", "Q4_0"]
    assert len(found["tensors"]) == 4
    rows = list(csv.DictReader(io.StringIO(run(model, "--types", "q8_0", "--csv").stdout)))
    assert [row["tensor"] for row in rows] == ["a.weight", "b.weight"]
    assert float(rows[0]["rmse"]) > 0
    table = run(model, "--types", "f8_e4m3_b128").stdout
    assert "left out: F8_E4M3_B128: rows of 96 are not divisible by 128" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "nope"], "'nope' is not a known type"),
        (["--types", "q8_0", "--tensors", "zzz*"], "no float matrix matches 'zzz*'"),
        (["--types", "q8_0", "--imatrix", "/nonexistent"], "No such file"),
    ],
)
def test_its_errors_are_one_line(model: Path, arguments: list[str], message: str) -> None:
    done = run(model, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
