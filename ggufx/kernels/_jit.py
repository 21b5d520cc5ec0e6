"""The one decorator of all kernels, and the few intrinsics that plain Numba lacks.

No ``fastmath`` (a fused multiply-add changes bits, NaN checks vanish), no ``parallel`` (threads are the caller's), no
eager signature (it would compile at import). Compiled code is kept on disk, see :mod:`ggufx.kernels._cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.errors import TypingError
from numba.core.typed_passes import InlineOverloads, NativeLowering, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes, InlineInlinables
from numba.extending import intrinsic

from ggufx import stopping
from ggufx.kernels import compiled, uncollected
from ggufx.kernels._cache import KNOWN_NUMBA, KernelCache
from ggufx.kernels._floats import plain_nans, store_floats, widen_brains, widen_halves

__all__ = [
    "bits_to_float",
    "float_at",
    "float_to_bits",
    "float_to_half",
    "half_at",
    "half_to_float",
    "halves_to_pairs",
    "inline",
    "kernel",
    "larger",
    "load16",
    "load32",
    "load64",
    "load_floats16",
    "nibble_lookup",
    "pairs_to_halves",
    "put",
    "scale_bytes16",
    "scale_signed16",
    "smaller",
    "store64",
    "subroutine",
    "trits4",
    "trits16",
    "widen_brains16",
    "widen_halves16",
]


def kernel(function: Callable[..., Any], key: str | None = None) -> Any:
    """Compile ``function`` on first call: nogil, strict IEEE arithmetic, kept on disk where a folder can be written.

    A function made by a factory that closes over other compiled functions needs a ``key``, its own among those of the factory.
    """
    # Nobody calls kernels from C: the wrapper for that would only be compiled.
    dispatcher = numba.njit(nogil=True, no_cfunc_wrapper=True, error_model="numpy", **_pipeline(_Compiler))(function)
    if hasattr(dispatcher, "_cache"):  # NUMBA_DISABLE_JIT gives the plain function back
        dispatcher._compiler.compile = compiled(function.__module__)(uncollected()(dispatcher._compiler.compile))
        dispatcher._cache = KernelCache(function, key)
    return dispatcher


@intrinsic
def put(typing_context: Any, out: Any, index: Any, value: Any) -> Any:
    """Write ``out[index] = value``, a float32 in the format that the array's dtype stands for."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = plain_nans(builder, signature.args[0], args[2])
        store_floats(context, builder, signature.args[0], args[0], args[1], value)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.float32), codegen


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code of a subroutine, which only kernels link: optimised and turned into machine code as a part of them, not before."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPart(NativeLowering):  # type: ignore[misc]
    _name = "ggufx_lower_part"

    def run_pass(self, state: Any) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        # Without this Numba asks for the address of a wrapper that is not there.
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        if not state.flags.forceinline:
            # What LLVM copies into its callers it optimises in every place; and where the length of a loop becomes known
            # there, unrolls it before it could vectorise it.
            function = state.library.get_function(lowered.fndesc.llvm_func_name)
            function.add_function_attribute("noinline")
        # What identifies the function for its callers; Numba takes nothing but a built-in function. This one harms nobody.
        entry = [state.func_id.func_qualname].count
        state.targetctx.insert_user_function(entry, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=entry)
        return True


_POINTLESS = frozenset((InlineClosureLikes, InlineOverloads, NopythonRewrites, InlineInlinables))
"""Passes of Numba for closures, comprehensions and array expressions, of which kernels have none: they are told so."""


class _Compiler(CompilerBase):  # type: ignore[misc]
    """Numba's own pipeline for machine code without what kernels do not need."""

    lowering: Any = NativeLowering

    def define_pipelines(self) -> list[Any]:
        stopping.check()  # once for every function that a kernel calls
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (self.lowering if found is NativeLowering else found, why)
            for found, why in manager.passes
            if found not in _POINTLESS
        ]
        manager._finalized = False
        manager.finalize()
        return [manager]


