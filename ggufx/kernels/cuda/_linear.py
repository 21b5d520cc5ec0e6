"""The fused product of a few activation rows with packed weights: every packed byte is read once.

One lane takes a unit of 32 weights: it loads the few words of the unit, decodes them to bytes in its registers and
multiplies them there, with integer dot products. Only one sum per output crosses lanes. What is limited on a GPU at this is
not the memory but the integer unit, so activations are prepared once, for all matrices of one order:

- 256 at a time become 16-bit integers under one float scale: 2^-16 of the group's largest, far below the rounding of a
  bfloat16 (or binary16 under a power of two, for F8_E4M3_B128, whose products are floats);
- in the order in which the type's lookups yield the codes, as pairs, so that a load is one contiguous 16 bytes a lane;
- with the sums of 16 and of 32, which take any offset of the type's codes out of the inner product.

A type brings two functions. ``LOAD(words, header, row, unit, mask, EVEN, ALIGNED)`` returns the raw words of a unit
(``words`` points to aligned words, the row's header and first block begin ``header`` and ``row`` bytes from there).
``DOT(raw, x, sums, known, DOUBLE)`` returns, float32, the product of the unit with its 16 pairs of activations, without what
``HEADER(words, header)`` returns for the whole row; ``known`` is the pointer to the type's words and the first of these, in
registers.

Launches are dependent where the device can: a kernel may begin before the one before it has ended, and says itself what it
waits for.

- The first product with prepared activations loads its first weights, then waits, and only then lets its successor begin.
- Any other product with them need not wait for anything it reads: what begins after a product that has waited begins after
  the activations are complete. It multiplies at once, lets its successor begin at once, and waits only before it stores: for
  what the memory of its result held before, and so that whoever waits for it has waited for all before it.

Weights must therefore have been written before the activations were prepared: :func:`prepare` waits for all before it. Where a
product is given plain activations, that is so; whoever gives prepared ones promises it, and that all of it is launched on one
stream: on another one, what begins after a product that has waited is something else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ggufx.kernels.cuda import _launch
from ggufx.kernels.cuda._words import dot2_high, dot2_low, narrow

__all__ = [
    "EIGHTS",
    "EIGHTS32",
    "FLOAT",
    "NATURAL",
    "PAIR16",
    "PAIR32",
    "PAIR64",
    "QUARTERS",
    "STRIDED",
    "Fused",
    "Prepared",
    "constants",
    "dots2",
    "dots4",
    "linear",
    "more4",
    "no_header",
    "prepare",
    "quad",
]

NATURAL = tl.constexpr(0)
"""Word i of a unit's codes holds elements 4i to 4i + 3 of 32."""
PAIR16 = tl.constexpr(1)
"""Nibbles as they lie: elements j, j + 16, j + 1, j + 17 of 32."""
PAIR32 = tl.constexpr(2)
"""Sixteen elements of 64, and those 32 further on."""
PAIR64 = tl.constexpr(3)
"""Sixteen elements of 128, and those 64 further on."""
QUARTERS = tl.constexpr(4)
"""Eight elements of 128 (j, j + 4, j + 1, j + 5 and so on), and those 32, 64 and 96 further on."""
FLOAT = tl.constexpr(5)
"""As ``NATURAL``, but binary16."""
STRIDED = tl.constexpr(6)
"""Every fourth of 32 elements: the first four of these, the last four, then those one further on."""
EIGHTS = tl.constexpr(7)
"""Elements j, j + 4, j + 1, j + 5 and so on of every 8: nibbles of two neighbouring words, merged."""
EIGHTS32 = tl.constexpr(8)
"""Sixteen elements of 64, and those 32 further on, each as ``EIGHTS``."""

GROUP_LEN = 256
MAX_BATCH = 8
SHORT = 128
"""Units of a row up to which one step takes it all."""
MANY = 4096
"""Rows from which every multiprocessor has enough of them."""


# When a product waits for the kernels before it.
_NEVER, _FIRST, _BEFORE_ACTIVATIONS, _LAST = range(4)

Tuned = tuple[int, int, int, bool]


BATCHED: Tuned = (4, 128, 4, False)
"""As :attr:`Fused.tuned`, for several rows of activations."""
EXPERTS: Tuned = (4, 128, 2, False)
"""For experts with rows of at most 4096 elements."""
EXPERTS_SETTLED: Tuned = (4, 32, 1, False)
"""The same, for products that need not wait for their activations."""


