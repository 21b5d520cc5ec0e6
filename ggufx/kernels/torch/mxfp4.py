"""MXFP4 in torch, see :mod:`ggufx.types.mxfp4`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ggufx.kernels.torch._words import Fields, fields, look_up


def _half_e8m0() -> np.ndarray[Any, Any]:
    # Half of 2^(e-127): 2^-128 and 2^-127 are subnormal float32.
    e = np.arange(256, dtype=np.uint32)
    return np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (e - 1) << 23).astype(np.uint32).view(np.float32)


def decode(block: Fields, header: Fields) -> Tensor:
    return look_up("E2M1_DOUBLED", fields(block["qs"], 4, 16)) * look_up(_half_e8m0, block["e"])
