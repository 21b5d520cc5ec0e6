"""F8_E4M3_B128 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch, _linear, _scaled
from ggufx.kernels.cuda._words import (
    byte_at,
    e4m3_pairs,
    first_half,
    fma_pairs,
    locate,
    put8,
    second_half,
    words2,
    words4,
    words8,
)

__all__ = ["ORDER", "decode", "linear", "split"]

ORDER = _linear.FLOAT.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=128, block_nbytes=129, header_nbytes=0, parts=16, warps=4, repeat=2)


@triton.jit
def e8m0(e):
    """2^(e - 127): 0 is a float32 subnormal, 255 NaN."""
    bits = tl.where(e == 0, 0x00400000, tl.where(e == 255, 0x7FC00000, e << 23))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    HARDWARE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 129, 128, 16 // RUNS
    )
    # RUNS times eight codes a lane.
    scale = e8m0(byte_at(words, block, mask))
    at += 8 * RUNS * part
    if RUNS == 1:
        a, b = words2(words, block + 1 + 8 * part, mask, ALIGNED)
    else:
        a, b, c, d = words4(words, block + 1 + 16 * part, mask, ALIGNED)
        _put(target, at + 8, c, d, scale, mask, TILE, HARDWARE)
    _put(target, at, a, b, scale, mask, TILE, HARDWARE)


@triton.jit
def _put(out, at, a, b, scale, mask, WIDTH: tl.constexpr, HARDWARE: tl.constexpr):
    c0, c1 = e4m3_pairs(a, HARDWARE)
    c2, c3 = e4m3_pairs(b, HARDWARE)
    put8(
        out,
        at,
        first_half(c0) * scale,
        second_half(c0) * scale,
        first_half(c1) * scale,
        second_half(c1) * scale,
        first_half(c2) * scale,
        second_half(c2) * scale,
        first_half(c3) * scale,
        second_half(c3) * scale,
        mask,
        WIDTH,
    )


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 4 * 129
    codes = words8(words, block + 1 + 32 * (unit % 4), mask, ALIGNED)
    return codes + (byte_at(words, block, mask),)


@triton.jit
def _load_planes(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    # ``header`` points to the row's scales; eight aligned words are two loads of 16 bytes.
    codes = _linear.quad(words, 2 * unit, mask, unit.shape[0]) + _linear.quad(words, 2 * unit + 1, mask, unit.shape[0])
    return codes + (tl.load(header + unit // 4, mask, other=0).to(tl.uint32),)


@triton.jit
def _chain(x, FIRST: tl.constexpr, a, b, HARDWARE: tl.constexpr):
    # Four products in a row stay within binary16's range and cost no more than its rounding.
    a0, a1 = e4m3_pairs(a, HARDWARE)
    b0, b1 = e4m3_pairs(b, HARDWARE)
    total = fma_pairs(a0, x[2 * FIRST], a0 * 0)
    total = fma_pairs(a1, x[2 * FIRST + 1], total)
    total = fma_pairs(b0, x[2 * FIRST + 2], total)
    total = fma_pairs(b1, x[2 * FIRST + 3], total)
    return first_half(total) + second_half(total)


@triton.jit
def _product(raw, x, HARDWARE: tl.constexpr):
    total = _chain(x, 0, raw[0], raw[1], HARDWARE) + _chain(x, 2, raw[2], raw[3], HARDWARE)
    total += _chain(x, 4, raw[4], raw[5], HARDWARE) + _chain(x, 6, raw[6], raw[7], HARDWARE)
    return total * e8m0(raw[8])


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    return _product(raw, x, True)


@triton.jit
def _dot_older(raw, x, sums, known, DOUBLE: tl.constexpr):
    return _product(raw, x, False)


_FUSED = {
    hardware: _linear.Fused(
        load=_load,
        dot=_dot if hardware else _dot_older,
        header=_linear.no_header,
        order=ORDER,
        layout=(129, 0),
        unit_nbytes=129 / 4,
        tuned=((2, 128, 2, False), (4, 128, 2, False), (2, 256, 8, False)),
        settled=((4, 32, 1, False), (4, 32, 1, False)),
        load_planes=_load_planes,
        tuned_planes=((4, 128, 4, False), (2, 128, 4, False), (4, 256, 8, False)),
        settled_planes=((2, 32, 1, False), (2, 32, 1, False)),
    )
    for hardware in (False, True)
}


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    hardware = _launch.converts_e4m3(rows.device)
    _launch.decode(_decode, _SHAPE, rows, out, HARDWARE=hardware, RUNS=16 // _SHAPE.parts)


def linear(
    x: torch.Tensor | _linear.Prepared,
    rows: torch.Tensor,
    out: torch.Tensor,
    *,
    planes: tuple[torch.Tensor, ...] | None = None,
    ids: torch.Tensor | None = None,
    settled: bool = False,
) -> None:
    """Fill ``out`` with ``x @ decode(rows).T``: see :func:`ggufx.kernels.cuda._linear.linear`.

    With :func:`split`'s ``planes`` rows are not read: 129-byte blocks keep the first-level cache busier than the memory.
    """
    fused = _FUSED[_launch.converts_e4m3(rows.device)]
    _linear.linear(fused, x, rows, out, planes=planes, ids=ids, settled=settled)


def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Part ``rows``, uint8 [..., row_nbytes], into planes.

    Returns
    -------
    codes, exponents
        uint8 [..., row_len] and [..., row_len // 128].
    scales
        float32: :func:`ggufx.kernels.cuda._scaled.weight_scales` of the exponents, for the FP8 product; empty for stacked rows.
    """
    blocks = rows.unflatten(-1, (rows.shape[-1] // 129, 129))
    codes, exponents = blocks[..., 1:].flatten(-2).contiguous(), blocks[..., 0].contiguous()
    scales = _scaled.weight_scales(exponents) if exponents.ndim == 2 else exponents.new_empty(0, dtype=torch.float32)
    return codes, exponents, scales
