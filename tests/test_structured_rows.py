"""Encoders on values that are unlike a model's weights: against the C library's errors, and against lower efforts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from structured_rows import structured_rows

from ggufx import types
from ggufx.types._effort import Weighting, errors, unusual

ERRORS = json.loads((Path(__file__).resolve().parents[1] / "fixtures" / "encoder_errors.json").read_text())
ROWS = structured_rows()
NEXT_TO_ZERO = np.random.default_rng(5).standard_normal((8, 512))


@cache
def error(name: str, kind: str, effort: str) -> np.ndarray:
    """Squared errors by row, with ones as the importance."""
    codec, rows = types.get(name), ROWS[kind]
    packed = codec.encode(rows, np.ones(rows.shape[1], np.float32), effort=effort, objective="mse")
    return ((codec.decode(packed).astype(np.float64) - rows) ** 2).sum(axis=1)


@pytest.mark.parametrize("effort", ["normal", "high"])
@pytest.mark.parametrize("name", [name for name in ERRORS if types.get(name).can_encode])
def test_no_kind_of_rows_is_worse_than_the_c_librarys(name: str, effort: str) -> None:
    for kind, expected in ERRORS[name].items():
        # Of a constant only the rounding of a binary16 scale is left, at most 2^-24 of its energy: chance.
        chance = 2.0**-24 * float((ROWS[kind].astype(np.float64) ** 2).sum())
        assert error(name, kind, effort).sum() <= 1.02 * expected + chance, kind


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "outliers"])
def test_minima_are_searched_on_both_sides_of_zero_in_a_hurry_too(name: str, kind: str) -> None:
    chance = 2.0**-24 * float((ROWS[kind].astype(np.float64) ** 2).sum())
    assert error(name, kind, "fast").sum() <= 1.02 * ERRORS[name][kind] + chance


def test_a_block_above_zero_is_stored_under_negative_scales() -> None:
    codec = types.get("Q2_K")
    rows = ROWS["offset"]
    _, blocks = codec.layout.split(codec.encode(rows, objective="mse"))
    assert (blocks["d"] < 0).all()
    assert (blocks["dmin"] < 0).all()
    _, blocks = codec.layout.split(codec.encode(-rows, objective="mse"))
    assert (blocks["d"] > 0).all()
    assert (blocks["dmin"] > 0).all()


@pytest.mark.parametrize("exponent", [-8, -9, -11, -20, -38])
@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_what_is_below_the_least_scale_becomes_zeros(exponent: int, effort: str) -> None:
    codec = types.get("IQ2_XXS")
    rows = (NEXT_TO_ZERO * 10.0**exponent).astype(np.float32)
    packed = codec.encode(rows, np.ones(512, np.float32), effort=effort)
    # Under the least subnormal of binary16 all values of the type are 6e-8 and more, twice the largest of these.
    assert not packed.any()
    assert not codec.decode(packed).any()


# What was worse at a higher effort.
@pytest.mark.parametrize("name", ["Q3_K", "Q5_K", "Q6_K", "IQ2_K", "IQ3_KT"])
def test_no_row_is_worse_at_a_higher_effort(name: str) -> None:
    for kind in ("ramp", "long ramp", "wave off zero", "offset", "steps", "constant"):
        fast, normal, high = (error(name, kind, effort) for effort in ("fast", "normal", "high"))
        assert (high <= normal).all(), kind
        assert (normal <= fast).all(), kind


def test_which_rows_are_unlike_weights() -> None:
    for kind, rows in ROWS.items():
        share = unusual(rows).mean()
        assert share == 0 if kind == "noise" else share > 0.8, kind
    weights = np.random.default_rng(0).standard_t(8, (2000, 512)).astype(np.float32)
    assert unusual(weights).mean() < 0.01
    for n in (16, 32, 64, 128):
        assert not unusual(np.random.default_rng(1).standard_normal((5000, n)).astype(np.float32)).any()


@pytest.mark.parametrize("columns", [20, 256, 512])
def test_errors_are_weighted_sums_of_squares(columns: int) -> None:
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2, 3, columns)).astype(np.float32)
    m = rng.random(columns).astype(np.float32)
    a, b, w = x.astype(np.float64), (x.astype(np.float64) - y) ** 2, m.astype(np.float64)
    span = min(columns, 256)
    mean = np.repeat((a**2).reshape(3, -1, span).mean(axis=2), span, axis=1)
    cases = {
        (None, None): b,
        ("m", None): w * b,
        ("m", Weighting()): w * b,
        ("m", Weighting(factor=2.0, span=span)): w * np.sqrt(2 * mean + a * a) * b,
        (None, Weighting(factor=2.0, plain_factor=0.25, plain_power=1.0, span=span)): (mean / 4 + a * a) * b,
        (None, Weighting(plain_power=0.5, span=span)): np.abs(a) * b,
        (None, Weighting(factor=1.0, span=0)): b,
        ("m", Weighting(factor=1.0, span=0)): w * np.sqrt((a * a).mean(axis=1, keepdims=True) + a * a) * b,
    }
    for (weighted, weighting), expected in cases.items():
        assert np.allclose(errors(x, y, m if weighted else None, weighting), expected.sum(axis=1), rtol=1e-12)


def test_bytes_of_a_row_do_not_depend_on_its_neighbours() -> None:
    rows = np.concatenate([rows[:, :512] for rows in ROWS.values()])
    for name in ("Q2_K", "Q5_K", "IQ2_K"):
        together = types.get(name).encode(rows, effort="normal")
        alone = [types.get(name).encode(row[None], effort="normal")[0] for row in rows]
        assert np.array_equal(together, np.stack(alone))
