"""Vector code for the blocks of a type, written in Python while the kernel compiles.

LLVM's loop vectoriser makes little of a block whose scales and codes are scattered bits. Here a kernel spells the block out:
``@block_intrinsic`` turns a function of one :class:`Block` into an intrinsic whose straight-line code is what the function
emitted through :class:`Vector`, so that Python's loops are unrolled and Python's numbers are constants. All of it is generic
LLVM IR: every CPU gets correct code, x86 and ARM get byte shuffles for the lookups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ggufx import tables
from ggufx.kernels._floats import plain_nans, store_floats, widen_halves
from ggufx.kernels._jit import _vector_lookup

__all__ = ["BYTE", "LANES", "WORD", "Block", "Vector", "block_intrinsic", "trellis"]

LANES = 16
"""Elements per step: one byte shuffle, one 512-bit or two 256-bit float vectors."""

_FLOAT = ir.FloatType()
BYTE = ir.IntType(8)
WORD = ir.IntType(32)


class Vector:
    """An LLVM vector of integers or floats. Operators work lane by lane, with another vector or a number for all lanes.

    Integers have no sign: ``>>`` brings zeros in; :meth:`floats` takes them as signed.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        count: int = self.value.type.count
        return count

    def _operand(self, other: Vector | float | Sequence[float]) -> Any:
        if isinstance(other, Vector):
            return other.value
        numbers = [other] * self.lanes if isinstance(other, int | float) else list(other)
        return ir.Constant(self.value.type, numbers)

    def _apply(self, name: str, other: Any) -> Vector:
        is_float = self.value.type.element == _FLOAT
        method = getattr(self.builder, f"f{name}" if is_float and name in {"add", "sub", "mul"} else name)
        return Vector(self.builder, method(self.value, self._operand(other)))

    def __add__(self, other: Any) -> Vector:
        return self._apply("add", other)

    def __sub__(self, other: Any) -> Vector:
        return self._apply("sub", other)

    def __mul__(self, other: Any) -> Vector:
        return self._apply("mul", other)

    def __and__(self, other: Any) -> Vector:
        return self._apply("and_", other)

    def __or__(self, other: Any) -> Vector:
        return self._apply("or_", other)

    def __xor__(self, other: Any) -> Vector:
        return self._apply("xor", other)

    def __lshift__(self, other: Any) -> Vector:
        return self._apply("shl", other)

    def __rshift__(self, other: Any) -> Vector:
        return self._apply("lshr", other)

    def __neg__(self) -> Vector:
        if self.value.type.element == _FLOAT:
            return Vector(self.builder, self.builder.fneg(self.value))
        return Vector(self.builder, self.builder.neg(self.value))

    def equals(self, other: Any) -> Vector:
        """Compare integers: a mask."""
        return Vector(self.builder, self.builder.icmp_unsigned("==", self.value, self._operand(other)))

    def choose(self, yes: Vector, no: Vector) -> Vector:
        """Where this mask is set ``yes``, else ``no``."""
        return Vector(self.builder, self.builder.select(self.value, yes.value, no.value))

    def take(self, lanes: Sequence[int], other: Vector | None = None) -> Vector:
        """Pick lanes by number; those from :attr:`lanes` on are lanes of ``other``."""
        if other is None and list(lanes) == list(range(self.lanes)):
            return self
        second = ir.Constant(self.value.type, ir.Undefined) if other is None else other.value
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
        return Vector(self.builder, self.builder.shuffle_vector(self.value, second, mask))

    def spread(self, lane: int) -> Vector:
        """Repeat one lane :data:`LANES` times."""
        return self.take([lane] * LANES)

    def widen(self, n_bits: int) -> Vector:
        """Zero-extend integers; a mask gives zeros and ones."""
        wide = ir.VectorType(ir.IntType(n_bits), self.lanes)
        return Vector(self.builder, self.builder.zext(self.value, wide))

    def extend(self, n_bits: int) -> Vector:
        """Sign-extend integers."""
        return self.mask_of(n_bits)

    def narrow(self, n_bits: int) -> Vector:
        """Keep the low bits of integers."""
        return Vector(self.builder, self.builder.trunc(self.value, ir.VectorType(ir.IntType(n_bits), self.lanes)))

    def mask_of(self, n_bits: int) -> Vector:
        """Extend a mask to integers of all zeros or all ones."""
        wide = ir.VectorType(ir.IntType(n_bits), self.lanes)
        return Vector(self.builder, self.builder.sext(self.value, wide))

    def cast(self, element: Any, lanes: int) -> Vector:
        """Reinterpret the bits."""
        return Vector(self.builder, self.builder.bitcast(self.value, ir.VectorType(element, lanes)))

    def floats(self) -> Vector:
        """Convert signed integers to float32."""
        return Vector(self.builder, self.builder.sitofp(self.value, ir.VectorType(_FLOAT, self.lanes)))

    def float_bits(self) -> Vector:
        """Reinterpret 32-bit integers as float32."""
        return self.cast(_FLOAT, self.lanes)

    def fused(self, factor: Vector | float, addend: Vector | float) -> Vector:
        """Return ``self * factor + addend`` of floats, rounded once."""
        # The builder's own fma() refuses vectors.
        vector = self.value.type
        fma = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{self.lanes}f32"
        )
        return Vector(self.builder, self.builder.call(fma, [self.value, self._operand(factor), self._operand(addend)]))

    def lookup(self, table: Sequence[int]) -> Vector:
        """Look :data:`LANES` byte codes up in a table of signed bytes."""
        return Vector(self.builder, _vector_lookup(self.builder, self.value, tuple(table), LANES))


