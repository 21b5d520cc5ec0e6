"""Types that are known by their layout only: they open, list, copy and tell dialects apart; decoding them raises.

A type leaves this table when it gets a file of its own.
"""

from __future__ import annotations

import numpy as np

from ggufx.types.codec import Codec, Layout

_TABLE = (
    # dialect, name, id, elements per block, bytes per block, row header (field "d") or None
    ("ik_llama.cpp", "IQ1_BN", 134, 64, 13, "<f2"),
    ("ik_llama.cpp", "IQ2_BN", 135, 64, 16, "<f4"),
    ("ik_llama.cpp", "IQ1_KT", 158, 256, 56, "<f4"),
)

CODECS: list[type[Codec]] = [
    type(
        name,
        (Codec,),
        {
            "__doc__": f"{name}: {block_len} elements in {nbytes} bytes; known by its layout only.",
            "__module__": __name__,
            "layout": Layout(
                block_len, np.dtype([("qs", "u1", (nbytes,))]), None if header is None else np.dtype([("d", header)])
            ),
            "ids": {dialect: type_id},
        },
    )
    for dialect, name, type_id, block_len, nbytes, header in _TABLE
]
