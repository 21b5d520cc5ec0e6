"""Q4_0: an f16 scale and 32 four-bit codes around zero."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types.codec import F32, U8, Codec, Layout, Search

BLOCK_LEN = 32


class Q4_0(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = (n - 8) * d``, 32 elements in 18 bytes; byte j of ``qs`` holds elements j (low) and j + 16 (high)."""

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("d", "<f2"), ("qs", "u1", (BLOCK_LEN // 2,))]))
    reproduces: ClassVar = True
    rms_bound: ClassVar = 0.089
    ids: ClassVar = {"llama.cpp": 2}

    def decode_rows(self, rows: U8, out: npt.NDArray[np.float32]) -> None:
        """Multiply; exact for finite scales."""
        _, blocks = self.layout.split(rows)
        codes = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)
        with np.errstate(invalid="ignore"):
            levels = codes.astype(np.float32) - np.float32(8)
            out.reshape(codes.shape)[...] = levels * blocks["d"].astype(np.float32)[..., None]

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Encode as the reference does, byte for byte: plain rounding, or a weighted scale search with importance."""
        _, blocks = self.layout.split(out)
        x = values.reshape(*blocks.shape, BLOCK_LEN)
        codes, d = self._round(x) if importance is None else self._search(values, x, importance)
        with np.errstate(over="ignore"):
            blocks["d"] = d.astype(np.float16)
        blocks["qs"] = codes[..., : BLOCK_LEN // 2] | codes[..., BLOCK_LEN // 2 :] << 4

    @staticmethod
    def _extreme(x: F32) -> F32:
        """Return the element of largest magnitude, with its sign, the first one on ties."""
        where = np.abs(x).argmax(axis=-1)
        return np.take_along_axis(x, where[..., None], axis=-1)[..., 0]

    def _round(self, x: F32) -> tuple[U8, F32]:
        d = self._extreme(x) / np.float32(-8)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
            codes = np.trunc(x * inverse[..., None] + np.float32(8.5))
        return np.nan_to_num(codes, nan=0, posinf=15, neginf=0).clip(0, 15).astype(np.uint8), d

    def _search(self, rows: F32, x: F32, importance: F32) -> tuple[U8, F32]:
        """Reference search: 19 inverse scales around ``-8 / extreme``, kept by weighted explained energy."""
        sigma2 = _sequential_sum(rows * rows) / np.float32(rows.shape[-1])
        weights = importance.reshape(x.shape[1:]) * np.sqrt(sigma2[:, None, None] + x * x)
        extreme = self._extreme(x)
        best = np.zeros(extreme.shape, np.float32)
        d = np.zeros(extreme.shape, np.float32)
        codes = np.zeros(x.shape, np.float32)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            for step in (0, *range(-9, 0), *range(1, 10)):
                inverse = -(np.float32(8) + np.float32(0.1) * np.float32(step)) / extreme
                level = np.rint(inverse[..., None] * x).clip(-8, 7)
                s1 = _sequential_sum(weights * x * level)
                s2 = _sequential_sum(weights * level * level)
                better = np.ones(best.shape, bool) if step == 0 else (s2 > 0) & (s1 * s1 > best * s2)
                scale = np.where(s2 > 0, s1 / s2, np.float32(0))
                d = np.where(better, scale, d)
                best = np.where(better, scale * s1, best)
                codes = np.where(better[..., None], level, codes)
        tiny = np.abs(extreme) < np.float32(1e-15)
        d = np.where(tiny, np.float32(0), d)
        codes = np.where(tiny[..., None], np.float32(-8), np.nan_to_num(codes))
        return (codes + 8).astype(np.uint8), d


def _sequential_sum(terms: F32) -> F32:
    """Sum the last axis in order, in float32, as a C loop does: numpy's own order is pairwise."""
    total: F32 = np.cumsum(terms, axis=-1, dtype=np.float32)[..., -1]
    return total
