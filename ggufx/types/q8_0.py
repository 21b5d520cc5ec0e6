"""Q8_0: an f16 scale and 32 signed bytes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32


class Q8_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = qs[i] * d``, 32 elements in 34 bytes."""

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "i1", (BLOCK_LEN,))]))
    reproduces: ClassVar = True
    rms_bound: ClassVar = 0.0055
    ids: ClassVar = {"llama.cpp": 8}
    file_types: ClassVar = {"llama.cpp": 7}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Multiply; exact for finite scales."""
        return w.reinterpreted(block["qs"], "i1") * w.half(block["d"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Encode as the reference does, byte for byte, importance ignored.

        ``d = amax / 127``; codes round half away from zero of ``x * (1 / d)`` in float32, with the unrounded ``d``.
        Only a ``d`` beyond binary16, which the library stores as infinity, is clamped to 65504.
        """
        _, blocks = self.layout.split(out)
        x = values.reshape(blocks["qs"].shape)
        d = np.abs(x).max(axis=-1) / np.float32(127)
        d = np.where(d < 65520, d, np.float32(65504))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = np.where(d > 0, np.float32(1) / d, np.float32(0))
            scaled = x * inverse[..., None]
            # The fraction is exact in float32, so adding a half to |x| cannot round up across it.
            whole = np.trunc(scaled)
            rounded = whole + np.where(np.abs(scaled - whole) >= 0.5, np.copysign(np.float32(1), scaled), np.float32(0))
            blocks["d"] = d.astype(np.float16)
            blocks["qs"] = np.nan_to_num(rounded, nan=0, posinf=127, neginf=-127).clip(-127, 127).astype(np.int8)
