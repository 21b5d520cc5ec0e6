"""What Triton lacks for packed bytes: unaligned words, byte permutes and exact narrowing, with a twin for its interpreter.

Blocks of 17, 18, 34, 66 or 129 bytes leave their codes unaligned. A lane reads the aligned 32-bit words around them and shifts
the odd bytes out (a funnel shift): byte loads cost an eighth of the bandwidth (measured on 129-byte blocks). Only words that
hold a wanted byte are read, so nothing beyond the allocation's own aligned words is touched.

Integers become floats by way of ``2^23``: one byte permute puts a byte u under the exponent bits of 2^23, which is exactly
``8388608 + u``; a subtraction takes that off again, together with any offset of the type, exactly.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "MAGIC",
    "add",
    "bits_at",
    "byte_at",
    "codes16",
    "dot2_high",
    "dot2_low",
    "dot4",
    "e4m3_pairs",
    "first_half",
    "fma_pairs",
    "funnel",
    "funnel_past",
    "half_at",
    "headed4",
    "headed8",
    "load_byte",
    "locate",
    "merge",
    "moved2",
    "narrow",
    "nibbles_at",
    "permute",
    "put8",
    "put_bytes",
    "rotate",
    "second_half",
    "short_at",
    "table_words",
    "times",
    "to_float",
    "upper",
    "vector4",
    "widen_half",
    "word_at",
    "words2",
    "words4",
    "words8",
]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs these kernels: it knows no assembly and truncates where the hardware rounds."""

MAGIC = tl.constexpr(8388608.0)
"""2^23: what :func:`to_float` adds to a byte."""


def table_words(values: Any, bias: int = 0) -> tuple[tl.constexpr, ...]:
    """Pack small integers plus ``bias`` into 32-bit words, four bytes each, lowest first: tables for :func:`permute`."""
    data = bytes((int(value) + bias) & 0xFF for value in values)
    return tuple(tl.constexpr(int.from_bytes(data[i : i + 4], "little")) for i in range(0, len(data), 4))


@triton.jit
def permute(low, high, selector):
    """PTX ``prmt``: byte j of the result is byte ``s & 7`` of ``high:low``, s nibble j of ``selector``.

    With bit 3 of s set it is that byte's sign bit, eight times. ``low`` and ``high`` are uint32 tensors or constants.
    """
    if INTERPRETED:
        both = selector.to(tl.uint64) * 0 + low
        both = both | ((selector.to(tl.uint64) * 0 + high) << 32)
        place = tl.arange(0, 4)[None, :].to(tl.uint32)
        nibble = (selector[:, None] >> (4 * place)) & 15
        byte = ((both[:, None] >> ((nibble & 7) * 8).to(tl.uint64)) & 255).to(tl.uint32)
        byte = tl.where(nibble >= 8, (byte >> 7) * 255, byte)
        return tl.sum(byte << (8 * place), 1).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def funnel(low, high, shift):
    """Low word of ``high:low >> shift``, shift below 32 (int32)."""
    if INTERPRETED:
        both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        return (both >> shift.to(tl.uint64)).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def rotate(word, shift):
    """``word`` with its bits moved right in a circle by ``shift`` (int32), of which only the low five bits count."""
    if INTERPRETED:
        return funnel(word, word, shift & 31)
    else:
        return funnel(word, word, shift)


@triton.jit
def to_float(word, j: tl.constexpr):
    """Byte j of ``word``, unsigned, plus :data:`MAGIC`, float32."""
    if INTERPRETED:
        return ((word >> (8 * j)) & 255).to(tl.float32) + MAGIC
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,n", [word, 0x7650 + j], dtype=tl.uint32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)


