"""Hypothesis profiles: ``dev`` is quick, ``ci`` is thorough; HYPOTHESIS_PROFILE chooses, CI selects ``ci``."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Kernels compile on first use, and shared machines stall: a deadline would only make tests flaky.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none: ``pytest -m cuda`` says so, and loads torch for it alone."""
    needing = [item for item in items if item.get_closest_marker("cuda")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
