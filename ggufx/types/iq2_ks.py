"""IQ2_KS: 2-bit codes into a table of four, 5-bit scales per 32 elements, one f16 scale per row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types._codes import planes, scaled, twin
from ggufx.types.codec import U8, Codec, Layout


class IQ2_KS(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (D * s) * IQ2[n]``, or the table's shifted twin where the sub-block's flag says so.

    256 elements in 70 bytes after 2 bytes per row. Low byte of ``extra``: flags; high byte: fifth bits of the scales.
    Source: ggml-common.h and iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype([("extra", "<u2"), ("scales", "u1", (4,)), ("qs", "u1", (64,))]),
        np.dtype([("d", "<f2")]),
    )
    ids: ClassVar = {"ik_llama.cpp": 145}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Scales -16..15; exact."""
        headers, blocks = self.layout.split(rows)
        assert headers is not None
        extra = planes(blocks["extra"][..., None], 1)
        scales = (planes(blocks["scales"], 4) | extra[..., 8:] << 4).astype(np.float32) - np.float32(16)
        values = twin(tables.IQ2, planes(blocks["qs"], 2, 32), extra[..., :8])
        scaled(headers["d"], scales, values, out)
