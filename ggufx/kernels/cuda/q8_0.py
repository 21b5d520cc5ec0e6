"""Q8_0 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ggufx.kernels.cuda import _launch
from ggufx.kernels.cuda._words import MAGIC, half_at, locate, put_bytes, words2

__all__ = ["decode"]

_SHAPE = _launch.Shape(block_len=32, block_nbytes=34, header_nbytes=0, parts=4)


@triton.jit
def _decode(
    data, out, row_nbytes, row_len, n_rows, n_units, chunks, 
    LEAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    words, _, _, block, target, at, part, mask = locate(
        data, out, row_nbytes, row_len, n_rows, n_units, chunks, LEAD, TILE, LANES, 0, 34, 32, 4
    )
    # Eight codes a lane. Flipping the sign bit of a byte adds 128 to it.
    a, b = words2(words, block + 2 + 8 * part, mask, ALIGNED)
    d = half_at(words, block, mask, EVEN)
    put_bytes(target, at + 8 * part, a ^ 0x80808080, b ^ 0x80808080, MAGIC + 128, d, mask, TILE)


def decode(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, float [R, row_len], from ``rows``, uint8 [R, row_nbytes]."""
    _launch.decode(_decode, _SHAPE, rows, out)