def trellis(seeds: Vector, group_len: int) -> Vector:
    """Return the generator's integers, -126..126, for groups of ``group_len`` lanes; each lane has its group's seed.

    Output i of a group has the state ``seed * factor^(i+1)``, so no lane waits for another.
    """
    factors = [pow(tables.TRELLIS_FACTOR, lane % group_len + 1, 1 << 32) for lane in range(seeds.lanes)]
    # The product's top byte is the sum of the four bytes: they are below 64, nothing carries into it.
    return (((seeds * factors & tables.TRELLIS_MASK) * 0x01010101) >> 24) - 126


class Block:
    """One packed block of a row, and the place of its values in the output.

    Attributes
    ----------
    d : Vector
        The scale that the kernel passed, in :data:`LANES` lanes of float32.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        data_type, _, _, out_type, _ = signature.args
        data, start, d, out, position = args
        self._builder = builder
        self._source = builder.gep(context.make_array(data_type)(context, builder, data).data, [start])
        self._store = partial(store_floats, context, builder, out_type, out)
        self._position = position
        self._loaded: dict[tuple[int, int, int], Vector] = {}
        self._plain = partial(plain_nans, builder, out_type)
        self._widen = partial(widen_halves, context, builder)
        self.d = self._scale(d)

    def load(self, byte: int, lanes: int, n_bits: int = 8) -> Vector:
        """Load little-endian integers from ``byte`` of the block on."""
        key = (byte, lanes, n_bits)
        if key not in self._loaded:
            pointer = self._builder.gep(self._source, [ir.Constant(ir.IntType(64), byte)])
            vector = ir.VectorType(ir.IntType(n_bits), lanes)
            value = self._builder.load(self._builder.bitcast(pointer, vector.as_pointer()), align=1)
            self._loaded[key] = Vector(self._builder, value)
        return self._loaded[key]

    def _scale(self, value: Any) -> Vector:
        lane = ir.Constant(ir.VectorType(_FLOAT, LANES), ir.Undefined)
        scalar = self._builder.insert_element(lane, self._plain(value), ir.Constant(ir.IntType(32), 0))
        return Vector(self._builder, scalar).spread(0)

    def half(self, byte: int) -> Vector:
        """Load a second scale, binary16 at ``byte`` of the block, in :data:`LANES` lanes of float32, to compute with."""
        bits = self._builder.extract_element(self.load(byte, 1, 16).value, ir.Constant(ir.IntType(32), 0))
        return self._scale(self._widen(bits, signalling=False))  # arithmetic makes any NaN quiet

    def widened(self, halves: Vector) -> Vector:
        """Widen binary16 bits to float32; signalling NaNs may become quiet ones."""
        return Vector(self._builder, self._widen(halves.value, signalling=False))

    def flags(self, byte: int, lanes: int) -> Vector:
        """Load consecutive bits as a mask."""
        return self.load(byte, 1, lanes).cast(ir.IntType(1), lanes)

    def fields(self, byte: int, n_bits: int, positions: Sequence[int]) -> Vector:
        """Gather fields of ``n_bits`` bits at bit ``positions`` (each within one 32-bit word) as 32-bit integers."""
        n_words = max(positions) // 32 + 1
        if n_words == 1 and max(positions) + n_bits <= 16:
            words = self.load(byte, 1, 16).widen(32)
        else:
            words = self.load(byte, n_words, 32)
        spread = words.take([position // 32 for position in positions])
        return (spread >> [position % 32 for position in positions]) & ((1 << n_bits) - 1)

    def codes(self, first: int, *planes: tuple[int, int, int]) -> Vector:
        """Collect the codes of elements ``first .. first + LANES - 1`` as bytes.

        A plane ``(byte, n_bits, run)`` starts at ``byte`` and holds ``n_bits`` bits per element in runs of ``run`` bytes (a
        multiple of LANES): the lowest bits of a run's bytes are its first ``run`` elements, the next bits the next ones. The
        first plane is the lowest bits of the codes.
        """
        result, place = None, 0
        for byte, n_bits, run in planes:
            group = first // (run * 8 // n_bits) * run
            loaded = self.load(byte + group + first % run, LANES)
            move = first // run % (8 // n_bits) * n_bits - place
            moved = loaded >> move if move > 0 else loaded << -move if move < 0 else loaded
            plane = moved & ((1 << n_bits) - 1 << place)
            result = plane if result is None else result | plane
            place += n_bits
        assert result is not None
        return result

    def store(self, position: int, values: Vector) -> None:
        """Store floats at element ``position`` of the block. Their NaNs must come from the scales, or be plain."""
        self._store(self._builder.add(self._position, ir.Constant(self._position.type, position)), values.value)

    def store_twins(
        self, table: tuple[int, ...], scales: Vector, flags: Vector, codes: Callable[[int], Vector]
    ) -> None:
        """Store ``scale * (table[code] + (shift where the flag is set))`` for sub-blocks of equal length.

        ``scales`` (float32) and ``flags`` (a mask) have a lane per sub-block, together 256 elements; ``codes(i)`` gives those
        of elements i .. i + LANES - 1. The sum is a byte: the shifted twins of all tables are.
        """
        shifts = flags.mask_of(8) & tables.SHIFTS[len(table).bit_length() - 1]
        for i in range(0, 256, LANES):
            k = i * scales.lanes // 256
            values = codes(i).lookup(table) + shifts.spread(k)
            self.store(i, scales.spread(k) * values.floats())


def block_intrinsic(emit: Callable[[Block], None]) -> Any:
    """Return the intrinsic ``block(data, start, d, out, position)`` whose code ``emit`` writes.

    It reads the block at byte ``start`` of ``data`` (uint8, contiguous) and writes its values to ``out[position:]``
    (contiguous, of a dtype that kernels decode to); ``d`` is a float32.
    """

    @intrinsic
    def block(typing_context: Any, data: Any, start: Any, d: Any, out: Any, position: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(Block(context, builder, signature, args))
            return context.get_dummy_value()

        return types.void(data, types.intp, types.float32, out, types.intp), codegen

    return block
