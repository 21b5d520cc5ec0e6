"""NVFP4 on the CPU: an unsigned E4M3 scale per 16 E2M1 codes, the two nibbles of a byte 8 elements apart."""

from __future__ import annotations

import numpy as np

from ggufx import tables
from ggufx.kernels._jit import float_to_bits, kernel, larger, smaller, subroutine
from ggufx.kernels._linear import LANES as SIDE
from ggufx.kernels._linear import floats, scratch_of
from ggufx.kernels._vector import LANES, Block, block_intrinsic

_NBYTES = 36
_ONE = np.float32(1)  # there is no scale per block


@block_intrinsic
def _block(b: Block) -> None:
    c = b.load(0, 4).widen(32)
    exponent = c >> 3 & 15
    subnormal = exponent.equals(0).widen(32)
    significand = (c & 7) + 8 - (subnormal << 3)
    # Half of the scale, as the table is doubled; code 0x7F is zero, 0xFF is not.
    power = ((exponent + subnormal + (127 - 11)) << 23).float_bits()
    scales = ((c.equals(0x7F).mask_of(32) ^ -1) & significand).floats() * power
    for k in range(0, 4, 2):
        # 16 bytes are two sub-blocks. Shuffling bytes before or after a lookup would keep it from becoming one instruction.
        both = scales.take([k] * 8 + [k + 1] * 8)
        low, high = (
            (b.load(4 + 8 * k, LANES) >> 4 * half & 15).lookup(tables.E2M1_DOUBLED).floats() * both for half in range(2)
        )
        b.store(16 * k, low.take([*range(8), *range(16, 24)], high))
        b.store(16 * k + 16, low.take([*range(8, 16), *range(24, 32)], high))


