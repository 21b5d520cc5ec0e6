"""What the Triton encoders share: bits of floats, stored halves, sums whose order is fixed, tables on the device.

The encoders give the bytes of the CPU's, so every sum runs in the CPU's order, nothing is fused (each launch passes
``STRICT``) and divisions and roots are the rounded ones. A *lane* is one element of a one-dimensional Triton tensor; the values
of a block lie in the registers of its lane, as a tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

STRICT: Final = {"enable_fp_fusion": False}
"""Keywords of every launch: no multiply-add may be fused."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a small float to an integer, ties to even."""
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
HALF_MAX = tl.constexpr(0x7BFF)


def lanes_of(n: int, per_program: int) -> tuple[int]:
    """Return the grid of one-dimensional programs over ``n`` lanes."""
    return (triton.cdiv(n, per_program),)


@cache
def table(build: Callable[[], np.ndarray], device: torch.device) -> torch.Tensor:
    """Return the numbers that ``build`` gives, copied to ``device`` once."""
    return torch.from_numpy(np.ascontiguousarray(build())).to(device)


def relative(importance: torch.Tensor | None, block_len: int) -> torch.Tensor | None:
    """Return the importance divided by the largest of its block, rounded once: only ratios count."""
    if importance is None:
        return None
    parts = importance.reshape(-1, block_len).double()
    return (parts / parts.amax(dim=1, keepdim=True)).float().reshape(-1)


def empty(n: int, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return scratch memory of ``n`` numbers beside ``like``."""
    return torch.empty(n, dtype=dtype, device=like.device)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exponent_field(magnitude):
    """Exponent field of the bits of a magnitude, within 1..253."""
    return tl.minimum(tl.maximum(magnitude >> 23, 1), 253)


@triton.jit
def down(field):
    """Return ``2^(127 - field)``: brings values of that exponent field to 1..2."""
    return float_of((254 - field) << 23)


@triton.jit
def up(field):
    """Return ``2^(field - 127)``."""
    return float_of(field << 23)


@triton.jit
def rounded(x):
    """Nearest integer, ties to even, of a float that is less than 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def inverse_of(x):
    """Rounded ``1 / x``, 0 for 0."""
    nothing = x == 0.0
    one = tl.full(x.shape, 1.0, tl.float32)
    return tl.where(nothing, 0.0, tl.div_rn(one, tl.where(nothing, 1.0, x)))


@triton.jit
def ratio(x, y):
    """Rounded ``x / y`` where y is above 0, else 0."""
    usual = y > 0.0
    return tl.where(usual, tl.div_rn(x, tl.where(usual, y, 1.0)), 0.0)


@triton.jit
def half_bits(x):
    """Bits of the nearest finite half, in an int32."""
    bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (bits & 0x8000) | tl.minimum(bits & 0x7FFF, HALF_MAX)


@triton.jit
def half_value(bits):
    """Value of half bits in an int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_elements(pointer, at, mask, N: tl.constexpr):
    """Return ``N`` consecutive elements of every lane, from ``at`` on, as a tuple."""
    found = ()
    for j in tl.static_range(N):
        found = found + (tl.load(pointer + at + j, mask=mask, other=0.0),)
    return found


@triton.jit
def load_quads(pointer, at, mask, N: tl.constexpr):
    """Return ``N`` (a multiple of 4) consecutive float32 of every lane as :func:`load_elements`, four by one instruction.

    Lanes lie far apart, so each instruction touches as many lines of the cache as there are lanes: few must do.
    """
    found = ()
    for q in tl.static_range(N // 4):
        quad = tl.load(pointer + (at[:, None] + (4 * q + tl.arange(0, 4))[None, :]), mask=mask[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(quad, [at.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        found = found + (first, second, third, fourth)
    return found


@triton.jit
def times(a, b, N: tl.constexpr):
    """Products of two tuples, or of a tuple with a lane's number."""
    found = ()
    for j in tl.static_range(N):
        found = found + (a[j] * b[j],)
    return found


@triton.jit
def scaled_by(a, factor, N: tl.constexpr):
    found = ()
    for j in tl.static_range(N):
        found = found + (a[j] * factor,)
    return found


@triton.jit
def halving_sum(terms, N: tl.constexpr, LEVELS: tl.constexpr):
    """Sum of a tuple of ``N = 2^LEVELS``: its halves are added until one term is left."""
    for level in tl.static_range(LEVELS):
        folded = ()
        for i in tl.static_range(N >> (level + 1)):
            folded = folded + (terms[i] + terms[i + (N >> (level + 1))],)
        terms = folded
    return terms[0]


@triton.jit
def greatest(terms, N: tl.constexpr):
    """Largest magnitude of a tuple."""
    found = tl.abs(terms[0])
    for j in tl.static_range(1, N):
        found = tl.maximum(found, tl.abs(terms[j]))
    return found


@triton.jit
def greatest_bits(terms, N: tl.constexpr):
    """Largest magnitude of a tuple, as bits."""
    found = bits_of(terms[0]) & MAGNITUDE
    for j in tl.static_range(1, N):
        found = tl.maximum(found, bits_of(terms[j]) & MAGNITUDE)
    return found


@triton.jit
def store_half(pointer, at, bits, mask):
    """Store 16 bits at any byte."""
    tl.store(pointer + at, (bits & 0xFF).to(tl.uint8), mask=mask)
    tl.store(pointer + at + 1, ((bits >> 8) & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def _first_nonfinite(values, found, n, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = bits_of(tl.load(values + at, mask=at < n, other=0.0))
    bad = (bits & 0x7F800000) == 0x7F800000
    first = tl.min(tl.where(bad, tl.arange(0, TILE), TILE), axis=0)
    tl.store(found + tl.program_id(0), first)


def first_nonfinite(values: torch.Tensor) -> int:
    """Return the flat index of the first NaN or infinity of float32 ``values`` (contiguous, any shape), -1 if there is none.

    Waits for the device.
    """
    n, tile = values.numel(), 4096
    if n == 0:
        return -1
    found = empty(triton.cdiv(n, tile), values, torch.int32)
    launch: Any = _first_nonfinite[lanes_of(n, tile)]
    with torch.cuda.device_of(values):
        launch(values, found, n, TILE=tile, num_warps=8, **STRICT)
    tiles = torch.arange(len(found), device=values.device) * tile
    nowhere = len(found) * tile
    first = int(torch.where(found < tile, tiles + found, nowhere).min().item())
    return -1 if first == nowhere else first
