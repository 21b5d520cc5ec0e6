"""Numbers of the formats that specifications and kernels share: code tables and grids. Facts, no code.

Source: ggml-common.h of llama.cpp and iqk_quantize.cpp of ik_llama.cpp. A *shifted* twin of a table (used where a block's
flag says so) is the table plus a constant, :data:`SHIFTS`.
"""

from __future__ import annotations

from typing import Final

__all__ = ["E2M1_DOUBLED", "IQ2", "IQ3", "IQ4", "IQ5", "IQ6", "SHIFTS"]

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