@triton.jit
def fma_pairs(a, b, c):
    """``a * b + c`` of pairs of binary16 (uint32), each rounded once."""
    if INTERPRETED:
        low = (first_half(a) * first_half(b) + first_half(c)).to(tl.float16).to(tl.uint16, bitcast=True)
        high = (second_half(a) * second_half(b) + second_half(c)).to(tl.float16).to(tl.uint16, bitcast=True)
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def codes16(nibbles, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    """Look the four low nibbles of ``nibbles`` up in a table of 16 bytes: byte j belongs to nibble j."""
    place = nibbles & 0x77777777
    pick = ((nibbles & 0x88888888) >> 1) | 0x32103210
    return permute(permute(T0, T1, place), permute(T2, T3, place), pick)


@triton.jit
def first_half(pair):
    """The low binary16 of a pair, widened to float32."""
    return (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def second_half(pair):
    """The high binary16 of a pair, widened to float32."""
    return (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _e4m3_half(word, j: tl.constexpr):
    code = (word >> (8 * j)) & 255
    magnitude = ((code & 127) << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    bits = magnitude.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return tl.where((code & 127) == 127, 0x7E00, bits) | ((code & 128) << 8)


@triton.jit
def e4m3_pairs(word, HARDWARE: tl.constexpr):
    """Four E4M3FN codes as two pairs of binary16 (uint32): exact, NaN kept. ``HARDWARE``: the device converts (sm_89 on)."""
    if INTERPRETED or not HARDWARE:
        return (
            _e4m3_half(word, 0) | (_e4m3_half(word, 1) << 16),
            _e4m3_half(word, 2) | (_e4m3_half(word, 3) << 16),
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b16 a, b; mov.b32 {a, b}, $2;
                 cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""",
            "=r,=r,r", [word], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def dot2_low(pairs, codes, total, SIGNED: tl.constexpr):
    """``total + x0 * c0 + x1 * c1``: int16 halves of ``pairs`` (uint32) times bytes 0 and 1 of ``codes``, int32."""
    if INTERPRETED:
        x0 = ((pairs << 16).to(tl.int32, bitcast=True)) >> 16
        x1 = pairs.to(tl.int32, bitcast=True) >> 16
        c0 = (codes & 255).to(tl.int32)
        c1 = ((codes >> 8) & 255).to(tl.int32)
        if SIGNED:
            c0 = (c0 ^ 128) - 128
            c1 = (c1 ^ 128) - 128
        return total + x0 * c0 + x1 * c1
    elif SIGNED:
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [pairs, codes, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [pairs, codes, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def dot2_high(pairs, codes, total, SIGNED: tl.constexpr):
    """:func:`dot2_low` with bytes 2 and 3 of ``codes``."""
    if INTERPRETED:
        return dot2_low(pairs, codes >> 16, total, SIGNED)
    elif SIGNED:
        return tl.inline_asm_elementwise(
            "dp2a.hi.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [pairs, codes, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp2a.hi.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [pairs, codes, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def dot4(a, b, total):
    """``total`` plus the products of the four bytes of ``a`` and ``b``, unsigned, int32: picks a byte where ``b`` is a one.

    A product with constants instead of shifts and masks: those are what the integer unit is busy with.
    """
    if INTERPRETED:
        for j in tl.static_range(4):
            total = total + (((a >> (8 * j)) & 255) * ((b >> (8 * j)) & 255)).to(tl.int32)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def merge(a, b, MASK: tl.constexpr):
    """The bits of ``a`` where ``MASK`` has ones, of ``b`` elsewhere (uint32): one instruction, which the compiler misses."""
    if INTERPRETED:
        return (a & MASK) | (b & (MASK ^ 0xFFFFFFFF))
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xE4;", "=r,r,r,r", [a, b, a * 0 + MASK], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def times(bit, number):
    """``bit * number`` (uint32) as a product: of a single bit the compiler would make a test and a selection."""
    if INTERPRETED:
        return bit * number
    else:
        return tl.inline_asm_elementwise(
            "mul.lo.u32 $0, $1, $2;", "=r,r,r", [bit, number], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def add(a, b):
    """``a + b`` (uint32) as a product."""
    if INTERPRETED:
        return a + b
    else:
        return tl.inline_asm_elementwise(
            "mad.lo.u32 $0, $1, $3, $2;", "=r,r,r,r", [a, b, a * 0 + 1], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def upper(word):
    """``word >> 16`` (uint32) as a product: the integer unit has no part in it."""
    if INTERPRETED:
        return word >> 16
    else:
        return tl.inline_asm_elementwise(
            "dp2a.lo.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [word, word * 0 + 0x0100, word * 0],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def word_at(words, at, mask, ALIGNED: tl.constexpr):
    """The uint32 at byte ``at`` (int32) after ``words``, a pointer to aligned uint32; any alignment unless ``ALIGNED``."""
    # The word past an aligned one is not loaded, and anything: a funnel by nothing ignores it.
    place = words + (at >> 2)
    first = tl.load(place, mask, other=0)
    if ALIGNED:
        return first
    else:
        odd = (at & 3).to(tl.int32)
        return funnel(first, tl.load(place + 1, mask & (odd != 0)), odd * 8)


@triton.jit
def words2(words, at, mask, ALIGNED: tl.constexpr):
    """Two uint32 in a row at byte ``at``: see :func:`word_at`."""
    place = words + (at >> 2)
    a = tl.load(place, mask, other=0)
    b = tl.load(place + 1, mask, other=0)
    if ALIGNED:
        return a, b
    else:
        odd = (at & 3).to(tl.int32)
        c = tl.load(place + 2, mask & (odd != 0))
        return funnel(a, b, odd * 8), funnel(b, c, odd * 8)


@triton.jit
def words4(words, at, mask, ALIGNED: tl.constexpr):
    """Four uint32 in a row at byte ``at``: see :func:`word_at`."""
    place = words + (at >> 2)
    a = tl.load(place, mask, other=0)
    b = tl.load(place + 1, mask, other=0)
    c = tl.load(place + 2, mask, other=0)
    d = tl.load(place + 3, mask, other=0)
    if ALIGNED:
        return a, b, c, d
    else:
        odd = (at & 3).to(tl.int32)
        e = tl.load(place + 4, mask & (odd != 0))
        shift = odd * 8
        return funnel(a, b, shift), funnel(b, c, shift), funnel(c, d, shift), funnel(d, e, shift)


@triton.jit
def vector4(words, at, mask, ALIGNED: tl.constexpr):
    """As :func:`words4`, in one load where ``ALIGNED`` is 16."""
    if ALIGNED == 16:
        place = words + ((at >> 4)[:, None] * 4 + tl.arange(0, 4)[None, :])
        four = tl.load(place, tl.broadcast_to(mask[:, None], place.shape), other=0)
        even, odd = tl.split(tl.reshape(four, (at.shape[0], 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        return words4(words, at, mask, ALIGNED)


@triton.jit
def moved2(words, at, shift, mask):
    """Two uint32 in a row at byte ``at``, each moved right by ``shift`` (int32, below 8).

    What comes into the upper bits of either is undefined. Of words that are not aligned this costs no shift of its own.
    """
    place = words + (at >> 2)
    a = tl.load(place, mask, other=0)
    b = tl.load(place + 1, mask, other=0)
    odd = (at & 3).to(tl.int32) * 8
    c = tl.load(place + 2, mask & (odd != 0))
    return funnel(a, b, odd + shift), funnel(b, c, odd + shift)


@triton.jit
def funnel_past(low, high, shift):
    """As :func:`funnel`, with shift up to 32 (which gives ``high``)."""
    if INTERPRETED:
        return funnel(low, high, shift)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.clamp.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def headed4(words, at, HEAD: tl.constexpr, mask):
    """The ``HEAD`` bytes at ``at``, in the low bits of a word with others above, and the four words after them.

    The bytes must not straddle a word: then five words hold it all, each with a wanted byte.
    """
    place = words + (at >> 2)
    a = tl.load(place, mask, other=0)
    b = tl.load(place + 1, mask, other=0)
    c = tl.load(place + 2, mask, other=0)
    d = tl.load(place + 3, mask, other=0)
    e = tl.load(place + 4, mask, other=0)
    odd = (at & 3).to(tl.int32) * 8
    s = odd + 8 * HEAD
    return (
        a >> odd.to(tl.uint32),
        funnel_past(a, b, s),
        funnel_past(b, c, s),
        funnel_past(c, d, s),
        funnel_past(d, e, s),
    )


@triton.jit
def headed8(words, at, HEAD: tl.constexpr, mask):
    """As :func:`headed4`, with eight words."""
    place = words + (at >> 2)
    a = tl.load(place, mask, other=0)
    b = tl.load(place + 1, mask, other=0)
    c = tl.load(place + 2, mask, other=0)
    d = tl.load(place + 3, mask, other=0)
    e = tl.load(place + 4, mask, other=0)
    f = tl.load(place + 5, mask, other=0)
    g = tl.load(place + 6, mask, other=0)
    h = tl.load(place + 7, mask, other=0)
    i = tl.load(place + 8, mask, other=0)
    odd = (at & 3).to(tl.int32) * 8
    s = odd + 8 * HEAD
    return (
        a >> odd.to(tl.uint32),
        funnel_past(a, b, s),
        funnel_past(b, c, s),
        funnel_past(c, d, s),
        funnel_past(d, e, s),
        funnel_past(e, f, s),
        funnel_past(f, g, s),
        funnel_past(g, h, s),
        funnel_past(h, i, s),
    )


@triton.jit
def widen_half(bits):
    """The binary16 in the low bits of a word, as float32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def words8(words, at, mask, ALIGNED: tl.constexpr):
    """Eight uint32 in a row at byte ``at``: see :func:`word_at`."""
    place = words + (at >> 2)
    a = tl.load(place, mask, other=0)
    b = tl.load(place + 1, mask, other=0)
    c = tl.load(place + 2, mask, other=0)
    d = tl.load(place + 3, mask, other=0)
    e = tl.load(place + 4, mask, other=0)
    f = tl.load(place + 5, mask, other=0)
    g = tl.load(place + 6, mask, other=0)
    h = tl.load(place + 7, mask, other=0)
    if ALIGNED:
        return a, b, c, d, e, f, g, h
    else:
        odd = (at & 3).to(tl.int32)
        i = tl.load(place + 8, mask & (odd != 0))
        s = odd * 8
        return (
            funnel(a, b, s),
            funnel(b, c, s),
            funnel(c, d, s),
            funnel(d, e, s),
            funnel(e, f, s),
            funnel(f, g, s),
            funnel(g, h, s),
            funnel(h, i, s),
        )


@triton.jit
def byte_at(words, at, mask):
    """The byte at byte ``at`` (int32) after ``words``, uint32."""
    return (tl.load(words + (at >> 2), mask, other=0) >> ((at & 3).to(tl.uint32) * 8)) & 255


@triton.jit
def load_byte(words, at, mask):
    """As :func:`byte_at` by a load of just that byte: no shift and no mask, but a byte has to have an address of its own."""
    return tl.load(words.to(tl.pointer_type(tl.uint8)) + at, mask, other=0).to(tl.uint32)


@triton.jit
def short_at(words, at, mask, EVEN: tl.constexpr):
    """The uint16 at byte ``at``, uint32; ``EVEN`` promises that it lies within one word."""
    place = words + (at >> 2)
    odd = (at & 3).to(tl.int32)
    first = tl.load(place, mask, other=0) >> (odd * 8).to(tl.uint32)
    if EVEN:
        return first & 0xFFFF
    else:
        second = tl.load(place + 1, mask & (odd == 3), other=0)
        return tl.where(odd == 3, first | (second << 8), first) & 0xFFFF


@triton.jit
def bits_at(words, at, shift, mask, EVEN: tl.constexpr):
    """The uint16 at byte ``at`` moved right by ``shift`` (int32), uint32, with other bits above what is left of it."""
    if EVEN:
        return tl.load(words + (at >> 2), mask, other=0) >> ((at & 3) * 8 + shift).to(tl.uint32)
    else:
        return short_at(words, at, mask, False) >> shift.to(tl.uint32)


@triton.jit
def nibbles_at(words, at, shift, mask, ALIGNED: tl.constexpr):
    """The uint32 at byte ``at`` moved right by ``shift`` (int32, 0 or 4): with ``0x0F0F0F0F``, low or high nibbles."""
    if ALIGNED:
        return word_at(words, at, mask, True) >> shift.to(tl.uint32)
    else:
        place = words + (at >> 2)
        odd = (at & 3).to(tl.int32)
        second = tl.load(place + 1, mask & (odd != 0))
        return funnel(tl.load(place, mask, other=0), second, odd * 8 + shift)


@triton.jit
def half_at(words, at, mask, EVEN: tl.constexpr):
    """The binary16 at byte ``at``, widened to float32: exact, subnormals included."""
    bits = short_at(words, at, mask, EVEN)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def narrow(value, TYPE: tl.constexpr):
    # The interpreter truncates to bfloat16; these integers round to nearest even, as the hardware does.
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(TYPE)


@triton.jit
def put8(out, at, v0, v1, v2, v3, v4, v5, v6, v7, mask, WIDTH: tl.constexpr):
    """Store eight neighbours a lane: ``out[at + j] = vj`` (float32, rounded to nearest even to the type of ``out``).

    ``at`` int32, a multiple of 8. Joined in registers, so a lane's eight values leave in one or two 16-byte stores.
    """
    # The last join varies fastest: it tells even from odd, the first one the halves.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    values = tl.reshape(tl.join(even, odd), (WIDTH, 8))
    place = at[:, None] + tl.arange(0, 8)[None, :]
    keep = tl.broadcast_to(mask[:, None], (WIDTH, 8))
    tl.store(out + place, narrow(values, out.dtype.element_ty), keep)


@triton.jit
def put_bytes(out, at, low, high, bias, scale, mask, WIDTH: tl.constexpr):
    """Store ``(byte - bias + MAGIC) * scale`` of the eight bytes of two words: two roundings at most, as the specification.

    ``bias`` is a float32 that holds :data:`MAGIC` plus the byte that stands for zero; the difference is exact.
    """
    put8(
        out,
        at,
        (to_float(low, 0) - bias) * scale,
        (to_float(low, 1) - bias) * scale,
        (to_float(low, 2) - bias) * scale,
        (to_float(low, 3) - bias) * scale,
        (to_float(high, 0) - bias) * scale,
        (to_float(high, 1) - bias) * scale,
        (to_float(high, 2) - bias) * scale,
        (to_float(high, 3) - bias) * scale,
        mask,
        WIDTH,
    )


@triton.jit
def locate(
    data,
    out,
    row_nbytes,
    row_len,
    n_rows,
    n_units,
    chunks,
    LEAD: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK_NBYTES: tl.constexpr,
    BLOCK_LEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Tell every lane its unit: one of ``PARTS`` parts of a block.

    A program has ``TILE`` lanes: one run of ``LANES`` units of one row, or all units of ``TILE // LANES`` short rows.

    Returns
    -------
    words
        Pointer to aligned uint32; ``header`` and ``block`` are bytes from there.
    header, row_exists
        Where the lane's row begins, int64, and whether it is one: scalars where the program has one row.
    block
        Where the lane's block begins: int32, or int64 with several rows.
    target, at
        Pointer into ``out``, and where the lane's block begins from there, in elements.
    part, mask
        Which part of the block, int32, and whether it exists.
    """
    # Without row headers the rows are one long row (and a division by a number known only at launch is 20 instructions).
    if HEADER == 0:
        chunk = tl.program_id(0).to(tl.int64)
        tile_row = 0
    else:
        chunk = (tl.program_id(0) % chunks).to(tl.int64)
        tile_row = tl.program_id(0) // chunks
    lane = tl.arange(0, TILE)
    unit = lane % LANES
    left = tl.minimum(n_units - chunk * LANES, LANES).to(tl.int32)
    mask = unit < left
    # 64 bits where a row or a tensor is counted; what one program adds fits in 32.
    aligned = (data - LEAD).to(tl.pointer_type(tl.uint32))
    if TILE == LANES:
        if HEADER == 0:
            start = chunk * 0 + LEAD
            target = out
        else:
            row = tile_row.to(tl.int64)
            start = row * row_nbytes + LEAD
            target = out + row * row_len
        first = start + HEADER + chunk * (LANES // PARTS * BLOCK_NBYTES)
        words = aligned + (first >> 2)
        block = (first & 3).to(tl.int32) + unit // PARTS * BLOCK_NBYTES
        # The header may lie far before: counted from the same pointer, it needs 64 bits.
        header = start - ((first >> 2) << 2)
        target += chunk * (LANES // PARTS * BLOCK_LEN)
        at = unit // PARTS * BLOCK_LEN
        row_exists = chunk >= 0
    else:
        row = tile_row.to(tl.int64) * (TILE // LANES) + lane // LANES
        row_exists = row < n_rows
        mask = mask & row_exists
        words = aligned
        header = row * row_nbytes + LEAD
        block = header + HEADER + chunk * (LANES // PARTS * BLOCK_NBYTES) + unit // PARTS * BLOCK_NBYTES
        target = out
        at = row * row_len + chunk * (LANES // PARTS * BLOCK_LEN) + unit // PARTS * BLOCK_LEN
    return words, header, row_exists, block, target, at, unit % PARTS, mask
