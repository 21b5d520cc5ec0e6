"""Encoders with evenly spaced codes, powers of two and grids: error against the C libraries' own bytes, and laws."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from oracle import VECTORS

from ggufx import tables, types
from ggufx.errors import CodecError
from ggufx.types import Codec
from ggufx.types import codec as codec_module
from ggufx.types.mxfp4 import ROUNDED_UP
from ggufx.types.words import NumpyWords

ROOT = Path(__file__).parent.parent
REALISTIC = [0, 1, *range(4, 12)]
"""Rows of the vectors that are neither zero nor constant. Row 4 has values round 1e-6, where a half is a coarse subnormal."""
TINY = REALISTIC.index(4)

BLOCK32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_0")
LEVELS = ("Q1_0", "Q2_0", "TQ1_0", "TQ2_0")
UNWEIGHTED = ("MXFP4", "NVFP4", *LEVELS)
"""Types whose reference ignores the importance, so that it is the weight itself here."""
SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
TRELLIS = ("IQ2_KT", "IQ3_KT", "IQ4_KT")
SEARCHES = (*UNWEIGHTED, *BLOCK32, "IQ2_XXS", *GRIDS, *SUPER, *TRELLIS)
EFFORTS = ("fast", "normal", "high")

# Geometric mean of the ratios to the C library's squared error, with importance and without: fast, normal, high.
BARS = {
    "MXFP4": ((0.69, 0.69, 0.68), (0.72, 0.72, 0.72)),
    "NVFP4": ((0.60, 0.585, 0.583), (0.66, 0.65, 0.65)),
    "Q1_0": ((0.995, 0.995, 0.995), (1.0, 1.0, 1.0)),
    "Q2_0": ((0.28, 0.278, 0.278), (0.316, 0.315, 0.315)),
    "TQ1_0": ((0.392, 0.391, 0.391), (0.427, 0.425, 0.425)),
    "TQ2_0": ((0.418, 0.417, 0.417), (0.43, 0.428, 0.428)),
    "Q4_0": ((0.97, 0.96, 0.96), (0.88, 0.88, 0.88)),
    "Q5_0": ((0.81, 0.80, 0.80), (0.78, 0.78, 0.78)),
    "Q6_0": ((0.67, 0.67, 0.66), (0.69, 0.68, 0.68)),
    "Q4_1": ((0.80, 0.79, 0.785), (0.61, 0.61, 0.605)),
    "Q5_1": ((0.66, 0.65, 0.65), (0.49, 0.485, 0.485)),
    "IQ2_XXS": ((0.66, 0.65, 0.65), None),
    "IQ1_S": ((0.83, 0.825, 0.825), None),
    "IQ1_M": ((0.79, 0.785, 0.78), None),
    "IQ2_XS": ((0.63, 0.625, 0.62), None),
    "IQ2_S": ((0.635, 0.63, 0.625), (0.49, 0.485, 0.48)),
    "IQ3_XXS": ((0.57, 0.555, 0.55), (0.386, 0.376, 0.369)),
    "IQ3_S": ((0.55, 0.535, 0.52), (0.397, 0.38, 0.373)),
    "IQ2_KT": ((0.735, 0.73, 0.715), (0.715, 0.705, 0.685)),
    "IQ3_KT": ((0.905, 0.89, 0.88), (0.92, 0.905, 0.895)),
    "IQ4_KT": ((0.965, 0.905, 0.90), (0.995, 0.95, 0.92)),
    "Q2_K": ((0.86, 0.83, 0.82), (0.73, 0.72, 0.71)),
    "Q3_K": ((0.69, 0.69, 0.69), (0.66, 0.66, 0.66)),
    "Q4_K": ((0.43, 0.42, 0.41), (0.42, 0.41, 0.41)),
    "Q5_K": ((0.36, 0.34, 0.33), (0.36, 0.34, 0.34)),
    "Q6_K": ((0.42, 0.40, 0.40), (0.43, 0.41, 0.40)),
}
# The same with the gain on the tiny row left out (a ratio below 1 there counts as 1): it would hide the others.
BARS_WITHOUT_TINY = {
    "MXFP4": ((0.69, 0.69, 0.68), (0.72, 0.72, 0.72)),
    "NVFP4": ((0.60, 0.585, 0.583), (0.66, 0.65, 0.65)),
    "Q1_0": ((0.996, 0.996, 0.996), (1.0, 1.0, 1.0)),
    "Q2_0": ((0.325, 0.324, 0.324), (0.362, 0.362, 0.362)),
    "TQ1_0": ((0.448, 0.447, 0.447), (0.491, 0.489, 0.489)),
    "TQ2_0": ((0.475, 0.474, 0.474), (0.487, 0.486, 0.486)),
    "Q4_0": ((0.99, 0.985, 0.983), (0.91, 0.91, 0.91)),
    "Q5_0": ((0.98, 0.97, 0.965), (0.915, 0.912, 0.91)),
    "Q6_0": ((1.0, 0.998, 0.99), (0.97, 0.965, 0.96)),
    "Q4_1": ((0.915, 0.905, 0.902), (0.705, 0.70, 0.70)),
    "Q5_1": ((0.94, 0.93, 0.927), (0.70, 0.695, 0.693)),
    "IQ2_XXS": ((0.86, 0.85, 0.845), None),
    "IQ1_S": ((0.83, 0.83, 0.825), None),
    "IQ1_M": ((0.81, 0.80, 0.80), None),
    "IQ2_XS": ((0.85, 0.845, 0.845), None),
    "IQ2_S": ((0.875, 0.87, 0.86), (0.70, 0.695, 0.685)),
    "IQ3_XXS": ((0.83, 0.815, 0.81), (0.586, 0.572, 0.567)),
    "IQ3_S": ((0.825, 0.81, 0.80), (0.612, 0.601, 0.595)),
    "IQ2_KT": ((0.745, 0.735, 0.725), (0.725, 0.71, 0.695)),
    "IQ3_KT": ((0.91, 0.895, 0.885), (0.925, 0.91, 0.9)),
    "IQ4_KT": ((0.965, 0.905, 0.90), (0.995, 0.95, 0.92)),
    "Q2_K": ((0.90, 0.875, 0.865), (0.77, 0.755, 0.75)),
    "Q3_K": ((0.99, 0.985, 0.985), (0.96, 0.96, 0.96)),
    "Q4_K": ((0.87, 0.85, 0.845), (0.845, 0.835, 0.83)),
    "Q5_K": ((0.80, 0.775, 0.76), (0.80, 0.78, 0.775)),
    "Q6_K": ((0.875, 0.83, 0.825), (0.89, 0.85, 0.83)),
}
# (c, f, p): weights are m sqrt(c mean + x^2) with importance, f mean + p x^2 without, means over the block: those of the C
# libraries, but that these have 0 for 1/4.
GRID_WEIGHTS = {
    "IQ1_S": (2, 0, 0), "IQ1_M": (2, 0.25, 1), "IQ2_XS": (1, 0, 0), "IQ2_S": (2, 0.5, 1), "IQ3_XXS": (2, 0.25, 1),
    "IQ3_S": (2, 0.25, 1),
}  # fmt: skip
WORST_ROW = {"fast": 1.045, "normal": 1.02, "high": 1.02}


@cache
def vector(name: str) -> dict[str, np.ndarray]:
    with np.load(VECTORS / f"{name.lower()}.npz") as archive:
        return dict(archive)


def weights(name: str, x: np.ndarray, importance: np.ndarray | None, objective: str = "reference") -> np.ndarray:
    """Weights of the error that the type's docstring states, in float64."""
    x = x.astype(np.float64)
    m = np.ones_like(x) if importance is None else np.broadcast_to(importance.astype(np.float64), x.shape)
    if objective == "mse" or name in UNWEIGHTED or (name in BLOCK32 and importance is None):
        return m
    if name in TRELLIS:
        s2 = 2 * np.repeat((x.reshape(x.shape[0], -1, 256) ** 2).mean(axis=2), 256, axis=1)
        return s2 / 4 + x * x if importance is None else m * np.sqrt(s2 + x * x)
    parts = x.reshape(x.shape[0], -1, x.shape[1] if name in BLOCK32 else 256)
    sigma2 = np.repeat((parts**2).mean(axis=2), parts.shape[2], axis=1)
    if name in GRIDS:
        c, f, p = GRID_WEIGHTS[name]
        return f * sigma2 + p * x * x if importance is None else m * np.sqrt(c * sigma2 + x * x)
    return m * np.sqrt(sigma2 + x * x)


