"""Vector primitives of the searching encoders: candidate scales in lanes, elements one after the other.

Each is an intrinsic of generic LLVM IR with the order of every sum fixed, so that the bits depend on no CPU. All arrays are
C-contiguous; floats are float32.
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ggufx.kernels._vector import Vector

__all__ = [
    "CHUNK",
    "GRID_LANES",
    "GRID_RUN",
    "Frame",
    "best_of_kinds",
    "grid_halves",
    "grid_least",
    "grid_slots",
    "grid_sweep",
    "join",
    "lane_sums",
    "midpoints",
    "model_cost",
    "nearest_bytes",
    "nearest_codes",
    "peek",
    "pick_lane",
    "planes",
    "staged_bytes",
    "staged_floats",
    "survey",
    "windows",
]

BYTES = 64
"""Codes that a staged search compares at a time."""
CHUNK = 16
"""Lanes of everything else."""
GRID_LANES = 32
"""Points of a grid that are looked for at a time."""
GRID_RUN = 2
"""Right halves that are looked at in one turn."""
MAGIC = float(3 << 22)
"""Adding it to a small float32 rounds that to an integer, ties to even; the low bits of the sum are the integer."""

_FLOAT, _BYTE, _INT = ir.FloatType(), ir.IntType(8), ir.IntType(32)


def midpoints(table: tuple[float, ...]) -> tuple[float, ...]:
    """Return where the nearest entry changes."""
    return tuple((a + b) / 2 for a, b in pairwise(table))


class Frame:
    """Arguments of an intrinsic as pointers and vectors."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args

    def pointer(self, argument: int, index: Any) -> Any:
        array = self.context.make_array(self.types[argument])(self.context, self.builder, self.args[argument])
        return self.builder.gep(array.data, [index])

    def load(self, argument: int, index: Any, lanes: int = CHUNK) -> Vector:
        pointer = self.builder.bitcast(self.pointer(argument, index), ir.VectorType(_FLOAT, lanes).as_pointer())
        return Vector(self.builder, self.builder.load(pointer, align=4))

    def store(self, argument: int, index: Any, vector: Vector) -> None:
        pointer = self.builder.bitcast(self.pointer(argument, index), vector.value.type.as_pointer())
        self.builder.store(vector.value, pointer, align=1 if vector.value.type.element == _BYTE else 4)

    def spread(self, value: Any, lanes: int = CHUNK) -> Vector:
        one = self.builder.insert_element(ir.Constant(ir.VectorType(value.type, 1), ir.Undefined), value, _INT(0))
        return Vector(self.builder, one).take([0] * lanes)

    def spread_element(self, argument: int, index: Any, lanes: int = CHUNK) -> Vector:
        return self.spread(self.builder.load(self.pointer(argument, index)), lanes)

    def constant(self, numbers: Any, lanes: int = CHUNK, element: Any = _FLOAT) -> Vector:
        numbers = list(numbers) if isinstance(numbers, list | range) else [numbers] * lanes
        return Vector(self.builder, ir.Constant(ir.VectorType(element, len(numbers)), numbers))

    def greater(self, a: Vector, b: Vector) -> Vector:
        return Vector(self.builder, self.builder.fcmp_ordered(">", a.value, b.value))

    def larger(self, a: Vector, b: Vector) -> Vector:
        """Return the maximum; ``b`` where ``a`` is NaN."""
        return self.greater(a, b).choose(a, b)

    def smaller(self, a: Vector, b: Vector) -> Vector:
        return self.greater(b, a).choose(a, b)

    def divide(self, a: Vector, b: Vector) -> Vector:
        return Vector(self.builder, self.builder.fdiv(a.value, b.value))

    def rounded(self, a: Vector) -> Vector:
        return (a + MAGIC) - MAGIC

    def variable(self, vector: Vector) -> Any:
        where = cgutils.alloca_once(self.builder, vector.value.type)
        self.builder.store(vector.value, where)
        return where

    def read(self, where: Any) -> Vector:
        return Vector(self.builder, self.builder.load(where))

    def write(self, where: Any, vector: Vector) -> None:
        self.builder.store(vector.value, where)

    def first(self, vector: Vector) -> Any:
        return self.builder.extract_element(vector.value, _INT(0))


