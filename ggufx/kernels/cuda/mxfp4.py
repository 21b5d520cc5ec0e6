"""MXFP4 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda import _launch, _linear
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import MAGIC, byte_at, headed4, locate, permute, put_bytes, table_words, words2

__all__ = ["ORDER", "decode", "linear"]

ORDER = _linear.PAIR16.value
"""How its product wants activations prepared."""

_SHAPE = _launch.Shape(block_len=32, block_nbytes=17, header_nbytes=0, parts=2, warps=8, repeat=1)

_P0, _P1 = table_words(tables.E2M1_DOUBLED[:8], 243)
_N0, _N1 = table_words(tables.E2M1_DOUBLED[:8], 12)
_M0, _M1 = table_words(tables.E2M1_DOUBLED[:8])


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
def _magnitudes(x, a, b, c, d, low, high):
    # The magnitudes of positive codes with their activations: a negative code's permute repeats a sign, 0.
    total = dots4(
        x,
        0,
        permute(low, high, a),
        permute(low, high, a >> 16),
        permute(low, high, b),
        permute(low, high, b >> 16),
        False,
    )
    return total + dots4(
        x,
        4,
        permute(low, high, c),
        permute(low, high, c >> 16),
        permute(low, high, d),
        permute(low, high, d >> 16),
        False,
    )


@triton.jit
def _dot(raw, x, sums, known, DOUBLE: tl.constexpr):
    a, b, c, d, e = raw
    _, p0, p1, n0, n1, low, high = known
    if DOUBLE:
        # Twice the products, which do not burden the integer unit, and no subtractions, which do.
        total = _magnitudes(x, a, b, c, d, low, high)
        total -= _magnitudes(x, a ^ 0x88888888, b ^ 0x88888888, c ^ 0x88888888, d ^ 0x88888888, low, high)
    else:
        total = dots4(
            x,
            0,
            signed4(a, p0, p1, n0, n1),
            signed4(a >> 16, p0, p1, n0, n1),
            signed4(b, p0, p1, n0, n1),
            signed4(b >> 16, p0, p1, n0, n1),
            False,
        )
        total += dots4(
            x,
            4,
            signed4(c, p0, p1, n0, n1),
            signed4(c >> 16, p0, p1, n0, n1),
            signed4(d, p0, p1, n0, n1),
            signed4(d >> 16, p0, p1, n0, n1),
            False,
        )
        total -= 243 * sums[2]
    return total.to(tl.float32) * half_e8m0(e & 255)


_FUSED = _linear.Fused(
    load=_load,
    dot=_dot,
    header=_linear.no_header,
    order=ORDER,
    layout=(17, 0),
    unit_nbytes=17,
    tuned=((2, 128, 2, False), (4, 128, 1, False), (4, 128, 4, False)),
    words=tuple(word.value for word in (_P0, _P1, _N0, _N1, _M0, _M1)),
    known=6,
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
