"""Types that are known by their layout only: they open, list, copy and tell dialects apart; decoding them raises.

A type leaves this table when it gets a file of its own.
"""

from __future__ import annotations

import numpy as np

from ggufx.types.codec import Codec, Layout

_TABLE = (
    # dialect, name, id, elements per block, bytes per block, row header (field "d") or None
    ("llama.cpp", "Q1_0", 41, 128, 18, None),
    ("llama.cpp", "Q2_0", 42, 64, 18, None),
    ("ik_llama.cpp", "Q6_0", 133, 32, 26, None),
    ("ik_llama.cpp", "IQ1_BN", 134, 64, 13, "<f2"),
    ("ik_llama.cpp", "IQ2_BN", 135, 64, 16, "<f4"),
    ("ik_llama.cpp", "IQ2_K", 137, 256, 76, None),
    ("ik_llama.cpp", "IQ3_K", 138, 256, 110, None),
    ("ik_llama.cpp", "IQ4_K", 139, 256, 144, None),
    ("ik_llama.cpp", "IQ5_K", 140, 256, 176, None),
    ("ik_llama.cpp", "IQ6_K", 141, 256, 212, None),
    ("ik_llama.cpp", "IQ4_KS", 144, 256, 136, "<f4"),
    ("ik_llama.cpp", "IQ2_KS", 145, 256, 70, "<f2"),
    ("ik_llama.cpp", "IQ4_KSS", 146, 256, 128, "<f4"),
    ("ik_llama.cpp", "IQ5_KS", 152, 256, 168, "<f4"),
    ("ik_llama.cpp", "IQ2_KT", 153, 256, 68, "<f4"),
    ("ik_llama.cpp", "IQ3_KT", 154, 256, 100, "<f4"),
    ("ik_llama.cpp", "IQ4_KT", 155, 256, 128, "<f4"),
    ("ik_llama.cpp", "IQ3_KS", 156, 256, 102, "<f2"),
    ("ik_llama.cpp", "IQ2_KL", 157, 256, 86, "<f2"),
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