def error(codec: Codec, packed: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (w * (x.astype(np.float64) - codec.decode(packed)) ** 2).sum(axis=1)


def fresh(rows: int = 24, columns: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian and Student-t rows that nothing was tuned on, of weights' magnitude, and an uneven importance."""
    rng = np.random.default_rng(20260101)
    x = rng.standard_normal((rows, columns))
    x[1::2] = rng.standard_t(4, (rows // 2, columns))
    return (x * 0.03).astype(np.float32), (rng.random(columns) ** 2 + 0.001).astype(np.float32)


def importances(name: str, importance: np.ndarray) -> list[np.ndarray | None]:
    return [importance] if types.get(name).needs_importance else [importance, None]


@pytest.mark.parametrize("case", ["imatrix", "plain"])
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", SEARCHES)
def test_error_against_the_reference(name: str, effort: str, case: str) -> None:
    data, codec = vector(name), types.get(name)
    importance = data["imatrix"] if case == "imatrix" else None
    if importance is None and codec.needs_importance:
        with pytest.raises(CodecError, match="importance"):
            codec.encode(data["x"])
        return
    if BARS[name][case == "plain"] is None:
        pytest.skip("the C libraries' vectors have no such case")
    x = data["x"]
    w = weights(name, x, importance)
    theirs = data["packed_imatrix" if case == "imatrix" else "packed"]
    ours = codec.encode(x, importance, effort=effort)
    rows = [row for row in REALISTIC if row < len(x)]
    ratio = (error(codec, ours, x, w) / error(codec, theirs, x, w).clip(1e-300))[rows]
    index = EFFORTS.index(effort)
    assert np.exp(np.log(ratio).mean()) <= BARS[name][case == "plain"][index]
    assert ratio.max() <= WORST_ROW[effort]
    if len(ratio) > TINY:
        ratio[TINY] = max(ratio[TINY], 1)
    assert np.exp(np.log(ratio).mean()) <= BARS_WITHOUT_TINY[name][case == "plain"][index]


@pytest.mark.parametrize("name", [*UNWEIGHTED, "Q4_0", "Q4_1", "Q5_1", "IQ2_XXS"])
def test_error_against_the_reference_effort_on_fresh_data(name: str) -> None:
    codec = types.get(name)
    x, importance = fresh()
    bars = {"MXFP4": 0.97, "Q1_0": 1.0001, "Q4_0": 0.99, "Q4_1": 0.96, "Q5_1": 0.96, "IQ2_XXS": 0.87}
    for m in importances(name, importance):
        w = weights(name, x, m)
        ours, theirs = (error(codec, codec.encode(x, m, effort=e), x, w).sum() for e in ("normal", "reference"))
        assert ours < bars.get(name, 0.85) * theirs


@pytest.mark.parametrize("name", SEARCHES)
def test_more_effort_is_less_error(name: str) -> None:
    codec = types.get(name)
    x, importance = fresh()
    for m in importances(name, importance):
        w = weights(name, x, m)
        fast, normal, high = (error(codec, codec.encode(x, m, effort=e), x, w).sum() for e in EFFORTS)
        assert high <= normal * 1.0001
        assert normal <= fast * 1.0001
        assert name in ("MXFP4", "Q1_0") or high < fast


@pytest.mark.parametrize("name", SEARCHES)
def test_objective_mse_is_the_better_one_in_its_own_measure(name: str) -> None:
    codec = types.get(name)
    x, importance = fresh()
    for m in importances(name, importance):
        w = weights(name, x, m, "mse")
        plain, default = (error(codec, codec.encode(x, m, objective=o), x, w).sum() for o in ("mse", "reference"))
        assert plain <= default * 1.0001


@pytest.mark.parametrize("name", ["IQ1_M", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_grids_without_importance_keep_small_elements_too(name: str) -> None:
    # The libraries' weight x^2 makes large elements of small ones; less weighted error is no gain if the plain one grows.
    codec, x = types.get(name), fresh()[0]
    plain, best = (error(codec, codec.encode(x, objective=o), x, np.ones(x.shape)).sum() for o in ("reference", "mse"))
    assert plain < 1.4 * best
    data = vector(name)
    if "packed" not in data:
        return
    x = data["x"]
    packed = codec.encode(x)
    for w, bar in ((np.ones(x.shape), 0.95), (x.astype(np.float64) ** 2, 0.35)):
        ratio = (error(codec, packed, x, w) / error(codec, data["packed"], x, w).clip(1e-300))[REALISTIC]
        ratio[TINY] = max(ratio[TINY], 1)
        assert np.exp(np.log(ratio).mean()) < bar


def grid_scales(codec: Codec, packed: np.ndarray) -> np.ndarray:
    """Scale of every group of a grid type, [rows, blocks, groups]."""
    blocks = codec.layout.split(packed)[1]
    if codec.name == "IQ1_M":
        words = blocks["scales"].view("<u2")
        d = np.bitwise_or.reduce(words >> 12 << np.arange(0, 16, 4, dtype=np.uint16), axis=-1).view(np.float16)
        a = (words[..., None] >> np.arange(0, 12, 3) & 7).reshape(*d.shape, 16)
        return d.astype(np.float64)[..., None] * (2 * a + 1)
    if codec.name == "IQ3_XXS":
        a, unit = blocks["qs"][..., 64:].copy().view("<u4") >> 28, 0.25
    elif codec.name == "IQ1_S":
        a, unit = blocks["qh"] >> 12 & 7, 1
    else:
        a, unit = NumpyWords().fields(blocks["scales"], 4, 1), 1 if codec.name == "IQ3_S" else 0.125
    return blocks["d"].astype(np.float64)[..., None] * unit * (2 * a.astype(np.float64) + 1)


@pytest.mark.parametrize("name", GRIDS)
def test_points_are_the_best_of_the_whole_grid(name: str) -> None:
    # By trying them all, under the scales that were found.
    codec = types.get(name)
    x, importance = fresh(rows=2)
    packed = codec.encode(x, importance, objective="mse")
    points = getattr(tables, f"GRID_{name[:3] if name.startswith('IQ1') else name}").astype(np.float64)
    length = points.shape[1]
    scales = grid_scales(codec, packed)
    each = 256 // length // scales.shape[-1]
    s = np.repeat(scales.reshape(-1), each)[:, None]
    v = x.astype(np.float64).reshape(-1, length)
    w = np.broadcast_to(importance.astype(np.float64), x.shape).reshape(-1, length)

    def errors(signed: np.ndarray, grid: np.ndarray) -> np.ndarray:
        return ((w * v * v).sum(axis=1)[:, None] - 2 * s * (w * signed) @ grid.T) + s * s * (w @ (grid**2).T)

    if name.startswith("IQ1"):
        plus, minus = (errors(v, points + shift).min(axis=1) for shift in (0.125, -0.125))
        if name == "IQ1_S":
            plus, minus = plus.reshape(-1, each).sum(axis=1), minus.reshape(-1, each).sum(axis=1)
        least = np.minimum(plus, minus).sum()
    else:
        right = errors(np.abs(v), points)
        wrong = right + 4 * s * ((w * np.abs(v))[:, None, :] * points).min(axis=2)
        right, wrong = right.min(axis=1), wrong.min(axis=1)
        odd = (v.reshape(-1, 8) < 0).sum(axis=1) % 2 == 1
        if name == "IQ2_XS":
            right = np.where(odd, wrong, right)
        elif name == "IQ3_XXS":
            first, second = (part.reshape(-1, 2) for part in (right, wrong))
            flipped = np.minimum(first[:, 0] + second[:, 1], first[:, 1] + second[:, 0])
            right = np.where(odd, flipped, first.sum(axis=1))
        least = right.sum()
    found = error(codec, packed, x, np.broadcast_to(importance, x.shape)).sum()
    assert 0.99999 * least <= found <= 1.0001 * least


@pytest.mark.parametrize("name", ["Q8_0", "F8_E4M3_B128"])
def test_types_without_a_search_ignore_importance_and_effort(name: str) -> None:
    codec = types.get(name)
    x, importance = fresh()
    packed = codec.encode(x)
    efforts = (*EFFORTS, "reference") if codec.reproduces else EFFORTS
    for effort in efforts:
        assert np.array_equal(codec.encode(x, importance, effort=effort), packed)


@pytest.mark.parametrize("name", [*UNWEIGHTED, "Q4_0", "Q4_1", "Q5_1"])
def test_the_default_is_not_the_reference(name: str) -> None:
    # Guards the byte tests of test_golden.py: they would prove little if every effort were the reference.
    codec = types.get(name)
    x, importance = fresh()
    assert (codec.encode(x, importance) != codec.encode(x, importance, effort="reference")).any()


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_a_reference_that_ignores_importance(name: str) -> None:
    x, importance = fresh()
    codec = types.get(name)
    assert np.array_equal(codec.encode(x, importance, effort="reference"), codec.encode(x, effort="reference"))


def test_mxfp4_exponents_round_up_for_a_few_floats_only() -> None:
    fields = np.arange(1, 254)
    below = ((fields + 1) << 23) - ROUNDED_UP[1:254].astype(np.int64)
    assert below.min() >= 0
    assert below.max() < 128
    assert below[126 - 1] == 0 or below[126 - 1] < 3  # just under 1 the logarithm is near 0 and keeps its digits
    assert below[253 - 1] > 20


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", SEARCHES)
def test_rows_splits_and_threads_change_nothing(name: str, effort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = types.get(name)
    x, importance = fresh(rows=14, columns=768)  # rows do not fill the lanes evenly
    x = np.concatenate([x, np.zeros_like(x[:1]), x[:1] * 1e-6, x[:1] * 1e6])
    for m in importances(name, importance):
        packed = codec.encode(x, m, effort=effort, threads=1)
        assert np.array_equal(np.concatenate([codec.encode(row[None], m, effort=effort) for row in x]), packed)
        assert np.array_equal(codec.encode(x[::-1], m, effort=effort)[::-1], packed)
        with monkeypatch.context() as patch:
            patch.setattr(codec_module, "_CHUNK_NBYTES", 3 * x.shape[1] * 4)
            for threads in (1, 2, 3):
                assert np.array_equal(codec.encode(x, m, effort=effort, threads=threads), packed)
        assert np.array_equal(codec.encode(x, m, effort=effort, use_kernel=False), packed)


_HASH = """
import hashlib, sys
import numpy as np
sys.path.insert(0, "tests")
from test_encoders_scalar import digest
print(digest())
"""


def digest() -> str:
    """Hash of what every encoder here makes of the vectors, at every effort."""
    total = hashlib.sha256()
    for name in (*SEARCHES, "Q8_0", "F8_E4M3_B128"):
        codec = types.get(name)
        x, importance = fresh(rows=6)
        x[0] *= np.float32(1e-4)
        for m in importances(name, importance):
            for effort in (*EFFORTS, "reference") if codec.reproduces else EFFORTS:
                total.update(codec.encode(x, m, effort=effort, threads=1).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize(
    "cpu",
    [
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+f16c,+fma"},
        {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    ],
    ids=["avx2", "generic"],
)
def test_the_cpu_model_changes_nothing(cpu: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, **cpu, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _HASH],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()


def edge_rows(columns: int) -> np.ndarray:
    rng = np.random.default_rng(9)
    noise = rng.standard_normal((16, columns)).astype(np.float32)
    noise[0] = 0
    noise[1] = 0.037
    noise[2] = -2.5
    noise[3] *= np.float32(1e-6)
    noise[4] *= np.float32(1e-12)
    noise[5] *= np.float32(1e-38)
    noise[6] = 0
    noise[6, 5] = 7.5
    noise[7] *= np.float32(1e-3)
    noise[7, ::61] = 9
    noise[8] = np.abs(noise[8])
    noise[9] = -np.abs(noise[9])
    noise[10] *= np.float32(1e4)
    noise[11, columns // 2 :] = 0
    noise[12] *= np.float32(2.0) ** rng.integers(-30, 4, columns).astype(np.float32)
    noise[13] *= np.float32(1e30)
    noise[14] = np.float32(3e38)
    noise[15] = np.float32(1e-45)
    return noise


def halves(codec: Codec, packed: np.ndarray) -> list[np.ndarray]:
    blocks = codec.layout.split(packed)[1]
    return [blocks[field] for field in ("d", "dmin", "m") if field in (blocks.dtype.names or ())]


@pytest.mark.parametrize("objective", ["reference", "mse"])
@pytest.mark.parametrize("effort", [*EFFORTS, "reference"])
@pytest.mark.parametrize("name", [*SEARCHES, "Q8_0", "F8_E4M3_B128"])
def test_edge_rows_stay_finite_and_sane(name: str, effort: str, objective: str) -> None:
    codec = types.get(name)
    if effort == "reference" and not codec.reproduces:
        pytest.skip("the type promises no reference bytes")
    x = edge_rows(512)
    for m in importances(name, fresh(columns=512)[1]):
        packed = codec.encode(x, m, effort=effort, objective=objective)
        for half in halves(codec, packed):
            assert np.isfinite(half).all()
        y = codec.decode(packed).astype(np.float64)
        assert np.isfinite(y).all()
        assert not y[0].any()
        top = np.abs(x).max(axis=1)
        # Nothing is farther from its value than the row's largest one; halves end at 65504 and 6e-8.
        usual = (top > 1e-5) & (top < 1e6)
        # Grids of eight with three values have not every combination of signs, and points of a trellis serve the columns that
        # count, together: an element that counts little may get the wrong one.
        farthest = 2.2 if name in TRELLIS else 2 if name in {"IQ1_S", "IQ1_M"} else 1.01
        assert (np.abs(y - x)[usual].max(axis=1) <= top[usual] * farthest).all()
        small = top <= 1e-5
        assert (np.abs(y - x)[small].max(axis=1) <= np.maximum(top[small], 2e-5)).all()


@pytest.mark.parametrize("name", [*BLOCK32, *SUPER, "Q8_0"])
def test_constant_rows_come_back(name: str) -> None:
    codec = types.get(name)
    for value in (0.037, -2.5, 100):
        y = codec.decode(codec.encode(np.full((1, 256), value, np.float32)))
        assert np.abs(y / value - 1).max() < 4e-3


@pytest.mark.parametrize("name", SEARCHES)
def test_only_ratios_of_the_importance_count(name: str) -> None:
    codec = types.get(name)
    x, importance = fresh(rows=4)
    packed = codec.encode(x, importance)
    for power in (-120.0, 100.0):
        assert np.array_equal(codec.encode(x, importance * np.float32(2.0**power)), packed)


@pytest.mark.parametrize("name", SEARCHES)
def test_powers_of_two_pass_through(name: str) -> None:
    # Within the normal range of the stored scales, so that nothing is rounded differently.
    codec = types.get(name)
    x, importance = fresh(rows=4)
    x *= 32
    expected = codec.decode(codec.encode(x, importance))
    assert np.array_equal(codec.decode(codec.encode(x * 16, importance)), expected * 16)


@pytest.mark.parametrize("name", SEARCHES)
def test_columns_without_importance_are_still_coded_sanely(name: str) -> None:
    codec = types.get(name)
    x, importance = fresh(rows=4)
    importance[::2] = 0
    y = codec.decode(codec.encode(x, importance))
    assert np.isfinite(y).all()
    used, unused = ((x - y)[:, start::2] for start in (1, 0))
    # One scale for a whole block of two or three levels favours no column by much.
    assert (used**2).sum() <= (unused**2).sum() * (1.02 if name in LEVELS else 1)
    # A point of a trellis that suits the others is noise there.
    assert (unused**2).sum() <= (x[:, ::2] ** 2).sum() * (2 if name in TRELLIS else 1.5)


@pytest.mark.parametrize("effort", [*EFFORTS, "reference"])
@pytest.mark.parametrize(("name", "levels"), [("TQ1_0", 3), ("TQ2_0", 3), ("Q2_0", 3), ("Q2_0", 4), ("Q1_0", 2)])
def test_values_of_few_levels_come_back_exactly(name: str, levels: int, effort: str) -> None:
    if effort == "reference" and levels == 4:
        pytest.skip("the C library never gives the fourth level")
    codec = types.get(name)
    rng = np.random.default_rng(4)
    scales = rng.uniform(1e-3, 2, (64, 1)).astype(np.float16).astype(np.float32)
    x = (
        np.array([-1, 1] if levels == 2 else range(-1, levels - 1), np.float32)[rng.integers(0, levels, (64, 512))]
        * scales
    )
    x[0, :256] = 0
    for m in (None, fresh(columns=512)[1]):
        y = codec.decode(codec.encode(x, m, effort=effort))
        assert np.array_equal(y[1:], x[1:])
        assert levels == 2 or np.array_equal(y[0], x[0])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", *SUPER])
def test_scales_beyond_binary16_are_clamped(name: str) -> None:
    codec = types.get(name)
    x = np.full((1, 256), 1e30, np.float32)
    x[0, ::2] *= -1
    packed = codec.encode(x)
    for half in halves(codec, packed):
        assert np.isfinite(half).all()
    assert (np.sign(codec.decode(packed))[0, 1::2] >= 0).all()
