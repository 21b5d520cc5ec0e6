"""Write a GGUF anew through the engine: the same metadata and tensor bytes, split, merged or as one file.

Types need not be known: bytes are copied, so a tensor of any fork travels untouched. Tensors may be left out and renamed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ggufx import execute, factors, plan
from ggufx.container import SPLIT_PATTERN, Value
from ggufx.errors import PlanError
from ggufx.file import File, Tensor, open
from ggufx.plan import Plan

__all__ = ["SPLIT_MAX_TENSORS", "plan_merge", "plan_rewrite", "plan_split", "renamed", "rewrite"]

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
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> Plan:
    """Plan a copy of an open GGUF, of all its tensors or of some.

    Parameters
    ----------
    file
        The source; all members of a split are merged.
    outfile
        Where to write; with ``split_max_nbytes`` the members get ``-NNNNN-of-NNNNN`` names.
    split_max_nbytes, split_max_tensors
        Bytes of tensor data, and tensors, per member.
    tensor_first
        ``False``: the first member holds the metadata and no tensor.
    source_allowed
        ``outfile`` may be the source's name: the members' names are others.
    keep
        Shell patterns of the tensors to copy; none: all.
    drop
        Shell patterns of tensors to leave out, of those that are kept.
    rename
        New names by old ones, as :func:`renamed` takes them; of several that match, the first applies.

    Raises
    ------
    PlanError
        The output is one of the sources; a pattern matches no tensor, no tensor is left, two would get the same name, or
        a weight would be parted from its factor (:attr:`ggufx.file.Tensor.factor`).
    """
    path = Path(outfile)
    paths = [str(p) for p in file.paths]
    if not source_allowed and path.exists() and any(path.samefile(p) for p in paths):
        raise PlanError(f"{path}: is the source itself; choose another --outfile")
    names, dropped = _names(file, keep, drop, rename or {})
    tensors = [
        plan.copy_tensor(
            name,
            tensor.shape,
            tensor.type,
            tensor.type_id,
            plan.Span(paths.index(str(tensor.path)), tensor.file_offset, tensor.nbytes),
        )
        for tensor in file.tensors
        if (name := names.get(tensor.name)) is not None
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
        skipped=dropped,
        notes=file.notes,
        file_type=file.file_type or "",
    )


def renamed(name: str, old: str, new: str) -> str | None:
    """Return a tensor's new name, or ``None`` where the pattern ``old`` does not match it.

    Each ``*`` of ``old`` stands for any text, the shortest that fits from the left; the first ``*`` of ``new`` takes the
    text of the first one, and so on. Nothing else is special: ``renamed("model.layers.3.up", "model.layers.*.up",
    "blk.*.ffn_up.weight")`` is ``"blk.3.ffn_up.weight"``.
    """
    texts = _wildcard_texts(name, old)
    if texts is None:
        return None
    first, *others = new.split("*")
    return first + "".join(text + part for text, part in zip(texts, others, strict=False))


def _wildcard_texts(name: str, pattern: str) -> list[str] | None:
    """Return what each ``*`` of a pattern stands for in a name, or ``None`` where the pattern does not match."""
    first, *rest = pattern.split("*")
    if not rest:
        return [] if name == pattern else None
    *middle, last = rest
    at, end = len(first), len(name) - len(last)
    if at > end or not (name.startswith(first) and name.endswith(last)):
        return None
    texts = []
    for part in middle:
        found = name.find(part, at, end)
        if found < 0:
            return None
        texts.append(name[at:found])
        at = found + len(part)
    return [*texts, name[at:end]]


def _names(
    file: File, keep: Sequence[str], drop: Sequence[str], rename: Mapping[str, str]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the output's names by the source's, and the tensors left out with the reason for each."""
    for old, new in rename.items():
        if not new or new.count("*") > old.count("*"):
            raise PlanError(
                f"{old}={new}: the new name of a tensor has {new.count('*')} *, the old one {old.count('*')}: each * of the "
                "new name takes the text of one of the old name"
                if new
                else f"{old}={new}: the new name of a tensor is empty"
            )
    names: dict[str, str] = {}
    dropped: list[tuple[str, str]] = []
    sources: dict[str, str] = {}
    unmatched = dict.fromkeys((*keep, *drop, *rename))
    for tensor in file.tensors:
        kept = _matching(tensor.name, keep)
        out = _matching(tensor.name, drop)
        for pattern in (*kept, *out):
            unmatched.pop(pattern, None)
        if (keep and not kept) or out:
            dropped.append((tensor.name, f"matches {out[0]}" if out else "is not among those to keep"))
            continue
        moved = [(old, found) for old, new in rename.items() if (found := renamed(tensor.name, old, new)) is not None]
        for old, _ in moved:
            unmatched.pop(old, None)
        name = moved[0][1] if moved else tensor.name
        if name in sources:
            raise PlanError(
                f"{file.path}: tensors {sources[name]!r} and {tensor.name!r} would both be called {name!r}; rename one, or "
                "drop it"
            )
        sources[name] = tensor.name
        names[tensor.name] = name
    if unmatched:
        raise PlanError(
            f"{file.path}: {', '.join(repr(pattern) for pattern in unmatched)} matches no tensor of the {len(file)}; ggufx "
            "inspect lists them"
        )
    if dropped and not names:
        raise PlanError(f"{file.path}: no tensor is left of the {len(file)}")
    _check_factors(file.tensors, names)
    return names, dropped


def _matching(name: str, patterns: Iterable[str]) -> list[str]:
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]


def _check_factors(tensors: Iterable[Tensor], names: Mapping[str, str]) -> None:
    """Refuse names under which a loader would read a weight without its factor."""
    for tensor in tensors:
        if tensor.factor is None or tensor.name not in names:
            continue
        wanted = factors.name_of(names[tensor.name])
        got = names.get(tensor.factor.name)
        if got != wanted:
            state = "be left out" if got is None else f"be called {got!r}"
            raise PlanError(
                f"tensor {tensor.name!r} has a factor in {tensor.factor.name!r}, which would {state}, expected {wanted!r}: "
                "its values would be read wrong; keep and rename both alike"
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
    if split_max_nbytes is not None and split_max_tensors is not None:
        raise PlanError("--split-max-size and --split-max-tensors: one of them at a time")
    if split_max_nbytes is None and split_max_tensors is None:
        split_max_tensors = SPLIT_MAX_TENSORS
    prefix = _unsplit_name(file.path) if outfile is None else Path(outfile)
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
    return plan_rewrite(file, _unsplit_name(file.path) if outfile is None else outfile)


def _unsplit_name(path: Path) -> Path:
    match = SPLIT_PATTERN.match(path.name)
    return path if match is None else path.with_name(f"{match['prefix']}.gguf")


def rewrite(
    path: str | Path,
    outfile: str | Path,
    *,
    split_max_nbytes: int | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Path]:
    """Copy a GGUF: :func:`plan_rewrite` and :func:`ggufx.execute.execute` (which takes ``options``)."""
    with open(path) as file:
        planned = plan_rewrite(file, outfile, split_max_nbytes=split_max_nbytes, keep=keep, drop=drop, rename=rename)
        return execute.execute(planned, **options)
