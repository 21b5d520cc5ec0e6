"""MXFP4 on the CPU: one E8M0 byte and 16 bytes of nibbles, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import bits_to_float, halves_to_pairs, kernel, nibble_lookup, pairs_to_halves

# Twice the E2M1 values. The sign is on the integer, so that code 8 ("minus zero") gives +0 as in the reference.
_decode16 = nibble_lookup((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))


@kernel
def decode(rows, out, block_len):
    half = block_len // 2
    block_nbytes = half + 1
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start = b * block_nbytes
            e = np.uint32(row[start])
            # Half of E8M0, as the table is doubled; 0 and 1 are float32 subnormals, 255 is 2^127 as in the reference.
            bits = (e - np.uint32(1)) << np.uint32(23)
            if e < np.uint32(2):
                bits = np.uint32(0x00200000) << e
            _decode16(row, start + 1, bits_to_float(bits), y, b * block_len, b * block_len + half)


@kernel
def pack(codes, scales, out, block_len, rows_per_scale):
    bad_scales = 0
    half = block_len // 2
    for r in range(codes.shape[0]):
        source, target = codes[r], out[r]
        scale_row = scales[r // rows_per_scale]
        for b in range(scale_row.shape[0]):
            e = scale_row[b]
            if e == np.uint8(255) and r % rows_per_scale == 0:
                bad_scales += 1
            start = b * (half + 1)
            target[start] = e
            pairs_to_halves(source, b * half, target, start + 1)
    return 0, bad_scales


@kernel
def unpack(rows, codes, scales, block_len):
    half = block_len // 2
    for r in range(rows.shape[0]):
        source, target = rows[r], codes[r]
        for b in range(scales.shape[1]):
            start = b * (half + 1)
            scales[r, b] = source[start]
            halves_to_pairs(source, start + 1, target, b * half)