def join(parts: list[Vector]) -> Vector:
    """Return one vector of a power of two of them."""
    while len(parts) > 1:
        parts = [a.take(range(2 * a.lanes), b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def staged_bytes(f: Frame, scaled: list[Vector], off: Vector) -> Vector:
    """Round ``scaled - off`` to signed bytes, one vector after the other."""
    parts = []
    for z in scaled:
        z = z + (f.constant(MAGIC, z.lanes) - off)
        z = f.larger(z, f.constant(MAGIC - 128, z.lanes))
        z = f.smaller(z, f.constant(MAGIC + 127, z.lanes))
        parts.append(z.cast(_INT, z.lanes).narrow(8))
    return join(parts)


def nearest_bytes(f: Frame, rounded: Vector, table: tuple[int, ...], off: Vector) -> Vector:
    """Return the entries of ``table`` nearest to bytes, plus ``off``."""
    value = off + table[0]
    for mid, (a, b) in zip(midpoints(table), pairwise(table), strict=True):
        above = f.builder.icmp_signed(">", rounded.value, f.constant(math.floor(mid), rounded.lanes, _BYTE).value)
        value = Vector(f.builder, above).choose(value + (b - a), value)
    return value


def staged_floats(values: Vector, lanes: int) -> list[Vector]:
    """Widen signed bytes to vectors of ``lanes`` floats."""
    parts = (values.take(range(at, at + lanes)) for at in range(0, values.lanes, lanes))
    return [part.mask_of(32).floats() for part in parts]


def lane_sums(table: tuple[int, ...], lanes: int, *, staged: bool) -> Any:
    """Return an intrinsic: nearest table entries of ``n`` elements under ``lanes`` inverse scales at a time.

    ``sums(x, wx, w, start, n, inverse, shift, at, s1, s2, to)`` sets, for lane ``l``,
    ``s1[to + l] = sum wx v`` and ``s2[to + l] = sum w v v`` over elements ``start .. start + n``, where ``v`` is the entry of
    ``table + shift[at + l]`` nearest to ``x * inverse[at + l]``. Sums run in order of elements, lane by lane. ``n`` is a
    multiple of ``64 // lanes``.

    ``staged``: products are rounded to signed bytes first and compared as bytes; up to half a unit of the table is lost
    in the comparison, never in the sums. Pays from 16 entries up.
    """
    unroll = BYTES // lanes if staged else 1
    steps = list(zip(midpoints(table), [b - a for a, b in pairwise(table)], strict=True))

    def staged_values(f: Frame, scaled: list[Vector], off: Vector) -> list[Vector]:
        codes = staged_bytes(f, scaled, off)
        off8 = Vector(f.builder, f.builder.fptosi(off.value, ir.VectorType(_BYTE, lanes)))
        return staged_floats(nearest_bytes(f, codes, table, join([off8] * unroll)), lanes)

    def float_values(f: Frame, scaled: list[Vector], off: Vector) -> list[Vector]:
        values = []
        for z in scaled:
            z = z - off
            value = off + float(table[0])
            for mid, jump in steps:
                value = f.greater(z, f.constant(mid, lanes)).choose(value + float(jump), value)
            values.append(value)
        return values

    @intrinsic
    def sums(typing_context, x, wx, w, start, n, inverse, shift, at, s1, s2, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            inv, off = f.load(5, args[7], lanes), f.load(6, args[7], lanes)
            acc1, acc2 = f.variable(f.constant(0.0, lanes)), f.variable(f.constant(0.0, lanes))
            step = ir.Constant(args[4].type, unroll)
            with cgutils.for_range(builder, builder.udiv(args[4], step), intp=args[4].type) as loop:
                begin = builder.add(args[3], builder.mul(loop.index, step))
                places = [builder.add(begin, ir.Constant(begin.type, u)) for u in range(unroll)]
                scaled = [f.spread_element(0, i, lanes) * inv for i in places]
                values = (staged_values if staged else float_values)(f, scaled, off)
                sum1, sum2 = f.read(acc1), f.read(acc2)
                for i, v in zip(places, values, strict=True):
                    sum1 = sum1 + f.spread_element(1, i, lanes) * v
                    sum2 = sum2 + f.spread_element(2, i, lanes) * v * v
                f.write(acc1, sum1)
                f.write(acc2, sum2)
            f.store(8, args[10], f.read(acc1))
            f.store(9, args[10], f.read(acc2))
            return context.get_dummy_value()

        return types.void(x, wx, w, types.intp, types.intp, inverse, shift, types.intp, s1, s2, types.intp), codegen

    return sums


def best_of_kinds(lanes: int, kinds: int = 4) -> Any:
    """Return an intrinsic: of ``lanes`` candidates, lane ``kinds f + kind``, the best of each kind.

    ``best(s1, s2, scale, curve, energy, to)`` keeps the highest explained energy ``s1^2 / s2`` and writes the optimal
    scale ``s1 / s2``, the curvature ``s2`` and the energy at ``to + kind``.
    """

    @intrinsic
    def best(typing_context, s1, s2, scale, curve, energy, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            zero = ir.Constant(ir.IntType(64), 0)
            top, bottom = f.load(0, zero, lanes), f.load(1, zero, lanes)
            none = f.constant(0.0, lanes)
            centre = f.greater(bottom, none).choose(f.divide(top, bottom), none)
            fields = [centre * top, centre, bottom]
            while fields[0].lanes > kinds:
                n = fields[0].lanes // 2
                lower, upper = ([v.take(range(at, at + n)) for v in fields] for at in (0, n))
                better = f.greater(upper[0], lower[0])
                fields = [better.choose(b, a) for a, b in zip(lower, upper, strict=True)]
            for argument, vector in zip((4, 2, 3), fields, strict=True):
                f.store(argument, args[5], vector)
            return context.get_dummy_value()

        return types.void(s1, s2, scale, curve, energy, types.intp), codegen

    return best


def survey(length: int) -> Any:
    """Return an intrinsic: ``total(x, wx, start)`` = ``(sum wx x, max |x|)`` over ``length`` elements, a power of two."""

    @intrinsic
    def total(typing_context, x, wx, start):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            values = f.load(0, args[2], length)
            terms = values * f.load(1, args[2], length)
            sizes = (values.cast(_INT, length) & 0x7FFFFFFF).float_bits()
            while terms.lanes > 1:
                n = terms.lanes // 2
                terms = terms.take(range(n)) + terms.take(range(n, 2 * n))
                sizes = f.larger(sizes.take(range(n)), sizes.take(range(n, 2 * n)))
            return cgutils.pack_array(builder, [f.first(terms), f.first(sizes)])

        return types.UniTuple(types.float32, 2)(x, wx, types.intp), codegen

    return total


def windows(low: int, step: int, count: int, kinds: int = 4) -> Any:
    """Return an intrinsic that fills 16 lanes, ``kinds c + kind``, with legal scales near an optimum of each kind.

    ``window(scale, at, d, c, width, legal, inverse, to, inverse_to)``: lane ``kinds j + kind`` gets the legal scale number
    ``c + j`` of the ``width`` ones round ``scale[at + kind] / d``, and its
    product with ``d`` inverted (0 for a scale of 0).
    """

    @intrinsic
    def window(typing_context, scale, at, d, c, width, legal, inverse, to, inverse_to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            unit = f.spread(args[2])
            optimum = f.load(0, args[1], kinds).take([lane % kinds for lane in range(CHUNK)])
            index = (f.divide(optimum, unit) - float(low)) * (1 / step)
            zero, top = f.constant(0.0), f.constant(float(count - 1))
            index = f.rounded(f.smaller(f.larger(index, zero), top))
            width_ = f.spread(builder.sitofp(args[4], _FLOAT))
            half = f.spread(builder.sitofp(builder.ashr(args[4], ir.Constant(args[4].type, 1)), _FLOAT))
            index = f.larger(f.smaller(index - half, (top - width_) + 1.0), zero)
            place = f.spread(builder.sitofp(args[3], _FLOAT)) + [float(lane // kinds) for lane in range(CHUNK)]
            index = f.smaller(index + place, top)
            s = index * float(step) + float(low)
            back = f.divide(f.constant(1.0), unit * s)
            is_zero = Vector(builder, builder.fcmp_ordered("==", s.value, zero.value))
            f.store(5, args[7], s)
            f.store(6, args[8], is_zero.choose(zero, back))
            return context.get_dummy_value()

        return types.void(
            scale, types.intp, types.float32, types.intp, types.intp, legal, inverse, types.intp, types.intp
        ), codegen

    return window


def pick_lane() -> Any:
    """Return an intrinsic: the lane whose legal scale has the least error.

    ``pick(s, s1, s2, at, lanes, d, energy)`` minimises ``d s (d s S2 - 2 S1) + energy`` over ``lanes`` (a multiple of 16, at
    most 128) lanes from ``at`` on. The error is not negative, so its bits sort as integers: the lane's number replaces the
    low ones.
    """
    most = 128
    ints = ir.VectorType(_INT, CHUNK)

    @intrinsic
    def pick(typing_context, s, s1, s2, at, lanes, d, energy):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            unit, rest = f.spread(args[5]), f.spread(args[6])

            def less(a: Vector, b: Vector) -> Vector:
                return Vector(builder, builder.icmp_signed("<", a.value, b.value)).choose(a, b)

            kept = f.variable(f.constant(0x7FFFFFFF, CHUNK, _INT))
            size = ir.Constant(args[4].type, CHUNK)
            with cgutils.for_range(builder, builder.udiv(args[4], size), intp=args[4].type) as loop:
                begin = builder.mul(loop.index, size)
                where = builder.add(args[3], begin)
                scale, top, bottom = f.load(0, where) * unit, f.load(1, where), f.load(2, where)
                error = f.larger(scale * (scale * bottom - (top + top)) + rest, f.constant(0.0))
                number = f.spread(builder.trunc(begin, _INT)) + list(range(CHUNK))
                key = (error.cast(_INT, CHUNK) & -most) | number
                f.write(kept, less(key, f.read(kept)))
            key = f.read(kept)
            while key.lanes > 1:
                n = key.lanes // 2
                key = less(key.take(range(n)), key.take(range(n, 2 * n)))
            return builder.zext(builder.and_(f.first(key), ir.Constant(_INT, most - 1)), ir.IntType(64))

        assert ints.count == CHUNK
        return types.intp(s, s1, s2, types.intp, types.intp, types.float32, types.float32), codegen

    return pick


def model_cost(low: int, step: int, count: int, kinds: int = 4) -> Any:
    """Return an intrinsic: what 16 values of D cost, judged by parabolas.

    ``model(scale, curve, energy, n_sub, d, inverse, cost, at)`` sums ``min over the parabolas of all kinds of
    curve (d s - scale)^2 - energy`` over sub-blocks, ``s`` being the legal scale nearest to the parabola's optimum.
    """

    @intrinsic
    def model(typing_context, scale, curve, energy, n_sub, d, inverse, cost, at):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            unit, back = f.load(4, args[7]), f.load(5, args[7])
            zero, top = f.constant(0.0), f.constant(float(count - 1))
            total = f.variable(zero)
            with cgutils.for_range(builder, args[3], intp=args[3].type) as loop:
                base = builder.mul(loop.index, ir.Constant(args[3].type, kinds))
                least = None
                for kind in range(kinds):
                    p = builder.add(base, ir.Constant(base.type, kind))
                    centre = f.spread_element(0, p)
                    index = (centre * back - float(low)) * (1 / step)
                    index = f.rounded(f.smaller(f.larger(index, zero), top))
                    off = unit * (index * float(step) + float(low)) - centre
                    value = f.spread_element(1, p) * off * off - f.spread_element(2, p)
                    least = value if least is None else f.smaller(value, least)
                assert least is not None
                f.write(total, f.read(total) + least)
            f.store(6, args[7], f.read(total))
            return context.get_dummy_value()

        return types.void(scale, curve, energy, types.intp, d, inverse, cost, types.intp), codegen

    return model


def nearest_codes(table: tuple[int, ...]) -> Any:
    """Return an intrinsic: ``nearest16(x, at, inverse, shift, codes, to)``, 16 exact codes of ``x * inverse - shift``."""

    @intrinsic
    def nearest16(typing_context, x, at, inverse, shift, codes, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            value = f.load(0, args[1]) * f.spread(args[2]) - f.spread(args[3])
            code = f.constant(0, CHUNK, _INT)
            for mid in midpoints(table):
                code = code + f.greater(value, f.constant(mid)).widen(32)
            f.store(4, args[5], code.narrow(8))
            return context.get_dummy_value()

        return types.void(x, types.intp, types.float32, types.float32, codes, types.intp), codegen

    return nearest16


def planes(count: int, n_bits: int, shift: int, run: int) -> Any:
    """Return an intrinsic ``store(codes, at, out, start)`` that packs ``n_bits`` bits at ``shift`` of ``count`` codes.

    In runs of ``run`` bytes: the lowest bits of the bytes of a run come first, ``run`` codes, then the next ones.
    """
    per_byte = 8 // n_bits
    bytes_of_run = ir.VectorType(_BYTE, run)

    @intrinsic
    def store(typing_context, codes, at, out, start):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)

            def where(argument: int, base: Any, offset: int) -> Any:
                pointer = f.pointer(argument, builder.add(base, ir.Constant(base.type, offset)))
                return builder.bitcast(pointer, bytes_of_run.as_pointer())

            for first in range(0, count, run * per_byte):
                packed = None
                for p in range(per_byte):
                    code = Vector(builder, builder.load(where(0, args[1], first + p * run), align=1))
                    code = (code >> shift & ((1 << n_bits) - 1)) << p * n_bits
                    packed = code if packed is None else packed | code
                assert packed is not None
                builder.store(packed.value, where(2, args[3], first // per_byte), align=1)
            return context.get_dummy_value()

        return types.void(codes, types.intp, out, types.intp), codegen

    return store


def grid_sweep(flips: bool) -> Any:
    """Return an intrinsic: the point of a grid of least error, for :data:`GRID_LANES` lanes.

    ``sweep(table, room, lefts, rights, scale, energy, slots, at, pairs, joined, starts, members, keys, value, code)``: a point
    is a left half ``p < lefts`` and a right half ``q < rights``. ``table`` [2, 3, room, lanes] has A, 2 B and 4 C of left and
    right halves; the error of a half over its scale s is ``s A - 2 B + energy / s``, with one wrong sign 4 C more. Lanes are
    the ``slots`` from ``at`` on of ``scale`` [slots] and of ``energy`` [2, slots], which are such that no error is negative.
    Writes the least sum to ``value[0]`` and ``128 p + q`` to ``code[0]``.

    ``flips``: ``value[1]`` and ``code[1]`` get the best point with one wrong sign, in whichever half costs less.

    Errors of right halves are kept in ``keys`` as integers that sort like them, ``q`` in place of the lowest seven bits: a row
    of lanes each, with ``flips`` a second one for the wrong sign. ``joined`` more rows are the least of two earlier ones, which
    ``pairs`` [joined, 2] names; the best partner of p is the least of ``members[starts[p] : starts[p + 1]]``, a multiple of
    :data:`GRID_RUN`. Pairs and members tell where in ``keys`` a row starts.
    """
    lanes, low = GRID_LANES, 127

    @intrinsic
    def sweep(
        typing_context,
        table,
        room,
        lefts,
        rights,
        scale,
        energy,
        slots,
        at,
        pairs,
        joined,
        starts,
        members,
        keys,
        value,
        code,
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            size = ir.Constant(ir.IntType(64), lanes)
            ints = ir.VectorType(_INT, lanes)
            sets = 2 if flips else 1

            def number(n: int) -> Any:
                return ir.Constant(ir.IntType(64), n)

            def less(a: Vector, b: Vector) -> Vector:
                return Vector(builder, builder.icmp_unsigned("<", a.value, b.value)).choose(a, b)

            def load_keys(start: Any, part: int) -> Vector:
                pointer = f.pointer(12, builder.add(start, number(lanes * part)))
                pointer = builder.bitcast(pointer, ints.as_pointer())
                return Vector(builder, builder.load(pointer, align=4))

            s = f.load(4, args[7], lanes)
            lifts = [f.divide(f.load(5, builder.add(args[7], skip), lanes), s) for skip in (number(0), args[6])]

            def errors(half: int, row: Any) -> list[Vector]:
                a, b, c = (
                    f.load(
                        0,
                        builder.mul(builder.add(builder.mul(args[1], number(3 * half + kind)), row), size),
                        lanes,
                    )
                    for kind in range(3)
                )
                whole = (s * a - b) + lifts[half]
                return [whole, whole + c] if flips else [whole]

            with cgutils.for_range(builder, args[3], intp=args[3].type) as loop:
                for part, error in enumerate(errors(1, loop.index)):
                    positive = f.larger(error, f.constant(0.0, lanes)).cast(_INT, lanes)
                    key = (positive & ~low) | f.spread(builder.trunc(loop.index, _INT), lanes)
                    row = builder.add(builder.mul(loop.index, number(lanes * sets)), number(lanes * part))
                    f.store(12, row, key)

            with cgutils.for_range(builder, args[9], intp=args[9].type) as loop:
                double = builder.mul(loop.index, number(2))
                first, second = (builder.load(f.pointer(8, builder.add(double, number(k)))) for k in range(2))
                for part in range(sets):
                    row = builder.mul(builder.add(loop.index, args[3]), number(lanes * sets))
                    key = less(load_keys(first, part), load_keys(second, part))
                    f.store(12, builder.add(row, number(lanes * part)), key)

            values = [f.variable(f.constant(float("inf"), lanes)) for _ in range(sets)]
            codes = [f.variable(f.constant(0, lanes, _INT)) for _ in range(sets)]
            least = [f.variable(f.constant(-1, lanes, _INT)) for _ in range(sets)]
            with cgutils.for_range(builder, args[2], intp=args[2].type) as outer:
                p = outer.index
                first, last = (builder.load(f.pointer(10, i)) for i in (p, builder.add(p, number(1))))
                for where in least:
                    f.write(where, f.constant(-1, lanes, _INT))
                turns = builder.udiv(builder.sub(last, first), number(GRID_RUN))
                with cgutils.for_range(builder, turns, intp=first.type) as inner:
                    here = builder.add(first, builder.mul(inner.index, number(GRID_RUN)))
                    for u in range(GRID_RUN):
                        q = builder.load(f.pointer(11, builder.add(here, number(u))))
                        for part, where in enumerate(least):
                            f.write(where, less(load_keys(q, part), f.read(where)))
                here = f.spread(builder.trunc(builder.shl(p, number(7)), _INT), lanes)
                left = errors(0, p)
                rests = [f.read(where) for where in least]
                sums = [left[0] + (key & ~low).float_bits() for key in rests]
                found = [here | (key & low) for key in rests]
                if flips:
                    other = left[1] + (rests[0] & ~low).float_bits()
                    better = f.greater(sums[1], other)
                    sums[1], found[1] = better.choose(other, sums[1]), better.choose(found[0], found[1])
                for k in range(sets):
                    better = f.greater(f.read(values[k]), sums[k])
                    f.write(values[k], better.choose(sums[k], f.read(values[k])))
                    f.write(codes[k], better.choose(found[k], f.read(codes[k])))
            for k in range(sets):
                f.store(13, number(k * lanes), f.read(values[k]))
                f.store(14, number(k * lanes), f.read(codes[k]))
            return context.get_dummy_value()

        intp = types.intp
        return types.void(
            table, intp, intp, intp, scale, energy, intp, intp, pairs, intp, starts, members, keys, value, code
        ), codegen

    return sweep


def grid_least() -> Any:
    """Return an intrinsic: of lines ``s (s a - b)``, the least one in each of :data:`GRID_LANES` lanes.

    ``least(scale, line_a, line_b, room, count, stride, at, part, best, best_a, best_b)``: s is ``scale[at : at + lanes]``; line
    n is that of list ``part`` [parts, room, stride] at the same lanes, and so are the results [parts, stride]. ``count`` is at
    least 1; of equal ones the first is taken.
    """
    lanes = GRID_LANES

    @intrinsic
    def least(typing_context, scale, line_a, line_b, room, count, stride, at, part, best, best_a, best_b):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            s = f.load(0, args[6], lanes)
            kept = [f.variable(f.constant(number, lanes)) for number in (float("inf"), 0.0, 0.0)]
            base = builder.mul(args[7], args[3])
            with cgutils.for_range(builder, args[4], intp=args[4].type) as loop:
                row = builder.add(builder.mul(builder.add(base, loop.index), args[5]), args[6])
                a, b = f.load(1, row, lanes), f.load(2, row, lanes)
                error = s * (s * a - b)
                better = f.greater(f.read(kept[0]), error)
                for where, value in zip(kept, (error, a, b), strict=True):
                    f.write(where, better.choose(value, f.read(where)))
            row = builder.add(builder.mul(args[7], args[5]), args[6])
            for argument, where in zip((8, 9, 10), kept, strict=True):
                f.store(argument, row, f.read(where))
            return context.get_dummy_value()

        intp = types.intp
        return types.void(scale, line_a, line_b, intp, intp, intp, intp, intp, best, best_a, best_b), codegen

    return least


def grid_slots(length: int) -> Any:
    """Return an intrinsic: lay :data:`GRID_LANES` slots of ``length`` elements out side by side.

    ``lay(x, w, at, factor, signed, xs, ws, energy, slots, tops, signs)`` takes the elements of ``x``, times ``factor`` and
    without their signs unless ``signed``, and of ``w`` for the slots from ``at`` on. Element j of them all goes to
    ``xs[at / lanes, j]`` and ``ws[at / lanes, j]``. ``energy`` [2, slots] gets ``sum w x^2`` of both halves, ``tops`` likewise
    the largest ``|x|`` and ``sum w |x|``, ``signs`` a bit an element.
    """
    lanes = GRID_LANES
    total = lanes * length

    @intrinsic
    def lay(typing_context, x, w, at, factor, signed, xs, ws, energy, slots, tops, signs):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)

            def number(k: int) -> Any:
                return ir.Constant(ir.IntType(64), k)

            start = builder.mul(args[2], number(length))
            values = f.load(0, start, total) * f.spread(args[3], total)
            sizes = (values.cast(_INT, total) & 0x7FFFFFFF).float_bits()
            below = builder.fcmp_ordered("<", values.value, f.constant(0.0, total).value)
            byte = builder.udiv(start, number(8))
            f.store(10, byte, Vector(builder, builder.bitcast(below, ir.VectorType(_BYTE, total // 8))))
            chosen = Vector(builder, builder.select(args[4], values.value, sizes.value))
            weights = f.load(1, start, total)
            halves: list[list[Vector]] = [[], []]
            picked: list[Vector] = []
            weighted: list[Vector] = []
            for j in range(length):
                picks = range(j, total, length)
                u, v, size = weights.take(picks), chosen.take(picks), sizes.take(picks)
                row = builder.add(start, number(j * lanes))
                f.store(5, row, v)
                f.store(6, row, u)
                halves[2 * j // length].append(u * size * size)
                picked.append(size)
                weighted.append(u * size)
            for half, terms in enumerate(halves):
                f.store(7, builder.add(args[2], builder.mul(args[8], number(half))), reduce(add, terms))
            for half, vector in enumerate((reduce(f.larger, picked), reduce(add, weighted))):
                f.store(9, builder.add(args[2], builder.mul(args[8], number(half))), vector)
            return context.get_dummy_value()

        intp = types.intp
        return types.void(x, w, intp, types.float32, types.boolean, xs, ws, energy, intp, tops, signs), codegen

    return lay


def grid_halves(n: int) -> Any:
    """Return an intrinsic: what halves of ``n`` elements have to do with :data:`GRID_LANES` slots.

    ``halves(points, count, xs, ws, first, odd, at, table, room, half)``: for every row g of ``points`` [count, n] and lane,
    ``table`` [2, 3, room, lanes] gets ``A = sum w g^2``, ``2 B = 2 sum w x g`` and ``odd min w x g`` of that half. Elements are
    ``first`` .. ``first + n`` of ``xs`` and ``ws`` [elements, lanes]; ``odd`` is that of the slots from ``at`` on.
    """
    lanes = GRID_LANES

    @intrinsic
    def halves(typing_context, points, count, xs, ws, first, odd, at, table, room, half):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)

            def number(k: int) -> Any:
                return ir.Constant(ir.IntType(64), k)

            rows = [builder.mul(builder.add(args[4], number(j)), number(lanes)) for j in range(n)]
            w = [f.load(3, row, lanes) for row in rows]
            y = [f.load(2, row, lanes) * v for row, v in zip(rows, w, strict=True)]
            wrong = f.load(5, args[6], lanes)
            base = builder.mul(builder.mul(args[9], number(3)), args[8])
            with cgutils.for_range(builder, args[1], intp=args[1].type) as loop:
                row = builder.mul(loop.index, number(n))
                g = [f.spread_element(0, builder.add(row, number(j)), lanes) for j in range(n)]
                squares = [v * (u * u) for u, v in zip(g, w, strict=True)]
                terms = [u * v for u, v in zip(g, y, strict=True)]
                a, b, c = reduce(add, squares), reduce(add, terms), reduce(f.smaller, terms)
                for kind, value in enumerate((a, b + b, c * wrong)):
                    row = builder.add(builder.add(base, builder.mul(args[8], number(kind))), loop.index)
                    f.store(7, builder.mul(row, number(lanes)), value)
            return context.get_dummy_value()

        intp = types.intp
        return types.void(points, intp, xs, ws, intp, odd, intp, table, intp, intp), codegen

    return halves


@intrinsic
def peek(typing_context: Any, array: Any, index: Any) -> Any:
    """Read element ``index`` of the flattened array, which must be there: no axes, no negative indices, no checks."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), codegen
