"""Upstream's classic quant types, decoded by the ``gguf`` package until they get a codec of their own.

``gguf.quants.dequantize`` decodes each of them bit for bit as the C reference does (held by the golden tests).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import U8, Codec, Layout


class _GGUFPackage(Codec):
    """A type of upstream whose decoder is the ``gguf`` package's, imported on first use."""

    ids: ClassVar[dict[str, int]]

    def decode_rows(self, rows: U8, out: npt.NDArray[Any]) -> None:
        """Hand the rows to ``gguf.quants``."""
        import gguf

        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(self.ids["llama.cpp"]))


_TABLE = (
    # name, id, elements per block, bytes per block (ggml-common.h)
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
)

CODECS: list[type[Codec]] = [
    type(
        name,
        (_GGUFPackage,),
        {
            "__doc__": f"{name}: {block_len} elements in {nbytes} bytes; decoded by the gguf package.",
            "__module__": __name__,
            "layout": Layout(block_len, np.dtype([("qs", "u1", (nbytes,))])),
            "ids": {"llama.cpp": type_id},
        },
    )
    for name, type_id, block_len, nbytes in _TABLE
]