@dataclass
class Prepared:
    """Activations as the fused kernels read them: for products on the stream that they were prepared on.

    Attributes
    ----------
    records
        int32 [P, G, 5, 8, 4], P the rows and what is missing to a power of two, G the groups of 256, 8 the units of a group:
        four times four pairs of 16-bit values, then the sums of the first and of the last 16 values of the unit, both
        together, and the float32 scale. All of a unit lies within 640 bytes, so one address serves five loads of 16 bytes.
    batch, row_len
        Rows, and activations in a row.
    order
        One of the orders above.
    dtype
        Of the activations: that of the product.
    settled
        Whether a product with them was launched: it waits for the preparation, the ones after it need not.
    """

    records: torch.Tensor
    batch: int
    row_len: int
    order: int
    dtype: torch.dtype
    settled: bool = False


class Fused(NamedTuple):
    """What a type brings to the product; see the module.

    Attributes
    ----------
    load, dot, header
        The functions of the module's text.
    order
        In which order ``dot`` wants its activations.
    layout
        (block_nbytes, header_nbytes), for the alignment of words.
    unit_nbytes
        Bytes of a unit on average, its share of the block's scales included.
    double
        Whether ``dot``, of one row of activations, may double its integer products to spare other instructions in short
        rows too: it pays in long ones.
    words, known
        32-bit words that ``dot`` gets a pointer to, and how many of them in registers.
    load_planes
        As ``load``, for codes and scales in separate planes: ``words`` points to a row's codes, ``header`` to its scales.
    tuned, tuned_planes
        (rows of a program, units of a step, warps, whether the next step's weights are loaded ahead), for few rows of at most
        4096 elements, for many, and for longer ones: measured, without and with planes.
    settled, settled_planes
        The first two of these for products that need not wait for their activations.
    """

    load: Any
    dot: Any
    header: Any
    order: int
    layout: tuple[int, int]
    unit_nbytes: float
    double: bool = False
    words: tuple[int, ...] = ()
    known: int = 0
    load_planes: Any = None
    tuned: tuple[Tuned, Tuned, Tuned] = ((2, 128, 4, False), (4, 128, 2, False), (4, 128, 4, False))
    tuned_planes: tuple[Tuned, Tuned, Tuned] | None = None
    settled: tuple[Tuned, Tuned] | None = None
    settled_planes: tuple[Tuned, Tuned] | None = None


