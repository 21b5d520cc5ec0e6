"""MXFP4 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import more4
from ggufx.kernels.cuda._words import (
    MAGIC,
    add,
    byte_at,
    headed4,
    locate,
    permute,
    put_bytes,
    table_words,
    upper,
    words2,
)

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.PAIR16.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=32, block_nbytes=17, header_nbytes=0, parts=2, warps=8, repeat=1)

_P0, _P1 = table_words(tables.E2M1_DOUBLED[:8], 243)
_N0, _N1 = table_words(tables.E2M1_DOUBLED[:8], 12)
_WORDS = table_words(tables.E2M1_DOUBLED, 12)


@triton.jit
def signed4(nibbles, P0, P1, N0, N1):
    """243 plus twice the E2M1 value of the four low nibbles of ``nibbles``, a byte each.

    A permute takes a nibble's sign bit as its own order to repeat the chosen byte's sign. So a table of bytes from 128 gives
    255 for every negative code, one of bytes below 128 gives 0 for every positive code of the flipped word, and
    ``(243 + m) - 0`` or ``255 - (12 + m)`` is the value plus 243, without a borrow between bytes: two lookups, not three.
    """
    return permute(P0, P1, nibbles) - permute(N0, N1, nibbles ^ 0x88888888)


@triton.jit
def half_e8m0(e):
    """Half of E8M0, for a doubled table: 0 and 1 are subnormal, and 255 is no NaN here."""
    bits = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 17, 32, 2
    )
    # Half a block a lane. Four nibbles in a row are elements j, j + 16, j + 1, j + 17; a permute parts low from high.
    a, b = words2(words, block + 1 + 8 * part, mask, ALIGNED)
    scale = half_e8m0(byte_at(words, block, mask))
    at += 8 * part
    a0, a1, b0, b1 = (
        signed4(a, _P0, _P1, _N0, _N1),
        signed4(a >> 16, _P0, _P1, _N0, _N1),
        signed4(b, _P0, _P1, _N0, _N1),
        signed4(b >> 16, _P0, _P1, _N0, _N1),
    )
    put_bytes(
        target, at, permute(a0, a1, 0x6420 + a * 0), permute(b0, b1, 0x6420 + b * 0), MAGIC + 243, scale, mask, TILE
    )
    put_bytes(
        target,
        at + 16,
        permute(a0, a1, 0x7531 + a * 0),
        permute(b0, b1, 0x7531 + b * 0),
        MAGIC + 243,
        scale,
        mask,
        TILE,
    )


@triton.jit
def _load(words, header, row, unit, mask, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    block = row + unit * 17
    e, a, b, c, d = headed4(words, block, 1, mask)
    return a, b, c, d, e


@triton.jit
def _eight(word, known):
    """Twice the E2M1 values of eight nibbles, plus 12, a byte each.

    A permute gives a byte's sign, 0, for a nibble of 8 or more: the lookups of either sign add up, and not even in the integer
    unit.
    """
    _, p0, p1, n0, n1 = known
    other = word ^ 0x88888888
    return (
        add(permute(p0, p1, word), permute(n0, n1, other)),
        add(permute(p0, p1, word >> 16), permute(n0, n1, upper(other))),
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, d, e = raw
    a0, a1 = _eight(a, known)
    b0, b1 = _eight(b, known)
    c0, c1 = _eight(c, known)
    d0, d1 = _eight(d, known)
    total = more4(x, 0, a0, a1, b0, b1, -12 * sums[2], False)
    total = more4(x, 4, c0, c1, d0, d1, total, False)
    return total.to(tl.float32) * half_e8m0(e & 255)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(17, 0),
    unit_nbytes=17,
    tuned=((2, 128, 4, False), (2, 128, 2, False), (4, 128, 4, False)),
    settled=((4, 32, 1, False), (4, 32, 1, False)),
    words=tuple(word.value for word in _WORDS),
    known=4,
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
