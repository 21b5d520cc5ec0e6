"""IQ4_NL on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._codebook4 import WORDS, codes_product
from ggufx.kernels.cuda._words import (
    MAGIC,
    codes16,
    half_at,
    headed4,
    locate,
    permute,
    put_bytes,
    short_at,
    table_words,
    widen_half,
    words2,
    words4,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.PAIR16.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=32, block_nbytes=18, header_nbytes=0, parts=2, warps=4, repeat=1)

_T0, _T1, _T2, _T3 = table_words(tables.IQ4, 128)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 18, 32, 2
    )
    # Half a block a lane. Four nibbles in a row are elements j, j + 16, j + 1, j + 17; a permute parts low from high.
    a, b = words2(words, block + 2 + 8 * part, mask, ALIGNED)
    d = half_at(words, block, mask, EVEN)
    at += 8 * part
    a0, a1 = codes16(a, _T0, _T1, _T2, _T3), codes16(a >> 16, _T0, _T1, _T2, _T3)
    b0, b1 = codes16(b, _T0, _T1, _T2, _T3), codes16(b >> 16, _T0, _T1, _T2, _T3)
    put_bytes(target, at, permute(a0, a1, 0x6420 + a * 0), permute(b0, b1, 0x6420 + b * 0), MAGIC + 128, d, mask, TILE)
    put_bytes(
        target, at + 16, permute(a0, a1, 0x7531 + a * 0), permute(b0, b1, 0x7531 + b * 0), MAGIC + 128, d, mask, TILE
    )


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
    return codes_product(x, raw[0], raw[1], raw[2], raw[3], known, DOUBLE).to(tl.float32) * widen_half(raw[4])


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(18, 0),
    unit_nbytes=18,
    tuned=((2, 64, 2, False), (2, 64, 2, False), (4, 256, 8, False)),
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