@triton.jit
def _prepare(
    x, records, row_len, x_stride,
    ORDER: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    # As stored: quad of pairs, unit of the group, pair, half.
    at = tl.arange(0, 256)
    half = at % 2
    pair = (at // 2) % 4 + 4 * (at // 64)
    local = (at // 8) % 8
    word = pair // 2
    byte = 2 * (pair % 2) + half
    if ORDER == 1:
        element = 32 * local + 16 * (byte % 2) + 4 * (word // 2) + 2 * (word % 2) + byte // 2
    elif ORDER == 2:
        element = 64 * (local // 2) + 16 * (local % 2) + 32 * (word // 4) + 4 * (word % 4) + byte
    elif ORDER == 3:
        element = 128 * (local // 4) + 16 * (local % 4) + 64 * (word // 4) + 4 * (word % 4) + byte
    elif ORDER == 4:
        element = 128 * (local // 4) + 8 * (local % 4) + 32 * (word // 2) + 2 * (word % 2) + byte // 2 + 4 * (byte % 2)
    elif ORDER == 6:
        element = 32 * local + 16 * (word % 2) + 4 * byte + word // 2
    elif ORDER == 7:
        element = 32 * local + 8 * (word // 2) + 2 * (word % 2) + byte // 2 + 4 * (byte % 2)
    elif ORDER == 8:
        element = 64 * (local // 2) + 16 * (local % 2) + 32 * (word // 4) + 8 * (word // 2 % 2)
        element += 2 * (word % 2) + byte // 2 + 4 * (byte % 2)
    else:
        element = 32 * local + 4 * word + byte
    element += 256 * group
    if DEPENDENT:
        # Only after the wait may the next kernel start: it then sees all that was written before this one.
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + row * x_stride + element, element < row_len, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    # Zero, or NaN where a value is not finite (a maximum passes over NaN): the scale carries it into every product.
    poison = tl.sum(values * 0.0, 0)
    if ORDER == 5:
        # Under 16, so that four products with codes up to 448 stay within binary16.
        power = tl.maximum((largest.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 1e-30)
        scale = power * 0.125
        bits = (values * (8.0 / power)).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        total = bits * 0
    else:
        scale = largest / 32767.0
        inverse = tl.where(largest > 0.0, 32767.0 / tl.maximum(largest, 1e-35), 0.0)
        # 1.5 * 2^23 leaves the rounded integer in the low bits.
        total = (values * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        bits = total & 0xFFFF
    # Units past the end are zeros.
    record = records + (row * tl.num_programs(0) + group) * 160
    low, high = tl.split(tl.reshape(bits, (128, 2)))
    tl.store(record + tl.arange(0, 128), low | (high << 16))
    halves = tl.sum(tl.reshape(tl.sum(tl.reshape(total, (32, 8)), 1), (2, 2, 8)), 1)
    first, last = tl.split(tl.trans(halves))
    unit = record + 128 + 4 * tl.arange(0, 8)
    tl.store(unit, first)
    tl.store(unit + 1, last)
    tl.store(unit + 2, first + last)
    tl.store(unit + 3, tl.zeros((8,), tl.int32) + (scale + poison).to(tl.int32, bitcast=True))


@triton.jit
def dots4(x, FIRST: tl.constexpr, c0, c1, c2, c3, SIGNED: tl.constexpr):
    """Integer product of four words of codes with pairs ``2 * FIRST`` to ``2 * FIRST + 7``."""
    return more4(x, FIRST, c0, c1, c2, c3, (c0 * 0).to(tl.int32), SIGNED)


@triton.jit
def more4(x, FIRST: tl.constexpr, c0, c1, c2, c3, total, SIGNED: tl.constexpr):
    """As :func:`dots4`, added to ``total``."""
    a = dot2_low(x[2 * FIRST], c0, total, SIGNED)
    a = dot2_high(x[2 * FIRST + 1], c0, a, SIGNED)
    a = dot2_low(x[2 * FIRST + 2], c1, a, SIGNED)
    a = dot2_high(x[2 * FIRST + 3], c1, a, SIGNED)
    a = dot2_low(x[2 * FIRST + 4], c2, a, SIGNED)
    a = dot2_high(x[2 * FIRST + 5], c2, a, SIGNED)
    a = dot2_low(x[2 * FIRST + 6], c3, a, SIGNED)
    return dot2_high(x[2 * FIRST + 7], c3, a, SIGNED)


@triton.jit
def dots2(x, FIRST: tl.constexpr, c0, c1, SIGNED: tl.constexpr):
    """Integer product of two words of codes with pairs ``2 * FIRST`` to ``2 * FIRST + 3``."""
    a = dot2_low(x[2 * FIRST], c0, (c0 * 0).to(tl.int32), SIGNED)
    a = dot2_high(x[2 * FIRST + 1], c0, a, SIGNED)
    a = dot2_low(x[2 * FIRST + 2], c1, a, SIGNED)
    return dot2_high(x[2 * FIRST + 3], c1, a, SIGNED)


@triton.jit
def no_header(words, header):
    """Scale of rows without a header."""
    return 1.0


@triton.jit
def constants(points, positive, COUNT: tl.constexpr, TOUCH: tl.constexpr, T: tl.constexpr):
    """Return ``points`` and its first ``COUNT`` words, in registers of every lane.

    Loaded, and by an address that looks as if it were the lane's own: a number, or anything equal in all lanes, the compiler
    keeps in a uniform register and copies before every permute. ``positive`` is any number of the launch that is not negative.
    """
    lane = tl.arange(0, T)
    same = (lane - (1 << 30) > positive).to(tl.int32)
    if TOUCH:
        # Larger tables: every lane asks for 16 bytes now, so that they are in the first-level cache when codes arrive.
        same = (lane - (1 << 30) > positive + tl.load(points + lane * 4 % TOUCH) % 2).to(tl.int32)
    words = (points,)
    for i in tl.static_range(COUNT):
        words = words + (tl.load(points + same + i).to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def quad(pointer, at, mask, T: tl.constexpr):
    """Return four words that lie together, number ``at`` of such: one 16-byte load a lane."""
    four = tl.load(
        pointer + at[:, None] * 4 + tl.arange(0, 4)[None, :], tl.broadcast_to(mask[:, None], (T, 4)), other=0
    )
    even, odd = tl.split(tl.reshape(four.to(tl.uint32, bitcast=True), (T, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _activations(record, unit, mask, T: tl.constexpr):
    at = unit // 8 * 40 + unit % 8
    x = quad(record, at, mask, T) + quad(record, at + 8, mask, T) + quad(record, at + 16, mask, T)
    x = x + quad(record, at + 24, mask, T)
    first, last, both, scale = quad(record, at + 32, mask, T)
    sums = (first.to(tl.int32, bitcast=True), last.to(tl.int32, bitcast=True), both.to(tl.int32, bitcast=True))
    return x, sums, scale.to(tl.float32, bitcast=True)


@triton.jit
def _row(
    data, side, row, row_nbytes, side_nbytes,
    LEAD: tl.constexpr, HEADER_NBYTES: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    # Pointer to the word in which a row begins, where its first block begins from there, and its header.
    start = row * row_nbytes + LEAD
    words = (data - LEAD).to(tl.pointer_type(tl.uint32)) + (start >> 2)
    odd = (start & 3).to(tl.int32)
    if PLANES:
        return words, odd, side + row * side_nbytes
    else:
        return words, odd + HEADER_NBYTES, odd


@triton.jit
def _linear(
    records, data, side, points, ids, out, row_nbytes, side_nbytes, n_rows, n_units, n_groups, n_batch, per_token,
    n_experts,
    PLANES: tl.constexpr, LOAD: tl.constexpr, DOT: tl.constexpr, HEADER: tl.constexpr,
    COUNT: tl.constexpr, TOUCH: tl.constexpr, HEADER_NBYTES: tl.constexpr,
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr, SIDE_STEP: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, BATCH: tl.constexpr, SINGLE: tl.constexpr, FULL: tl.constexpr,
    DOUBLE: tl.constexpr, EXPERTS: tl.constexpr, WAIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if WAIT == 1:
        gdc_wait()
        gdc_launch_dependents()
    elif WAIT == 3:
        gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    lane = tl.arange(0, T)
    base = tl.zeros((), tl.int64)
    token = tl.zeros((), tl.int64)
    unknown = 0.0
    if EXPERTS:
        # There is no one to raise an error here: what a number names that is no expert's is NaN, and nobody's memory.
        expert = tl.load(ids + tl.program_id(1))
        named = (expert >= 0) & (expert < n_experts)
        unknown = tl.where(named, 0.0, float("nan"))
        base = tl.where(named, expert, 0).to(tl.int64) * n_rows
        token += tl.program_id(1) // per_token
    # Rows past the end are read as the last one, and not stored.
    w0, r0, h0 = _row(data, side, base + first, row_nbytes, side_nbytes, LEAD, HEADER_NBYTES, PLANES)
    w1, r1, h1 = w0, r0, h0
    w2, r2, h2 = w0, r0, h0
    w3, r3, h3 = w0, r0, h0
    if ROWS > 1:
        row = base + tl.minimum(first + 1, n_rows - 1)
        w1, r1, h1 = _row(data, side, row, row_nbytes, side_nbytes, LEAD, HEADER_NBYTES, PLANES)
    if ROWS > 2:
        row = base + tl.minimum(first + 2, n_rows - 1)
        w2, r2, h2 = _row(data, side, row, row_nbytes, side_nbytes, LEAD, HEADER_NBYTES, PLANES)
        row = base + tl.minimum(first + 3, n_rows - 1)
        w3, r3, h3 = _row(data, side, row, row_nbytes, side_nbytes, LEAD, HEADER_NBYTES, PLANES)
    # A constant mask leaves no predicate, and no zeros to put before a load.
    always = tl.full((T,), 1, tl.int1)
    mask = always
    if not FULL:
        mask = lane < n_units
    raw0 = LOAD(w0, h0, r0, lane, mask, EVEN, ALIGNED)
    raw1, raw2, raw3 = raw0, raw0, raw0
    if ROWS > 1:
        raw1 = LOAD(w1, h1, r1, lane, mask, EVEN, ALIGNED)
    if ROWS > 2:
        raw2 = LOAD(w2, h2, r2, lane, mask, EVEN, ALIGNED)
        raw3 = LOAD(w3, h3, r3, lane, mask, EVEN, ALIGNED)
    known = constants(points, n_rows, COUNT, TOUCH, T)
    d0 = HEADER(w0, h0)
    d1, d2, d3 = d0, d0, d0
    if ROWS > 1:
        d1 = HEADER(w1, h1)
    if ROWS > 2:
        d2 = HEADER(w2, h2)
        d3 = HEADER(w3, h3)
    if WAIT == 2:
        # Not sooner: what begins before these activations are complete would take them for settled.
        gdc_wait()
        gdc_launch_dependents()
    zero = tl.zeros((T,), tl.float32) + unknown
    acc = (zero,) * (ROWS * BATCH)
    record = records + token * (n_groups * 160)
    if SINGLE:
        acc = _step(acc, raw0, raw1, raw2, raw3, record, known, n_groups, lane, mask, DOT, ROWS, T, BATCH, DOUBLE)
    else:
        for begin in range(0, n_units, T):
            # Where a lane's unit lies within its step never changes: only the pointers move on.
            w0 += STEP
            w1 += STEP
            w2 += STEP
            w3 += STEP
            if PLANES:
                h0 += SIDE_STEP
                h1 += SIDE_STEP
                h2 += SIDE_STEP
                h3 += SIDE_STEP
            if AHEAD:
                # The next weights are on their way while these are multiplied. After the last step the row's first ones come
                # once more.
                last = begin + T >= n_units
                more = always
                if not FULL:
                    more = lane < tl.where(last, n_units, n_units - begin - T)
                back = tl.where(last, begin // T + 1, 0).to(tl.int64)
                next0 = LOAD(w0 - back * STEP, _back(h0, back, SIDE_STEP, PLANES), r0, lane, more, EVEN, ALIGNED)
                next1, next2, next3 = next0, next0, next0
                if ROWS > 1:
                    next1 = LOAD(w1 - back * STEP, _back(h1, back, SIDE_STEP, PLANES), r1, lane, more, EVEN, ALIGNED)
                if ROWS > 2:
                    next2 = LOAD(w2 - back * STEP, _back(h2, back, SIDE_STEP, PLANES), r2, lane, more, EVEN, ALIGNED)
                    next3 = LOAD(w3 - back * STEP, _back(h3, back, SIDE_STEP, PLANES), r3, lane, more, EVEN, ALIGNED)
                if not FULL:
                    mask = lane < n_units - begin
                acc = _step(
                    acc, raw0, raw1, raw2, raw3, record, known, n_groups, lane, mask, DOT, ROWS, T, BATCH, DOUBLE
                )
                raw0, raw1, raw2, raw3 = next0, next1, next2, next3
            else:
                if not FULL:
                    mask = lane < n_units - begin
                side0, side1, side2, side3 = h0, h1, h2, h3
                if PLANES:
                    side0, side1, side2, side3 = h0 - SIDE_STEP, h1 - SIDE_STEP, h2 - SIDE_STEP, h3 - SIDE_STEP
                raw0 = LOAD(w0 - STEP, side0, r0, lane, mask, EVEN, ALIGNED)
                raw1, raw2, raw3 = raw0, raw0, raw0
                if ROWS > 1:
                    raw1 = LOAD(w1 - STEP, side1, r1, lane, mask, EVEN, ALIGNED)
                if ROWS > 2:
                    raw2 = LOAD(w2 - STEP, side2, r2, lane, mask, EVEN, ALIGNED)
                    raw3 = LOAD(w3 - STEP, side3, r3, lane, mask, EVEN, ALIGNED)
                acc = _step(
                    acc, raw0, raw1, raw2, raw3, record, known, n_groups, lane, mask, DOT, ROWS, T, BATCH, DOUBLE
                )
            record += T // 8 * 160
    scaled = ()
    for b in tl.static_range(BATCH):
        scaled = scaled + (acc[b * ROWS] * d0,)
        if ROWS > 1:
            scaled = scaled + (acc[b * ROWS + 1] * d1,)
        if ROWS > 2:
            scaled = scaled + (acc[b * ROWS + 2] * d2, acc[b * ROWS + 3] * d3)
    target = out + tl.program_id(1).to(tl.int64) * n_rows + first
    if WAIT == 3:
        gdc_wait()
    if ROWS * BATCH == 1:
        tl.store(target, narrow(tl.sum(scaled[0], 0), out.dtype.element_ty))
    else:
        # All sums cross the lanes together. A join's new axis is the last: the first join tells the halves apart.
        joined = _join(scaled, ROWS * BATCH)
        total = tl.sum(tl.reshape(joined, (T, ROWS * BATCH)), 0)
        number = tl.arange(0, ROWS * BATCH)
        place = number // ROWS * n_rows + number % ROWS
        exists = (first + number % ROWS < n_rows) & (number // ROWS < n_batch)
        tl.store(target + place, narrow(total, out.dtype.element_ty), exists)


@triton.jit
def _back(header, back, SIDE_STEP: tl.constexpr, PLANES: tl.constexpr):
    if PLANES:
        return header - back * SIDE_STEP
    else:
        return header


@triton.jit
def _halve(parts, HALF: tl.constexpr):
    new = ()
    for i in tl.static_range(HALF):
        new = new + (tl.join(parts[i], parts[i + HALF]),)
    return new


@triton.jit
def _join(parts, COUNT: tl.constexpr):
    # COUNT, a power of two, tensors [T] to one [T, 2, 2, ...].
    if COUNT >= 32:
        parts = _halve(parts, 16)
    if COUNT >= 16:
        parts = _halve(parts, 8)
    if COUNT >= 8:
        parts = _halve(parts, 4)
    if COUNT >= 4:
        parts = _halve(parts, 2)
    return _halve(parts, 1)[0]


@triton.jit
def _step(
    acc, raw0, raw1, raw2, raw3, record, known, n_groups, unit, mask,
    DOT: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, BATCH: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    new = ()
    for b in tl.static_range(BATCH):
        x, h, scale = _activations(record + b * (n_groups * 160), unit, mask, T)
        new = new + (acc[b * ROWS] + DOT(raw0, x, h, known, DOUBLE) * scale,)
        if ROWS > 1:
            new = new + (acc[b * ROWS + 1] + DOT(raw1, x, h, known, DOUBLE) * scale,)
        if ROWS > 2:
            new = new + (acc[b * ROWS + 2] + DOT(raw2, x, h, known, DOUBLE) * scale,)
            new = new + (acc[b * ROWS + 3] + DOT(raw3, x, h, known, DOUBLE) * scale,)
    return new


@cache
def _dependent(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def prepare(x: torch.Tensor, order: int) -> Prepared:
    """Turn activations, float [B, row_len], into what the fused kernels of ``order`` read.

    ``row_len`` is a multiple of 32, and of 128 or 256 where the type's blocks are. The same result serves every matrix of
    that order.
    """
    batch, row_len = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    n_groups = triton.cdiv(row_len, GROUP_LEN)
    # A kernel multiplies 1, 2, 4 or 8 rows; what it makes of rows that do not exist is not stored.
    padded = triton.next_power_of_2(batch) if batch else 0
    records = torch.empty((padded, n_groups, 5, 8, 4), dtype=torch.int32, device=x.device)
    dependent = _dependent(x.device)
    if batch and row_len:
        with _launch.on(x.device):
            _prepare[(n_groups, batch)](
                x, records, row_len, x.stride(0),
                ORDER=order, DEPENDENT=dependent,
                **_launch.options(num_warps=1, launch_pdl=dependent, enable_fp_fusion=False),
            )  # fmt: skip
    return Prepared(records, batch, row_len, order, x.dtype)


def linear(
    fused: Fused,
    x: torch.Tensor | Prepared,
    rows: torch.Tensor,
    out: torch.Tensor,
    *,
    planes: tuple[torch.Tensor, ...] | None = None,
    ids: torch.Tensor | None = None,
    settled: bool = False,
    tuned: Tuned | None = None,
) -> None:
    """Fill ``out`` with ``x @ decode(rows).T``.

    Parameters
    ----------
    fused
        The type's part.
    x
        float [B, row_len], B at most 8 without ``ids``; or :func:`prepare`'s result in the type's order.
    rows
        uint8 [R, row_nbytes], or [E, R, row_nbytes] with ``ids``; contiguous.
    out
        float [B, R], or [B, K, R] with ``ids``; contiguous.
    planes
        What the type's ``split`` gives: read instead of ``rows``.
    ids
        int32 or int64 [B, K]: which experts each row of x is multiplied with; NaN comes of a number that is no expert's.
    settled
        Promises that ``ids`` were written before x was prepared: they may then be read while the kernel before still runs.
    tuned
        Overrides the type's measured choice.
    """
    if out.numel() == 0:
        return
    if ids is None and out.shape[0] > MAX_BATCH:
        raise ValueError(f"a fused product takes at most {MAX_BATCH} rows of activations, got {out.shape[0]}")
    prepared = prepare(x, int(fused.order)) if isinstance(x, torch.Tensor) else x
    # Expert numbers may come from the kernel just before; after our own preparation they cannot.
    early = ids is None or settled or isinstance(x, torch.Tensor)
    if prepared.order != fused.order:
        raise ValueError(f"activations prepared in order {prepared.order}, this type reads order {fused.order}")
    n_units, n_groups = prepared.row_len // 32, prepared.records.shape[1]
    if n_units == 0:
        out.zero_()
        return
    batch = prepared.batch
    data, side = rows, rows
    if planes is not None and planes[0].data_ptr() % 16 == 0 and planes[0].shape[-1] % 16 == 0:
        data, side = planes[:2]
    n_rows, row_nbytes = data.shape[-2:]
    width = 1 if ids is not None else prepared.records.shape[0]
    if width == MAX_BATCH and n_units > SHORT:
        # Of long rows so many activations come by that two times four are faster (measured).
        for part in (slice(0, MAX_BATCH // 2), slice(MAX_BATCH // 2, batch)):
            half = replace(
                prepared, records=prepared.records[part.start :][: MAX_BATCH // 2], batch=part.stop - part.start
            )
            linear(fused, half, rows, out[part], planes=planes, tuned=tuned)
            prepared.settled = True
        return
    chosen = fused.tuned_planes or fused.tuned if side is not data else fused.tuned
    settled_ones = (fused.settled_planes if side is not data else fused.settled) or chosen
    if n_units > SHORT:
        best = chosen[2] if width == 1 else BATCHED
    elif ids is not None:
        best = EXPERTS_SETTLED if prepared.settled else EXPERTS
    elif width > 1:
        best = BATCHED
    else:
        best = (settled_ones if prepared.settled else chosen)[n_rows >= MANY]
    n_per_program, units, warps, ahead = tuned or best
    lead = _launch.lead_of(data)
    steps = (lead, row_nbytes, *fused.layout)
    dependent = _dependent(rows.device)
    wait = _NEVER if not dependent else _FIRST if not early else _LAST if prepared.settled else _BEFORE_ACTIVATIONS
    per_token = 1 if ids is None else ids.shape[1]
    none = prepared.records
    with _launch.on(rows.device):
        _linear[(triton.cdiv(n_rows, n_per_program), 1 if ids is None else batch * per_token)](
            prepared.records,
            data,
            side,
            _launch.table(fused.words, rows.device) if fused.words else none,
            none if ids is None else ids,
            out,
            row_nbytes,
            side.shape[-1],
            n_rows,
            n_units,
            n_groups,
            batch if ids is None else 1,
            per_token,
            1 if ids is None else data.shape[0],
            PLANES=side is not data,
            LOAD=fused.load if side is data else fused.load_planes,
            DOT=fused.dot,
            HEADER=fused.header,
            COUNT=fused.known,
            TOUCH=len(fused.words) if len(fused.words) > fused.known else 0,
            HEADER_NBYTES=fused.layout[1],
            LEAD=lead,
            EVEN=all(step % 2 == 0 for step in steps),
            # Sixteen where a lane's words may come in one load.
            ALIGNED=16 if all(step % 16 == 0 for step in (data.data_ptr(), *steps)) else all(s % 4 == 0 for s in steps),
            # Words and bytes that a step of T units takes of a row.
            STEP=(units * 32 if side is not data else int(units * fused.unit_nbytes)) // 4,
            SIDE_STEP=units // 4,
            ROWS=n_per_program,
            T=units,
            BATCH=width,
            SINGLE=n_units <= units,
            FULL=n_units % units == 0,
            DOUBLE=width == 1 and (fused.double or n_units > units),
            AHEAD=ahead,
            EXPERTS=ids is not None,
            WAIT=wait,
            # Said, as Triton 3.10 will not fuse by itself.
            **_launch.options(num_warps=warps, launch_pdl=dependent, enable_fp_fusion=True),
        )
    # Only now: a launch that failed did not wait.
    prepared.settled = True
