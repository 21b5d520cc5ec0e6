"""Codebooks of the searching encoders: what codes stand for, as vector code over candidate scales.

A search asks two things of a :class:`Book`: sums of the nearest values under many scales at a time, and, in the end, the
nearest codes under one. All of it is generic LLVM IR with the order of every sum fixed, see :mod:`ggufx.kernels._lanes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ggufx.kernels._lanes import CHUNK, Frame, lane_sums, midpoints
from ggufx.kernels._vector import Vector

__all__ = ["Book", "table_book"]

_INT = ir.IntType(32)


class Book(NamedTuple):
    """What a search knows of the values.

    Attributes
    ----------
    key
        Tells books apart.
    sums
        As :func:`ggufx.kernels._lanes.lane_sums` for 16 lanes.
    codes
        ``codes(x, w, start, n, inverse, shift, out)`` writes the nearest codes of the ``n`` elements from ``start`` on,
        times ``inverse`` and less ``shift``, where ``w`` are their weights.
    positive
        A code whose value is positive: zeros under a scale of 0 come out without a sign.
    """

    key: str
    sums: Any
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
    return Book(key, lane_sums(table, CHUNK, staged=staged), _nearest(table), _positive(table))
