"""Encoders of evenly spaced codes on a GPU: Q8_0, and Q4_0 as ``kernels/_linear.py`` searches it, with the same bytes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda._encode_common import (
    MAGNITUDE,
    STRICT,
    bits_of,
    down,
    empty,
    exponent_field,
    float_of,
    half_bits,
    half_value,
    inverse_of,
    lanes_of,
    load_elements,
    load_quads,
    ratio,
    relative,
    rounded,
    scaled_by,
    store_half,
    table,
    times,
    up,
)

__all__ = ["encode_q4_0", "encode_q8_0"]

_LANES: Final = 128


@triton.jit
def _q8_0(values, out, n_blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < n_blocks
    j = tl.arange(0, 32)[None, :]
    x = tl.load(values + block[:, None] * 32 + j, mask=real[:, None], other=0.0)
    top = float_of(tl.max(bits_of(x) & MAGNITUDE, axis=1))
    d = tl.div_rn(top, tl.full([BLOCKS], 127.0, tl.float32))
    # The library would store infinity from 65520 on.
    d = tl.where(d < 65520.0, d, 65504.0)
    scaled = x * inverse_of(d)[:, None]
    # A subnormal d has an infinite inverse; the specification clips, and 0 * inf counts as 0.
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
    # Half away from zero: the fraction is exact.
    size = tl.abs(scaled)
    whole = size.to(tl.int32)
    whole += (size - whole.to(tl.float32) >= 0.5).to(tl.int32)
    code = tl.where(scaled < 0.0, -whole, whole)
    start = out + block * 34
    store_half(start, 0, half_bits(d), real)
    tl.store(start[:, None] + 2 + j, (code & 255).to(tl.uint8), mask=real[:, None])


def encode_q8_0(values: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from float32 [R, row_len], with the C library's bytes."""
    n_blocks = values.numel() // 32
    launch: Any = _q8_0[lanes_of(n_blocks, 64)]
    launch(values, out, n_blocks, BLOCKS=64, num_warps=4, **STRICT)


# Q4_0 ----------------------------------------------------------------------------------------------------------------

# Levels that the largest element is tried at, with either sign; see types/scalar.py, effort normal.
_BELOW: Final = (-2.5, 1.5, 0.25)
_ABOVE: Final = (-2.0, 1.5, 0.25)


def _steps() -> np.ndarray:
    steps = [-(8.0 + t) for t in np.arange(*_BELOW)] + [7.5 + t for t in np.arange(*_ABOVE)]
    return np.array(steps, np.float32)


def _ends() -> np.ndarray:
    """Return int32 [1 + groups]: where groups of steps that give the largest element the same level begin, and their end."""
    steps = [-(8.0 + t) for t in np.arange(*_BELOW)] + [7.5 + t for t in np.arange(*_ABOVE)]
    return np.array([0, *(np.flatnonzero(np.diff(np.rint(steps))) + 1), len(steps)], np.int32)


@triton.jit
def _row_tops(values, fields, row_len, TILE: tl.constexpr):
    """Exponent field of the largest magnitude of every row."""
    row = tl.program_id(0)
    start = values + row.to(tl.int64) * row_len
    found = tl.zeros([TILE], tl.int32)
    for at in range(0, row_len, TILE):
        i = at + tl.arange(0, TILE)
        found = tl.maximum(found, bits_of(tl.load(start + i, mask=i < row_len, other=0.0)) & MAGNITUDE)
    tl.store(fields + row, exponent_field(tl.max(found, axis=0)))


