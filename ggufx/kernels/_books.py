"""Codebooks of the searching encoders: what codes stand for, as vector code over candidate scales.

A search asks two things of a :class:`Book`: sums of the nearest values under many scales at a time, and, in the end, the
nearest codes under one. All of it is generic LLVM IR with the order of every sum fixed, see :mod:`ggufx.kernels._lanes`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ggufx import tables
from ggufx.kernels._lanes import (
    CHUNK,
    Frame,
    join,
    lane_sums,
    midpoints,
    nearest_bytes,
    staged_bytes,
    staged_floats,
)
from ggufx.kernels._vector import Vector

__all__ = ["Book", "cubic_book", "even_book", "pair_book", "table_book"]

_BYTE, _INT = ir.IntType(8), ir.IntType(32)


class Book(NamedTuple):
    """What a search knows of the values.

    Attributes
    ----------
    key
        Tells books apart.
    sums
        As :func:`ggufx.kernels._lanes.lane_sums` for 16 lanes.
    exact
        The same without comparing rounded values; ``sums`` itself where that does not.
    codes
        ``codes(x, w, start, n, inverse, shift, out)`` writes the nearest codes of the ``n`` elements from ``start`` on,
        times ``inverse`` and less ``shift``, where ``w`` are their weights.
    positive
        A code whose value is positive: zeros under a scale of 0 come out without a sign.
    """

    key: str
    sums: Any
    exact: Any
    codes: Any
    positive: int


def _codes(emit: Callable[[Frame, Any], None], sub_len: int) -> Any:
    """Return the intrinsic ``codes``, which runs ``emit(frame, first element)`` for every ``sub_len`` elements."""

    @intrinsic
    def codes(typing_context, x, w, start, n, inverse, shift, out):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            size = ir.Constant(args[3].type, sub_len)
            with cgutils.for_range(builder, builder.udiv(args[3], size), intp=args[3].type) as loop:
                emit(f, builder.add(args[2], builder.mul(loop.index, size)))
            return context.get_dummy_value()

        return types.void(x, w, types.intp, types.intp, types.float32, types.float32, out), codegen

    return codes


def _count(f: Frame, value: Vector, borders: tuple[float, ...]) -> Vector:
    """Return how many borders are below, as 32-bit integers."""
    code = f.constant(0, value.lanes, _INT)
    for border in borders:
        code = code + f.greater(value, f.constant(border, value.lanes)).widen(32)
    return code


def _nearest(table: tuple[float, ...]) -> Any:
    def emit(f: Frame, at: Any) -> None:
        value = f.load(0, at) * f.spread(f.args[4]) - f.spread(f.args[5])
        f.store(6, at, _count(f, value, midpoints(table)).narrow(8))

    return _codes(emit, CHUNK)


def _positive(table: tuple[float, ...]) -> int:
    return next(code for code, value in enumerate(table) if value > 0)


def table_book(table: tuple[int, ...], *, staged: bool) -> Book:
    """Return the book of a table of ascending integers; ``staged`` as in :func:`ggufx.kernels._lanes.lane_sums`."""
    key = repr((table, staged))
    sums = lane_sums(table, CHUNK, staged=staged)
    exact = lane_sums(table, CHUNK, staged=False) if staged else sums
    return Book(key, sums, exact, _nearest(table), _positive(table))


def _sums(step: int, emit: Callable[[Frame, Any, Vector, Vector], list[tuple[Vector, Vector]]]) -> Any:
    """Return the intrinsic ``sums`` of a book that is no plain table.

    ``emit(frame, first element, inverse, shift)`` gives, for the next ``step`` elements, what the sums ``s1`` and ``s2`` grow
    by, in this order.
    """

    @intrinsic
    def sums(typing_context, x, wx, w, start, n, inverse, shift, at, s1, s2, to):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f = Frame(context, builder, signature, args)
            inv, off = f.load(5, args[7]), f.load(6, args[7])
            totals = [f.variable(f.constant(0.0)) for _ in range(2)]
            size = ir.Constant(args[4].type, step)
            with cgutils.for_range(builder, builder.udiv(args[4], size), intp=args[4].type) as loop:
                begin = builder.add(args[3], builder.mul(loop.index, size))
                for total, terms in zip(totals, zip(*emit(f, begin, inv, off), strict=True), strict=True):
                    grown = f.read(total)
                    for term in terms:
                        grown = grown + term
                    f.write(total, grown)
            for argument, total in zip((8, 9), totals, strict=True):
                f.store(argument, args[10], f.read(total))
            return context.get_dummy_value()

        return types.void(x, wx, w, types.intp, types.intp, inverse, shift, types.intp, s1, s2, types.intp), codegen

    return sums


def _after(f: Frame, place: Any, offset: int) -> Any:
    return f.builder.add(place, ir.Constant(place.type, offset))


_CODE_OF_CUBIC = (31.234182, 45.950529, -31.594347, 30.229667, -12.725878)
"""Coefficients of 1, t, t^3, t^5 and t^7: the code, before rounding, of a value ``128 t`` above the cubic's centre. Fitted to
be right at the midpoints to a twentieth of a code: values so near to one cost the same with either code."""


def cubic_book() -> Book:
    """Return IQ6_K's book: 64 values of a cubic, monotonous, so that another polynomial finds the code without a table.

    The sums' values are the format's up to rounding; the codes are exact.
    """
    a0, a1, a2, a3 = (float(np.float32(c)) for c in tables.P6_COEFFICIENTS)
    table = tuple(float(v) for v in np.array(tables.P6_BITS, np.uint32).view(np.float32))
    turn = -a2 / (3 * a3)
    centre = a0 + turn * (a1 + turn * (a2 + turn * a3))
    constant, *odd = _CODE_OF_CUBIC

    def emit(f: Frame, at: Any, inv: Vector, off: Vector) -> list[tuple[Vector, Vector]]:
        value = f.spread_element(0, at) * inv - off
        value = f.smaller(f.larger(value, f.constant(table[0])), f.constant(table[-1]))
        t = (value - centre) * (1 / 128)
        square = t * t
        code = square * odd[-1] + odd[-2]
        for coefficient in reversed(odd[:-2]):
            code = code * square + coefficient
        code = f.smaller(f.larger(f.rounded(code * t + constant), f.constant(0.0)), f.constant(63.0))
        value = (((code * a3 + a2) * code + a1) * code + a0) + off
        return [(f.spread_element(1, at) * value, f.spread_element(2, at) * value * value)]

    sums = _sums(1, emit)
    return Book("cubic", sums, sums, _nearest(table), _positive(table))


def even_book(table: tuple[int, ...]) -> Book:
    """Return IQ4_KSS's book: a table of 16, codes of elements ``2 p, 2 p + 1, 2 p + 16, 2 p + 17`` with an even number of ones.

    An element takes the nearest entry. In a word whose codes come out odd one element, the one that it costs least, takes
    the nearest entry of the other parity instead: three would cost more. Entries and costs depend on the scale, so each
    lane decides for itself.
    """
    halves = [tuple((v, c) for c, v in enumerate(table) if c.bit_count() % 2 == parity) for parity in (0, 1)]
    values = [tuple(v for v, _ in half) for half in halves]

    def chosen(f: Frame, z: list[Vector], w: list[Vector], pairs: list[tuple[Vector, Vector]]) -> list[Vector]:
        """Return masks: which elements of the words take their odd entry."""
        gains = [
            weight * (odd - even) * (value + value - (even + odd))
            for value, weight, (even, odd) in zip(z, w, pairs, strict=True)
        ]
        none = f.constant(0.0, z[0].lanes)
        masks = [f.greater(gain, none) for gain in gains]
        losses = [mask.choose(gain, -gain) for mask, gain in zip(masks, gains, strict=True)]
        left, right = f.smaller(losses[0], losses[1]), f.smaller(losses[2], losses[3])
        later = f.greater(left, right)
        parity = masks[0] ^ masks[1] ^ masks[2] ^ masks[3]
        first, second = f.greater(losses[0], losses[1]), f.greater(losses[2], losses[3])
        here, there = parity & (later ^ 1), parity & later
        turns = [here & (first ^ 1), here & first, there & (second ^ 1), there & second]
        return [mask ^ turn for mask, turn in zip(masks, turns, strict=True)]

    def emit(f: Frame, at: Any, inv: Vector, off: Vector) -> list[tuple[Vector, Vector]]:
        # Steps of 4 elements, 8 to a sub-block: a word each, two elements wide in either half of the sub-block.
        builder = f.builder
        local = builder.sub(at, f.args[3])
        block = builder.and_(local, ir.Constant(at.type, -32))
        word = builder.lshr(builder.and_(local, ir.Constant(at.type, 31)), ir.Constant(at.type, 1))
        begin = builder.add(f.args[3], builder.add(block, word))
        places = [_after(f, begin, offset) for offset in (0, 1, 16, 17)]
        z = [f.spread_element(0, i) * inv for i in places]
        rounded = staged_bytes(f, z, off)
        off8 = join([Vector(builder, builder.fptosi(off.value, ir.VectorType(_BYTE, CHUNK)))] * 4)
        both = [staged_floats(nearest_bytes(f, rounded, half, off8), CHUNK) for half in values]
        pairs = list(zip(*both, strict=True))
        w = [f.spread_element(2, i) for i in places]
        picked = [m.choose(odd, even) for m, (even, odd) in zip(chosen(f, z, w, pairs), pairs, strict=True)]
        return [(f.spread_element(1, i) * v, weight * v * v) for i, weight, v in zip(places, w, picked, strict=True)]

    def codes(f: Frame, at: Any) -> None:
        evens, odds = range(0, CHUNK, 2), range(1, CHUNK, 2)
        x, w = ([f.load(a, p) for p in (at, _after(f, at, CHUNK))] for a in (0, 1))
        lanes = CHUNK // 2
        inverse, off = f.spread(f.args[4], lanes), f.spread(f.args[5], lanes)
        z = [half.take(which) * inverse - off for half in x for which in (evens, odds)]
        weights = [half.take(which) for half in w for which in (evens, odds)]
        pairs, numbers = [], []
        for value in z:
            entries = []
            for half in halves:
                entry = f.constant(float(half[0][0]), lanes), f.constant(half[0][1], lanes, _INT)
                for mid, (v, c) in zip(midpoints(tuple(v for v, _ in half)), half[1:], strict=True):
                    above = f.greater(value, f.constant(mid, lanes))
                    entry = (
                        above.choose(f.constant(float(v), lanes), entry[0]),
                        above.choose(f.constant(c, lanes, _INT), entry[1]),
                    )
                entries.append(entry)
            pairs.append((entries[0][0], entries[1][0]))
            numbers.append((entries[0][1], entries[1][1]))
        masks = chosen(f, z, weights, pairs)
        found = [m.choose(odd, even) for m, (even, odd) in zip(masks, numbers, strict=True)]
        in_turn = [lane // 2 + lanes * (lane % 2) for lane in range(CHUNK)]
        for part, place in enumerate((at, _after(f, at, CHUNK))):
            f.store(6, place, found[2 * part].take(in_turn, found[2 * part + 1]).narrow(8))

    sums = _sums(4, emit)
    return Book(f"even {table}", sums, sums, _codes(codes, 2 * CHUNK), _positive(table))


def pair_book(points: tuple[tuple[int, int], ...]) -> Book:
    """Return IQ2_KL's book: ascending pairs of values. Its codes, one for two elements, start at half the first element.

    For every first value the nearest second one is a matter of thresholds; the least of their weighted errors is the
    nearest point.
    """
    levels = [(a, [b for _, b in group]) for a, group in groupby(points, lambda point: point[0])]

    def nearest(
        f: Frame, z: tuple[Vector, Vector], w: tuple[Vector, Vector], wanted: bool
    ) -> tuple[Vector, Vector, Vector | None]:
        """Return the nearest points' values, and if wanted their codes."""
        lanes = z[0].lanes
        best: list[Vector] = []
        code = 0
        for a, seconds in levels:
            second = f.constant(float(seconds[0]), lanes)
            number = f.constant(code, lanes, _INT)
            for mid, value in zip(midpoints(tuple(seconds)), seconds[1:], strict=True):
                above = f.greater(z[1], f.constant(mid, lanes))
                second = above.choose(f.constant(float(value), lanes), second)
                number = number + above.widen(32)
            first = f.constant(float(a), lanes)
            off0, off1 = z[0] - first, z[1] - second
            error = w[0] * off0 * off0 + w[1] * off1 * off1
            found = [error, first, second, *([number] if wanted else [])]
            if best:
                better = f.greater(best[0], error)
                found = [better.choose(new, old) for new, old in zip(found, best, strict=True)]
            best = found
            code += len(seconds)
        return best[1], best[2], best[3] if wanted else None

    def emit(f: Frame, at: Any, inv: Vector, off: Vector) -> list[tuple[Vector, Vector]]:
        places = at, _after(f, at, 1)
        z0, z1 = (f.spread_element(0, i) * inv for i in places)
        w0, w1 = (f.spread_element(2, i) for i in places)
        a, b, _ = nearest(f, (z0, z1), (w0, w1), wanted=False)
        return [
            (f.spread_element(1, i) * v, weight * v * v) for i, weight, v in zip(places, (w0, w1), (a, b), strict=True)
        ]

    def codes(f: Frame, at: Any) -> None:
        evens, odds = range(0, 2 * CHUNK, 2), range(1, 2 * CHUNK, 2)
        x, w = (f.load(argument, at, 2 * CHUNK) for argument in (0, 1))
        inverse = f.spread(f.args[4])
        _, _, number = nearest(
            f, (x.take(evens) * inverse, x.take(odds) * inverse), (w.take(evens), w.take(odds)), wanted=True
        )
        assert number is not None
        f.store(6, f.builder.lshr(at, ir.Constant(at.type, 1)), number.narrow(8))

    positive = next(code for code, point in enumerate(points) if min(point) > 0)
    sums = _sums(2, emit)
    return Book(f"pairs {points}", sums, sums, _codes(codes, 2 * CHUNK), positive)
