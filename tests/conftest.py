"""Hypothesis profiles: ``dev`` is quick, ``ci`` is thorough; HYPOTHESIS_PROFILE chooses, CI selects ``ci``."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Kernels compile on first use, and shared machines stall: a deadline would only make tests flaky.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
