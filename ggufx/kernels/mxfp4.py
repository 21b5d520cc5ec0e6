"""MXFP4 on the CPU: one E8M0 byte and 16 bytes of nibbles, byte j = elements j (low) and j + 16 (high)."""

from __future__ import annotations

import numpy as np

from ggufx.kernels._jit import (
    bits_to_float,
    float_to_bits,
    halves_to_pairs,
    inline,
    kernel,
    load64,
    nibble_lookup,
    pairs_to_halves,
    store64,
    subroutine,
)

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


# The search works with blocks side by side in the lanes, as in _linear.py: sums run over a block's elements in order.
_LANES = 64
_ZERO = np.float32(0)


@inline
def _reference_scale(x, rounded_up):
    """Return ``floor(log2f(amax)) + 125`` within 0..254, 0 for amax 0."""
    top = np.uint32(0)
    for i in range(x.shape[0]):
        top = max(top, np.uint32(float_to_bits(x[i]) & np.uint32(0x7FFFFFFF)))
    field = np.int32(top >> np.uint32(23))
    return max(field + np.int32(top >= rounded_up[field]) - 2, 0)


@inline
def _factors(e):
    """Return two factors whose product is ``2^(128 - e)``, which itself may be beyond float32."""
    first = min(128 - e, 127)
    return bits_to_float(np.uint32(first + 127) << np.uint32(23)), np.float32(2) if e == 0 else np.float32(1)


@inline
def _scale_block(x, e, scaled):
    f, g = _factors(e)
    for i in range(x.shape[0]):
        scaled[i] = x[i] * f * g


@subroutine
def _code(scaled, codes):
    """Nearest codes of many values at once (a long loop vectorises better than one of a block), in doubled units."""
    for i in range(codes.shape[0]):
        v = scaled[i]
        a = abs(v)
        # A magnitude on a threshold stays below.
        c = np.float32(1) if a > np.float32(0.5) else _ZERO
        c = np.float32(2) if a > np.float32(1.5) else c
        c = np.float32(3) if a > np.float32(2.5) else c
        c = np.float32(4) if a > np.float32(3.5) else c
        c = np.float32(5) if a > np.float32(5) else c
        c = np.float32(6) if a > np.float32(7) else c
        c = np.float32(7) if a > np.float32(10) else c
        c = c + np.float32(8) if v < np.float32(-0.5) else c
        codes[i] = np.uint8(np.int32(c))


@inline
def _write(codes, at, row, start):
    store64(row, start + 1, load64(codes, at) | (load64(codes, at + 16) << np.uint64(4)))
    store64(row, start + 9, load64(codes, at + 8) | (load64(codes, at + 24) << np.uint64(4)))


@subroutine
def _errors(xt, wt, factor, back, error):
    """Per lane: ``sum w (x - y)^2`` for y of the scale ``factor`` below the one that ``xt`` (magnitudes) is in units of."""
    n = error.shape[0]
    for i in range(n):
        error[i] = _ZERO
    for j in range(0, xt.shape[0], 8):
        for i in range(n):
            total = error[i]
            for u in range(8):
                x = xt[j + u, i]
                a = x * factor
                y = np.float32(1) if a > np.float32(0.5) else _ZERO
                y = np.float32(2) if a > np.float32(1.5) else y
                y = np.float32(3) if a > np.float32(2.5) else y
                y = np.float32(4) if a > np.float32(3.5) else y
                y = np.float32(6) if a > np.float32(5) else y
                y = np.float32(8) if a > np.float32(7) else y
                y = np.float32(12) if a > np.float32(10) else y
                difference = x - y * back
                total += wt[j + u, i] * difference * difference
            error[i] = total


@kernel
def encode_reference(values, out, rounded_up):
    """Give every block the C library's scale."""
    blocks = values.shape[1] // 32
    scaled, codes = np.empty(32 * _LANES, np.float32), np.empty(32 * _LANES, np.uint8)
    for r in range(values.shape[0]):
        row, target = values[r], out[r]
        for first in range(0, blocks, _LANES):
            n = min(_LANES, blocks - first)
            for b in range(n):
                x = row[(first + b) * 32 : (first + b) * 32 + 32]
                e = _reference_scale(x, rounded_up)
                target[(first + b) * 17] = np.uint8(e)
                _scale_block(x, e, scaled[b * 32 : b * 32 + 32])
            _code(scaled[: 32 * n], codes[: 32 * n])
            for b in range(n):
                _write(codes, b * 32, target, (first + b) * 17)


@kernel
def encode_search(values, importance, out, rounded_up, deltas):
    """Give every block the best of the reference's scale plus ``deltas``, of which the first is 0 and the last ones fall.

    Scales under which all values of all blocks side by side are clipped are left out.
    """
    blocks = values.shape[1] // 32
    count = values.shape[0] * blocks
    weighted = importance.shape[0] > 0
    scaled, codes = np.zeros(32 * _LANES, np.float32), np.empty(32 * _LANES, np.uint8)
    xt = np.zeros((32, _LANES), np.float32)
    wt = np.ones((32, _LANES), np.float32)
    error, best = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    scale, chosen = np.zeros(_LANES, np.int64), np.zeros(_LANES, np.int64)
    for first in range(0, count, _LANES):
        n = min(_LANES, count - first)
        for lane in range(n):
            r, b = divmod(first + lane, blocks)
            x = values[r, b * 32 : b * 32 + 32]
            # Over 252 the larger codes overflow float32: a finite value must not come back infinite.
            e = min(_reference_scale(x, rounded_up), 252)
            scale[lane] = e
            chosen[lane] = e
            f, g = _factors(e)
            for j in range(x.shape[0]):
                xt[j, lane] = abs(x[j]) * f * g
            if weighted:
                m = importance[b * 32 : b * 32 + 32]
                for j in range(x.shape[0]):
                    wt[j, lane] = m[j]
        smallest = _ZERO
        if deltas.shape[0] > 3:
            smallest = np.float32(12)
            for j in range(32):
                for i in range(n):
                    a = xt[j, i]
                    smallest = a if a > _ZERO and a < smallest else smallest
        for k in range(deltas.shape[0]):
            delta = deltas[k]
            if smallest * np.float32(2.0) ** -(delta + 1) > np.float32(12):
                break
            _errors(xt, wt, np.float32(2.0) ** -delta, np.float32(2.0) ** delta, error)
            for i in range(_LANES):
                e = scale[i] + delta
                better = k == 0 or (error[i] < best[i] and e >= 0 and e <= 252)
                best[i] = error[i] if better else best[i]
                chosen[i] = e if better else chosen[i]
        for lane in range(n):
            r, b = divmod(first + lane, blocks)
            _scale_block(values[r, b * 32 : b * 32 + 32], chosen[lane], scaled[lane * 32 : lane * 32 + 32])
        _code(scaled[: 32 * n], codes[: 32 * n])
        for lane in range(n):
            r, b = divmod(first + lane, blocks)
            out[r, b * 17] = np.uint8(chosen[lane])
            _write(codes, lane * 32, out[r], b * 17)
