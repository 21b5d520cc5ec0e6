"""Encode on a GPU: dispatch by type name. Importing this module loads torch and triton."""

from __future__ import annotations

from typing import Final, Literal

import torch

from ggufx.kernels.cuda import _encode_codebook, _encode_grid, _encode_linear, _encode_narrow
from ggufx.kernels.cuda._encode_common import first_nonfinite

__all__ = ["REPRODUCES", "SUPPORTED", "count_heads", "encode", "first_nonfinite"]

SUPPORTED: Final = frozenset((*_encode_codebook.CODEBOOKS, "IQ2_XXS", "MXFP4", "Q4_0", "Q8_0", "F8_E4M3_B128"))
"""Types that :func:`encode` knows."""
REPRODUCES: Final = frozenset(("MXFP4", "Q4_0", "Q8_0"))
"""Types for which effort ``reference`` gives the C library's bytes."""


def encode(
    type_name: str,
    values: torch.Tensor,
    importance: torch.Tensor | None,
    out: torch.Tensor,
    objective: Literal["reference", "mse"] = "reference",
    effort: Literal["normal", "reference"] = "normal",
) -> None:
    """Encode rows where they lie, with the bytes of the CPU's encoder of the same effort.

    Parameters
    ----------
    type_name
        One of :data:`SUPPORTED`.
    values
        float32 [R, row_len], contiguous and finite (see :func:`first_nonfinite`); row_len is a multiple of the type's block.
    importance
        float32 [row_len] on the same device, not negative, not all zero over a block; or None, which IQ2_XXS does not take.
    out
        uint8 [R, row_nbytes], contiguous, on the same device: filled.
    objective
        Weights of the error, as for the CPU's encoders.
    effort
        ``reference``: the C library's bytes, for :data:`REPRODUCES`.

    Raises
    ------
    ValueError
        Another type, an effort that the type does not have, or no importance where the type needs it.
    """
    if type_name not in SUPPORTED or (effort != "normal" and type_name not in REPRODUCES):
        raise ValueError(f"no GPU encoder of effort {effort!r} for {type_name}")
    if values.numel() == 0:
        return
    if type_name == "IQ2_XXS" and importance is None:
        raise ValueError("IQ2_XXS needs importance weights")
    with torch.cuda.device_of(values):  # kernels run on the current device
        _encode(type_name, values, importance, out, objective == "mse", effort == "reference")


def _encode(
    type_name: str,
    values: torch.Tensor,
    importance: torch.Tensor | None,
    out: torch.Tensor,
    mse: bool,
    reference: bool,
) -> None:
    book = _encode_codebook.CODEBOOKS.get(type_name)
    if book is not None:
        _encode_codebook.encode(book, values, importance, out, mse)
    elif type_name == "IQ2_XXS":
        assert importance is not None
        _encode_grid.encode(values, importance, out, mse)
    elif type_name == "MXFP4":
        _encode_narrow.encode_mxfp4(values, importance, out, search=not reference)
    elif type_name == "Q8_0":
        _encode_linear.encode_q8_0(values, out)
    elif type_name == "F8_E4M3_B128":
        _encode_narrow.encode_f8(values, out)
    elif reference:
        _encode_linear.encode_q4_0_reference(values, importance, out)
    else:
        _encode_linear.encode_q4_0(values, importance, out, mse)


def count_heads(values: torch.Tensor, size: int) -> torch.Tensor:
    """Count of the first ``size`` values of float32 rows, on any device: negative ones, changes of sign, large ones; [R, 3].

    The CPU's ``count_heads`` counts the same.
    """
    bits = values[:, :size].contiguous().view(torch.int32)
    magnitudes = bits & 0x7FFFFFFF
    large = magnitudes > magnitudes.amax(dim=1, keepdim=True) - (2 << 23)
    return torch.stack([part.sum(dim=1) for part in (bits < 0, (bits[:, 1:] ^ bits[:, :-1]) < 0, large)], dim=1)
