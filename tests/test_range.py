"""Values beyond what a type's scales can hold are errors that say where they are; up to there nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import Run

from ggufx import types
from ggufx.container import Value, encode_header
from ggufx.errors import CodecError, OutOfRangeError

Cli = Callable[..., Run]
BLOCKS = [
    codec.name
    for codec in types.all_codecs()
    if codec.can_encode and codec.layout.block_len > 1 and codec.value_dtype == np.float32
]
# Scales of these are exponents of eight bits, or float32 at the head of a row.
WIDE = {"MXFP4", "F8_E4M3_B128", "IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ4_KS", "IQ5_KS", "IQ4_KSS"}


def rows(name: str, seed: int = 0) -> np.ndarray:
    n = 2 * types.get(name).layout.block_len
    return np.random.default_rng(seed).standard_normal((3, max(n, 256))).astype(np.float32)


def encoded(name: str, values: np.ndarray) -> np.ndarray:
    codec = types.get(name)
    return codec.encode(
        values, np.ones(values.shape[1], np.float32) if codec.needs_importance else None, effort="fast", saturate=False
    )


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - WIDE))
def test_a_value_beyond_the_scales_is_named(name: str) -> None:
    values = rows(name)
    values[1, 77] = 3e38
    with pytest.raises(OutOfRangeError, match=rf"found 3e\+38 at row 1, column 77: it is beyond what {name} can hold"):
        encoded(name, values)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("magnitude", [1000.0, 1e-3])
def test_ordinary_outliers_are_not_refused(name: str, magnitude: float) -> None:
    values = rows(name, 1)
    values[0] *= magnitude
    values[1, 5] = 60 * magnitude if name != "NVFP4" else magnitude
    encoded(name, values)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_KS"])
def test_what_the_scales_still_hold_is_encoded(name: str) -> None:
    """Beyond the magnitude from which on it is tested, and within what the type can hold."""
    values = rows(name, 2) * np.float32(60_000)
    assert np.abs(values).max() > types.get(name).safe_magnitude
    found = types.get(name).decode(encoded(name, values))
    small = types.get(name).decode(encoded(name, values * np.float32(2.0**-17)))
    np.testing.assert_allclose(found, small * 2.0**17, atol=values.std() / 100)


@pytest.mark.parametrize(("name", "value"), [("F16", 1e6), ("F16", 65520.0), ("BF16", 3.4e38), ("F16", -7e4)])
def test_a_float_type_does_not_make_infinities_in_silence(name: str, value: float) -> None:
    values = np.ones((2, 8), np.float32)
    values[1, 3] = value
    with pytest.raises(OutOfRangeError, match=rf"row 1, column 3: it is beyond what {name} can hold"):
        types.get(name).encode(values, saturate=False)


def test_the_largest_of_float_types_are_encoded() -> None:
    for name, value in (("F16", 65504.0), ("BF16", 3.38e38), ("F32", 3.4e38)):
        found = types.get(name).decode(types.get(name).encode(np.full((1, 4), value, np.float32), saturate=False))
        np.testing.assert_allclose(found, value, rtol=1e-2)


def model(path: Path, values: np.ndarray) -> Path:
    header = encode_header(
        {"general.architecture": Value.string("llama")}, [("blk.0.ffn_up_exps.weight", values.shape, 0, 0)], 32
    )
    path.write_bytes(header + values.astype("<f4").tobytes())
    return path


@pytest.mark.parametrize(
    ("value", "words"), [(3.4e38, ["beyond what Q8_0 can hold"]), (np.nan, ["found nan", "finite values only"])]
)
def test_the_command_names_expert_row_and_column(value: float, words: list[str], tmp_path: Path, cli: Cli) -> None:
    values = np.random.default_rng(3).standard_normal((4, 32, 64)).astype(np.float32)
    values[2, 5, 33] = value
    run = cli("quantize", model(tmp_path / "m.gguf", values), tmp_path / "o.gguf", "q8_0")
    assert run.code == 1
    assert all(word in run.err for word in ("blk.0.ffn_up_exps.weight", "expert 2, row 5, column 33", *words))
    assert "Traceback" not in run.err
    assert not (tmp_path / "o.gguf").exists()


def several(path: Path, count: int) -> Path:
    """A file of ``count`` stacks of experts; the odd ones have a NaN in expert 1, row 3, column 40 and another further down."""
    directory, data = [], b""
    for number in range(count):
        values = np.random.default_rng(number).standard_normal((4, 8, 64)).astype(np.float32)
        if number % 2:
            values[1, 3, 40] = values[3, 0, 0] = np.nan
        directory.append((f"blk.{number}.ffn_up_exps.weight", values.shape, 0, len(data)))
        data += values.tobytes()
    path.write_bytes(encode_header({"general.architecture": Value.string("llama")}, directory, 32) + data)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_one_run_names_every_tensor_with_such_values(threads: int, tmp_path: Path, cli: Cli) -> None:
    source = several(tmp_path / "m.gguf", 6)
    run = cli("quantize", source, tmp_path / "o.gguf", "q8_0", "--threads", threads)
    assert run.code == 1
    assert run.err.splitlines()[-1] == (
        f"error: {source}: tensor 'blk.1.ffn_up_exps.weight': found nan at expert 1, row 3, column 40: Q8_0 encodes finite "
        "values only (2 more tensors have such values: 'blk.3.ffn_up_exps.weight', 'blk.5.ffn_up_exps.weight')"
    )
    assert not (tmp_path / "o.gguf").exists()


def test_a_run_ends_after_ten_of_them(tmp_path: Path, cli: Cli) -> None:
    run = cli("quantize", several(tmp_path / "m.gguf", 60), tmp_path / "o.gguf", "q8_0", "--threads", 1)
    assert run.code == 1
    assert "(at least 9 more tensors have such values: " in run.err
    assert "'blk.19.ffn_up_exps.weight'" in run.err
    assert "'blk.21.ffn_up_exps.weight'" not in run.err


def test_measuring_goes_on_past_them(tmp_path: Path, cli: Cli) -> None:
    source = several(tmp_path / "m.gguf", 4)
    run = cli("measure", source, "--types", "q8_0,q4_0")
    assert run.code == 1
    assert [line.split()[:3] for line in run.out.splitlines()[1:3]] == [["Q8_0", "2", "2"], ["Q4_0", "2", "2"]]
    place = "found nan at expert 1, row 3, column 40 (and 1 more in the rows that were read)"
    assert f"left out: blk.1.ffn_up_exps.weight: {place}\n" in run.out
    assert run.err.splitlines()[-1] == (
        f"error: {source}: 2 of 4 tensors hold values that are NaN or infinite, 'blk.1.ffn_up_exps.weight' first"
    )
    found = json.loads(cli("measure", source, "--types", "q8_0", "--max-rows", 4, "--json").out)["tensors"]
    # Rows 0, 10, 20 and 31 are read: expert 1 row 3 (11) is not, expert 3 row 0 (24) is not.
    assert [record["damaged"] for record in found] == [False] * 4
    found = json.loads(cli("measure", source, "--types", "q8_0", "--json").out)["tensors"]
    assert [record["damaged"] for record in found] == [False, True] * 2
    assert found[1]["note"] == f"blk.1.ffn_up_exps.weight: {place}"


def test_errors_are_codecs(tmp_path: Path) -> None:
    error = OutOfRangeError(69, 5, 1e39, "Q8_0")
    assert isinstance(error, CodecError)
    assert "expert 2, row 5" in str(error.moved(0, 32))
    assert "row 79," in str(error.moved(10))
