"""The GPU encoders: the CPU's bytes, so its error too. Without a GPU, Triton's interpreter runs them on a few blocks."""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

import reference_encoders  # noqa: E402
import test_encoders_scalar as scalar  # noqa: E402
from oracle import VECTORS  # noqa: E402
from structured_rows import structured_rows  # noqa: E402

from ggufx import types  # noqa: E402
from ggufx.kernels.cuda.encode import REPRODUCES, SUPPORTED, count_heads, encode, first_nonfinite  # noqa: E402
from ggufx.types._effort import HEAD, unlike_weights, unusual  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REALISTIC = [0, 1, *range(4, 12)]
"""Rows of the vectors that are neither zero nor constant."""
NAMES = sorted(SUPPORTED)
# Rows of a quick test: as many as the lanes of one program hold, the zero and the tiny one among them.
FEW = {
    "IQ2_KS": [0, 2, 4, 9],
    "IQ3_KS": [1, 2, 4, 7],
    "IQ4_KS": [0, 2, 4, 11],
    "IQ4_K": [2, 9],
    "IQ5_K": [0, 4],
    "IQ2_XXS": [7],
    "Q4_0": [0, 2, 4, 9],
}

every_type = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter is NumPy
gpu = [pytest.mark.cuda, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]


@cache
def vector(name: str) -> dict[str, np.ndarray]:
    path = VECTORS / f"{name.lower()}.npz"
    with np.load(path if path.exists() else VECTORS / "q8_0.npz") as archive:
        found = dict(archive) if path.exists() else {"x": archive["x"]}
    with np.load(VECTORS / "mxfp4.npz") as archive:
        return {"imatrix": archive["imatrix"], **found}


