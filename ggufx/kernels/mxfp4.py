"""MXFP4 on the CPU: one E8M0 byte and 16 bytes of nibbles, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import bits_to_float, kernel, load64, nibble_lookup, store64

# Twice the E2M1 values. The sign is on the integer, so that code 8 ("minus zero") gives +0 as in the reference.
_decode16 = nibble_lookup((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_FOUR = np.uint64(4)
_EIGHT = np.uint64(8)
_SIXTEEN = np.uint64(16)
_SPREAD16 = np.uint64(0x0000FFFF0000FFFF)
_SPREAD8 = np.uint64(0x00FF00FF00FF00FF)
_LOW32 = np.uint64(0xFFFFFFFF)
_THIRTYTWO = np.uint64(32)


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
            # Source byte k holds elements 2k (low) and 2k + 1 (high): gather the even and odd elements of both halves
            # of the block into eight bytes each, then interleave them.
            lower = load64(source, b * half)
            upper = load64(source, b * half + 8)
            even = (lower & _LOW) | ((upper & _LOW) << _FOUR)
            odd = ((lower >> _FOUR) & _LOW) | (upper & _HIGH)
            for quarter in range(2):
                x = even & _LOW32
                y = odd & _LOW32
                x = (x | (x << _SIXTEEN)) & _SPREAD16
                x = (x | (x << _EIGHT)) & _SPREAD8
                y = (y | (y << _SIXTEEN)) & _SPREAD16
                y = (y | (y << _EIGHT)) & _SPREAD8
                store64(target, start + 1 + 8 * quarter, x | (y << _EIGHT))
                even = even >> _THIRTYTWO
                odd = odd >> _THIRTYTWO
    return 0, bad_scales


@kernel
def unpack(rows, codes, scales, block_len):
    half = block_len // 2
    for r in range(rows.shape[0]):
        source, target = rows[r], codes[r]
        for b in range(scales.shape[1]):
            start = b * (half + 1)
            scales[r, b] = source[start]
            # The packing backwards: separate the interleaved even and odd elements, then part the halves of the block.
            even = np.uint64(0)
            odd = np.uint64(0)
            for quarter in range(2):
                word = load64(source, start + 1 + 8 * quarter)
                x = word & _SPREAD8
                y = (word >> _EIGHT) & _SPREAD8
                x = (x | (x >> _EIGHT)) & _SPREAD16
                x = (x | (x >> _SIXTEEN)) & _LOW32
                y = (y | (y >> _EIGHT)) & _SPREAD16
                y = (y | (y >> _SIXTEEN)) & _LOW32
                shift = _THIRTYTWO * np.uint64(quarter)
                even |= x << shift
                odd |= y << shift
            store64(target, b * half, (even & _LOW) | ((odd & _LOW) << _FOUR))
            store64(target, b * half + 8, ((even >> _FOUR) & _LOW) | (odd & _HIGH))
