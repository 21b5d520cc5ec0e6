"""F8_E4M3_B128: one E8M0 scale and 128 E4M3FN codes, the nisparks fork's native FP8 type."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ggufx import kernels
from ggufx.types.codec import F32, U8, Codec, Layout, Search
from ggufx.types.words import Array, Fields, Words

BLOCK_LEN = 128


def _e4m3_values() -> F32:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def _e8m0_values() -> F32:
    bits = np.arange(256, dtype=np.uint32) << 23
    bits[0] = 0x00400000  # 2^-127 is a float32 subnormal
    bits[255] = 0x7FC00000
    return bits.view(np.float32)


E4M3 = _e4m3_values()
"""float32 [256]: value of every E4M3FN code; 0x7F and 0xFF are NaN, 0x80 is -0.0."""
E8M0 = _e8m0_values()
"""float32 [256]: 2^(e-127); 255 is NaN (OCP microscaling formats)."""


def widened(raw: U8, dtype: str) -> F32:
    """Return scales of a checkpoint as float32, exactly.

    Parameters
    ----------
    raw
        uint8 [nbytes], contiguous.
    dtype
        Safetensors' name: ``F32``, ``BF16`` or ``F16``.

    Returns
    -------
    float32 [number of scales]
        Of float32 scales a view.
    """
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "BF16":
        return (raw.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    return raw.view("<f2").astype("<f4")


def exponents(scales: F32) -> tuple[U8, int]:
    """Turn float32 scales into E8M0 bytes.

    Parameters
    ----------
    scales
        Any shape.

    Returns
    -------
    (uint8 of the same shape, number of scales that are no power of two that E8M0 holds; their bytes mean nothing)
    """
    bits = np.ascontiguousarray(scales).view(np.uint32)
    e = bits >> 23
    # A sign lifts e above 255. 255 itself is infinity; 0 is a zero or a subnormal, of which 2^-127 alone has a byte.
    good = ((bits & 0x7FFFFF) == 0) & (e >= 1) & (e <= 254) | (bits == 0x00400000)
    return e.astype(np.uint8), int(good.size - np.count_nonzero(good))


def decode_scaled(
    codes: U8, scales: F32, rows_per_scale: int, phase: int = 0, *, use_kernel: bool = True
) -> tuple[F32, int, int]:
    """Decode E4M3FN codes under float32 scales: ``E4M3[code] * scale``, rounded to float32 once.

    Parameters
    ----------
    codes
        uint8 [rows, row_len]; the last 128 elements of a row may be fewer.
    scales
        float32 [ceil((phase + rows) / rows_per_scale), ceil(row_len / 128)].
    rows_per_scale, phase
        Rows that share a row of scales, and how many of the first one's lie before ``codes``.
    use_kernel
        ``False`` runs this specification.

    Returns
    -------
    (float32 [rows, row_len], number of NaN codes, number of scales that are not finite)
    """
    module = kernels.find("F8_E4M3_B128") if use_kernel else None
    bad_scales = int(scales.size - np.count_nonzero(np.isfinite(scales)))
    if module is not None:
        out = np.empty(codes.shape, np.float32)
        return out, int(module.decode_scaled(codes, scales, out, BLOCK_LEN, rows_per_scale, phase)), bad_scales
    full = np.repeat(scales[(phase + np.arange(codes.shape[0])) // rows_per_scale], BLOCK_LEN, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        values = E4M3[codes] * full[:, : codes.shape[1]]
    return values, int(np.count_nonzero((codes & 0x7F) == 0x7F)), bad_scales


class F8_E4M3_B128(Codec):  # noqa: N801 (upstream's spelling)
    """``y[i] = E4M3[qs[i]] * 2^(e-127)``, 128 elements in 129 bytes.

    There is no reference library; the format follows OCP and ``ml_dtypes`` at its corners (E8M0 255 and codes 0x7F, 0xFF
    are NaN, E8M0 0 is 2^-127). The scale belongs to 128 consecutive elements of one row, so a checkpoint's 128x128 scale
    is repeated in each of its 128 rows and the codes are copied as they are.
    """

    layout: ClassVar = Layout(BLOCK_LEN, np.dtype([("e", "u1"), ("qs", "u1", (BLOCK_LEN,))]))
    rms_bound: ClassVar = 0.0272
    nested: ClassVar = True
    ids: ClassVar = {"nisparks": 42}
    planes: ClassVar = ("qs", "e")

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Look both factors up; the product is exact or overflows."""
        return w.look_up(E4M3, block["qs"]) * w.look_up(E8M0, block["e"])

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Smallest scale that clips nothing, nearest code (ties to even); -0.0 is kept. Importance changes nothing.

        The scale is the smallest ``e`` with ``amax <= 448 * 2^(e-127)``: a power of two, so a larger one gives the same
        values and a smaller one clips.
        """
        import ml_dtypes

        _, blocks = self.layout.split(out)
        x = values.reshape(*blocks.shape, BLOCK_LEN)
        fraction, exponent = np.frexp(np.abs(x).max(axis=-1))
        # 448 = 0.875 * 2^9 and amax = fraction * 2^exponent with 0.5 <= fraction < 1.
        e = np.clip(127 + exponent.astype(np.int32) - 9 + (fraction > 0.875), 0, 254)
        e[fraction == 0] = 0
        scaled = np.ldexp(x.astype(np.float64), (127 - e)[..., None])
        blocks["e"] = e
        # float64 -> E4M3 directly: by way of float32 the value would be rounded twice.
        # Under e = 247 the codes above 240 overflow float32: stay below, a finite value must not come back infinite.
        limit = np.where(e < 247, 448, 240)[..., None]
        blocks["qs"] = np.clip(scaled, -limit, limit).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    def pack_rows(self, codes: U8, scales: U8, out: U8, rows_per_scale: int) -> tuple[int, int]:
        """Interleave scale bytes and codes."""
        _, blocks = self.layout.split(out)
        blocks["e"] = np.repeat(scales, rows_per_scale, axis=0)[: codes.shape[0]]
        blocks["qs"] = codes.reshape(blocks["qs"].shape)
        return int(np.count_nonzero((codes & 0x7F) == 0x7F)), int(np.count_nonzero(scales == 255))

    def unpack_rows(self, rows: U8) -> tuple[U8, U8]:
        """Part scale bytes and codes."""
        _, blocks = self.layout.split(rows)
        return blocks["qs"].reshape(rows.shape[0], blocks.shape[1] * BLOCK_LEN), blocks["e"].copy()
