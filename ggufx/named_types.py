"""Types that have a name and a size here, and no codec: a file that holds them is listed and copied, not decoded.

They are no codecs because a codec's unit is the row: interleaved types mix the bytes of 4, 8 or 16 rows, and I2_S keeps its
scale behind the last row of the tensor. A type leaves these tables when it gets a codec.

Ids, elements per block, bytes per block and bytes of row header of the dialects' own types are those of ``sizeof`` over each
program's headers (fixtures/type_ids.tsv); those of programs that are no dialects here are as their users report them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ggufx.types.codec import Layout

__all__ = ["FOREIGN", "OWNED", "NamedType"]

_INTERLEAVED: Final = "its rows are interleaved for one kind of CPU"
_REMOVED: Final = "its rows are interleaved for one kind of ARM CPU; llama.cpp wrote such files until December 2024"
_ACTIVATIONS: Final = "a type of activations and caches, not of weights"


class _BitNetLayout(Layout):
    """I2_S: 2 bits a weight, and 32 bytes behind the last row, of which the first 4 are the tensor's float32 scale."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of ``shape``."""
        packed = super().nbytes(shape)
        return packed + 32 if packed else 0


@dataclass(frozen=True)
class NamedType:
    """A type that is known by name and size only.

    Attributes
    ----------
    name
        Its own program's spelling.
    type_id
        Its number there.
    layout
        Bytes of a tensor; the fields of a block are not told apart.
    program
        The program whose files have it.
    what
        What it is and why it has no codec, as half a sentence.
    """

    name: str
    type_id: int
    layout: Layout
    program: str
    what: str

    @property
    def label(self) -> str:
        """Name and id, as listings have them."""
        return f"{self.name} (id {self.type_id})"


def _layout(block_len: int, block_nbytes: int, header_nbytes: int = 0, kind: type[Layout] = Layout) -> Layout:
    header = np.dtype([("d", "u1", (header_nbytes,))]) if header_nbytes else None
    return kind(block_len, np.dtype([("qs", "u1", (block_nbytes,))]), header)


def _named(program: str, rows: Sequence[tuple[str, int, int, int, int, str]]) -> dict[int, NamedType]:
    return {
        type_id: NamedType(name, type_id, _layout(block_len, block_nbytes, header_nbytes), program, what)
        for name, type_id, block_len, block_nbytes, header_nbytes, what in rows
    }


