"""Q6_K on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import MAGIC, byte_at, half_at, locate, put_bytes, words2, words4

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.PAIR64.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=210, header_nbytes=0, parts=16, warps=8, repeat=1)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 210, 256, 16
    )
    # Eight bytes of low nibbles a lane: low ones are elements of 64, high ones are 64 further on; eight bytes of two high bits.
    half, group = part // 8, part % 8
    a, b = words2(words, block + 8 * part, mask, ALIGNED)
    p, r = words2(words, block + 128 + 32 * half + 8 * (group % 4), mask, ALIGNED)
    shift = (2 * (group // 4)).to(tl.uint32)
    p, r = p >> shift, r >> shift
    d = half_at(words, block + 208, mask, EVEN)
    scales = block + 192 + 8 * half + group // 2
    at += 128 * half + 8 * group
    for odd in tl.static_range(2):
        s = byte_at(words, scales + 4 * odd, mask).to(tl.int32)
        dl = d * ((s ^ 128) - 128).to(tl.float32)
        low = ((a >> (4 * odd)) & 0x0F0F0F0F) | (((p >> (4 * odd)) & 0x03030303) << 4)
        high = ((b >> (4 * odd)) & 0x0F0F0F0F) | (((r >> (4 * odd)) & 0x03030303) << 4)
        put_bytes(target, at + 64 * odd, low, high, MAGIC + 32, dl, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 210
    half, g = (unit % 8) // 4, unit % 4
    return (
        words4(words, block + 64 * half + 16 * g, mask, ALIGNED)
        + words4(words, block + 128 + 32 * half + 16 * (g % 2), mask, ALIGNED)
        + (
            half_at(words, block + 208, mask, EVEN),
            byte_at(words, block + 192 + 8 * half + g, mask).to(tl.int32),
            byte_at(words, block + 196 + 8 * half + g, mask).to(tl.int32),
            (2 * (g // 2)).to(tl.uint32),
        )
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, e, p, q, r, t, d, s0, s1, shift = raw
    p, q, r, t = p >> shift, q >> shift, r >> shift, t >> shift
    first = dots4(x, 0, _six(a, p), _six(b, q), _six(c, r), _six(e, t), False) - 32 * sums[0]
    second = dots4(x, 4, _six(a >> 4, p >> 4), _six(b >> 4, q >> 4), _six(c >> 4, r >> 4), _six(e >> 4, t >> 4), False)
    second -= 32 * sums[1]
    s0, s1 = ((s0 ^ 128) - 128).to(tl.float32), ((s1 ^ 128) - 128).to(tl.float32)
    return d * (s0 * first.to(tl.float32) + s1 * second.to(tl.float32))


@triton.jit
def _six(low, high):
    return (low & 0x0F0F0F0F) | ((high & 0x03030303) << 4)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(210, 0),
    unit_nbytes=210 / 8,
    tuned=((4, 128, 1, False), (4, 128, 2, False), (4, 128, 4, False)),
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
