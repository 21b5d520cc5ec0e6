"""Q8_0 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import (
    MAGIC,
    half_at,
    headed8,
    locate,
    put_bytes,
    short_at,
    widen_half,
    words2,
    words4,
    words8,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.NATURAL.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=32, block_nbytes=34, header_nbytes=0, parts=4, warps=4, repeat=2)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 34, 32, 4 // RUNS
    )
    # RUNS times eight codes a lane. Flipping the sign bit of a byte adds 128 to it.
    d = half_at(words, block, mask, EVEN)
    at += 8 * RUNS * part
    if RUNS == 1:
        a, b = words2(words, block + 2 + 8 * part, mask, ALIGNED)
    else:
        a, b, c, e = words4(words, block + 2 + 16 * part, mask, ALIGNED)
        put_bytes(target, at + 8, c ^ 0x80808080, e ^ 0x80808080, MAGIC + 128, d, mask, TILE)
    put_bytes(target, at, a ^ 0x80808080, b ^ 0x80808080, MAGIC + 128, d, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit * 34
    if EVEN:
        d, a, b, c, e, f, g, h, i = headed8(words, block, 2, mask)
        return a, b, c, e, f, g, h, i, d
    else:
        return words8(words, block + 2, mask, ALIGNED) + (short_at(words, block, mask, EVEN),)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    total = dots4(x, 0, raw[0], raw[1], raw[2], raw[3], True) + dots4(x, 4, raw[4], raw[5], raw[6], raw[7], True)
    return total.to(tl.float32) * widen_half(raw[8])


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(34, 0),
    unit_nbytes=34,
    tuned=((4, 128, 2, False), (4, 128, 2, False), (4, 256, 8, False)),
    settled=((2, 32, 1, False), (4, 32, 1, False)),
)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out, RUNS=4 // _SHAPE.parts)


def linear(
    x: torch.Tensor | _linear.Prepared,
    rows: torch.Tensor,
    out: torch.Tensor,
    *,
    planes: None = None,
    ids: torch.Tensor | None = None,
    settled: bool = False,
) -> None:
    """Fill ``out`` with ``x @ decode(rows).T``: see :func:`ggufx.kernels.cuda._linear.linear`."""
    _linear.linear(_FUSED, x, rows, out, ids=ids, settled=settled)
