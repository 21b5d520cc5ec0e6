"""Products with the codebook of 16 that IQ4_NL and IQ4_KS share, nibbles as they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from ggufx import tables
from ggufx.kernels.cuda._linear import dots4
from ggufx.kernels.cuda._words import codes16, permute, table_words

__all__ = ["WORDS", "codes_product"]

_U0, _U1, _U2, _U3 = table_words(tables.IQ4)
_T4, _T5 = table_words(tables.IQ4[:8])
_T6, _T7 = table_words(tables.IQ4[8:], 1)
WORDS = tuple(word.value for word in (_T4, _T5, _T6, _T7))
"""What ``known`` of :func:`codes_product` begins with."""


@triton.jit
def codes_product(x, a, b, c, d, known, DOUBLE: tl.constexpr):
    """Integer product of 32 codes, as they lie, with their activations."""
    if DOUBLE:
        _, t4, t5, t6, t7 = known
        # A permute repeats the sign of the byte that a nibble of 8 or more, less 8, names. All of the lower half are
        # negative: -1 for codes of the upper half. All of the upper half are positive: 0 for the others. So two lookups and
        # two products do what three lookups and a choice do with one: as many instructions, but half of them beside the
        # integer unit.
        total = dots4(
            x,
            0,
            permute(t4, t5, a),
            permute(t4, t5, a >> 16),
            permute(t4, t5, b),
            permute(t4, t5, b >> 16),
            True,
        )
        total += dots4(
            x,
            4,
            permute(t4, t5, c),
            permute(t4, t5, c >> 16),
            permute(t4, t5, d),
            permute(t4, t5, d >> 16),
            True,
        )
        a, b, c, d = a ^ 0x88888888, b ^ 0x88888888, c ^ 0x88888888, d ^ 0x88888888
        total += dots4(
            x,
            0,
            permute(t6, t7, a),
            permute(t6, t7, a >> 16),
            permute(t6, t7, b),
            permute(t6, t7, b >> 16),
            True,
        )
        return total + dots4(
            x,
            4,
            permute(t6, t7, c),
            permute(t6, t7, c >> 16),
            permute(t6, t7, d),
            permute(t6, t7, d >> 16),
            True,
        )
    else:
        a0, a1 = codes16(a, _U0, _U1, _U2, _U3), codes16(a >> 16, _U0, _U1, _U2, _U3)
        b0, b1 = codes16(b, _U0, _U1, _U2, _U3), codes16(b >> 16, _U0, _U1, _U2, _U3)
        c0, c1 = codes16(c, _U0, _U1, _U2, _U3), codes16(c >> 16, _U0, _U1, _U2, _U3)
        d0, d1 = codes16(d, _U0, _U1, _U2, _U3), codes16(d >> 16, _U0, _U1, _U2, _U3)
        return dots4(x, 0, a0, a1, b0, b1, True) + dots4(x, 4, c0, c1, d0, d1, True)
