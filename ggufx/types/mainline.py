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
    ("NVFP4", 40, 64, 36),
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
