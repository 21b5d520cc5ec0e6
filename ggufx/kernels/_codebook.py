"""Search of the codebook encoders: integer scales under one shared scale, codes into a table that may be shifted.

A *group* (a row, or 256 elements) shares one real scale ``D``; each of its sub-blocks has a legal integer scale ``s`` and a
flag that picks the table or its shifted twin. Three stages, candidates always in vector lanes:

1. per sub-block, real scales of both signs and both tables: sums ``S1 = sum w v x`` and ``S2 = sum w v v`` of the nearest
   codes. Such a pair is a parabola, the error under any other scale with these codes.
2. ``D`` from many values by the parabolas alone, no element is touched.
3. under that ``D``, exact sums for windows of legal scales round the optima. They are parabolas again, so choosing scales
   and refitting ``D`` alternate for free. ``D`` is rounded as stored before scales and codes are chosen for the last time.

Everything is done in float32 lanes whose order is fixed, so the bytes depend on neither CPU nor threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ggufx.kernels._jit import bits_to_float, float_to_bits, float_to_half, half_to_float, kernel

__all__ = ["codebook_search", "inline", "store_planes"]

_LANES = 64
_MAGIC = float(3 << 22)


def midpoints(table):
    return tuple((a + b) / 2 for a, b in zip(table[:-1], table[1:], strict=True))


def _splat(builder: Any, value: Any, count: int) -> Any:
    kind, i32 = ir.VectorType(value.type, count), ir.IntType(32)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(i32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(i32, count), [0] * count))


def lane_sums(table: tuple[int, ...], lanes: int, *, staged: bool) -> Any:
    """Return an intrinsic: nearest table entries of ``n`` elements under ``lanes`` inverse scales at a time.

    ``sums(x, wx, w, start, n, inverse, shift, at, s1, s2, to)`` sets, for lane ``l``,
    ``s1[to + l] = sum wx v`` and ``s2[to + l] = sum w v v`` over elements ``start .. start + n``, where ``v`` is the entry of
    ``table + shift[at + l]`` nearest to ``x * inverse[at + l]``. Sums run in order of elements, lane by lane: the bits do not
    depend on the CPU's vector width. ``n`` is a multiple of ``64 // lanes``.

    ``staged``: products are rounded to signed bytes first and compared as bytes; up to half a unit of the table is lost
    in the comparison, never in the sums.
    """
    unroll = _LANES // lanes
    f32, i8, i32 = ir.FloatType(), ir.IntType(8), ir.IntType(32)
    floats = ir.VectorType(f32, lanes)
    mids = midpoints(table)
    steps = [b - a for a, b in zip(table[:-1], table[1:], strict=True)]

    def constant(kind: Any, count: int, value: float) -> Any:
        return ir.Constant(ir.VectorType(kind, count), [value] * count)

    @intrinsic
    def sums(typing_context, x, wx, w, start, n, inverse, shift, at, s1, s2, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def data(i: int) -> Any:
                return context.make_array(signature.args[i])(context, builder, args[i]).data

            def vector(i: int, index: Any) -> Any:
                return builder.bitcast(builder.gep(data(i), [index]), floats.as_pointer())

            def join(parts: list[Any]) -> Any:
                while len(parts) > 1:
                    count = parts[0].type.count
                    mask = ir.Constant(ir.VectorType(i32, 2 * count), list(range(2 * count)))
                    parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2], strict=True)]
                return parts[0]

            inv = builder.load(vector(5, args[7]), align=4)
            off = builder.load(vector(6, args[7]), align=4)
            zero = constant(f32, lanes, 0.0)
            acc1 = cgutils.alloca_once_value(builder, zero)
            acc2 = cgutils.alloca_once_value(builder, zero)
            builder.store(zero, acc1)
            builder.store(zero, acc2)
            if staged:
                bias = builder.fsub(constant(f32, lanes, _MAGIC), off)
                low, high = constant(f32, lanes, _MAGIC - 128), constant(f32, lanes, _MAGIC + 127)
                off8 = builder.fptosi(off, ir.VectorType(i8, lanes))
                off8 = join([off8] * unroll)
            xs, wxs, ws = data(0), data(1), data(2)
            step = ir.Constant(args[4].type, unroll)
            with cgutils.for_range(builder, builder.sdiv(args[4], step), intp=args[4].type) as loop:
                first = builder.add(args[3], builder.mul(loop.index, step))
                at_u = [builder.add(first, ir.Constant(first.type, u)) for u in range(unroll)]
                scaled = [builder.fmul(_splat(builder, builder.load(builder.gep(xs, [i])), lanes), inv) for i in at_u]
                if staged:
                    parts = []
                    for z in scaled:
                        z = builder.fadd(z, bias)
                        z = builder.select(builder.fcmp_ordered(">", z, low), z, low)
                        z = builder.select(builder.fcmp_ordered("<", z, high), z, high)
                        parts.append(
                            builder.trunc(
                                builder.bitcast(z, ir.VectorType(i32, lanes)),
                                ir.VectorType(i8, lanes),
                            )
                        )
                    codes = join(parts)
                    value = builder.add(off8, constant(i8, _LANES, table[0]))
                    for mid, jump in zip(mids, steps, strict=True):
                        above = builder.icmp_signed(">", codes, constant(i8, _LANES, int(np.floor(mid))))
                        value = builder.select(above, builder.add(value, constant(i8, _LANES, jump)), value)
                    values = []
                    for u in range(unroll):
                        mask = ir.Constant(ir.VectorType(i32, lanes), list(range(u * lanes, (u + 1) * lanes)))
                        part = value if unroll == 1 else builder.shuffle_vector(value, value, mask)
                        values.append(builder.sitofp(builder.sext(part, ir.VectorType(i32, lanes)), floats))
                else:
                    values = []
                    for z in scaled:
                        z = builder.fsub(z, off)
                        v = builder.fadd(off, constant(f32, lanes, float(table[0])))
                        for mid, jump in zip(mids, steps, strict=True):
                            above = builder.fcmp_ordered(">", z, constant(f32, lanes, mid))
                            v = builder.select(above, builder.fadd(v, constant(f32, lanes, float(jump))), v)
                        values.append(v)
                sum1, sum2 = builder.load(acc1), builder.load(acc2)
                for i, v in zip(at_u, values, strict=True):
                    wx_i = _splat(builder, builder.load(builder.gep(wxs, [i])), lanes)
                    w_i = _splat(builder, builder.load(builder.gep(ws, [i])), lanes)
                    sum1 = builder.fadd(sum1, builder.fmul(wx_i, v))
                    sum2 = builder.fadd(sum2, builder.fmul(builder.fmul(w_i, v), v))
                builder.store(sum1, acc1)
                builder.store(sum2, acc2)
            builder.store(builder.load(acc1), vector(8, args[10]), align=4)
            builder.store(builder.load(acc2), vector(9, args[10]), align=4)
            return context.get_dummy_value()

        return types.void(
            x, wx, w, types.intp, types.intp, inverse, shift, types.intp, s1, s2, types.intp
        ), codegen

    return sums


def pick_lane(lanes: int) -> Any:
    """Return an intrinsic: the lane whose legal scale has the least error.

    ``pick(s, s1, s2, at, d, energy)`` minimises ``d s (d s S2 - 2 S1) + energy`` over ``s[at + l]``, ``s1[at + l]``,
    ``s2[at + l]``. The error is not negative, so its bits sort as integers: the lane's number replaces the low ones.
    """
    f32, i32 = ir.FloatType(), ir.IntType(32)
    floats, ints = ir.VectorType(f32, lanes), ir.VectorType(i32, lanes)

    @intrinsic
    def pick(typing_context, s, s1, s2, at, d, energy):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def load(i: int) -> Any:
                array = context.make_array(signature.args[i])(context, builder, args[i])
                pointer = builder.bitcast(builder.gep(array.data, [args[3]]), floats.as_pointer())
                return builder.load(pointer, align=4)

            scale = builder.fmul(load(0), _splat(builder, args[4], lanes))
            s1_, s2_ = load(1), load(2)
            error = builder.fsub(builder.fmul(scale, s2_), builder.fadd(s1_, s1_))
            error = builder.fadd(builder.fmul(scale, error), _splat(builder, args[5], lanes))
            zero = ir.Constant(floats, [0.0] * lanes)
            error = builder.select(builder.fcmp_ordered(">", error, zero), error, zero)
            key = builder.and_(builder.bitcast(error, ints), ir.Constant(ints, [-lanes] * lanes))
            key = builder.or_(key, ir.Constant(ints, list(range(lanes))))
            count = lanes
            while count > 1:
                count //= 2
                lower, upper = (
                    builder.shuffle_vector(
                        key, key, ir.Constant(ir.VectorType(i32, count), list(range(base, base + count)))
                    )
                    for base in (0, count)
                )
                key = builder.select(builder.icmp_signed("<", lower, upper), lower, upper)
            least = builder.extract_element(key, ir.Constant(i32, 0))
            return builder.sext(builder.and_(least, ir.Constant(i32, lanes - 1)), ir.IntType(64))

        return types.intp(s, s1, s2, types.intp, types.float32, types.float32), codegen

    return pick


def nearest_codes(table: tuple[int, ...]) -> Any:
    """Return an intrinsic: ``nearest16(x, at, inverse, shift, codes, to)``, 16 exact codes of ``x * inverse - shift``."""
    floats, ints = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
    octets = ir.VectorType(ir.IntType(8), 16)

    @intrinsic
    def nearest16(typing_context, x, at, inverse, shift, codes, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source = context.make_array(signature.args[0])(context, builder, args[0]).data
            target = context.make_array(signature.args[4])(context, builder, args[4]).data
            value = builder.load(builder.bitcast(builder.gep(source, [args[1]]), floats.as_pointer()), align=4)
            value = builder.fmul(value, _splat(builder, args[2], 16))
            value = builder.fsub(value, _splat(builder, args[3], 16))
            code = ir.Constant(ints, [0] * 16)
            for mid in midpoints(table):
                above = builder.fcmp_ordered(">", value, ir.Constant(floats, [mid] * 16))
                code = builder.add(code, builder.zext(above, ints))
            where = builder.bitcast(builder.gep(target, [args[5]]), octets.as_pointer())
            builder.store(builder.trunc(code, octets), where, align=1)
            return context.get_dummy_value()

        return types.void(x, types.intp, types.float32, types.float32, codes, types.intp), codegen

    return nearest16


def inline(function: Any) -> Any:
    return numba.njit(nogil=True, forceinline=True)(function)


@inline
def _total(terms, count):
    """Sum ``terms[:count]`` (a power of two) by halving, in place: in lanes, and the same on every CPU."""
    while count > 1:
        count //= 2
        for i in range(count):
            terms[i] += terms[count + i]
    return terms[0]


@inline
def _exponent_scale(bits):
    """Return the power of two that brings a float of these bits near 1, and its inverse."""
    field = min(max(bits >> np.uint32(23), np.uint32(1)), np.uint32(253))
    return bits_to_float((np.uint32(254) - field) << np.uint32(23)), bits_to_float(field << np.uint32(23))


@inline
def store_planes(codes, at, count, n_bits, shift, run, out, start):
    """Pack ``n_bits`` bits at ``shift`` of codes: runs of ``run`` bytes, first the lowest bits of each byte of a run."""
    per_byte = 8 // n_bits
    mask = (1 << n_bits) - 1
    for first in range(0, count, run * per_byte):
        to = start + first // per_byte
        for j in range(run):
            out[to + j] = (codes[at + first + j] >> shift) & mask
        for p in range(1, per_byte):
            source = at + first + p * run
            for j in range(run):
                out[to + j] |= ((codes[source + j] >> shift) & mask) << (p * n_bits)


def codebook_search(
    table: tuple[int, ...],
    *,
    shift: int,
    sub_len: int,
    low: int,
    step: int,
    count: int,
    whole_row: bool,
    half: bool,
    sigma: float,
    plain: float,
    starts: tuple[float, float],
    staged: bool,
    store: Any,
) -> Any:
    """Return the search kernel of one type.

    Parameters
    ----------
    table, shift
        Codebook, and what its twin adds.
    sub_len, low, step, count
        Elements per scale; legal scales are ``low + step * i`` for ``i < count``.
    whole_row, half
        Whether ``D`` belongs to the row (else to 256 elements) and is stored as binary16 (else float32).
    sigma, plain
        Reference weights: ``m sqrt(sigma mean + x^2)``, or ``plain sigma mean + x^2`` without importance, where ``mean``
        is the mean of ``x^2`` over 256 elements.
    starts
        Range of the table's units that the largest element of a sub-block may take.
    staged
        Whether the search compares bytes; see :func:`lane_sums`.
    store
        ``store(row, group, d_bits, scales, flags, codes)`` writes the bytes of a group.
    """
    sums16 = lane_sums(table, 16, staged=staged)
    sums64 = lane_sums(table, 64, staged=staged)
    pick = pick_lane(64)
    nearest16 = nearest_codes(table)
    first, last = np.float32(low), np.float32(low + step * (count - 1))
    extreme = np.float32(max(abs(low), abs(low + step * (count - 1))))
    f_low, f_step, f_top = np.float32(low), np.float32(step), np.float32(count - 1)
    f_shift = np.float32(shift)
    magic = np.float32(_MAGIC)
    sigma32, plain32 = np.float32(sigma), np.float32(plain * sigma)
    start_low, start_high = np.float32(starts[0]), np.float32(starts[1])
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    huge = np.float32(3e38)
    ceiling = np.float32(65504) if half else np.float32(3.4e38 / 127 / 127)
    floor = np.float32(2.0**-24) if half else np.float32(2.0**-126)
    zero_index = -low // step if step == 1 else count // 2

    @inline
    def stored(d, up, down):
        """Round D as the file stores it, never to zero or infinity; D is in normalised units."""
        value = d * up
        size = min(max(abs(value), floor), ceiling)
        if half:
            size = half_to_float(float_to_half(size))
        return (-size if value < zero else size) * down

    @inline
    def weigh(values, offset, length, unit, importance, at, mse, x, w, wx, terms):
        """Normalise a group, and fill its weights: those of the reference, or the importance."""
        for i in range(length):
            x[i] = values[offset + i] * unit
        weighted = importance.shape[0] > 0
        for b in range(length // 256):
            begin = b * 256
            for i in range(256):
                terms[i] = x[begin + i] * x[begin + i]
            mean = _total(terms, 256) * np.float32(1 / 256)
            if weighted:
                if mse:
                    for i in range(begin, begin + 256):
                        w[i] = importance[at + i]
                else:
                    for i in range(begin, begin + 256):
                        w[i] = importance[at + i] * np.sqrt(sigma32 * mean + x[i] * x[i])
            elif mse:
                for i in range(begin, begin + 256):
                    w[i] = one
            else:
                for i in range(begin, begin + 256):
                    w[i] = plain32 * mean + x[i] * x[i]
        for i in range(length):
            wx[i] = w[i] * x[i]

    @inline
    def model(n_sub, per, scale, s2, energy, d, inverse_d, least, cost):
        """Cost of every D in ``d``: per sub-block the least over its parabolas, each at its own best legal scale."""
        n = d.shape[0]
        for j in range(n):
            cost[j] = zero
        for k in range(n_sub):
            for j in range(n):
                least[j] = huge
            for p in range(k * per, (k + 1) * per):
                centre, curve, explained = scale[p], s2[p], energy[p]
                for j in range(n):
                    index = (centre * inverse_d[j] - f_low) / f_step
                    index = min(max(index, zero), f_top)
                    index = (index + magic) - magic
                    off = d[j] * (f_low + f_step * index) - centre
                    value = curve * off * off - explained
                    least[j] = value if value < least[j] else least[j]
            for j in range(n):
                cost[j] += least[j]

    @kernel
    def search(values, out, importance, mse, n_starts, n_values, span, window, refits):
        row_len = values.shape[1]
        length = row_len if whole_row else 256
        n_sub = length // sub_len
        lanes = 4 * n_starts
        width = np.float32(span)
        x, w, wx = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
        terms = np.empty(256, np.float32)
        inverse, shifts, legal = np.empty(64, np.float32), np.empty(64, np.float32), np.empty(64, np.float32)
        sum1, sum2 = np.empty(64 * n_sub, np.float32), np.empty(64 * n_sub, np.float32)
        legals = np.empty(64 * n_sub, np.float32)
        units, unit_shifts = np.empty(64, np.float32), np.empty(64, np.float32)
        scale, curve, energy = (
            np.empty(4 * n_sub, np.float32),
            np.empty(4 * n_sub, np.float32),
            np.empty(4 * n_sub, np.float32),
        )
        total = np.empty(n_sub, np.float32)
        d_try, d_inverse = np.empty(n_values, np.float32), np.empty(n_values, np.float32)
        least, cost = np.empty(n_values, np.float32), np.empty(n_values, np.float32)
        scales, flags = np.empty(n_sub, np.int32), np.empty(n_sub, np.uint8)
        chosen = np.empty(n_sub, np.int64)
        codes = np.empty(length, np.uint8)
        for lane in range(lanes):
            # Lanes: table, table with -inverse, twin, twin with -inverse; n_starts each.
            kind = lane // n_starts
            t = start_low + (start_high - start_low) * np.float32(lane % n_starts) / np.float32(max(1, n_starts - 1))
            units[lane] = -t if kind & 1 else t
            unit_shifts[lane] = f_shift if kind & 2 else zero
        for r in range(values.shape[0]):
            row = values[r]
            for g in range(row_len // length):
                offset = g * length
                top = np.uint32(0)
                for i in range(offset, offset + length):
                    magnitude = float_to_bits(row[i]) & np.uint32(0x7FFFFFFF)
                    top = magnitude if magnitude > top else top
                if top == np.uint32(0):
                    for k in range(n_sub):
                        scales[k], flags[k] = zero_index, 0
                    codes[:] = 0
                    store(out[r], g, np.uint32(0), scales, flags, codes)
                    continue
                down, up = _exponent_scale(top)
                weigh(row, offset, length, down, importance, offset, mse, x, w, wx, terms)
                # 1: parabolas of real scales.
                widest = zero
                for k in range(n_sub):
                    begin = k * sub_len
                    biggest = np.uint32(0)
                    for i in range(begin, begin + sub_len):
                        magnitude = float_to_bits(x[i]) & np.uint32(0x7FFFFFFF)
                        biggest = magnitude if magnitude > biggest else biggest
                    for i in range(sub_len):
                        terms[i] = wx[begin + i] * x[begin + i]
                    total[k] = _total(terms, sub_len)
                    amax = bits_to_float(biggest)
                    back = one / amax if amax > np.float32(1e-30) else zero
                    for lane in range(lanes):
                        inverse[lane] = units[lane] * back
                    if lanes == 64:
                        sums64(x, wx, w, begin, sub_len, inverse, unit_shifts, 0, sum1, sum2, 0)
                    else:
                        for at in range(0, lanes, 16):
                            sums16(x, wx, w, begin, sub_len, inverse, unit_shifts, at, sum1, sum2, at)
                    for kind in range(4):
                        p = 4 * k + kind
                        scale[p], curve[p], energy[p] = zero, zero, zero
                        for lane in range(kind * n_starts, (kind + 1) * n_starts):
                            s1, s2 = sum1[lane], sum2[lane]
                            # Comparing explained energies without dividing by each S2.
                            if s2 > zero and s1 * s1 > energy[p] * s2:
                                scale[p] = s1 / s2
                                curve[p] = s2
                                energy[p] = scale[p] * s1
                        widest = max(widest, abs(scale[p]))
                # 2: D by the model.
                base = max(widest / extreme, np.float32(1e-30))
                for j in range(n_values):
                    if low == -(low + step * (count - 1)):  # symmetric: the sign of D is no choice
                        m = one - width + two * width * np.float32(j) / np.float32(n_values - 1)
                    else:
                        m = one - width + two * width * np.float32(j // 2) / np.float32(n_values // 2 - 1)
                        m = -m if j & 1 else m
                    d_try[j] = stored(base * m, up, down)
                    d_inverse[j] = one / d_try[j]
                model(n_sub, 4, scale, curve, energy, d_try, d_inverse, least, cost)
                d = d_try[0]
                lowest = cost[0]
                for j in range(1, n_values):
                    if cost[j] < lowest:
                        lowest = cost[j]
                        d = d_try[j]
                # 3: exact sums of legal scales near the optima, and D again.
                for turn in range(refits + 1):
                    for k in range(n_sub):
                        for kind in range(4):
                            centre = (scale[4 * k + kind] / d - f_low) / f_step
                            centre = np.rint(min(max(centre, zero), f_top)) - np.float32(window // 2)
                            centre = min(max(centre, zero), max(f_top - np.float32(window - 1), zero))
                            for c in range(window):
                                lane = kind * window + c
                                s = f_low + f_step * min(centre + np.float32(c), f_top)
                                legal[lane] = s
                                shifts[lane] = f_shift if kind & 2 else zero
                                inverse[lane] = zero if s == zero else one / (d * s)
                        at = 64 * k
                        for lane in range(64):
                            legals[at + lane] = legal[lane] if lane < 4 * window else zero
                        if window == 16:
                            sums64(x, wx, w, k * sub_len, sub_len, inverse, shifts, 0, sum1, sum2, at)
                        else:
                            for lane in range(64):
                                sum1[at + lane] = zero
                                sum2[at + lane] = zero
                            for lane in range(0, 4 * window, 16):
                                sums16(x, wx, w, k * sub_len, sub_len, inverse, shifts, lane, sum1, sum2, at + lane)
                    for _ in range(3):
                        top_sum, bottom_sum = zero, zero
                        for k in range(n_sub):
                            lane = pick(legals, sum1, sum2, 64 * k, d, total[k])
                            chosen[k] = lane
                            s = legals[64 * k + lane]
                            top_sum += s * sum1[64 * k + lane]
                            bottom_sum += s * s * sum2[64 * k + lane]
                        if bottom_sum > zero:
                            d = stored(top_sum / bottom_sum, up, down)
                for k in range(n_sub):
                    lane = pick(legals, sum1, sum2, 64 * k, d, total[k])
                    s = legals[64 * k + lane]
                    scales[k] = np.int32((s - f_low) / f_step)
                    flags[k] = 1 if lane >= 2 * window else 0
                    back = zero if s == zero else one / (d * s)
                    for i in range(k * sub_len, (k + 1) * sub_len, 16):
                        nearest16(x, i, back, f_shift if flags[k] else zero, codes, i)
                d_stored = d * up
                bits = np.uint32(float_to_half(d_stored)) if half else float_to_bits(d_stored)
                store(out[r], g, bits, scales, flags, codes)

    return search
