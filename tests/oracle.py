"""Independent truth for the tests: comparisons of bits, fixtures, and number formats built from ``ml_dtypes`` alone."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

FIXTURES = Path(__file__).parent.parent / "fixtures"
VECTORS = FIXTURES / "vectors"
MANIFEST = {name.upper(): facts for name, facts in json.loads((VECTORS / "manifest.json").read_text()).items()}

ALL_BYTES = np.arange(256, dtype=np.uint8)
E4M3 = ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""float32 [256]"""
E8M0 = ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
"""float32 [256]: 0 is 2^-127, 255 is NaN"""
E2M1 = np.arange(16, dtype=np.uint8).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
"""float32 [16]"""


def bits(array: npt.NDArray[np.generic]) -> npt.NDArray[np.unsignedinteger]:
    """Bit patterns of a float array, with one pattern for every NaN."""
    array = np.ascontiguousarray(array)
    patterns = array.view(f"u{array.dtype.itemsize}").copy()
    with np.errstate(invalid="ignore"):  # ml_dtypes' comparisons warn on NaN
        patterns[array != array] = np.iinfo(patterns.dtype).max
    return patterns


def assert_same_bits(actual: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> None:
    """Equal dtype, shape and bits: signed zeros differ, any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wrong = np.argwhere(bits(actual) != bits(expected))
    assert wrong.size == 0, (
        f"{len(wrong)} of {expected.size} values differ, first at {wrong[0]}: "
        f"{actual[tuple(wrong[0])]!r}, expected {expected[tuple(wrong[0])]!r}"
    )
