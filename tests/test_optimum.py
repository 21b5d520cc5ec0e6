"""MXFP4 and NVFP4 against an exhaustive search over every scale: ``high`` finds the optimum, ``normal`` comes near it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ggufx import types

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SCALES = {
    "MXFP4": 2.0 ** np.arange(-12, 6),
    # Code 0x7F is no number.
    "NVFP4": np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64),
}
BLOCK = {"MXFP4": 32, "NVFP4": 16}


def sample(name: str, heavy: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, (32, 512)) if heavy else rng.standard_normal((32, 512))
    importance = rng.random(512) ** 2 + 1e-3
    return (x * (20 if name == "NVFP4" else 1)).astype(np.float32), importance.astype(np.float32)


def optimum(name: str, x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The least weighted squared error of every block under any scale, each value with its nearest code."""
    blocks = np.abs(x.reshape(-1, BLOCK[name])).astype(np.float64)
    m = np.tile(importance.astype(np.float64), (len(x), 1)).reshape(blocks.shape)
    least = (m * blocks**2).sum(axis=1)
    for scale in SCALES[name]:
        distance = np.abs(blocks[..., None] - scale * E2M1).min(axis=2)
        least = np.minimum(least, (m * distance**2).sum(axis=1))
    return least


def found(name: str, x: np.ndarray, importance: np.ndarray, effort: str) -> np.ndarray:
    codec = types.get(name)
    y = codec.decode(codec.encode(x, importance, effort=effort))
    errors = importance.astype(np.float64) * (x.astype(np.float64) - y) ** 2
    return errors.reshape(-1, BLOCK[name]).sum(axis=1)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_high_is_the_optimum_and_normal_is_near(name: str, heavy: bool) -> None:
    x, importance = sample(name, heavy, 5)
    least = optimum(name, x, importance)
    high = found(name, x, importance, "high")
    # Sums in float32 decide between scales that are as good.
    assert (high <= least * (1 + 1e-5) + 1e-12).all()
    assert (high >= least * (1 - 1e-9) - 1e-12).all()
    assert found(name, x, importance, "normal").sum() <= 1.002 * least.sum()


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_values_that_do_not_count_do_not_decide_the_scale(name: str) -> None:
    x, importance = sample(name, heavy=False, seed=6)
    x[:, ::16] *= 30
    importance[::16] = 1e-9
    least = optimum(name, x, importance)
    assert (found(name, x, importance, "high") <= least * (1 + 1e-5) + 1e-12).all()
    assert found(name, x, importance, "fast").sum() > 2 * least.sum()
