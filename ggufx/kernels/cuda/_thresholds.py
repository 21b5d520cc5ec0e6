"""Which way a product takes: one table, measured."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

__all__ = ["THRESHOLDS", "Threshold", "Way", "choose"]

Way = Literal["fused", "workspace", "fp8"]
"""``fused``: decode and multiply in registers. ``workspace``: decode to bfloat16, then the library's product. ``fp8``: the
library's block-scaled FP8 product, with activations quantized."""


class Threshold(NamedTuple):
    """Batches at which a type changes its way.

    Attributes
    ----------
    fused
        Largest batch of the fused product.
    fp8
        Least batch of the FP8 product; ``None`` where there is none.
    """

    fused: int
    fp8: int | None = None


THRESHOLDS: Final = {
    "F8_E4M3_B128": Threshold(fused=8, fp8=256),
    "IQ2_KS": Threshold(fused=8),
    "IQ2_XXS": Threshold(fused=8),
    "IQ3_KS": Threshold(fused=8),
    "IQ4_K": Threshold(fused=8),
    "IQ4_KS": Threshold(fused=8),
    "IQ4_NL": Threshold(fused=8),
    "IQ5_K": Threshold(fused=8),
    "MXFP4": Threshold(fused=8),
    "Q4_0": Threshold(fused=8),
    "Q4_K": Threshold(fused=8),
    "Q6_K": Threshold(fused=8),
    "Q8_0": Threshold(fused=8),
}
"""Type -> thresholds, on an H200 at 4096 x 4096 (tools/bench_cuda.py prints what they follow from).

Eight rows of activations take 9 to 15 us fused and 21 to 24 us by way of a workspace, and sixteen about as much as the
workspace by two fused products. The FP8 product would be faster than the workspace from about 16 rows on, but rounds the
activations to 2.6 %: it begins where it is no slower than a product with bfloat16 weights."""


def choose(name: str, batch: int, out_features: int, row_len: int) -> Way:
    """Return the fastest way for ``batch`` rows of ``row_len`` activations and ``out_features`` weights each of type ``name``.

    ``fp8`` is meant for devices and weights that can: others take ``workspace`` instead.
    """
    threshold = THRESHOLDS.get(name)
    if threshold is None:
        return "workspace"
    if batch <= threshold.fused:
        return "fused"
    # The library wants whole 16 bytes of both.
    if row_len % 128 == 0 and out_features % 16 == 0 and threshold.fp8 is not None and batch >= threshold.fp8:
        return "fp8"
    return "workspace"