class _PartCompiler(_Compiler):
    lowering = _LowerPart


def _pipeline(compiler: Any) -> dict[str, Any]:
    return {"pipeline_class": compiler} if numba.__version__.startswith(KNOWN_NUMBA) else {}


_PART = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}


def subroutine(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call, so that its code is there once, however many calls there are.

    It becomes part of their machine code. So it has no way in from Python and no place on disk: either costs as much to make
    as a small function itself.
    """
    return numba.njit(**_pipeline(_PartCompiler), **_PART)(function)


def inline(function: Callable[..., Any]) -> Any:
    """Compile a function that becomes part of every kernel or subroutine that calls it, at every call: for small ones."""
    return numba.njit(forceinline=True, **_pipeline(_PartCompiler), **_PART)(function)


def _bitcast(source: Any, target: Any) -> Any:
    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        # Integer arithmetic is 64 bits wide in Numba; the declared signature makes it truncate to the 32 that matter.
        if value != source and not (isinstance(source, types.Integer) and isinstance(value, types.Integer)):
            raise TypingError(f"expected {source}, got {value}")

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), codegen

    return cast


def _extreme(comparison: str) -> Any:
    @intrinsic
    def pick(typing_context: Any, a: Any, b: Any) -> Any:
        unified = typing_context.unify_types(types.unliteral(a), types.unliteral(b))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if isinstance(unified, types.Float):
                second = builder.fcmp_ordered(comparison, args[1], args[0])
            else:
                compare = builder.icmp_signed if unified.signed else builder.icmp_unsigned
                second = compare(comparison, args[1], args[0])
            return builder.select(second, args[1], args[0])

        return unified(unified, unified), codegen

    return pick


larger = _extreme(">")
"""Return what ``max`` of two numbers does, which Numba compiles as a function of its own for every pair of types."""
smaller = _extreme("<")
"""Return what ``min`` of two numbers does."""

bits_to_float = _bitcast(types.uint32, types.float32)
"""Reinterpret uint32 bits as float32."""
float_to_bits = _bitcast(types.float32, types.uint32)
"""Reinterpret a float32 as its uint32 bits."""


# Half conversions in integers: LLVM's own need F16C, and where a CPU lacks it the call goes to a run-time helper that is
# not there, which kills the process. They run once a block, so their cost does not show.


@inline
def half_to_float(bits):
    """Widen binary16 bits (uint16) to float32; exact for every input, subnormals, infinities and NaN included."""
    magnitude = np.uint32(bits & np.uint16(0x7FFF))
    sign = np.uint32(bits & np.uint16(0x8000)) << np.uint32(16)
    wide = magnitude << np.uint32(13)
    if magnitude >= np.uint32(0x7C00):
        return bits_to_float(sign | np.uint32(0x7F800000) | wide)
    # The exponents' biases differ by 112; the product is exact, for half subnormals (float subnormals here), too.
    value = bits_to_float(wide) * np.float32(2.0**112)
    return bits_to_float(sign | float_to_bits(value))


@inline
def half_at(data, index):
    """Read the binary16 at byte ``index`` of a uint8 array as float32."""
    return half_to_float(np.uint16(data[index] | (np.uint16(data[index + 1]) << np.uint16(8))))


@inline
def float_at(data, index):
    """Read the little-endian float32 at byte ``index`` of a uint8 array."""
    low = data[index] | (np.uint32(data[index + 1]) << np.uint32(8))
    high = data[index + 2] | (np.uint32(data[index + 3]) << np.uint32(8))
    return bits_to_float(low | (high << np.uint32(16)))


@inline
def float_to_half(value):
    """Round a float32 to binary16 bits (uint16): to nearest, ties to even, subnormals kept, NaN to the quiet 0x7E00."""
    bits = np.uint32(float_to_bits(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    elif magnitude >= np.uint32(0x477FF000):  # 65520 and more
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # under 2^-14: the addition does the rounding, 0.5 has ulp 2^-24
        half = np.uint32(float_to_bits(bits_to_float(magnitude) + np.float32(0.5))) - np.uint32(0x3F000000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    return np.uint16(half | sign)


def _vector_lookup(builder: Any, indices: Any, table: tuple[int, ...], lanes: int) -> Any:
    """Emit ``table[indices]`` for a vector of byte indices, as extract/insert IR that becomes a byte shuffle.

    LLVM turns ``table[index]`` loads into gathers, never into a shuffle. Spelt like this, x86 and ARM back ends recognise
    one byte-shuffle instruction per 16 entries, and other targets get correct scalar code. The table is int8: as float
    lanes the same shuffle falls apart on CPUs without AVX-512.
    """
    i32 = ir.IntType(32)
    vector = ir.VectorType(ir.IntType(8), lanes)
    halves = []
    for start in range(0, len(table), lanes):
        part = list(table[start : start + lanes])
        values = ir.Constant(vector, part + [0] * (lanes - len(part)))
        looked_up = ir.Constant(vector, ir.Undefined)
        inner = builder.and_(indices, ir.Constant(vector, [lanes - 1] * lanes))
        for lane in range(lanes):
            position = builder.extract_element(inner, ir.Constant(i32, lane))
            element = builder.extract_element(values, builder.zext(position, i32))
            looked_up = builder.insert_element(looked_up, element, ir.Constant(i32, lane))
        halves.append(looked_up)
    result = halves[0]
    for number, half in enumerate(halves[1:], 1):
        bound = ir.Constant(vector, [number * lanes] * lanes)
        result = builder.select(builder.icmp_unsigned(">=", indices, bound), half, result)
    return result


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    result = ir.Constant(vector, ir.Undefined)
    for lane in range(vector.count):
        result = builder.insert_element(result, scalar, ir.Constant(ir.IntType(32), lane))
    return result


_LANES = 16
_BYTES = ir.VectorType(ir.IntType(8), _LANES)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)


def _load_bytes(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    source = context.make_array(array_type)(context, builder, array)
    pointer = builder.bitcast(builder.gep(source.data, [index]), _BYTES.as_pointer())
    return builder.load(pointer, align=1)


def _store_scaled(context: Any, builder: Any, out_type: Any, out: Any, index: Any, values: Any, scale: Any) -> None:
    """Store ``float32(values) * scale`` for 16 signed bytes: one IEEE multiplication each."""
    scale = _splat(builder, plain_nans(builder, out_type, scale), _FLOATS)
    store_floats(context, builder, out_type, out, index, builder.fmul(builder.sitofp(values, _FLOATS), scale))


def _reorder_nibbles(order: list[int]) -> Any:
    """Return an intrinsic ``reorder(source, index, out, position)`` that permutes the 32 nibbles of 16 bytes.

    Nibbles are numbered with the low ones of the bytes first, 0..15, then the high ones.
    """
    vector = ir.VectorType(ir.IntType(32), _LANES)
    lanes = (ir.Constant(vector, order[:_LANES]), ir.Constant(vector, order[_LANES:]))

    @intrinsic
    def reorder(typing_context: Any, source: Any, index: Any, out: Any, position: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            four = ir.Constant(_BYTES, [4] * _LANES)
            packed = _load_bytes(context, builder, signature.args[0], args[0], args[1])
            nibbles = (builder.and_(packed, ir.Constant(_BYTES, [15] * _LANES)), builder.lshr(packed, four))
            low, high = (builder.shuffle_vector(*nibbles, mask) for mask in lanes)
            target = context.make_array(signature.args[2])(context, builder, args[2])
            where = builder.bitcast(builder.gep(target.data, [args[3]]), _BYTES.as_pointer())
            builder.store(builder.or_(low, builder.shl(high, four)), where, align=1)
            return context.get_dummy_value()

        return types.void(source, types.intp, out, types.intp), codegen

    return reorder


pairs_to_halves = _reorder_nibbles([nibble for k in range(_LANES) for nibble in (k, _LANES + k)])
"""Reorder 32 codes: byte k held 2k (low) and 2k + 1 (high), afterwards byte j holds j (low) and j + 16 (high)."""
halves_to_pairs = _reorder_nibbles([*range(0, 2 * _LANES, 2), *range(1, 2 * _LANES, 2)])
"""The inverse of :data:`pairs_to_halves`."""


def nibble_lookup(table: tuple[int, ...]) -> Any:
    """Return an intrinsic that decodes 16 bytes of nibbles through a table of 16 signed bytes.

    ``decode16(codes, index, scale, out, low, high)`` reads ``codes[index : index + 16]`` and writes
    ``out[low + j] = float32(table[codes[index + j] & 15]) * scale`` and the same for the high nibbles at ``high``, for j
    in 0..15.
    """
    assert len(table) == _LANES

    @intrinsic
    def decode16(typing_context: Any, codes: Any, index: Any, scale: Any, out: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            packed = _load_bytes(context, builder, signature.args[0], args[0], args[1])
            nibbles = builder.and_(packed, ir.Constant(_BYTES, [15] * _LANES))
            for indices, where in (
                (nibbles, args[4]),
                (builder.lshr(packed, ir.Constant(_BYTES, [4] * _LANES)), args[5]),
            ):
                values = _vector_lookup(builder, indices, table, _LANES)
                _store_scaled(context, builder, signature.args[3], args[3], where, values, args[2])
            return context.get_dummy_value()

        return types.void(codes, types.intp, types.float32, out, types.intp, types.intp), codegen

    return decode16


@intrinsic
def scale_bytes16(typing_context: Any, values: Any, index: Any, scale: Any, out: Any, position: Any) -> Any:
    """Write ``out[position + j] = float32(int8(values[index + j])) * scale`` for j in 0..15."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = _load_bytes(context, builder, signature.args[0], args[0], args[1])
        _store_scaled(context, builder, signature.args[3], args[3], args[4], loaded, args[2])
        return context.get_dummy_value()

    return types.void(values, types.intp, types.float32, out, types.intp), codegen


def _load(bits: int) -> Any:
    @intrinsic
    def load(typing_context: Any, data: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, args[0])
            pointer = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(bits).as_pointer())
            return builder.load(pointer, align=1)

        return types.Integer.from_bitwidth(bits, signed=False)(data, types.intp), codegen

    return load


