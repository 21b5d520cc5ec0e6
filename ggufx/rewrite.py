"""Write a GGUF anew through the engine: the same metadata and tensor bytes, split, merged or as one file.

Types need not be known: bytes are copied, so a tensor of any fork travels untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ggufx import execute, plan
from ggufx.container import SPLIT_PATTERN, Value
from ggufx.errors import PlanError
from ggufx.file import File, open
from ggufx.options import given, refuse
from ggufx.output_names import fill_file_type, is_directory
from ggufx.plan import Plan

__all__ = ["SPLIT_MAX_TENSORS", "plan_merge", "plan_rewrite", "plan_split", "rewrite"]

SPLIT_MAX_TENSORS: Final = 128
"""llama-gguf-split's default."""


def plan_rewrite(
    file: File,
    outfile: str | Path,
    *,
    split_max_nbytes: int | None = None,
    split_max_tensors: int | None = None,
    tensor_first: bool = True,
    source_allowed: bool = False,
) -> Plan:
    """Plan a copy of an open GGUF.

    Parameters
    ----------
    file
        The source; all members of a split are merged.
    outfile
        Where to write; may hold ``{ftype}``. In a directory it has the source's name. With ``split_max_nbytes`` the members
        get ``-NNNNN-of-NNNNN`` names.
    split_max_nbytes, split_max_tensors
        Bytes of tensor data, and tensors, per member.
    tensor_first
        ``False``: the first member holds the metadata and no tensor.
    source_allowed
        ``outfile`` may be the source's name: the members' names are others.

    Raises
    ------
    PlanError
        The output is one of the sources.
    """
    path = _named(file, outfile)
    paths = [str(p) for p in file.paths]
    if not source_allowed and path.exists() and any(path.samefile(p) for p in paths):
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
        split_max_tensors=split_max_tensors,
        tensor_first=tensor_first,
        notes=file.notes,
        file_type=file.file_type or "",
    )


def plan_split(
    file: File,
    outfile: str | Path | None = None,
    *,
    split_max_nbytes: int | None = None,
    split_max_tensors: int | None = None,
    tensor_first: bool = True,
) -> Plan:
    """Plan to split a GGUF as llama-gguf-split does: ``PREFIX-00001-of-0000N.gguf``, metadata in the first.

    Parameters
    ----------
    file
        The source; one that is split already is split anew.
    outfile
        Prefix of the names, with or without ``.gguf``; default: the source's own name.
    split_max_nbytes, split_max_tensors
        Bytes of tensor data, or tensors, per member; default :data:`SPLIT_MAX_TENSORS` tensors.
    tensor_first
        ``False``: the first member holds the metadata and no tensor.

    Raises
    ------
    PlanError
        Both limits are given, or an output is one of the sources.
    """
    refuse("split", given({"split_max_nbytes": split_max_nbytes, "split_max_tensors": split_max_tensors}))
    if split_max_nbytes is None and split_max_tensors is None:
        split_max_tensors = SPLIT_MAX_TENSORS
    prefix = _unsplit_name(file.path) if outfile is None else _named(file, outfile)
    built = plan_rewrite(
        file,
        prefix if prefix.suffix == ".gguf" else prefix.with_name(prefix.name + ".gguf"),
        split_max_nbytes=split_max_nbytes,
        split_max_tensors=split_max_tensors,
        tensor_first=tensor_first,
        source_allowed=True,
    )
    taken = {path.resolve() for path in file.paths} & {planned.path.resolve() for planned in built.files}
    if taken:
        raise PlanError(f"{min(taken)}: is the source itself; choose another --outfile")
    return built


def plan_merge(file: File, outfile: str | Path | None = None) -> Plan:
    """Plan to merge the members of a split GGUF; by default under the name that they have in common.

    Raises
    ------
    PlanError
        The file is not split.
    """
    if "split.count" not in file.metadata:  # a split may have one member only
        raise PlanError(f"{file.path}: is not split; there is nothing to merge")
    return plan_rewrite(file, _unsplit_name(file.path) if outfile is None else _named(file, outfile))


def _named(file: File, outfile: str | Path) -> Path:
    """Return where a copy goes: in a directory it has the source's own name."""
    if is_directory(outfile):
        return Path(outfile) / _unsplit_name(file.path).name
    return fill_file_type(outfile, file.file_type or "mixed")


def _unsplit_name(path: Path) -> Path:
    match = SPLIT_PATTERN.match(path.name)
    return path if match is None else path.with_name(f"{match['prefix']}.gguf")


def rewrite(
    path: str | Path, outfile: str | Path, *, split_max_nbytes: int | None = None, **options: Any
) -> list[Path]:
    """Copy a GGUF: :func:`plan_rewrite` and :func:`ggufx.execute.execute` (which takes ``options``)."""
    with open(path) as file:
        return execute.execute(plan_rewrite(file, outfile, split_max_nbytes=split_max_nbytes), **options)
