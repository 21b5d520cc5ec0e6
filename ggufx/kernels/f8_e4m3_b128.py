"""F8_E4M3_B128 on the CPU: one E8M0 byte, then one E4M3FN code per element (129 bytes per 128)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import bits_to_float, float_to_bits, kernel, put
from ggufx.kernels._vector import LANES, Block, block_intrinsic


@block_intrinsic
def _block(b: Block) -> None:
    for i in range(0, 128, LANES):
        # As binary16, whose exponent's bias is 8 more, subnormals included; the shift leaves the sign in two places.
        halves = b.load(1 + i, LANES).extend(16) << 7 & 0xBF80
        # NaN, 0x7F of a code, would be 1.875 * 2^0 here.
        nan = (halves & 0x3F80).equals(0x3F80).mask_of(16) & (0x3F80 ^ 0x7E00)
        # Not with the scale in one factor: 2^127 times 2^8 is infinite.
        b.store(i, b.widened(halves ^ nan) * 2.0**8 * b.d)


@kernel
def decode(rows, out, block_len):
    block_nbytes = block_len + 1
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(row.shape[0] // block_nbytes):
            start, position = b * block_nbytes, b * block_len
            e = np.uint32(row[start])
            bits = e << np.uint32(23)
            if e == np.uint32(0):
                bits = np.uint32(0x00400000)  # 2^-127 is a float32 subnormal
            if e == np.uint32(255):
                # All NaN, negative only where the code is -NaN: a product of two NaNs would leave that to LLVM.
                for i in range(block_len):
                    nan = np.uint32(0xFFC00000) if row[start + 1 + i] == np.uint8(0xFF) else np.uint32(0x7FC00000)
                    put(y, position + i, bits_to_float(nan))
            else:
                _block(row, start, bits_to_float(bits), y, position)


@kernel
def encode(values, out, block_len):
    block_nbytes = block_len + 1
    for r in range(values.shape[0]):
        row, target = values[r], out[r]
        for b in range(row.shape[0] // block_len):
            x = row[b * block_len : (b + 1) * block_len]
            top = np.uint32(0)
            for i in range(x.shape[0]):
                top = max(top, np.uint32(float_to_bits(x[i]) & np.uint32(0x7FFFFFFF)))
            # The smallest e with amax <= 448 * 2^(e - 127), 448 = 1.75 * 2^8; 0 where even e = 0 is enough, subnormals too.
            e = max(np.int32(top >> np.uint32(23)) - 8 + np.int32((top & np.uint32(0x7FFFFF)) > np.uint32(0x600000)), 0)
            target[b * block_nbytes] = np.uint8(e)
            # 2^(127 - e), with e = 254 a subnormal; both this product and the one below are exact where they matter.
            factor = (
                bits_to_float(np.uint32(254 - e) << np.uint32(23)) if e < 254 else bits_to_float(np.uint32(1 << 22))
            )
            # Under e = 247 the codes above 240 overflow float32: stay below, a finite value must not come back infinite.
            limit = np.float32(448) if e < 247 else np.float32(240)
            codes = target[b * block_nbytes + 1 : (b + 1) * block_nbytes]
            for i in range(x.shape[0]):
                bits = np.uint32(float_to_bits(x[i]))
                z = bits_to_float(bits & np.uint32(0x7FFFFFFF)) * factor
                z = z if z < limit else limit
                # To nearest even: bits above the 20 dropped ones; under 2^-6 in steps of 2^-9, the ulp of 2^14.
                m = np.uint32(float_to_bits(z))
                m = np.uint32(m + np.uint32(0x7FFFF) + ((m >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
                normal = np.uint32(m - np.uint32(120 << 3))
                small = np.uint32(float_to_bits(z + np.float32(16384))) - np.uint32(0x46800000)
                code = normal if z >= np.float32(2.0**-6) else small
                codes[i] = np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))


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
