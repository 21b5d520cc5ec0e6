"""Scales that several types pack alike."""

from __future__ import annotations

from ggufx.kernels._vector import Block, Vector

_BYTES = range(0, 32, 8)


def scales_and_minima(b: Block) -> tuple[Vector, Vector]:
    """Return the eight scales and the eight minima of a block of Q4_K or Q5_K: two f16, then twelve bytes of six bits each."""

    def floats(scale: Vector, byte: int, nibble: int) -> Vector:
        low = b.fields(12, 4, [bit + nibble for bit in _BYTES])
        high = b.fields(byte, 2, [bit + 6 for bit in _BYTES])
        codes = b.fields(byte, 6, _BYTES).take(range(8), low | high << 4)
        return scale.take(range(8)) * codes.floats()

    return floats(b.d, 4, 0), floats(b.half(2), 8, 4)
