"""The grid of IQ1_S and IQ1_M with its shift built in."""

from __future__ import annotations

import numpy as np

from ggufx import tables

POINTS = np.concatenate([8 * tables.GRID_IQ1 + 1, 8 * tables.GRID_IQ1 - 1]).view(np.uint64).ravel()
"""uint64 [4096]: eight signed bytes each, in eighths (an eighth of the scale is exact). Bit 11 of the index shifts down."""
