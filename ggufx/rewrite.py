"""Write a GGUF anew through the engine: the same metadata and tensor bytes, split, merged or as one file.

Types need not be known: bytes are copied, so a tensor of any fork travels untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufx import execute, plan
from ggufx.container import Value
from ggufx.errors import PlanError
from ggufx.file import File, open
from ggufx.plan import Plan

__all__ = ["plan_rewrite", "rewrite"]


def plan_rewrite(file: File, outfile: str | Path, *, split_max_nbytes: int | None = None) -> Plan:
    """Plan a copy of an open GGUF.

    Parameters
    ----------
    file
        The source; all members of a split are merged.
    outfile
        Where to write; with ``split_max_nbytes`` the members get ``-NNNNN-of-NNNNN`` names.
    split_max_nbytes
        Bytes of tensor data per member.

    Raises
    ------
    PlanError
        The output is one of the sources.
    """
    path = Path(outfile)
    paths = [str(p) for p in file.paths]
    if path.exists() and any(path.samefile(p) for p in paths):
        raise PlanError(f"{path}: is the source itself; choose another --outfile")
    tensors = [
        plan.copy_tensor(
            tensor.name,
            tensor.shape,
            tensor.type,
            tensor.type_id,
            plan.Span(paths.index(str(tensor.path)), tensor.file_offset, tensor.nbytes),
        )
        for tensor in file.tensors
    ]
    # A single file that kept its split keys would be refused by loaders as an invalid split.
    metadata: Mapping[str, Value] = {
        key: value for key, value in file.metadata.typed().items() if not key.startswith("split.")
    }
    return plan.build(
        path,
        metadata,
        tensors,
        source_files=paths,
        dialect=file.dialect or "",
        alignment=file.alignment,
        split_max_nbytes=split_max_nbytes,
    )


def rewrite(
    path: str | Path, outfile: str | Path, *, split_max_nbytes: int | None = None, **options: Any
) -> list[Path]:
    """Copy a GGUF: :func:`plan_rewrite` and :func:`ggufx.execute.execute` (which takes ``options``)."""
    with open(path) as file:
        return execute.execute(plan_rewrite(file, outfile, split_max_nbytes=split_max_nbytes), **options)
