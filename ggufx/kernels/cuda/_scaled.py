"""Block-scaled FP8 products on Hopper and newer: activations quantized 128 at a time, weights as they are in the file."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from ggufx.kernels.cuda import _launch
from ggufx.kernels.cuda._words import INTERPRETED

__all__ = ["BLOCK_LEN", "linear_fp8", "quantize_activations", "supported", "weight_scales"]

BLOCK_LEN = 128


@triton.jit
def _quantize(x, codes, scales, n_groups, per_row, n_rows, x_stride, TILE: tl.constexpr):
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = group < n_groups
    row = group // per_row
    block = group - row * per_row
    column = tl.arange(0, 128)[None, :]
    mask = tl.broadcast_to(exists[:, None], (TILE, 128))
    place = row.to(tl.int64) * x_stride + block * 128
    values = tl.load(x + place[:, None] + column, mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    # Not finite: NaN, by way of the scale, in every product.
    poison = tl.sum(values * 0.0, 1)
    largest = tl.maximum(largest, 1e-30)
    scale = largest * (1.0 / 448.0)
    scaled = values * (448.0 / largest)[:, None]
    if INTERPRETED:
        # The exponents of E4M3 and float32 lie 120 apart; the rest is rounding to nearest even.
        bits = (tl.abs(scaled) * 7.52316385e-37).to(tl.uint32, bitcast=True)
        code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        code = tl.minimum(code, 0x7E) | tl.where(scaled < 0, 128, 0).to(tl.uint32)
    else:
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes + group.to(tl.int64)[:, None] * 128 + column, code.to(tl.uint8), mask)
    tl.store(scales + block.to(tl.int64) * n_rows + row, scale + poison, exists)


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float [M, K], K a multiple of 128, to E4M3 under one float32 scale per 128 elements: largest value 448.

    Returns
    -------
    codes
        float8_e4m3fn [M, K].
    scales
        float32 [M, K // 128], column-major as ``torch._scaled_mm`` wants them.
    """
    n_rows, row_len = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty((n_rows, row_len), dtype=torch.uint8, device=x.device)
    per_row = row_len // BLOCK_LEN
    scales = torch.empty((per_row, n_rows), dtype=torch.float32, device=x.device)
    n_groups = n_rows * per_row
    # A few groups a program while the rows are few, so that all multiprocessors work.
    tile = 4 if n_groups < 1 << 13 else 16
    if n_groups:
        with _launch.on(x.device):
            _quantize[(triton.cdiv(n_groups, tile),)](
                x, codes, scales, n_groups, per_row, n_rows, x.stride(0), TILE=tile,
                **_launch.options(num_warps=4 if tile == 16 else 1, enable_fp_fusion=False),
            )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scales.t()


def weight_scales(exponents: torch.Tensor) -> torch.Tensor:
    """Return float32 scales of E8M0 bytes uint8 [R, K // 128], as ``torch._scaled_mm`` wants them of weights.

    One for 128 x 128 where 128 rows share theirs, as native checkpoints have them, row-major [ceil(R / 128), K // 128] with
    rows padded to a multiple of four; else one for 1 x 128, column-major [R, K // 128] and slower by a third. Waits for the
    device.
    """
    n_rows, per_row = exponents.shape
    first = exponents[::BLOCK_LEN]
    shared = bool((first.repeat_interleave(BLOCK_LEN, 0)[:n_rows] == exponents).all())
    bits = (first if shared else exponents).to(torch.int32) << 23
    bits = torch.where(bits == 0, 0x00400000, bits)
    scales = torch.where(bits == 255 << 23, 0x7FC00000, bits).view(torch.float32)
    if not shared:
        return scales.t().contiguous().t()
    padded = scales.new_zeros((scales.shape[0], -(-per_row // 4) * 4))
    padded[:, :per_row] = scales
    return padded[:, :per_row]


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept_scales(exponents: torch.Tensor) -> torch.Tensor:
    version, scales = _KEPT.get(exponents, (-1, exponents))
    if version != exponents._version:
        scales = weight_scales(exponents)
        _KEPT[exponents] = exponents._version, scales
    return scales


def supported(device: torch.device) -> bool:
    """Return whether ``device`` multiplies block-scaled FP8: Hopper, for torch's scales in float32."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def linear_fp8(x: torch.Tensor, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return ``x @ w.T``, bfloat16 [M, R], of float x [M, K] quantized to E4M3 and weights of the planes, as they are.

    ``planes``: codes uint8 [R, K], E8M0 uint8 [R, K // 128], and maybe :func:`weight_scales` of the latter: without them the
    first product with these planes makes and keeps them. R is a multiple of 16 and M at least 1.
    """
    codes, scales = quantize_activations(x)
    weights = planes[2] if len(planes) > 2 else _kept_scales(planes[1])
    return torch._scaled_mm(
        codes,
        planes[0].view(torch.float8_e4m3fn).t(),
        scale_a=scales,
        scale_b=weights.t(),
        out_dtype=torch.bfloat16,
    )
