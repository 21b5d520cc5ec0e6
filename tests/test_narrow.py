"""float32 to binary16 and bfloat16 against NumPy's and ml_dtypes' own rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ggufx import kernels


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rounding_is_that_of_astype(dtype: type) -> None:
    name = np.dtype(dtype).name
    points = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        between = (points[:-1].astype(np.float64) + points[1:]).astype(np.float32) / 2  # ties, and overflow to infinity
        near = np.nextafter(np.concatenate([points, between]), np.float32(np.inf))
        random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
        values = np.concatenate([points, between, near, -near, random])
        expected = values.astype(dtype)
    narrow = kernels.narrower(name)
    assert narrow is not None
    for count in (values.size, 1, 15, 16, 17):
        out = np.full(count + 1, 0xABCD, np.uint16)
        narrow(values[:count], out[:count])
        number = ~np.isnan(values[:count])
        assert np.array_equal(out[:count][number], expected[:count].view(np.uint16)[number])
        assert np.isnan(out[:count][~number].view(dtype).astype(np.float32)).all()
        assert out[count] == 0xABCD


def test_other_types_have_no_such_kernel() -> None:
    assert kernels.narrower("float64") is None
