"""IQ3_K: 3-bit codes into a table of eight, 4-bit odd scales with a sign per 16 elements."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx import tables
from ggufx.types._search import search_codebook
from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.packing import fields, scaled, twin


class IQ3_K(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (d * s) * IQ3[n]``, or the table's shifted twin where the sub-block's bit of ``extra`` says so.

    256 elements in 110 bytes. Bits of ``scales_h`` are the signs of the scales. Source: ggml-common.h and
    iqk_quantize.cpp of ik_llama.cpp.
    """

    layout: ClassVar = Layout(
        256,
        np.dtype(
            [
                ("d", "<f2"),
                ("extra", "<u2"),
                ("scales_h", "<u2"),
                ("scales_l", "u1", (8,)),
                ("qs", "u1", (64,)),
                ("qh", "u1", (32,)),
            ]
        ),
    )
    ids: ClassVar = {"ik_llama.cpp": 138}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Scales are odd, -31..31, never 0; exact."""
        _, blocks = self.layout.split(rows)
        magnitudes = 2 * fields(blocks["scales_l"], 4).astype(np.float32) + np.float32(1)
        scales = np.where(fields(blocks["scales_h"][..., None], 1), -magnitudes, magnitudes)
        codes = fields(blocks["qs"], 2, 32) | fields(blocks["qh"], 1, 32) << 2
        scaled(blocks["d"], scales, twin(tables.IQ3, codes, fields(blocks["extra"][..., None], 1)), out)

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Search scales, tables and codes for the least ``sum w (x - y)^2``.

        Reference weights: ``w = m * sqrt(sigma2 + x^2)`` with importance m, ``0.25*sigma2 + x^2`` without; sigma2 is
        1.5 times the mean of x^2 over 256 elements.
        """
        search_codebook(self.name, 16, values, out, importance, search)