@kernel
def decode(rows, out, block_len):
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for b in range(y.shape[0] // block_len):
            _block(row, b * _NBYTES, _ONE, y, b * block_len)


_ZERO = np.float32(0)
_MAGIC = np.float32(12582912)
_LARGEST = 0x7E
_SATURATED = 0x78
"""The code of 256: from there on ``ggml_fp32_to_ue4m3`` gives the largest."""


@subroutine
def _scale_code(amax):
    """Return the E4M3 code of ``amax / 6``, mantissas rounded half up as in ``ggml_fp32_to_ue4m3``."""
    x = amax / np.float32(6)
    if x > np.float32(448):
        return _LARGEST
    bits = np.uint32(float_to_bits(x))
    exponent = np.int64(bits >> np.uint32(23)) - 120
    if exponent <= 0:
        return smaller(np.int64(x * np.float32(512) + np.float32(0.5)), 7)
    # A mantissa that is rounded up to 8 carries into the exponent.
    code = (
        exponent * 8
        + np.int64((bits >> np.uint32(20)) & np.uint32(7))
        + np.int64((bits >> np.uint32(19)) & np.uint32(1))
    )
    return smaller(code, _LARGEST)


@subroutine
def _errors(xt, wt, scale, error):
    """Per lane: ``sum w (x - y)^2`` for the nearest codes under ``scale`` (half of it, as the table is doubled)."""
    n = error.shape[0]
    for i in range(n):
        error[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            s, total = scale[i], error[i]
            inverse = _ONE / s
            for u in range(8):
                a = xt[j + u, i] * inverse
                a = np.float32(12) if a > np.float32(12) else a
                # Steps of 1, from 4 on of 2, from 8 on of 4: adding and subtracting rounds to them.
                magic = _MAGIC if a < np.float32(4) else np.float32(2) * _MAGIC
                magic = magic if a < np.float32(8) else np.float32(4) * _MAGIC
                off = xt[j + u, i] - s * ((a + magic) - magic)
                total += wt[j + u, i] * off * off
            error[i] = total


@subroutine
def _code(xt, scale, codes):
    """Per lane: the nearest codes; magnitudes on a threshold stay below, zero is coded 0. Products are exact."""
    n = scale.shape[0]
    for j in range(xt.shape[0]):
        x, c = xt[j], codes[j]
        for i in range(n):
            s, a = scale[i], abs(x[i])
            v = np.float32(1) if a > np.float32(0.5) * s else _ZERO
            v = np.float32(2) if a > np.float32(1.5) * s else v
            v = np.float32(3) if a > np.float32(2.5) * s else v
            v = np.float32(4) if a > np.float32(3.5) * s else v
            v = np.float32(5) if a > np.float32(5) * s else v
            v = np.float32(6) if a > np.float32(7) * s else v
            v = np.float32(7) if a > np.float32(10) * s else v
            v = v + np.float32(8) if v > _ZERO and x[i] < _ZERO else v
            # Under scale 0 all codes are alike.
            c[i] = np.uint8(np.int32(v if s > _ZERO else _ZERO))


def encode_search(values, importance, out, scales, deltas):
    """Give every 16 elements the best of the reference's scale code plus ``deltas``, of which the first is 0.

    ``importance`` is [row_len], or empty for 1; ``scales`` float32 [256] half the value of every scale code. The best has the
    least ``sum m (x - y)^2``; 0 alone gives the C library's bytes, which know no scale between 240 and 448. The last of many
    deltas fall, and end where all values of all parts side by side are clipped.
    """
    scratch = scratch_of(*[floats(16, SIDE)] * 3, floats(3, SIDE), (np.uint8, (16, SIDE)), *[(np.int64, (SIDE,))] * 2)
    scratch[2].fill(1)
    _encode_search(values.reshape(-1), importance, out.reshape(-1), scales, deltas, scratch)


@kernel
def _encode_search(flat, importance, out, scales, deltas, scratch):
    xt, at, wt, lanes, codes, base, chosen = scratch
    scale, error, least = lanes[0], lanes[1], lanes[2]
    weighted = importance.shape[0] > 0
    count = flat.shape[0] // 16
    for first in range(0, count, SIDE):
        n = smaller(SIDE, count - first)
        for lane in range(n):
            x = flat[(first + lane) * 16 : (first + lane) * 16 + 16]
            for j in range(x.shape[0]):
                xt[j, lane] = x[j]
            if weighted:
                start = (first + lane) * 16 % importance.shape[0]
                m = importance[start : start + 16]
                for j in range(m.shape[0]):
                    wt[j, lane] = m[j]
        for i in range(SIDE):
            scale[i] = _ZERO
            least[i] = np.float32(np.inf)
        for j in range(16):
            x, a = xt[j], at[j]
            for i in range(SIDE):
                a[i] = abs(x[i])
                scale[i] = a[i] if a[i] > scale[i] else scale[i]
        for i in range(SIDE):
            least[i] = least[i] if scale[i] > _ZERO else _ZERO  # zeros keep scale 0
        for lane in range(n):
            base[lane] = _scale_code(scale[lane])
            chosen[lane] = _LARGEST if base[lane] >= _SATURATED else base[lane]
        if deltas.shape[0] > 1:
            lowest = np.int64(0)
            if deltas[-1] < -8:
                # A step below the code under which the smallest value is clipped.
                for i in range(n):
                    smallest = np.float32(np.inf)
                    for j in range(16):
                        smallest = at[j, i] if at[j, i] > _ZERO and at[j, i] < smallest else smallest
                    if smallest < np.float32(np.inf):
                        lowest = smaller(lowest, _scale_code(smallest) - 1 - base[i])
            for k in range(deltas.shape[0]):
                if deltas[k] < -8 and deltas[k] < lowest:
                    break
                for i in range(SIDE):
                    scale[i] = scales[smaller(larger(base[i] + deltas[k], 1), _LARGEST)]
                _errors(at, wt, scale, error)
                for i in range(SIDE):
                    better = error[i] < least[i]
                    least[i] = error[i] if better else least[i]
                    chosen[i] = smaller(larger(base[i] + deltas[k], 1), _LARGEST) if better else chosen[i]
        for i in range(SIDE):
            scale[i] = scales[chosen[i]]
        _code(xt, scale, codes)
        for lane in range(n):
            block, sub = divmod(first + lane, 4)
            out[block * _NBYTES + sub] = np.uint8(chosen[lane])
            to = block * _NBYTES + 4 + 8 * sub
            for j in range(8):
                out[to + j] = codes[j, lane] | codes[j + 8, lane] << np.uint8(4)
