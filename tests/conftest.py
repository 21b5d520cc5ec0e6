"""Hypothesis profiles (HYPOTHESIS_PROFILE chooses: ``dev``, ``ci``, ``thorough``), the slow tests, what all tests share."""

from __future__ import annotations

import gc
import os
import sys

import interpreting
import pytest
from command import cli  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, settings

# Kernels compile on first use, and shared machines stall: a deadline would only make tests flaky.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=50, **_COMMON)
settings.register_profile("thorough", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


SLOW = (
    # Kernels compiled anew for other CPU models, or all of them.
    "test_encoders_scalar.py::test_the_cpu_model_changes_nothing",
    "test_encoders.py::test_every_cpu_model_gives_the_same_bytes",
    "test_warmup.py::test_the_engine_compiles_nothing_after_warming_up",
    "test_warmup.py::test_no_call_compiles_after_warming_up",
    "test_warmup.py::test_code_from_the_cache_and_code_made_now_work_together",
    "test_narrow.py::test_every_cpu_model_gives_the_same_bits",
    "test_torch_upload.py::test_the_kernel_is_cached_whatever_the_addresses",
    # Many shards, or a gigabyte on its way to a device.
    "test_torch_upload.py::test_any_shard_is_that_slice",
    "test_torch_load.py::test_memory_on_the_way_is_bounded",
    # The same for another target, or by another grouping.
    "test_budget.py::test_sizes_are_met_and_more_room_is_less_error[tensor]",
    "test_budget.py::test_errors_of_a_full_sample_are_those_of_a_run[ik_llama.cpp]",
    # Searches of a million weights a second under many seeds; the quick group has each law once for every type.
    *(
        f"test_codec_contract.py::test_law_whatever_the_seed[{law}-{name}]"
        for law in ("encode_error", "encode_finite", "encode_rows", "quiet")
        for name in ("IQ2_KT", "IQ3_KT", "IQ4_KT")
    ),
    "test_codec_contract.py::test_encoding_any_values[IQ2_KT]",
    "test_codec_contract.py::test_encoding_any_values[IQ3_KT]",
    "test_codec_contract.py::test_encoding_any_values[IQ4_KT]",
    "test_encoders_scalar.py::test_rows_splits_and_threads_change_nothing[IQ2_KT-high]",
    "test_encoders_scalar.py::test_rows_splits_and_threads_change_nothing[IQ3_KT-high]",
    "test_encoders_scalar.py::test_rows_splits_and_threads_change_nothing[IQ4_KT-high]",
    # Plans of models with a hundred thousand tensors, beyond the first.
    "test_fullshape.py::test_the_native_file_moved_and_exported",
    "test_fullshape.py::test_names_shapes_types_and_order[llama.cpp]",
    "test_fullshape.py::test_dry_run_json",
    "test_fullshape.py::test_dry_run_table",
    "test_fullshape.py::test_the_published_file_with_45_keys",
    "test_merge.py::test_the_full_model",
    "test_fullshape_v3.py",
    # Triton's interpreter, where a search or a wide product runs in it; each family has a type in the quick group.
    "test_offload.py::test_searches_on_the_device",
    "test_offload.py::test_the_devices_bytes_are_the_cpus",
    "test_cuda_encode.py::test_bytes_are_the_cpus[IQ2_KS]",
    "test_cuda_encode.py::test_bytes_are_the_cpus[IQ2_XXS]",
    "test_cuda_encode.py::test_bytes_are_the_cpus[IQ3_KS]",
    "test_cuda_encode.py::test_bytes_are_the_cpus[IQ4_KS]",
    "test_cuda_encode.py::test_bytes_are_the_cpus[IQ4_K]",
    "test_cuda_encode.py::test_bytes_are_the_cpus[IQ5_K]",
    "test_cuda_encode.py::test_bytes_are_the_cpus_without_importance",
    *(
        f"test_cuda_kernels.py::{test}[{kind}"
        for test in (
            "test_linear",
            "test_linear_of_the_largest_does_not_overflow",
            "test_products_with_the_same_activations",
        )
        for kind in ("IQ2_XXS", "IQ3", "IQ4", "IQ5")
    ),
    "test_cuda_kernels.py::test_no_expert_of_that_number[dtype1",
    "test_cuda_kernels.py::test_no_expert_of_that_number[dtype2",
    "test_cuda_kernels.py::test_linear_of_long_rows_and_eight_tokens",
    "test_cuda_kernels.py::test_experts[F8_E4M3_B128]",
    # Thirteen decoders and products through a compiler.
    "test_cuda_compiles.py",
)
"""Tests of several seconds that look again at what quicker ones look at: ``make test-slow``, in CI after ``make test``."""


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spare the garbage collector the tests and torch's modules, which stay anyway: it takes 7 % of a run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _triton_is_interpreted_quickly() -> None:
    if "triton" in sys.modules:  # modules of tests have imported it, or nobody will
        interpreting.quicken()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and skip what needs a GPU where there is none: ``pytest -m cuda`` loads torch for it alone."""
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)
    needing = [item for item in items if item.get_closest_marker("cuda")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