def weights(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    module = reference_encoders if name in reference_encoders.REFERENCES else scalar
    return module.weights(name, x, importance).astype(np.float64)


def on_device(
    name: str,
    x: np.ndarray,
    importance: np.ndarray | None,
    objective: str = "reference",
    effort: str = "normal",
) -> np.ndarray:
    out = torch.full((len(x), types.get(name).layout.row_nbytes(x.shape[1])), 0xAA, dtype=torch.uint8, device=DEVICE)
    m = None if importance is None else torch.from_numpy(importance).to(DEVICE)
    encode(name, torch.from_numpy(x).to(DEVICE), m, out, objective, effort)
    packed, codec = out.cpu().numpy(), types.get(name)
    # What torch.encode and quantizing on a device add on the CPU, for rows unlike weights.
    rows = unusual(x).nonzero()[0] if effort == "normal" and codec.searches else []
    if len(rows):
        better = packed[rows]
        codec.keep_better(x[rows], better, importance, types.Search(effort, objective))
        packed[rows] = better
    return packed


def check(name: str, rows: list[int], weighted: bool, objective: str = "reference", effort: str = "normal") -> None:
    """Same bytes as the CPU's, and by the CPU's decoder no realistic row much worse than the reference's."""
    data, codec = vector(name), types.get(name)
    x, importance = np.ascontiguousarray(data["x"][rows]), data["imatrix"] if weighted else None
    packed = on_device(name, x, importance, objective, effort)
    assert np.array_equal(packed, codec.encode(x, importance, objective=objective, effort=effort))
    case = "dequant_imatrix" if weighted else "dequant"
    if objective == "reference" and case in data:
        w = weights(name, x, importance)
        ours, theirs = (
            (w * (x.astype(np.float64) - y) ** 2).sum(axis=1) for y in (codec.decode(packed), data[case][rows])
        )
        realistic = np.isin(rows, REALISTIC)
        assert (ours[realistic] <= 1.02 * theirs[realistic]).all()


@every_type
def test_bytes_are_the_cpus(name: str) -> None:
    check(name, FEW.get(name, list(range(12))), weighted=True)


@pytest.mark.parametrize("name", ["IQ4_K", "MXFP4", "Q4_0", "Q8_0", "F8_E4M3_B128"])
def test_bytes_are_the_cpus_without_importance(name: str) -> None:
    check(name, FEW.get(name, list(range(12))), weighted=False)


@pytest.mark.parametrize("name", ["MXFP4", "Q4_0"])
def test_objective_mse(name: str) -> None:
    check(name, FEW.get(name, list(range(12)))[:1], weighted=True, objective="mse")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", sorted(REPRODUCES))
def test_the_librarys_bytes(name: str, weighted: bool) -> None:
    data = vector(name)
    rows = slice(2, 5) if weighted and name == "Q4_0" and DEVICE == "cpu" else slice(12)  # its sums are long
    packed = on_device(name, data["x"][rows], data["imatrix"] if weighted else None, effort="reference")
    assert np.array_equal(packed, data["packed_imatrix" if weighted and "packed_imatrix" in data else "packed"][rows])


@pytest.mark.parametrize("name", ["MXFP4", "Q8_0", "F8_E4M3_B128", "Q4_0"])
def test_edge_rows(name: str) -> None:
    x = scalar.edge_rows(256)
    assert np.array_equal(on_device(name, x, None), types.get(name).encode(x))


def test_a_device_counts_the_same() -> None:
    heavy = np.random.default_rng(3).standard_t(3, (2000, 512)).astype(np.float32)
    heavy[7] = -0.0
    heavy[8] *= np.float32(1e-42)
    rows = np.concatenate([heavy, *(rows[:, :512] for rows in structured_rows().values())])
    counts = count_heads(torch.from_numpy(rows).to(DEVICE), HEAD).cpu().numpy()
    assert np.array_equal(unlike_weights(counts, HEAD), unusual(rows))
    assert 100 < unusual(heavy).sum() < 1900
    head = rows[:, :256].astype(np.float64)
    signs = np.signbit(head)
    assert np.array_equal(counts[:, 0], signs.sum(axis=1))
    assert np.array_equal(counts[:, 1], (signs[:, 1:] != signs[:, :-1]).sum(axis=1))
    usual = np.abs(head).max(axis=1) > 1e-37
    large = (np.abs(head) > np.abs(head).max(axis=1, keepdims=True) / 4).sum(axis=1)
    assert np.array_equal(counts[usual, 2], large[usual])


@pytest.mark.slow
def test_what_is_below_the_least_scale_becomes_zeros() -> None:
    x = (np.random.default_rng(5).standard_normal((1, 256)) * 1e-9).astype(np.float32)
    importance = np.ones(256, np.float32)
    packed = on_device("IQ2_XXS", x, importance)
    assert not packed.any()
    assert np.array_equal(packed, types.get("IQ2_XXS").encode(x, importance))


def test_rows_that_do_not_fill_a_program() -> None:
    x, importance = scalar.fresh(rows=6, columns=32 * 7)
    for name in ("Q8_0", "MXFP4", "Q4_0"):
        assert np.array_equal(on_device(name, x, importance), types.get(name).encode(x, importance))
    assert on_device("Q8_0", x[:0], None).shape == (0, 7 * 34)


def test_what_is_refused() -> None:
    x = np.zeros((1, 256), np.float32)
    with pytest.raises(ValueError, match="Q6_K"):
        encode("Q6_K", torch.from_numpy(x), None, torch.empty(1, 210, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'reference' for IQ4_K"):
        on_device("IQ4_K", x, None, effort="reference")
    with pytest.raises(ValueError, match="importance"):
        on_device("IQ2_XXS", x, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_that_is_not_finite_is_found(bad: float) -> None:
    values = torch.full((3, 5000), 3.4e38, device=DEVICE)
    assert first_nonfinite(values) == -1
    values[2, 4999] = bad
    assert first_nonfinite(values) == 14999
    values[1, 7] = bad
    values[1, 8] = -bad
    assert first_nonfinite(values) == 5007
    values[0, 0] = bad
    assert first_nonfinite(values) == 0
    assert first_nonfinite(values[:0]) == -1


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("objective", ["reference", "mse"])
    @pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
    @every_type
    def test_every_row_of_the_vectors(self, name: str, weighted: bool, objective: str) -> None:
        if weighted or not types.get(name).needs_importance:
            check(name, list(range(12)), weighted, objective)

    @every_type
    def test_fresh_rows_alone_and_together(self, name: str) -> None:
        x, importance = scalar.fresh(rows=64, columns=2048)
        x[::8] *= np.float32(1e-6)
        packed = on_device(name, x, importance)
        assert np.array_equal(packed, types.get(name).encode(x, importance))
        assert np.array_equal(np.concatenate([on_device(name, row[None], importance) for row in x]), packed)

    @every_type
    def test_edges(self, name: str) -> None:
        x = scalar.edge_rows(1024)
        importance = scalar.fresh(columns=1024)[1]
        for m in scalar.importances(name, importance):
            assert np.array_equal(on_device(name, x, m), types.get(name).encode(x, m))

    def test_more_than_2_to_the_31_values(self) -> None:
        rows, columns = (1 << 31) // 65536 + 3, 65536
        values = torch.zeros(rows, columns, device=DEVICE)
        x, _ = scalar.fresh(rows=2, columns=columns)
        values[-2:] = torch.from_numpy(x).to(DEVICE)
        for name in ("Q8_0", "F8_E4M3_B128", "Q4_0", "MXFP4"):
            out = torch.full((rows, types.get(name).layout.row_nbytes(columns)), 0xAA, dtype=torch.uint8, device=DEVICE)
            encode(name, values, None, out)
            assert np.array_equal(out[-2:].cpu().numpy(), types.get(name).encode(x))
        values[-1, -1] = torch.nan
        assert first_nonfinite(values) == values.numel() - 1

    @pytest.mark.parametrize("name", ["IQ2_KS", "IQ4_K", "IQ2_XXS"])
    def test_several_pieces(self, name: str) -> None:
        x, importance = scalar.fresh(rows=40, columns=1024)
        values = torch.from_numpy(x).to(DEVICE).repeat(2000, 1)
        out = torch.full((len(values), types.get(name).layout.row_nbytes(1024)), 0xAA, dtype=torch.uint8, device=DEVICE)
        encode(name, values, torch.from_numpy(importance).to(DEVICE), out)
        expected = torch.from_numpy(types.get(name).encode(x, importance)).to(DEVICE)
        assert bool((out.reshape(2000, 40, -1) == expected).all())
