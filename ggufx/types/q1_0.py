"""Q1_0: an f16 scale and 128 signs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout
from ggufx.types.packing import fields


class Q1_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = d`` where bit i is set, else ``-d``; 128 elements in 18 bytes.

    ik_llama.cpp calls it Q1_0_G128. Source: ggml-common.h and ggml-quants.c of llama.cpp.
    """

    layout: ClassVar = Layout(
        128,
        np.dtype([("d", "<f2"), ("qs", "u1", (16,))]),
    )
    ids: ClassVar = {"llama.cpp": 41}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Choose the sign."""
        _, blocks = self.layout.split(rows)
        d = blocks["d"].astype(np.float32)[..., None]
        out.reshape(*blocks.shape, 128)[...] = np.where(fields(blocks["qs"], 1), d, -d)
