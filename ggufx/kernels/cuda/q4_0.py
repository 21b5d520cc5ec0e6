"""Q4_0 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import MAGIC, half_at, headed4, locate, put_bytes, short_at, widen_half, words2, words4

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.NATURAL.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=32, block_nbytes=18, header_nbytes=0, parts=2, warps=8, repeat=1)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 18, 32, 2
    )
    # Half a block a lane: eight bytes hold elements j.. in their low and j + 16.. in their high nibbles.
    a, b = words2(words, block + 2 + 8 * part, mask, ALIGNED)
    d = half_at(words, block, mask, EVEN)
    at += 8 * part
    bias = MAGIC + 8
    put_bytes(target, at, a & 0x0F0F0F0F, b & 0x0F0F0F0F, bias, d, mask, TILE)
    put_bytes(target, at + 16, (a >> 4) & 0x0F0F0F0F, (b >> 4) & 0x0F0F0F0F, bias, d, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit * 18
    if EVEN:
        d, a, b, c, e = headed4(words, block, 2, mask)
        return a, b, c, e, d
    else:
        return words4(words, block + 2, mask, ALIGNED) + (short_at(words, block, mask, EVEN),)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, d = raw
    mask: tl.constexpr = 0x0F0F0F0F
    total = dots4(x, 0, a & mask, b & mask, c & mask, e & mask, False)
    total += dots4(x, 4, (a >> 4) & mask, (b >> 4) & mask, (c >> 4) & mask, (e >> 4) & mask, False)
    return (total - 8 * sums[2]).to(tl.float32) * widen_half(d)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(18, 0),
    unit_nbytes=18,
    tuned=((4, 128, 4, False), (4, 128, 4, False), (4, 128, 2, False)),
    settled=((4, 32, 1, False), (4, 32, 1, False)),
)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out)


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
