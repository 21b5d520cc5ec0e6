"""What a kernel of another package is written with: Numba's compiler as ggufx uses it, and what plain Numba lacks.

>>> from ggufx.kernels.jit import half_at, kernel, put
>>> @kernel                                                                            # doctest: +SKIP
... def decode(rows, out, block_len):
...     ...

``kernel`` compiles strictly (no fused operations, NaN kept), without the global lock, and keeps the code on disk. ``half_at``
and ``float_at`` read stored floats, as Numba has no 16-bit ones. ``put(out, index, value)`` writes a float32 in the dtype that
``out`` stands for, rounded to nearest even, so that one function serves all of :data:`ggufx.kernels.OUTPUTS`.
``nibble_lookup(table)`` makes a function that looks 16 bytes of nibbles up at once.
"""

from __future__ import annotations

from ggufx.kernels._jit import (
    bits_to_float,
    float_at,
    float_to_bits,
    float_to_half,
    half_at,
    half_to_float,
    inline,
    kernel,
    load32,
    load64,
    nibble_lookup,
    put,
)

__all__ = [
    "bits_to_float",
    "float_at",
    "float_to_bits",
    "float_to_half",
    "half_at",
    "half_to_float",
    "inline",
    "kernel",
    "load32",
    "load64",
    "nibble_lookup",
    "put",
]