load16 = _load(16)
"""Read the little-endian uint16 at byte ``index`` of a contiguous 1-D uint8 array; no alignment needed."""
load32 = _load(32)
"""Read the little-endian uint32 at byte ``index`` of a contiguous 1-D uint8 array; no alignment needed."""
load64 = _load(64)
"""Read the little-endian uint64 at byte ``index`` of a contiguous 1-D uint8 array; no alignment needed."""


@intrinsic
def store64(typing_context: Any, data: Any, index: Any, value: Any) -> Any:
    """Write a uint64, little-endian, at byte ``index`` of a contiguous 1-D uint8 array; no alignment needed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(64).as_pointer())
        builder.store(args[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), codegen


def _lanes_of_bits(builder: Any, bits: Any) -> Any:
    """Spread a 16-bit integer over 16 booleans, lowest bit first."""
    return builder.bitcast(bits, ir.VectorType(ir.IntType(1), _LANES))


def _join_words(builder: Any, first: Any, second: Any) -> Any:
    """Make 16 bytes of two uint64, the first one in the lower lanes."""
    words = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
    for lane, word in enumerate((first, second)):
        words = builder.insert_element(words, word, ir.Constant(ir.IntType(32), lane))
    return builder.bitcast(words, _BYTES)


@intrinsic
def scale_signed16(
    typing_context: Any, first: Any, second: Any, signs: Any, scale: Any, out: Any, position: Any
) -> Any:
    """Write ``out[position + j] = float32(+-byte j) * scale`` for the 16 signed bytes of two words, j in 0..15.

    Bit j of ``signs`` (uint16) negates byte j.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _join_words(builder, args[0], args[1])
        negative = builder.sub(ir.Constant(_BYTES, [0] * _LANES), values)
        values = builder.select(_lanes_of_bits(builder, args[2]), negative, values)
        _store_scaled(context, builder, signature.args[4], args[4], args[5], values, args[3])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint16, types.float32, out, types.intp), codegen


