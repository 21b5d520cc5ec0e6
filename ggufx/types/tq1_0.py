"""TQ1_0: ternary codes, five to a byte, under an f16."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.scalar import encode_levels
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 256

POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


class TQ1_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 1) * d``, 256 elements in 54 bytes.

    A byte is a fraction of 256, its base-3 digits are the codes. 32 and then 16 bytes of ``qs`` hold five digits each, those of
    ``qh`` four: all first digits of a run of bytes, then all second ones, and so on.

    Source: ``dequantize_row_tq1_0`` of llama.cpp.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("qs", "u1", (48,)), ("qh", "u1", (4,)), ("d", "<f2")]))
    reproduces: ClassVar = True
    ids: ClassVar = {"llama.cpp": 34}
    file_types: ClassVar = {"llama.cpp": 36}
    fallbacks: ClassVar = {"llama.cpp": "Q4_0"}

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Multiply digit n to the top of its byte (modulo 256) and take it off."""
        powers = w.look_up(POWERS, w.steps(5, 1, block["qh"]))[:, None]
        runs = ((block["qs"][..., :32], 5), (block["qs"][..., 32:], 5), (block["qh"], 4))
        parts = [w.joined(run[..., None, :] * powers[:digits]) for run, digits in runs]
        codes = w.cast(w.concatenate(parts), "i4") * 3 >> 8
        return w.half(block["d"]) * w.floats(codes - 1)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search the scale of every block; see :func:`ggufx.types.scalar.encode_levels`."""
        encode_levels(self, 1, values, out, importance, search)
