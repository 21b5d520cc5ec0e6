"""Q8_0 on the CPU: an f16 scale and 32 signed bytes."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import bits_to_float, float_to_bits, float_to_half, half_to_float, kernel, scale_bytes16


@kernel
def decode(rows, out, block_len):
    block_nbytes = block_len + 2
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start = b * block_nbytes
            d = half_to_float(np.uint16(row[start] | (np.uint16(row[start + 1]) << np.uint16(8))))
            # Not a loop: 32 turns are too few for LLVM's vector loop and its overlap checks.
            scale_bytes16(row, start + 2, d, y, b * block_len)
            scale_bytes16(row, start + 18, d, y, b * block_len + 16)


@kernel
def encode(values, out, block_len):
    block_nbytes = block_len + 2
    for r in range(values.shape[0]):
        row, target = values[r], out[r]
        for b in range(row.shape[0] // block_len):
            x = row[b * block_len : (b + 1) * block_len]
            # max |x| as an integer maximum of the bits without sign: a float maximum would not vectorise.
            top = np.uint32(0)
            for i in range(x.shape[0]):
                top = max(top, np.uint32(float_to_bits(x[i]) & np.uint32(0x7FFFFFFF)))
            d = bits_to_float(top) / np.float32(127)
            inverse = np.float32(1) / d if d > np.float32(0) else np.float32(0)
            bits = float_to_half(d)
            start = b * block_nbytes
            target[start] = np.uint8(bits & np.uint16(0xFF))
            target[start + 1] = np.uint8(bits >> np.uint16(8))
            codes = target[start + 2 : start + block_nbytes]
            for i in range(x.shape[0]):
                scaled = x[i] * inverse
                # A subnormal d has an infinite inverse; the specification clips, and 0 * inf counts as 0.
                scaled = scaled if scaled == scaled else np.float32(0)  # noqa: PLR0124
                scaled = min(max(scaled, np.float32(-127)), np.float32(127))
                whole = np.trunc(scaled)
                away = np.float32(1) if scaled > np.float32(0) else np.float32(-1)
                whole += away if abs(scaled - whole) >= np.float32(0.5) else np.float32(0)
                codes[i] = np.uint8(np.int8(np.int32(whole)))
