"""Q4_K on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import MAGIC, half_at, locate, put8, to_float, word_at, words2, words4

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.PAIR32.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=144, header_nbytes=0, parts=16, warps=8, repeat=1)


@triton.jit
def scales_and_minima(words, at, q, mask, ALIGNED: tl.constexpr):
    """Six-bit scales and minima of sub-blocks 2q and 2q + 1, in the two low bytes of uint32."""
    w0 = word_at(words, at, mask, ALIGNED)
    w1 = word_at(words, at + 4, mask, ALIGNED)
    w2 = word_at(words, at + 8, mask, ALIGNED)
    # Sub-blocks 4 to 7 have four bits in the last word and two on top of those of 0 to 3.
    s = tl.where(q < 2, w0 & 0x3F3F3F3F, (w2 & 0x0F0F0F0F) | ((w0 >> 2) & 0x30303030))
    m = tl.where(q < 2, w1 & 0x3F3F3F3F, ((w2 >> 4) & 0x0F0F0F0F) | ((w1 >> 2) & 0x30303030))
    shift = (16 * (q % 2)).to(tl.uint32)
    return s >> shift, m >> shift


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 144, 256, 16
    )
    # Eight code bytes a lane: low nibbles are elements of sub-block 2q, high ones, 32 further on, of 2q + 1.
    q, group = part // 4, part % 4
    a, b = words2(words, block + 16 + 8 * part, mask, ALIGNED)
    d = half_at(words, block, mask, EVEN)
    dmin = half_at(words, block + 2, mask, EVEN)
    s, m = scales_and_minima(words, block + 4, q, mask, ALIGNED)
    at += 64 * q + 8 * group
    for odd in tl.static_range(2):
        scale = d * ((s >> (8 * odd)) & 255).to(tl.float32)
        least = dmin * ((m >> (8 * odd)) & 255).to(tl.float32)
        low = (a >> (4 * odd)) & 0x0F0F0F0F
        high = (b >> (4 * odd)) & 0x0F0F0F0F
        put8(
            target,
            at + 32 * odd,
            (to_float(low, 0) - MAGIC) * scale - least,
            (to_float(low, 1) - MAGIC) * scale - least,
            (to_float(low, 2) - MAGIC) * scale - least,
            (to_float(low, 3) - MAGIC) * scale - least,
            (to_float(high, 0) - MAGIC) * scale - least,
            (to_float(high, 1) - MAGIC) * scale - least,
            (to_float(high, 2) - MAGIC) * scale - least,
            (to_float(high, 3) - MAGIC) * scale - least,
            mask,
            TILE,
        )


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 144
    s, m = scales_and_minima(words, block + 4, (unit % 8) // 2, mask, ALIGNED)
    return words4(words, block + 16 + 16 * (unit % 8), mask, ALIGNED) + (
        half_at(words, block, mask, EVEN),
        half_at(words, block + 2, mask, EVEN),
        s,
        m,
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, d, dmin, s, m = raw
    mask: tl.constexpr = 0x0F0F0F0F
    first = dots4(x, 0, a & mask, b & mask, c & mask, e & mask, False)
    second = dots4(x, 4, (a >> 4) & mask, (b >> 4) & mask, (c >> 4) & mask, (e >> 4) & mask, False)
    total = (s & 255).to(tl.int32) * first + ((s >> 8) & 255).to(tl.int32) * second
    least = (m & 255).to(tl.int32) * sums[0] + ((m >> 8) & 255).to(tl.int32) * sums[1]
    return d * total.to(tl.float32) - dmin * least.to(tl.float32)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(144, 0),
    unit_nbytes=144 / 8,
    tuned=((4, 128, 4, False), (4, 128, 4, False), (2, 256, 8, False)),
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
