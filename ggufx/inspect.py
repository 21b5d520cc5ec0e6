"""What is in a GGUF, a hybrid or a checkpoint: metadata, tensors, and bytes by type and by role, as plain data."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ggufx import architectures
from ggufx.checkpoint import Checkpoint, SourceTensor, read_shard
from ggufx.errors import CheckpointError
from ggufx.file import Tensor
from ggufx.hybrid import HybridFile, open
from ggufx.values import Value, ValueType, as_unicode

__all__ = ["inspect", "role", "summarise"]

# First match wins; the names are those of upstream, of the forks, of DeepSeek's checkpoints, which export writes, and of
# transformers.
_ROLES: Final = (
    (re.compile(r"^token_embd|^embed\.|embed_tokens"), "embedding"),
    (re.compile(r"^((output|head)\.weight|lm_head\.)"), "output"),
    (re.compile(r"_exps|\.experts\."), "routed experts"),
    (re.compile(r"_shexp|shared_experts"), "shared experts"),
    (re.compile(r"hc_"), "hyper-connections"),
    (re.compile(r"indexer"), "indexer"),
    (re.compile(r"_norm|layernorm|\bnorm\."), "norms"),
    (re.compile(r"ffn_gate_inp|exp_probs_b|tid2eid|(ffn|mlp)\.gate\.|mlp\.router\."), "routers"),
    (re.compile(r"nextn"), "next-token heads"),
    (re.compile(r"attn|ssm"), "attention"),
    (re.compile(r"ffn|mlp"), "feed-forward"),
)
_SCALES: Final = (
    (".weight", ".weight_scale_inv"),
    (".weight", ".weight_scale"),
    (".weight", ".scale"),
    ("_blocks", "_scales"),
)
"""Endings of a quantized tensor's name in a checkpoint, and of the name of its scales."""
_JSON_KINDS: Final[Mapping[type, str]] = {
    bool: "bool", int: "int", float: "float", str: "str", list: "array", dict: "object", type(None): "null",
}  # fmt: skip


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
    """Describe a GGUF, a KTransformers hybrid, or a checkpoint.

    Parameters
    ----------
    path
        The file; any member of a split; a hybrid's or a checkpoint's directory; or a safetensors file.
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
        (arrays cut to ``elements``; of a checkpoint its config.json), ``tensors``, ``by_type``, ``by_role``: JSON data.
        A checkpoint's types are the dtypes of safetensors, and its weights are counted as the elements that these have:
        an I8 that holds two FP4 codes is one. Its tensors have their ``shard`` and, of the quantized ones, the name of
        their ``scales``.

    Raises
    ------
    ContainerError, CheckpointError
        The file, or a file of the directory, is damaged or missing.
    UnknownDialect, AmbiguousDialect
        As in :func:`ggufx.open`.
    """
    found = _safetensors(Path(path))
    if found is not None:
        return _inspect_checkpoint(Path(path), *found, pattern=pattern, limit=limit, elements=elements)
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


def _safetensors(path: Path) -> tuple[Checkpoint | None, list[Path], list[SourceTensor]] | None:
    """Return a checkpoint, its shards and tensors; ``None`` of a GGUF and of a hybrid."""
    checkpoint, shards = None, [path]
    if path.is_dir():
        if (path / "config.json").exists() or path.absolute().name.startswith("models--"):
            checkpoint = Checkpoint(path)
            shards, tensors = checkpoint.shards, list(checkpoint.values())
        else:
            shards = sorted(path.glob("*.safetensors"))
            tensors = [tensor for number, shard in enumerate(shards) for tensor in read_shard(shard, number)[1]]
    elif path.suffix == ".safetensors":
        tensors = read_shard(path, 0)[1]
    else:
        return None
    hybrid = not shards or any(tensor.name.endswith(".ggml_type") for tensor in tensors)
    return None if hybrid else (checkpoint, shards, tensors)


def _inspect_checkpoint(
    path: Path,
    checkpoint: Checkpoint | None,
    shards: Sequence[Path],
    tensors: list[SourceTensor],
    *,
    pattern: str | None,
    limit: int | None,
    elements: int | None,
) -> dict[str, Any]:
    names = {tensor.name: tensor for tensor in tensors}
    # By layer, and scales beside their weights: writers of safetensors sort by dtype.
    tensors.sort(key=lambda t: [(int(part), "") if part.isdecimal() else (-1, part) for part in t.name.split(".")])
    chosen = [t for t in tensors if pattern is None or fnmatch.fnmatchcase(t.name, pattern)]
    n_weights = sum(_size(t.shape) for t in tensors)
    data_nbytes = sum(t.nbytes for t in tensors)
    notes = []
    if checkpoint is not None:
        try:
            architectures.find(checkpoint)
        except CheckpointError as error:
            notes.append(f"ggufx convert does not take it: {error}")
    config = {} if checkpoint is None else checkpoint.config
    return {
        "file": {
            "path": str(path if checkpoint is None else checkpoint.path),
            "paths": [str(shard) for shard in shards],
            "format": "safetensors" if checkpoint is None else "checkpoint",
            "version": None,
            "dialect": None,
            "equivalent_dialects": [],
            "alignment": None,
            "data_offset": None,
            "nbytes": sum(shard.stat().st_size for shard in shards),
            "n_tensors": len(tensors),
            "n_weights": n_weights,
            "data_nbytes": data_nbytes,
            "bits_per_weight": data_nbytes * 8 / n_weights if n_weights else 0.0,
            "file_type": None,
            "complete": True,
            "notes": notes,
        },
        "metadata": {as_unicode(key): _describe_json(value, elements) for key, value in config.items()},
        "n_matching": len(chosen),
        "tensors": [
            {
                "name": as_unicode(tensor.name),
                "shape": list(tensor.shape),
                "type": tensor.dtype,
                "type_label": tensor.dtype,
                "type_id": None,
                "nbytes": tensor.nbytes,
                "bits_per_weight": tensor.nbytes * 8 / size if (size := _size(tensor.shape)) else 0.0,
                "role": role(tensor.name),
                "file_offset": tensor.offset,
                "shard": shards[tensor.shard].name,
                "scales": _scales_of(tensor.name, names),
            }
            for tensor in (chosen if limit is None else chosen[:limit])
        ],
        "by_type": summarise(tensors, lambda t: t.dtype),
        "by_role": summarise(tensors, lambda t: role(t.name)),
    }


def _size(shape: Iterable[int]) -> int:
    return int(np.prod(tuple(shape), dtype=np.int64))


def _scales_of(name: str, names: Mapping[str, SourceTensor]) -> str | None:
    for ending, scales in _SCALES:
        found = name.removesuffix(ending) + scales
        if name.endswith(ending) and found in names:
            return as_unicode(found)
    return None


def _describe_json(value: Any, limit: int | None) -> dict[str, Any]:
    kind = _JSON_KINDS[type(value)]
    if kind == "array":
        return {"type": kind, "length": len(value), "value": value if limit is None else value[:limit]}
    return {"type": kind, "value": value}


def summarise(tensors: Iterable[Any], label: Callable[[Any], str]) -> dict[str, dict[str, Any]]:
    """Add up tensors (anything with ``nbytes`` and ``shape``) by a label: count, weights, bytes and bits per weight."""
    groups: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        group = groups.setdefault(label(tensor), {"n_tensors": 0, "n_weights": 0, "nbytes": 0})
        group["n_tensors"] += 1
        group["n_weights"] += _size(tensor.shape)
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