@triton.jit
def _row_squares(values, fields, partial, row_len):
    """Sums of squares of every 64th element, the part of a row that fills whole 64s: ``partial`` [R, 64]."""
    row = tl.program_id(0)
    start = values + row.to(tl.int64) * row_len
    factor = down(tl.load(fields + row))
    lane = tl.arange(0, 64)
    total = tl.zeros([64], tl.float32)
    for at in range(0, row_len // 64 * 64, 64):
        v = tl.load(start + at + lane) * factor
        total += v * v
    tl.store(partial + row * 64 + lane, total)


@triton.jit
def _row_means(values, fields, partial, mean, n_rows, row_len, ROWS: tl.constexpr):
    """Mean squares of rows (the lanes): the rest of the row first, then the 64 sums in order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    start = values + row.to(tl.int64) * row_len
    factor = down(tl.load(fields + row, mask=real, other=1))
    total = tl.zeros([ROWS], tl.float32)
    for i in range(row_len // 64 * 64, row_len):
        v = tl.load(start + i, mask=real, other=0.0) * factor
        total += v * v
    for i in range(64):
        total += tl.load(partial + row * 64 + i, mask=real, other=0.0)
    tl.store(mean + row, tl.div_rn(total, total * 0.0 + row_len), mask=real)


@triton.jit
def _explain(x, wx, w, inverse):
    """With levels ``clamp(rint(x * inverse))``: ``sum w x l`` and ``sum w l l``."""
    s1 = tl.zeros(inverse.shape, tl.float32)
    s2 = tl.zeros(inverse.shape, tl.float32)
    for j in tl.static_range(32):
        level = rounded(tl.minimum(tl.maximum(x[j] * inverse, -8.0), 7.0))
        s1 += wx[j] * level
        s2 += w[j] * level * level
    return s1, s2


@triton.jit
def _error(x, w, scale):
    inverse = inverse_of(scale)
    total = tl.zeros(scale.shape, tl.float32)
    for j in tl.static_range(32):
        off = x[j] - scale * rounded(tl.minimum(tl.maximum(x[j] * inverse, -8.0), 7.0))
        total += w[j] * off * off
    return total


@triton.jit
def _write_q4_0(x, inverse, d, start, real):
    store_half(start, 0, d, real)
    for j in tl.static_range(16):
        low = rounded(tl.minimum(tl.maximum(x[j] * inverse, -8.0), 7.0)) + 8.0
        high = rounded(tl.minimum(tl.maximum(x[j + 16] * inverse, -8.0), 7.0)) + 8.0
        tl.store(start + 2 + j, (low.to(tl.int32) | high.to(tl.int32) << 4).to(tl.uint8), mask=real)


@triton.jit
def _extreme(x):
    """Element of largest magnitude with its sign, the first of equal ones."""
    found = x[0]
    for j in tl.static_range(1, 32):
        found = tl.where(tl.abs(x[j]) > tl.abs(found), x[j], found)
    return found


@triton.jit
def _q4_0(
    values, importance, fields, mean, steps, ends, out, n_blocks, blocks_per_row,
    WEIGHTED: tl.constexpr, BY_ENERGY: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = block < n_blocks
    raw = load_quads(values, block * 32, real, 32)
    top = bits_of(raw[0]) & MAGNITUDE
    for j in tl.static_range(1, 32):
        top = tl.maximum(top, bits_of(raw[j]) & MAGNITUDE)
    field = exponent_field(top)
    x = scaled_by(raw, down(field), 32)
    w = ()
    if WEIGHTED:
        m = load_quads(importance, (block % blocks_per_row) * 32, real, 32)
        if BY_ENERGY:
            row = block // blocks_per_row
            sigma2 = tl.load(mean + row, mask=real, other=0.0)
            factor = down(tl.load(fields + row, mask=real, other=1))
            for j in tl.static_range(32):
                v = raw[j] * factor
                w = w + (m[j] * tl.sqrt_rn(sigma2 + v * v),)
        else:
            w = m
    else:
        for _j in tl.static_range(32):
            w = w + (tl.full([LANES], 1.0, tl.float32),)
    wx = times(x, w, 32)
    turned = inverse_of(_extreme(x))
    least = tl.full([LANES], float("inf"), tl.float32)
    chosen = tl.zeros([LANES], tl.float32)
    for group in range(GROUPS):
        best = tl.full([LANES], -1.0, tl.float32)
        scale = tl.zeros([LANES], tl.float32)
        end = tl.load(ends + group + 1)
        # After the steps of a group, once more from the best scale found.
        for k in range(tl.load(ends + group), end + 1):
            refit = k == end
            step = tl.load(steps + k, mask=k < end, other=0.0)
            inverse = tl.where(refit, inverse_of(scale), step * turned)
            s1, s2 = _explain(x, wx, w, inverse)
            fitted = ratio(s1, s2)
            energy = fitted * s1
            better = energy > best
            best = tl.where(better, energy, best)
            scale = tl.where(better, fitted, scale)
        # To the 11 significant bits of a half.
        bits = bits_of(scale)
        scale = float_of((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000)
        error = _error(x, w, scale)
        better = error < least
        least = tl.where(better, error, least)
        chosen = tl.where(better, scale, chosen)
    d = chosen * up(field)
    shrink = down(field)
    subnormal = (d != 0.0) & (tl.abs(d) < 2.0**-14)
    if tl.max(subnormal.to(tl.int32), axis=0) > 0:
        # Half subnormals are far apart: the nearest one need not be the best.
        middle = rounded(tl.where(subnormal, d, 0.0) * 2.0**24)
        best = tl.full([LANES], float("inf"), tl.float32)
        for k in range(-4, 5):
            candidate = (middle + k) * 2.0**-24
            error = _error(x, w, candidate * shrink)
            better = subnormal & (error < best)
            best = tl.where(better, error, best)
            d = tl.where(better, candidate, d)
    bits = half_bits(d)
    _write_q4_0(x, inverse_of(half_value(bits) * shrink), bits, out + block * 18, real)


def encode_q4_0(values: torch.Tensor, importance: torch.Tensor | None, out: torch.Tensor, mse: bool) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from float32 [R, row_len]: effort ``normal``."""
    n_rows, row_len = values.shape
    n_blocks = values.numel() // 32
    weights = relative(importance, 32)
    by_energy = weights is not None and not mse
    fields, mean = values, values
    if by_energy:
        fields, mean, partial = empty(n_rows, values, torch.int32), empty(n_rows, values), empty(64 * n_rows, values)
        launch: Any = _row_tops[(n_rows,)]
        launch(values, fields, row_len, TILE=1024, num_warps=4, **STRICT)
        launch = _row_squares[(n_rows,)]
        launch(values, fields, partial, row_len, num_warps=1, **STRICT)
        launch = _row_means[lanes_of(n_rows, 32)]
        launch(values, fields, partial, mean, n_rows, row_len, ROWS=32, num_warps=1, **STRICT)
    launch = _q4_0[lanes_of(n_blocks, _LANES)]
    launch(
        values, values if weights is None else weights, fields, mean, table(_steps, values.device),
        table(_ends, values.device), out, n_blocks, row_len // 32,
        WEIGHTED=weights is not None, BY_ENERGY=by_energy, GROUPS=_ends().size - 1, LANES=_LANES, num_warps=4, **STRICT,
    )  # fmt: skip


# The C library's own Q4_0 --------------------------------------------------------------------------------------------


def _units() -> np.ndarray:
    """Return float32 [19]: what the extreme element is tried as, in the library's order."""
    k = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)
    return -(np.float32(8) + np.float32(0.1) * k)


