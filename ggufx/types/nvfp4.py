"""NVFP4: one unsigned E4M3 scale per 16 E2M1 codes."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ggufx import tables
from ggufx.types.codec import F32, U8, Codec, Effort, Layout, Search
from ggufx.types.scalar import kernel_of, locked, relative
from ggufx.types.words import Array, Fields, Words


def _halved_ue4m3() -> F32:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-10, (8 + mantissa) * 2.0 ** (exponent - 11))
    values[0x7F] = 0
    return values.astype(np.float32)


HALF_UE4M3 = _halved_ue4m3()
"""float32 [256]: half the value of every scale code."""


# Steps of the scale's code from the one that makes the largest magnitude 6.
_DELTAS: Final[dict[Effort, tuple[int, ...]]] = {
    "reference": (0,),
    "fast": (0, -2, -1, 1, 2, 4, 5),
    "normal": (0, *range(-4, 0), *range(1, 7)),
    "high": (0, *range(1, 10), *range(-1, -127, -1)),
}
_WEIGHTED_NORMAL: Final = (*_DELTAS["normal"], *range(-5, -9, -1), 7)
"""Where the importance is uneven, clipping what counts little is worth more."""


class NVFP4(Codec):
    """``y[i] = E2M1[n] * E4M3(d)``, 64 elements in 36 bytes; bit 7 of a scale is ignored.

    Byte j of a sub-block's 8 bytes of ``qs`` holds elements j (low) and j + 8 (high). Scale codes 0x00 and 0x7F give 0,
    0xFF gives 240. A checkpoint's tensor scale is a tensor of its own. Source: ggml-common.h and ggml-quants.c of
    llama.cpp.
    """

    layout: ClassVar = Layout(
        64,
        np.dtype([("d", "u1", (4,)), ("qs", "u1", (32,))]),
    )
    reproduces: ClassVar = True
    safe_magnitude: ClassVar = 2688.0  # 448, the largest scale, times 6
    nested: ClassVar = True
    ids: ClassVar = {"llama.cpp": 40}
    file_types: ClassVar = {"llama.cpp": 39}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale doubled table values by half the scale."""
        scales = w.look_up(HALF_UE4M3, block["d"])
        values = w.look_up(tables.E2M1_DOUBLED, w.fields(block["qs"], 4, 8))
        return w.joined(scales[..., None] * w.parted(values, 4, 16))

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Try scales, each with the nearest codes (ties to the smaller magnitude, zero coded 0).

        The first scale is ``E4M3(max |x| / 6)``, mantissas rounded half up. Effort ``reference`` takes it, whatever the
        importance, and like the C library the largest, 448, for what would round to 256 or more; the others keep the one with
        the least ``sum m (x - y)^2`` among its neighbours, m the importance or 1: both objectives are the same. Among those of
        effort ``high`` are all that could be the best: one that is larger by more than an octave only makes codes coarser, and
        under a smaller one than that which clips all values, each is farther. Values whose
        magnitude is under 2^-11 become 0: there is no scale of the tensor to bring them up. Source: ``quantize_row_nvfp4_ref``
        of llama.cpp.
        """
        weighted = importance is not None and search.effort == "normal"
        deltas = np.array(_WEIGHTED_NORMAL if weighted else _DELTAS[search.effort], np.int64)
        weights = relative(None if search.effort == "reference" else importance, self.layout.block_len)
        kernel_of(self).encode_search(locked(values), weights, out, HALF_UE4M3, deltas)