OWNED: Final[Mapping[str, Mapping[int, NamedType]]] = {
    # name, id, elements per block, bytes per block, bytes of row header, what it is
    "llama.cpp": _named(
        "llama.cpp",
        [
            ("Q8_1", 9, 32, 36, 0, _ACTIVATIONS),
            ("Q8_K", 15, 256, 292, 0, _ACTIVATIONS),
        ],
    ),
    "ik_llama.cpp": _named(
        "ik_llama.cpp",
        [
            ("Q8_K", 15, 256, 296, 0, _ACTIVATIONS),  # its block also keeps the sum of the values
            ("Q4_0_4_4", 31, 32, 18, 0, _REMOVED),
            ("Q4_0_4_8", 32, 32, 18, 0, _REMOVED),
            ("Q4_0_8_8", 33, 32, 18, 0, _REMOVED),
            ("Q8_0_X4", 97, 32, 34, 0, _ACTIVATIONS),
            ("Q8_1_X4", 98, 32, 36, 0, _ACTIVATIONS),
            ("Q8_2_X4", 99, 32, 36, 0, _ACTIVATIONS),
            ("Q8_K64", 136, 64, 68, 0, _ACTIVATIONS),
            ("Q8_K16", 147, 64, 64, 20, _ACTIVATIONS),
            ("Q8_K32", 148, 256, 296, 0, _ACTIVATIONS),
            ("Q8_KR8", 149, 256, 296, 0, _ACTIVATIONS),
            ("Q8_K128", 150, 128, 140, 0, _ACTIVATIONS),
            ("Q8_KV", 151, 32, 32, 8, _ACTIVATIONS),
            ("Q4_0_R8", 202, 32, 18, 0, _INTERLEAVED),
            ("Q5_0_R4", 206, 32, 22, 0, _INTERLEAVED),
            ("Q8_0_R8", 208, 32, 34, 0, _INTERLEAVED),
            ("Q2_K_R4", 210, 256, 84, 0, _INTERLEAVED),
            ("Q3_K_R4", 211, 256, 110, 0, _INTERLEAVED),
            ("Q4_K_R4", 212, 256, 144, 0, _INTERLEAVED),
            ("Q5_K_R4", 213, 256, 176, 0, _INTERLEAVED),
            ("Q6_K_R4", 214, 256, 210, 0, _INTERLEAVED),
            ("IQ2_XXS_R4", 216, 256, 66, 0, _INTERLEAVED),
            ("IQ2_XS_R4", 217, 256, 74, 0, _INTERLEAVED),
            ("IQ3_XXS_R4", 218, 256, 98, 0, _INTERLEAVED),
            ("IQ1_S_R4", 219, 32, 6, 2, _INTERLEAVED),
            ("IQ4_NL_R4", 220, 32, 18, 0, _INTERLEAVED),
            ("IQ3_S_R4", 221, 256, 110, 0, _INTERLEAVED),
            ("IQ2_S_R4", 222, 256, 82, 0, _INTERLEAVED),
            ("IQ4_XS_R8", 223, 256, 136, 0, _INTERLEAVED),
            ("IQ1_M_R4", 229, 32, 7, 2, _INTERLEAVED),
            ("BF16_R16", 230, 1, 2, 0, _INTERLEAVED),
            ("Q6_0_R4", 233, 32, 26, 0, _INTERLEAVED),
            ("IQ2_BN_R4", 335, 64, 16, 4, _INTERLEAVED),
            ("IQ2_K_R4", 337, 256, 76, 0, _INTERLEAVED),
            ("IQ3_K_R4", 338, 256, 110, 0, _INTERLEAVED),
            ("IQ4_K_R4", 339, 256, 144, 0, _INTERLEAVED),
            ("IQ5_K_R4", 340, 256, 176, 0, _INTERLEAVED),
            ("IQ4_KS_R4", 344, 256, 136, 4, _INTERLEAVED),
            ("IQ5_KS_R4", 352, 256, 168, 4, _INTERLEAVED),
            ("MXFP4_R8", 353, 32, 17, 0, _INTERLEAVED),
            ("Q8_K_R16", 397, 256, 258, 0, _INTERLEAVED),
            ("Q8_KV_R8", 398, 32, 32, 4, _INTERLEAVED),
            ("Q8_K_R8", 399, 256, 258, 0, _INTERLEAVED),
        ],
    )
    | {
        36: NamedType(
            "I2_S", 36, _layout(4, 1, kind=_BitNetLayout), "ik_llama.cpp", "BitNet's type of one scale a tensor"
        )
    },
}
"""Dialect -> id -> type: what that program's loader takes."""

FOREIGN: Final[Sequence[NamedType]] = tuple(
    NamedType(name, type_id, _layout(block_len, block_nbytes), program, what)
    for name, type_id, block_len, block_nbytes, program, what in (
        ("IQ4_NL_4_4", 36, 32, 18, "llama.cpp of November 2024", _REMOVED),
        ("IQ4_NL_4_8", 37, 32, 18, "llama.cpp of November 2024", _REMOVED),
        ("IQ4_NL_8_8", 38, 32, 18, "llama.cpp of November 2024", _REMOVED),
        ("Q1_0_G32", 40, 32, 6, "PrismML's llama.cpp of April 2026", "an earlier form of its Q1_0"),
        ("Q2_0_G128", 42, 128, 34, "PrismML's llama.cpp", "its Q2_0 with blocks of 128"),
        ("TQ3_1S", 45, 32, 16, "the TurboQuant forks of llama.cpp", "of rotated weights"),
        ("TQ4_1S", 46, 32, 20, "the TurboQuant forks of llama.cpp", "of rotated weights"),
        ("IQ1_XS", 64, 256, 46, "unsloth's llama.cpp", "IQ1_S with a smaller grid"),
        ("IQ1_XXS", 65, 256, 42, "unsloth's llama.cpp", "IQ1_S with a smaller grid"),
        ("IQ1_XXXS", 66, 256, 38, "unsloth's llama.cpp", "IQ1_S with a smaller grid"),
        ("PQ2_0", 142, 128, 34, "PrismML's llama.cpp", "of rotated weights"),
    )
)
"""Types of programs that are no dialects here. One is named where its size fits and no dialect's type of that id does."""
