"""Float formats in LLVM code: values are stored in the format of the array they go to.

Numba knows neither binary16 nor bfloat16 on the CPU, so their bits go into arrays of two different integers
(:data:`ggufx.kernels.OUTPUTS`): uint16 is binary16, int16 is bfloat16. Rounding is to nearest, ties to even, as NumPy and
ml_dtypes round.

A NaN becomes the quiet one without payload, whichever way the CPU converts. Rounding must be told: an increment could carry a
payload into the sign. Looking for NaN in every vector costs up to a third of the speed, so whoever stores makes those of the
scales plain (:func:`plain_nans`), once; arithmetic passes a NaN on or makes a plain one, so values have no others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

__all__ = ["plain_nans", "store_floats", "widen_brains", "widen_halves"]

_PROBE = "define <16 x half> @f(<16 x float> %x) {\n%y = fptrunc <16 x float> %x to <16 x half>\nret <16 x half> %y\n}"


@cache
def _converts(triple: str, cpu: str, features: str) -> bool:
    # LLVM knows what the name of a CPU implies, so it is asked: the name of a helper begins with two underscores.
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    return "__" not in machine.emit_assembly(llvm.parse_assembly(_PROBE))


def _can_convert_halves(context: Any) -> bool:
    """Return whether the CPU that ``context`` compiles for converts binary16 itself (x86: F16C).

    Where it does not, LLVM calls a helper that is not there at run time, which kills the process.
    """
    return _converts(*context.codegen().magic_tuple())


def _of(element: Any, values: Any) -> Any:
    """Return the type of as many ``element`` as ``values`` has: a vector, or a scalar."""
    return ir.VectorType(element, values.type.count) if isinstance(values.type, ir.VectorType) else element


def _all(number: float, values: Any) -> Any:
    is_vector = isinstance(values.type, ir.VectorType)
    return ir.Constant(values.type, [number] * values.type.count if is_vector else number)


def widen_halves(context: Any, builder: Any, halves: Any, *, signalling: bool = True) -> Any:
    """Widen binary16 bits to float32, exactly; faster where no NaN needs to stay ``signalling`` (CPUs make them quiet)."""
    if not signalling and _can_convert_halves(context):
        return builder.fpext(builder.bitcast(halves, _of(ir.HalfType(), halves)), _of(ir.FloatType(), halves))
    bits = builder.zext(halves, _of(ir.IntType(32), halves))
    sign = builder.shl(builder.and_(bits, _all(0x8000, bits)), _all(16, bits))
    moved = builder.shl(builder.and_(bits, _all(0x7FFF, bits)), _all(13, bits))
    # The exponents' biases differ by 112. Exponent 0 means 2^-14 without the leading one: write 2^-14 with it and subtract it,
    # exactly. (One multiplication by 2^112 does both, but CPUs are slow to multiply float subnormals.)
    floats = _of(ir.FloatType(), halves)
    with_one = builder.bitcast(builder.add(moved, _all(113 << 23, bits)), floats)
    low = builder.bitcast(builder.fsub(with_one, _all(2.0**-14, with_one)), bits.type)
    normal = builder.add(moved, _all(112 << 23, bits))
    magnitude = builder.select(builder.icmp_unsigned("<", moved, _all(1 << 23, bits)), low, normal)
    special = builder.icmp_unsigned(">=", moved, _all(0x7C00 << 13, bits))
    magnitude = builder.select(special, builder.or_(moved, _all(0x7F800000, bits)), magnitude)
    return builder.bitcast(builder.or_(magnitude, sign), floats)


def widen_brains(builder: Any, brains: Any) -> Any:
    """Widen bfloat16 bits to float32."""
    bits = builder.zext(brains, _of(ir.IntType(32), brains))
    return builder.bitcast(builder.shl(bits, _all(16, bits)), _of(ir.FloatType(), brains))


def plain_nans(builder: Any, out_type: Any, values: Any) -> Any:
    """Return float32 ``values`` with NaNs that :func:`store_floats` rounds right; as they are when ``out`` is float32."""
    if out_type.dtype == types.float32:
        return values
    bits = builder.bitcast(values, _of(ir.IntType(32), values))
    plain = builder.or_(builder.and_(bits, _all(0x80000000, bits)), _all(0x7FC00000, bits))
    nan = builder.fcmp_unordered("uno", values, values)
    return builder.select(nan, builder.bitcast(plain, values.type), values)


def _round_up(builder: Any, bits: Any, dropped: int) -> Any:
    """Add what makes the cut after ``dropped`` bits round to nearest, ties to even."""
    odd = builder.and_(builder.lshr(bits, _all(dropped, bits)), _all(1, bits))
    return builder.add(builder.add(bits, _all((1 << (dropped - 1)) - 1, bits)), odd)


def _to_brains(builder: Any, values: Any) -> Any:
    # Not by the instruction of AVX512-BF16: it flushes subnormals. A plain NaN stays one.
    bits = builder.bitcast(values, _of(ir.IntType(32), values))
    rounded = builder.lshr(_round_up(builder, bits, 16), _all(16, bits))
    return builder.trunc(rounded, _of(ir.IntType(16), values))


def _to_halves(builder: Any, values: Any) -> Any:
    return builder.bitcast(builder.fptrunc(values, _of(ir.HalfType(), values)), _of(ir.IntType(16), values))


def _to_halves_in_integers(builder: Any, values: Any) -> Any:
    bits = builder.bitcast(values, _of(ir.IntType(32), values))
    magnitude = builder.and_(bits, _all(0x7FFFFFFF, bits))
    sign = builder.and_(builder.lshr(bits, _all(16, bits)), _all(0x8000, bits))
    rebased = builder.sub(magnitude, _all(112 << 23, bits))
    normal = builder.lshr(_round_up(builder, rebased, 13), _all(13, bits))
    # Under 2^-14 the addition rounds: 0.5 has ulp 2^-24, the step of half subnormals.
    shifted = builder.fadd(builder.bitcast(magnitude, values.type), _all(0.5, values))
    tiny = builder.sub(builder.bitcast(shifted, bits.type), _all(0x3F000000, bits))
    half = builder.select(builder.icmp_unsigned("<", magnitude, _all(0x38800000, bits)), tiny, normal)
    # From 65520 on.
    half = builder.select(builder.icmp_unsigned(">=", magnitude, _all(0x477FF000, bits)), _all(0x7C00, bits), half)
    half = builder.select(builder.icmp_unsigned(">", magnitude, _all(0x7F800000, bits)), _all(0x7E00, bits), half)
    return builder.trunc(builder.or_(half, sign), _of(ir.IntType(16), values))


def store_floats(context: Any, builder: Any, out_type: Any, out: Any, index: Any, values: Any) -> None:
    """Store float32 ``values`` (a vector or one), whose NaNs are plain, from ``out[index]`` on in the array's format."""
    if out_type.dtype == types.uint16:
        values = (_to_halves if _can_convert_halves(context) else _to_halves_in_integers)(builder, values)
    elif out_type.dtype == types.int16:
        values = _to_brains(builder, values)
    else:
        assert out_type.dtype == types.float32, out_type
    target = context.make_array(out_type)(context, builder, out)
    where = builder.bitcast(builder.gep(target.data, [index]), values.type.as_pointer())
    builder.store(values, where, align=out_type.dtype.bitwidth // 8)
