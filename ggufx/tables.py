"""Numbers of the formats that specifications and kernels share: code tables and grids. Facts, no code.

Source: ggml-common.h of llama.cpp and iqk_quantize.cpp of ik_llama.cpp. A *shifted* twin of a table (used where a block's
flag says so) is the table plus a constant, :data:`SHIFTS`.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "E2M1_DOUBLED",
    "IQ2",
    "IQ3",
    "IQ4",
    "IQ5",
    "IQ6",
    "KL_PAIRS",
    "P6_BITS",
    "P6_COEFFICIENTS",
    "SHIFTS",
    "TRELLIS_FACTOR",
    "TRELLIS_MASK",
    "TRELLIS_OFFSET",
]

E2M1_DOUBLED: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the E2M1 values; code 8 ("minus zero") is plain 0, as in the reference."""

IQ2: Final = (-31, -13, 1, 17)
IQ3: Final = (-63, -40, -23, -10, 1, 13, 28, 47)
IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Also the codebook of IQ4_NL and IQ4_XS."""
IQ5: Final = (
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
    -1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121,
)  # fmt: skip
IQ6: Final = (
    -127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54,
    -51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5,
    -2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44,
    47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121,
)  # fmt: skip
SHIFTS: Final = {2: 5, 3: 4, 4: 4, 5: 2, 6: 1}
"""Bits per code -> what the shifted twin of the table of that width adds."""
KL_PAIRS: Final = (
    (-63, -23), (-63, 13), (-40, -63), (-40, -10), (-40, 13), (-40, 47), (-23, -40), (-23, -23),
    (-23, 1), (-23, 13), (-23, 28), (-10, -63), (-10, 1), (-10, 13), (-10, 47), (1, -23),
    (1, -10), (1, 1), (1, 13), (1, 28), (13, -40), (13, -23), (13, -10), (13, 1),
    (13, 13), (28, -63), (28, -23), (28, 1), (28, 28), (28, 47), (47, -23), (47, 13),
)  # fmt: skip
"""IQ2_KL: code -> the values of two neighbours, members of :data:`IQ3`."""
P6_BITS: Final = (
    0xC2FE0000, 0xC2F1B557, 0xC2E5D9E1, 0xC2DA69EE, 0xC2CF61D2, 0xC2C4BDE0, 0xC2BA7A69, 0xC2B093C1,
    0xC2A70639, 0xC29DCE24, 0xC294E7D5, 0xC28C4F9F, 0xC28401D2, 0xC277F587, 0xC2686D87, 0xC259644D,
    0xC24AD27C, 0xC23CB0B6, 0xC22EF7A6, 0xC2219FEE, 0xC214A232, 0xC207F718, 0xC1F72E90, 0xC1DEF6C0,
    0xC1C73814, 0xC1AFE3D6, 0xC198EB4A, 0xC1823FC0, 0xC157A4F8, 0xC12B299C, 0xC0FDE002, 0xC0A5B558,
    0xC01B3100, 0x3EAB16D8, 0x4046C6B4, 0x40BCB7EB, 0x410B7516, 0x41391A72, 0x41676976, 0x418B3FC3,
    0x41A33D0A, 0x41BBBB48, 0x41D4C931, 0x41EE757D, 0x4204676E, 0x4211F208, 0x421FE1E1, 0x422E3E57,
    0x423D0EC6, 0x424C5A88, 0x425C28F9, 0x426C8170, 0x427D6B4F, 0x428776F5, 0x42908850, 0x4299ED66,
    0x42A3A9E2, 0x42ADC174, 0x42B837CC, 0x42C31092, 0x42CE4F77, 0x42D9F828, 0x42E60E52, 0x42F295A4,
)  # fmt: skip
"""float32 bits of IQ6_K's 64 values: ``A + n*(B + n*(C + n*D))`` with :data:`P6_COEFFICIENTS`, by Horner, each step fused
(one rounding). :data:`IQ6` is the table rounded to integers, which only the quantizer and the matrix kernels upstream use."""
P6_COEFFICIENTS: Final = (-127.0, 6.2568, -0.11218, 0.0011972)
"""A, B, C, D; each is rounded to float32."""
TRELLIS_FACTOR: Final = 0xCBAC1FED
"""State after each output: ``x = x * factor mod 2^32``. Closed form: output i of a group starts at ``seed * factor^(i+1)``."""
TRELLIS_OFFSET: Final = 4096
"""Seed of a group = its index + offset."""
TRELLIS_MASK: Final = 0x3F3F3F3F
"""Output = sum of the four bytes of ``x & mask``, minus 126."""
