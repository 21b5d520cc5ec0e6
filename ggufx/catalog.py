"""The table of types, as ``ggufx types`` and the documentation have it."""

from __future__ import annotations

from typing import Any

from ggufx import dialects, types
from ggufx.types import Codec

__all__ = ["cell", "markdown", "markdown_table", "type_row", "type_rows"]


def type_row(codec: Codec) -> dict[str, Any]:
    """Return what ggufx knows of a type, as plain JSON data.

    Keys: ``type``; ``ids`` (dialect -> id, inherited ones included); ``block`` (elements), ``bytes`` (per block), ``header``
    (bytes per row), ``bpw`` (bits per weight without the header); and whether there is a way to ``decode``, ``encode`` and
    ``native pack``, a Numba ``kernel`` and a ``CUDA`` one, and the reference encoder's very bytes (``byte-compatible``).
    ``torch`` says what decodes tensors of other devices, and CUDA's of a type without a kernel: ``True`` for plain torch,
    ``"CPU"`` where the rows go to the CPU and the values come back, ``False`` for a type that does not decode.
    """
    layout = codec.layout
    return {
        "type": codec.name,
        "ids": {d.name: i for d in dialects.DIALECTS.values() if (i := d.type_id(codec)) is not None},
        "block": layout.block_len,
        "bytes": layout.block.itemsize,
        "header": layout.header_nbytes,
        "bpw": round(layout.bits_per_weight(), 4),
        "decode": codec.can_decode,
        "encode": codec.can_encode,
        "native pack": codec.can_pack,
        "kernel": codec.has_kernel,
        "CUDA": codec.has_cuda,
        "torch": codec.has_torch or ("CPU" if codec.can_decode else False),
        "byte-compatible": codec.reproduces,
    }


def type_rows() -> list[dict[str, Any]]:
    """Return :func:`type_row` of every registered type."""
    return [type_row(codec) for codec in types.all_codecs()]


def cell(value: Any) -> str:
    """Return a table's text for a value: an id that every dialect has is the number alone."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, dict):
        distinct = set(value.values())
        if len(distinct) == 1 and len(value) == len(dialects.DIALECTS):
            return f"{distinct.pop()}"
        return ", ".join(f"{number} {name}" for name, number in value.items())
    return str(value)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return rows of the same keys as a Markdown table; the empty string for none."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return the table of types in Markdown."""
    return markdown_table(type_rows())
