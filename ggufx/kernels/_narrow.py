"""float32 to binary16 and bfloat16, sixteen at a time: to nearest, ties to even, as NumPy and ml_dtypes round.

In integers, for the reason given in ``_jit``: LLVM's own conversion calls a helper that is not there on CPUs without F16C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ggufx.kernels._jit import _FLOATS, _LANES, float_to_bits, float_to_half, kernel

_WORDS = ir.VectorType(ir.IntType(32), _LANES)
_SHORTS = ir.VectorType(ir.IntType(16), _LANES)


def _all(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * _LANES)


def _narrow(*, brain: bool) -> Any:
    def round_up(builder: Any, bits: Any, dropped: int) -> Any:
        """Add what makes the cut after ``dropped`` bits round to nearest, ties to even."""
        odd = builder.and_(builder.lshr(bits, _all(dropped)), _all(1))
        return builder.add(builder.add(bits, _all((1 << (dropped - 1)) - 1)), odd)

    def to_brain(builder: Any, bits: Any) -> Any:
        magnitude = builder.and_(bits, _all(0x7FFFFFFF))
        rounded = builder.lshr(round_up(builder, bits, 16), _all(16))
        sign = builder.and_(builder.lshr(bits, _all(16)), _all(0x8000))
        nan = builder.icmp_unsigned(">", magnitude, _all(0x7F800000))
        return builder.select(nan, builder.or_(sign, _all(0x7FC0)), rounded)

    def to_half(builder: Any, bits: Any) -> Any:
        magnitude = builder.and_(bits, _all(0x7FFFFFFF))
        sign = builder.and_(builder.lshr(bits, _all(16)), _all(0x8000))
        normal = builder.lshr(round_up(builder, builder.sub(magnitude, _all(112 << 23)), 13), _all(13))
        # Under 2^-14 the addition rounds: 0.5 has ulp 2^-24, the step of half subnormals.
        shifted = builder.fadd(builder.bitcast(magnitude, _FLOATS), ir.Constant(_FLOATS, [0.5] * _LANES))
        tiny = builder.sub(builder.bitcast(shifted, _WORDS), _all(0x3F000000))
        half = builder.select(builder.icmp_unsigned("<", magnitude, _all(0x38800000)), tiny, normal)
        half = builder.select(builder.icmp_unsigned(">=", magnitude, _all(0x477FF000)), _all(0x7C00), half)
        half = builder.select(builder.icmp_unsigned(">", magnitude, _all(0x7F800000)), _all(0x7E00), half)
        return builder.or_(half, sign)

    convert = to_brain if brain else to_half

    @intrinsic
    def narrow(typing_context: Any, values: Any, index: Any, out: Any, position: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source = context.make_array(signature.args[0])(context, builder, args[0])
            target = context.make_array(signature.args[2])(context, builder, args[2])
            pointer = builder.bitcast(builder.gep(source.data, [args[1]]), _WORDS.as_pointer())
            bits = builder.load(pointer, align=4)
            where = builder.bitcast(builder.gep(target.data, [args[3]]), _SHORTS.as_pointer())
            builder.store(builder.trunc(convert(builder, bits), _SHORTS), where, align=2)
            return context.get_dummy_value()

        return types.void(values, types.intp, out, types.intp), codegen

    return narrow


_halves16 = _narrow(brain=False)
_brains16 = _narrow(brain=True)


@kernel
def to_float16(values, out):
    """Fill ``out`` uint16 [n] with the binary16 bits of ``values`` float32 [n]."""
    whole = values.shape[0] - values.shape[0] % 16
    for i in range(0, whole, 16):
        _halves16(values, i, out, i)
    for i in range(whole, values.shape[0]):
        out[i] = float_to_half(values[i])


@kernel
def to_bfloat16(values, out):
    """Fill ``out`` uint16 [n] with the bfloat16 bits of ``values`` float32 [n]."""
    whole = values.shape[0] - values.shape[0] % 16
    for i in range(0, whole, 16):
        _brains16(values, i, out, i)
    for i in range(whole, values.shape[0]):
        bits = np.uint32(float_to_bits(values[i]))
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            out[i] = np.uint16(((bits >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0))
        else:
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