def _trits(builder: Any, rest: Any) -> Any:
    """Turn 16 bytes, fractions of 256, into their first base-3 digits less one: ``(x * 3 >> 8) - 1``."""
    values = ir.Constant(_BYTES, [-1] * _LANES)
    for bound in (86, 171):  # the least x of digits 1 and 2
        reached = builder.icmp_unsigned(">=", rest, ir.Constant(_BYTES, [bound] * _LANES))
        values = builder.add(values, builder.zext(reached, _BYTES))
    return values


@intrinsic
def trits16(typing_context: Any, codes: Any, index: Any, scale: Any, out: Any, position: Any, stride: Any) -> Any:
    """Decode 16 bytes of five base-3 digits each, the most significant first, to -1, 0 or 1 times ``scale``.

    Digit n of byte j goes to ``out[position + stride * n + j]``. A byte is a fraction of 256; tripled modulo 256 it is the
    fraction that follows its first digit.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rest = _load_bytes(context, builder, signature.args[0], args[0], args[1])
        where = args[4]
        for _ in range(5):
            _store_scaled(context, builder, signature.args[3], args[3], where, _trits(builder, rest), args[2])
            rest = builder.mul(rest, ir.Constant(_BYTES, [3] * _LANES))
            where = builder.add(where, args[5])
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.float32, out, types.intp, types.intp), codegen


@intrinsic
def trits4(typing_context: Any, codes: Any, scale: Any, out: Any, position: Any) -> Any:
    """Decode the four bytes of a uint32, four base-3 digits each: digit n of byte j to ``out[position + 4 * n + j]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes16 = builder.bitcast(_splat(builder, args[0], ir.VectorType(ir.IntType(32), 4)), _BYTES)
        rest = builder.mul(bytes16, ir.Constant(_BYTES, [3 ** (lane // 4) for lane in range(_LANES)]))
        _store_scaled(context, builder, signature.args[2], args[2], args[3], _trits(builder, rest), args[1])
        return context.get_dummy_value()

    return types.void(types.uint32, types.float32, out, types.intp), codegen


def _widen(element: Any, convert: Callable[[Any, Any, Any, Any], Any]) -> Any:
    stored = ir.VectorType(element, _LANES)

    @intrinsic
    def widen(typing_context: Any, data: Any, index: Any, out: Any, position: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data_type, _, out_type, _ = signature.args
            source = context.make_array(data_type)(context, builder, args[0])
            pointer = builder.bitcast(builder.gep(source.data, [args[1]]), stored.as_pointer())
            values = convert(context, builder, out_type, builder.load(pointer, align=1))
            store_floats(context, builder, out_type, args[2], args[3], plain_nans(builder, out_type, values))
            return context.get_dummy_value()

        return types.void(data, types.intp, out, types.intp), codegen

    return widen


def _from_halves(context: Any, builder: Any, out_type: Any, halves: Any) -> Any:
    # Narrower outputs lose what makes a NaN signalling anyway.
    return widen_halves(context, builder, halves, signalling=out_type.dtype == types.float32)


widen_halves16 = _widen(ir.IntType(16), _from_halves)
"""``widen_halves16(data, index, out, position)``: 16 binary16 from byte ``index`` of ``data`` to ``out[position:]``."""
widen_brains16 = _widen(ir.IntType(16), lambda context, builder, out_type, brains: widen_brains(builder, brains))
"""The same of bfloat16."""
load_floats16 = _widen(ir.FloatType(), lambda context, builder, out_type, values: values)
"""The same of float32."""