@triton.jit
def _row_sigma(values, mean, row_len):
    """Mean squares of rows, summed element by element as the library does."""
    row = tl.program_id(0)
    start = values + row.to(tl.int64) * row_len
    lane = tl.arange(0, 1)
    total = tl.zeros([1], tl.float32)
    for at in range(0, row_len, 32):
        part = load_elements(start, at + lane, lane < 1, 32)
        for j in tl.static_range(32):
            total += part[j] * part[j]
    tl.store(mean + row + lane, tl.div_rn(total, total * 0.0 + row_len))


@triton.jit
def _q4_0_reference(
    values, importance, mean, units, out, n_blocks, blocks_per_row, WEIGHTED: tl.constexpr, LANES: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = block < n_blocks
    x = load_quads(values, block * 32, real, 32)
    extreme = _extreme(x)
    start = out + block * 18
    if WEIGHTED:
        m = load_quads(importance, (block % blocks_per_row) * 32, real, 32)
        sigma2 = tl.load(mean + block // blocks_per_row, mask=real, other=0.0)
        w = ()
        for j in tl.static_range(32):
            w = w + (m[j] * tl.sqrt_rn(sigma2 + x[j] * x[j]),)
        wx = times(x, w, 32)
        best = tl.zeros([LANES], tl.float32)
        scale = tl.zeros([LANES], tl.float32)
        inverse = tl.zeros([LANES], tl.float32)
        some = extreme != 0.0
        safe = tl.where(some, extreme, 1.0)
        for step in range(19):
            unit = tl.load(units + step) + tl.zeros([LANES], tl.float32)
            tried = tl.where(some, tl.div_rn(unit, safe), 0.0)
            s1, s2 = _explain(x, wx, w, tried)
            better = (s2 > 0.0) & (s1 * s1 > best * s2)
            better = better | (tl.zeros([LANES], tl.int32) + step == 0)  # the first is taken as it is
            fitted = ratio(s1, s2)
            best = tl.where(better, fitted * s1, best)
            scale = tl.where(better, fitted, scale)
            inverse = tl.where(better, tried, inverse)
        tiny = tl.abs(extreme) < 1e-15
        # The library writes codes 0 beside a scale of 0: an inverse of -8 over nothing.
        scale = tl.where(tiny, 0.0, scale)
        store_half(start, 0, half_bits(scale), real)
        for j in tl.static_range(16):
            low = rounded(tl.minimum(tl.maximum(x[j] * inverse, -8.0), 7.0)) + 8.0
            high = rounded(tl.minimum(tl.maximum(x[j + 16] * inverse, -8.0), 7.0)) + 8.0
            byte = tl.where(tiny, 0, low.to(tl.int32) | high.to(tl.int32) << 4)
            tl.store(start + 2 + j, byte.to(tl.uint8), mask=real)
    else:
        d = extreme * -0.125  # a division by -8, exactly
        inverse = inverse_of(d)
        store_half(start, 0, half_bits(d), real)
        for j in tl.static_range(16):
            low = _plain_code(x[j] * inverse)
            high = _plain_code(x[j + 16] * inverse)
            tl.store(start + 2 + j, (low | high << 4).to(tl.uint8), mask=real)


@triton.jit
def _plain_code(scaled):
    t = scaled + 8.5
    # 0 times the infinite inverse of a subnormal is NaN and counts as 0.
    t = tl.where(t == t, t, 0.0)
    return tl.minimum(tl.maximum(t, 0.0), 15.0).to(tl.int32)


def encode_q4_0_reference(values: torch.Tensor, importance: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fill ``out`` uint8 [R, row_nbytes] from float32 [R, row_len], with the C library's bytes."""
    n_rows, row_len = values.shape
    n_blocks = values.numel() // 32
    mean = values
    if importance is not None:
        mean = empty(n_rows, values)
        launch: Any = _row_sigma[(n_rows,)]
        launch(values, mean, row_len, num_warps=1, **STRICT)
    launch = _q4_0_reference[lanes_of(n_blocks, _LANES)]
    launch(
        values, values if importance is None else importance, mean, table(_units, values.device), out, n_blocks,
        row_len // 32,
        WEIGHTED=importance is not None, LANES=_LANES, num_warps=4, **STRICT,
    )  # fmt: skip
