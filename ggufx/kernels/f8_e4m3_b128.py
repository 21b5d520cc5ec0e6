"""F8_E4M3_B128 on the CPU: one E8M0 byte, then one E4M3FN code per element (129 bytes per 128)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import bits_to_float, float_to_bits, kernel

_SMALLEST_NORMAL = np.float32(2.0**-6)


@kernel
def decode(rows, out, block_len):
    block_nbytes = block_len + 1
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start = b * block_nbytes
            e = np.uint32(row[start])
            bits = e << np.uint32(23)
            if e == np.uint32(0):
                bits = np.uint32(0x00400000)  # 2^-127 is a float32 subnormal
            scale = bits_to_float(bits)
            codes = row[start + 1 : start + block_nbytes]
            z = y[b * block_len : (b + 1) * block_len]
            # The trip count is a run-time value on purpose: LLVM unrolls literal ones before it vectorises.
            if e == np.uint32(255):
                # All NaN, negative only where the code is -NaN: a product of two NaNs would leave that to LLVM.
                for i in range(codes.shape[0]):
                    nan = np.uint32(0xFFC00000) if codes[i] == np.uint8(0xFF) else np.uint32(0x7FC00000)
                    z[i] = bits_to_float(nan)
                continue
            for i in range(codes.shape[0]):
                c = np.uint32(codes[i])
                m = c & np.uint32(0x7F)
                # E4M3 exponent x means 2^(x-7), float32's means 2^(x-127): move the field and add 120.
                normal = (m << np.uint32(20)) + np.uint32(120 << 23)
                # Exponent 0 means 2^-6 without the leading one: write 2^-6 with it and subtract it, exactly.
                low = bits_to_float(normal + np.uint32(1 << 23)) - _SMALLEST_NORMAL
                magnitude = np.uint32(float_to_bits(low)) if m < np.uint32(8) else np.uint32(normal)
                magnitude = np.uint32(0x7FC00000) if m == np.uint32(0x7F) else magnitude
                z[i] = bits_to_float(magnitude | ((c & np.uint32(0x80)) << np.uint32(24))) * scale


@kernel
def pack(codes, scales, out, block_len, rows_per_scale):
    bad_codes = 0
    bad_scales = 0
    block_nbytes = block_len + 1
    for r in range(codes.shape[0]):
        source, target = codes[r], out[r]
        scale_row = scales[r // rows_per_scale]
        for b in range(scale_row.shape[0]):
            e = scale_row[b]
            if e == np.uint8(255) and r % rows_per_scale == 0:
                bad_scales += 1
            target[b * block_nbytes] = e
            s = source[b * block_len : (b + 1) * block_len]
            t = target[b * block_nbytes + 1 : (b + 1) * block_nbytes]
            bad = np.uint8(0)  # at most block_len = 128 fit
            for i in range(s.shape[0]):
                c = s[i]
                t[i] = c
                bad += np.uint8((c & np.uint8(0x7F)) == np.uint8(0x7F))
            bad_codes += np.int64(bad)
    return bad_codes, bad_scales


@kernel
def unpack(rows, codes, scales, block_len):
    block_nbytes = block_len + 1
    for r in range(rows.shape[0]):
        source, target = rows[r], codes[r]
        for b in range(scales.shape[1]):
            scales[r, b] = source[b * block_nbytes]
            s = source[b * block_nbytes + 1 : (b + 1) * block_nbytes]
            t = target[b * block_len : (b + 1) * block_len]
            for i in range(s.shape[0]):
                t[i] = s[i]
