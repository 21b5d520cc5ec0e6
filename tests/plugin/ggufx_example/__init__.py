"""TERNARY: a quant type that ggufx does not know, from a package of its own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ggufx.types import Array, Codec, Fields, Layout, Search, Words

__all__ = ["TERNARY"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class TERNARY(Codec):
    """``y[i] = (q[i] - 1) * d``, 16 elements in 6 bytes: an f16 scale and 2-bit codes 0, 1, 2, four a byte, low bits first.

    Code 3 is 2 as well, by the formula.
    """

    layout: ClassVar = Layout(16, np.dtype([("d", "<f2"), ("qs", "u1", (4,))]))
    ids: ClassVar = {"llama.cpp": 250}
    kernel_module: ClassVar = "ggufx_example.kernels"
    rms_bound: ClassVar = 0.48  # 0.4354 is what the best scale leaves of a normal distribution; blocks are short

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Multiply; exact for finite scales."""
        return (w.floats(w.fields(block["qs"], 2)) - 1) * w.half(block["d"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Keep the k largest magnitudes, with the k and the scale of least squared error, weighted by importance.

        For k elements kept the best scale is their mean magnitude, so every k is tried.
        """
        _, blocks = self.layout.split(out)
        x = values.reshape(*blocks.shape, 16).astype(np.float64)
        w = np.ones(values.shape[1]) if importance is None else importance.astype(np.float64)
        w = np.broadcast_to(w.reshape(blocks.shape[1], 16), x.shape)
        order = np.argsort(-np.abs(x), axis=-1, kind="stable")
        magnitude, weight = (np.take_along_axis(a, order, axis=-1) for a in (np.abs(x), w))
        moment, mass = (weight * magnitude).cumsum(axis=-1), weight.cumsum(axis=-1)
        # The error with the best scale is sum(w x^2) - moment^2 / mass.
        gain = np.divide(moment**2, mass, out=np.zeros_like(mass), where=mass > 0)
        best = gain.argmax(axis=-1)[..., None]
        top = np.take_along_axis(moment, best, axis=-1)
        mean = np.divide(top, np.take_along_axis(mass, best, axis=-1), out=np.zeros_like(top), where=top > 0)
        with np.errstate(over="ignore"):
            blocks["d"] = mean[..., 0].astype(np.float16)
        kept = np.abs(x) >= np.take_along_axis(magnitude, best, axis=-1)
        codes = np.where(kept, np.sign(x), 0).astype(np.int8) + 1
        fields = codes.astype(np.uint8).reshape(*blocks.shape, 4, 4) << np.arange(0, 8, 2, dtype=np.uint8)
        blocks["qs"] = np.bitwise_or.reduce(fields, axis=-1)
