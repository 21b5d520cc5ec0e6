"""MXFP4: one E8M0 scale and 32 E2M1 codes, OCP's microscaling FP4 as ggml stores it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import tables
from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.scalar import kernel_of, locked, relative
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 32

E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""float32 [16]: twice the E2M1 value of every code; code 8 ("minus zero") is +0 as in the reference."""


def _halved_e8m0() -> F32:
    e = np.arange(256, dtype=np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (e - 1) << np.uint32(23))
    return bits.astype(np.uint32).view(np.float32)


HALF_E8M0 = _halved_e8m0()
"""float32 [256]: 2^(e-128). 255 gives 2^127, not NaN: the reference decoder does so and files are read as it does."""


ROUNDED_UP = tables.LOG2_ROUNDED_UP
"""uint32 [256]: by exponent field, the least bits of a float whose float32 log2 is rounded up to the next integer."""


class MXFP4(Codec):
    """``y[i] = E2M1[n] * 2^(e-127)``, 32 elements in 17 bytes; byte j of ``qs`` holds elements j (low) and j + 16 (high).

    Checkpoints keep elements 2j (low) and 2j + 1 (high) in a byte, so packing permutes nibbles and changes no code.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("e", "u1"), ("qs", "u1", (BLOCK_LEN // 2,))]))
    reproduces: ClassVar = True
    rms_bound: ClassVar = 0.118
    nested: ClassVar = True
    ids: ClassVar = {"llama.cpp": 39}
    file_types: ClassVar = {"ik_llama.cpp": 38}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Scale doubled table values by half the scale."""
        return w.look_up(tables.E2M1_DOUBLED, w.fields(block["qs"], 4, 16)) * w.look_up(HALF_E8M0, block["e"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Try scales, each with the nearest codes (ties to the smaller magnitude, zero coded 0).

        The first scale is the reference's, ``e = floor(log2(amax)) - 2 + 127`` with C's float32 ``log2``. Effort
        ``reference`` takes it, whatever the importance. The others keep the least ``sum m (x - y)^2``, m the importance or 1:
        both objectives are the same. ``fast`` tries it and the next larger, ``normal`` with importance the next smaller, too.
        ``high`` tries every one that could be the best: a larger one only makes codes coarser, and under a smaller one than
        that which clips all values, each is farther.
        """
        kernel = kernel_of(self)
        if search.effort == "reference":
            kernel.encode_reference(locked(values), out, ROUNDED_UP)
            return
        deltas = [0, 1]
        if search.effort == "high":
            deltas += range(-1, -253, -1)
        elif search.effort == "normal" and importance is not None:
            deltas.append(-1)
        weights = relative(importance, BLOCK_LEN)
        kernel.encode_search(locked(values), weights, out, ROUNDED_UP, np.array(deltas, np.int64))

    def pack_rows(self, codes: U8, scales: U8, out: U8, rows_per_scale: int) -> tuple[int, int]:
        """Permute nibbles from pairs (2j, 2j + 1) to halves (j, j + 16)."""
        _, blocks = self.layout.split(out)
        pairs = codes.reshape(*blocks.shape, BLOCK_LEN // 2)
        elements = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*blocks.shape, BLOCK_LEN)
        blocks["e"] = np.repeat(scales, rows_per_scale, axis=0)[: codes.shape[0]]
        blocks["qs"] = elements[..., : BLOCK_LEN // 2] | elements[..., BLOCK_LEN // 2 :] << 4
        return 0, int(np.count_nonzero(scales == 255))

    def unpack_rows(self, rows: U8) -> tuple[U8, U8]:
        """Permute nibbles from halves (j, j + 16) to pairs (2j, 2j + 1)."""
        _, blocks = self.layout.split(rows)
        elements = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)
        pairs = elements[..., 0::2] | elements[..., 1::2] << 4
        return pairs.reshape(rows.shape[0], blocks.shape[1] * BLOCK_LEN // 2), blocks["e"].copy()
