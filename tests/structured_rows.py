"""Rows that are unlike a model's weights, from a seed; ``fixtures/encoder_errors.json`` has the C library's errors on them."""

from __future__ import annotations

import numpy as np

__all__ = ["structured_rows"]


def structured_rows() -> dict[str, np.ndarray]:
    """Return name -> float32 [R, n], n a multiple of 256."""
    rng = np.random.default_rng(11)
    outliers = rng.standard_normal((24, 1024))
    outliers[rng.random(outliers.shape) < 0.01] *= 20
    found = {
        "ramp": np.linspace(-0.5, 0.5, 1024)[None],
        "long ramp": np.linspace(-1, 1, 4096).reshape(2, 2048),
        "ramps of 0 to n": np.linspace(0, 1, 1024) * np.arange(1, 5)[:, None],
        "wave off zero": (0.1 + np.sin(np.arange(4096) / 50)).reshape(4, 1024),
        "offset": 1 + 0.1 * rng.standard_normal((4, 1024)),
        "negative offset": -1 + 0.1 * rng.standard_normal((4, 1024)),
        "constant": np.repeat([[0.3], [-1.7], [1.0], [0.005]], 512, axis=1),
        "outliers": outliers,
        "one sign": np.abs(rng.standard_normal((4, 1024))),
        "steps": np.repeat(rng.standard_normal((4, 32)), 32, axis=1),
        "noise": rng.standard_normal((4, 1024)),
    }
    return {name: np.ascontiguousarray(rows, np.float32) for name, rows in found.items()}
