"""What is in a GGUF, or a hybrid: dialect, metadata, tensors, and bytes by type and by role, as plain data."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ggufx.file import Tensor
from ggufx.hybrid import HybridFile, open
from ggufx.values import Value, ValueType, as_unicode

__all__ = ["inspect", "role", "summarise"]

# First match wins; the names are those of upstream, of the forks, and of DeepSeek's checkpoints, which export writes.
_ROLES: Final = (
    (re.compile(r"^token_embd|^embed\."), "embedding"),
    (re.compile(r"^(output|head)\.weight"), "output"),
    (re.compile(r"_exps|\.experts\."), "routed experts"),
    (re.compile(r"_shexp|shared_experts"), "shared experts"),
    (re.compile(r"hc_"), "hyper-connections"),
    (re.compile(r"indexer"), "indexer"),
    (re.compile(r"_norm|^norm\."), "norms"),
    (re.compile(r"ffn_gate_inp|exp_probs_b|tid2eid|ffn\.gate\."), "routers"),
    (re.compile(r"nextn"), "next-token heads"),
    (re.compile(r"attn|ssm"), "attention"),
    (re.compile(r"ffn"), "feed-forward"),
)


def role(name: str) -> str:
    """Return what a tensor is for, by its name."""
    return next((label for pattern, label in _ROLES if pattern.search(name)), "other")


def inspect(
    path: str | Path,
    *,
    dialect: str | None = None,
    pattern: str | None = None,
    limit: int | None = None,
    elements: int | None = None,
    header_only: bool = False,
) -> dict[str, Any]:
    """Describe a GGUF, or a KTransformers hybrid.

    Parameters
    ----------
    path
        The file; any member of a split; or a hybrid's directory.
    dialect
        As in :func:`ggufx.open`.
    pattern
        Shell pattern of the tensors to list; the totals count all.
    limit, elements
        At most so many tensors in the listing, and elements of a metadata array.
    header_only
        Do without tensor data, and without members of a split, that are not there.

    Returns
    -------
    dict
        ``file`` (``complete`` is whether everything was there, ``notes`` says what was not and what is odd), ``metadata``
        (arrays cut to ``elements``), ``tensors``, ``by_type``, ``by_role``: JSON data.
    """
    with open(path, dialect=dialect, header_only=header_only) as file:
        hybrid = isinstance(file, HybridFile)  # which has no header of its own
        chosen = [t for t in file.tensors if pattern is None or fnmatch.fnmatchcase(t.name, pattern)]
        n_weights = sum(t.size for t in file.tensors)
        return {
            "file": {
                "path": str(file.path),
                "paths": [str(p) for p in file.paths],
                "format": "hybrid" if hybrid else "gguf",
                "version": None if hybrid else file.version,
                "dialect": file.dialect,
                "equivalent_dialects": list(file.equivalent),
                "alignment": None if hybrid else file.alignment,
                "data_offset": None if hybrid else file.containers[0].data_offset,
                "nbytes": sum(c.file_nbytes for c in file.containers),
                "n_tensors": len(file),
                "n_weights": n_weights,
                "data_nbytes": file.data_nbytes,
                "bits_per_weight": file.data_nbytes * 8 / n_weights if n_weights else 0.0,
                "file_type": file.file_type,
                "complete": file.complete,
                "notes": list(file.notes),
            },
            "metadata": {as_unicode(key): _describe(file.metadata.value(key), elements) for key in file.metadata},
            "n_matching": len(chosen),
            "tensors": [_line(t) for t in (chosen if limit is None else chosen[:limit])],
            "by_type": summarise(file.tensors, lambda t: t.type_label),
            "by_role": summarise(file.tensors, lambda t: role(t.name)),
        }


def summarise(tensors: Iterable[Any], label: Callable[[Any], str]) -> dict[str, dict[str, Any]]:
    """Add up tensors (anything with ``nbytes`` and ``shape``) by a label: count, weights, bytes and bits per weight."""
    groups: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        group = groups.setdefault(label(tensor), {"n_tensors": 0, "n_weights": 0, "nbytes": 0})
        group["n_tensors"] += 1
        group["n_weights"] += int(np.prod(tensor.shape, dtype=np.int64))
        group["nbytes"] += tensor.nbytes
    for group in groups.values():
        group["bits_per_weight"] = group["nbytes"] * 8 / group["n_weights"] if group["n_weights"] else 0.0
    return dict(sorted(groups.items(), key=lambda item: -item[1]["nbytes"]))


def _line(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": as_unicode(tensor.name),
        "shape": list(tensor.shape),
        "type": tensor.type,
        "type_label": tensor.type_label,
        "type_id": tensor.type_id,
        "nbytes": tensor.nbytes,
        "bits_per_weight": tensor.bits_per_weight,
        "role": role(tensor.name),
        "file_offset": tensor.position,
    }


def _describe(value: Value, limit: int | None) -> dict[str, Any]:
    length = {"length": len(value.data)} if value.type is ValueType.ARRAY else {}
    return {"type": value.kind, **length, "value": value.to_json(limit)}
