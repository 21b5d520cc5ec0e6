"""IQ4_KS on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._codebook4 import WORDS, codes_product
from ggufx.kernels.cuda._words import (
    MAGIC,
    byte_at,
    codes16,
    locate,
    permute,
    put_bytes,
    table_words,
    word_at,
    words2,
    words4,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.PAIR16.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=256, block_nbytes=136, header_nbytes=4, parts=16, warps=8, repeat=1)

_T0, _T1, _T2, _T3 = table_words(tables.IQ4, 128)
_SHIFT = tl.constexpr(tables.SHIFTS[4])


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, header, row_exists, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 4, 136, 256, 16
    )
    # Half a sub-block a lane. Four nibbles in a row are elements j, j + 16, j + 1, j + 17; a permute parts low from high.
    sub, half = part // 2, part % 2
    a, b = words2(words, block + 8 + 8 * part, mask, ALIGNED)
    d = word_at(words, header, row_exists, ALIGNED).to(tl.float32, bitcast=True)
    c = byte_at(words, block + sub, mask)
    dl = d * ((c & 254).to(tl.int32) - 127).to(tl.float32)
    bias = MAGIC + 128 - _SHIFT * (c & 1).to(tl.float32)
    at += 32 * sub + 8 * half
    a0, a1 = codes16(a, _T0, _T1, _T2, _T3), codes16(a >> 16, _T0, _T1, _T2, _T3)
    b0, b1 = codes16(b, _T0, _T1, _T2, _T3), codes16(b >> 16, _T0, _T1, _T2, _T3)
    put_bytes(target, at, permute(a0, a1, 0x6420 + a * 0), permute(b0, b1, 0x6420 + b * 0), bias, dl, mask, TILE)
    put_bytes(target, at + 16, permute(a0, a1, 0x7531 + a * 0), permute(b0, b1, 0x7531 + b * 0), bias, dl, mask, TILE)


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit // 8 * 136
    sub = unit % 8
    return words4(words, block + 8 + 16 * sub, mask, ALIGNED) + (byte_at(words, block + sub, mask),)


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    total = codes_product(x, raw[0], raw[1], raw[2], raw[3], known, DOUBLE)
    c = raw[4].to(tl.int32)
    total += _SHIFT * (c & 1) * sums[2]
    return total.to(tl.float32) * ((c & 254) - 127).to(tl.float32)


@triton.jit
def _header(words, header):
    return word_at(words, header, header >= 0, False).to(tl.float32, bitcast=True)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_header,
    order=ORDER,
    layout=(136, 4),
    unit_nbytes=136 / 8,
    tuned=((4, 128, 4, False), (4, 128, 4, False), (2, 128, 4, True)),
    settled=((4, 32, 1, False), (4, 32, 1, False)),
    words=WORDS,
    known=4,
    double=True,
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
