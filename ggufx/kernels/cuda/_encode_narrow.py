"""Encoders of block-scaled FP8 and FP4 on a GPU: F8_E4M3_B128 and MXFP4, with the CPU's bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda._encode_common import (
    MAGNITUDE,
    STRICT,
    bits_of,
    float_of,
    greatest_bits,
    lanes_of,
    load_quads,
    relative,
    table,
)

__all__ = ["encode_f8", "encode_mxfp4"]


@triton.jit
def _f8(values, out, n_blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < n_blocks
    j = tl.arange(0, 128)[None, :]
    bits = bits_of(tl.load(values + block[:, None] * 128 + j, mask=real[:, None], other=0.0))
    top = tl.max(bits & MAGNITUDE, axis=1)
    # The smallest e with amax <= 448 * 2^(e - 127), 448 = 1.75 * 2^8; 0 where even e = 0 is enough, subnormals too.
    e = tl.maximum((top >> 23) - 8 + ((top & 0x7FFFFF) > 0x600000).to(tl.int32), 0)
    # 2^(127 - e), with e = 254 a subnormal; both this product and the one below are exact where they matter.
    factor = float_of(tl.where(e < 254, (254 - e) << 23, 1 << 22))
    # Under e = 247 the codes above 240 overflow float32: stay below, a finite value must not come back infinite.
    limit = tl.where(e < 247, 448.0, 240.0)
    z = tl.minimum(float_of(bits & MAGNITUDE) * factor[:, None], limit[:, None])
    # To nearest even: bits above the 20 dropped ones; under 2^-6 in steps of 2^-9, the ulp of 2^14.
    m = bits_of(z)
    normal = ((m + 0x7FFFF + ((m >> 20) & 1)) >> 20) - (120 << 3)
    small = bits_of(z + 16384.0) - 0x46800000
    code = tl.where(z >= 2.0**-6, normal, small) | ((bits >> 24) & 0x80)
    start = out + block * 129
    tl.store(start, e.to(tl.uint8), mask=real)
    tl.store(start[:, None] + 1 + j, (code & 255).to(tl.uint8), mask=real[:, None])


def encode_f8(values: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from float32 [R, row_len]: smallest scale that clips nothing, nearest codes."""
    n_blocks = values.numel() // 128
    launch: Any = _f8[lanes_of(n_blocks, 16)]
    launch(values, out, n_blocks, BLOCKS=16, num_warps=4, **STRICT)


@triton.jit
def _factors(e):
    """Return two factors whose product is ``2^(128 - e)``, which itself may be beyond float32."""
    first = tl.minimum(128 - e, 127)
    return float_of((first + 127) << 23), tl.where(e == 0, 2.0, 1.0)


@triton.jit
def _error(size, w, factor, back, WEIGHTED: tl.constexpr):
    """``sum w (x - y)^2`` for y of the scale ``factor`` below the one that ``size`` (magnitudes) is in units of."""
    total = tl.zeros(size[0].shape, tl.float32)
    for j in tl.static_range(32):
        a = size[j] * factor
        # A magnitude on a threshold stays below.
        y = (a > 0.5).to(tl.float32) + (a > 1.5).to(tl.float32) + (a > 2.5).to(tl.float32) + (a > 3.5).to(tl.float32)
        y += tl.where(a > 5.0, 2.0, 0.0) + tl.where(a > 7.0, 2.0, 0.0) + tl.where(a > 10.0, 4.0, 0.0)
        off = size[j] - y * back
        if WEIGHTED:
            total += w[j] * off * off
        else:
            total += off * off
    return total


@triton.jit
def _code(x, f, g):
    v = x * f * g
    a = tl.abs(v)
    c = (a > 0.5).to(tl.int32) + (a > 1.5).to(tl.int32) + (a > 2.5).to(tl.int32) + (a > 3.5).to(tl.int32)
    c += (a > 5.0).to(tl.int32) + (a > 7.0).to(tl.int32) + (a > 10.0).to(tl.int32)
    return c + tl.where(v < -0.5, 8, 0)


@triton.jit
def _mxfp4(
    values, importance, rounded_up, out, n_blocks, blocks_per_row,
    WEIGHTED: tl.constexpr, SEARCH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = block < n_blocks
    x = load_quads(values, block * 32, real, 32)
    top = greatest_bits(x, 32)
    field = top >> 23
    # floor(log2(amax)) + 125 with C's float32 logarithm: a few floats under a power of two count as it.
    e = tl.maximum(field + (top >= tl.load(rounded_up + field)).to(tl.int32) - 2, 0)
    if SEARCH:
        # Over 252 the larger codes overflow float32: a finite value must not come back infinite.
        e = tl.minimum(e, 252)
        f, g = _factors(e)
        size = ()
        for j in tl.static_range(32):
            size = size + (tl.abs(x[j]) * f * g,)
        w = size
        if WEIGHTED:
            w = load_quads(importance, (block % blocks_per_row) * 32, real, 32)
        # The scale itself, the next larger one, and with importance the next smaller: steps 0, 1, -1.
        least = tl.zeros([LANES], tl.float32)
        best = tl.zeros([LANES], tl.int32)
        for k in range(3 if WEIGHTED else 2):
            last = k // 2
            step = k - 3 * last
            error = _error(size, w, 1.0 - 0.5 * k + 2.0 * last, 1.0 + k - 2.5 * last, WEIGHTED)
            better = (k == 0) | ((error < least) & (e + step >= 0) & (e + step <= 252))
            least = tl.where(better, error, least)
            best = tl.where(better, step, best)
        e += best
    f, g = _factors(e)
    start = out + block * 17
    tl.store(start, e.to(tl.uint8), mask=real)
    for j in tl.static_range(16):
        tl.store(start + 1 + j, (_code(x[j], f, g) | _code(x[j + 16], f, g) << 4).to(tl.uint8), mask=real)


def _rounded_up() -> np.ndarray:
    # As int32, which the bits of magnitudes are here; the largest stands for never.
    return np.minimum(tables.LOG2_ROUNDED_UP, 0x7FFFFFFF).astype(np.int32)


def encode_mxfp4(values: torch.Tensor, importance: torch.Tensor | None, out: torch.Tensor, *, search: bool) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from float32 [R, row_len].

    ``search``: the best of the C library's scale and its neighbours, by ``sum m (x - y)^2``; else the library's bytes.
    """
    n_blocks = values.numel() // 32
    weights = relative(importance, 32) if search else None
    rounded_up = table(_rounded_up, values.device)
    launch: Any = _mxfp4[lanes_of(n_blocks, 128)]
    launch(
        values, values if weights is None else weights, rounded_up, out, n_blocks, values.shape[1] // 32,
        WEIGHTED=weights is not None, SEARCH=search, LANES=128, num_warps=4, **STRICT,
    )  # fmt: skip
