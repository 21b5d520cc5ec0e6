"""What a checkpoint says of itself besides its weights: its model card and its name, as ``general.*`` keys and file names.

A card is a text that anybody wrote. Its front matter is read as YAML without aliases, its values as texts, and no word of it
becomes a part of a path.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Final

from ggufx import companions
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, ValueType
from ggufx.errors import CheckpointError
from ggufx.typed import Facts, open_regular, shown

__all__ = ["file_name", "general_keys", "read_card"]

CARD_NAME: Final = "README.md"
_MAX_CARD_NBYTES: Final = 4 << 20
"""Published cards have some ten kilobytes; tables of results make some of them a few hundred."""

_TEXTS: Final = (
    *(f"{prefix}{name}" for prefix in ("", "model_") for name in (
        "name", "author", "version", "organization", "description", "finetune", "basename", "size_label", "url", "doi",
        "uuid", "repo_url",
    )),
    "model_creator", "model_type", "license", "license_name", "license_link",
)  # fmt: skip
"""Entries of a card that the gguf package takes for a text."""
_LISTS: Final = ("tags", "pipeline_tag", "languages", "language")
"""Entries that are a text or a list of texts."""
_SOURCES: Final = ("base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources")
"""Entries that are an id, or a list of ids and of mappings that describe one."""

_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f/\\:*?\"<>|\s]+|[\ud800-\udfff]+")
"""What no part of a derived file name has: separators of any system, control characters, blanks, halves of surrogate pairs."""
_MAX_NAME_NBYTES: Final = 200
"""File systems take 255; the names of splits and of unfinished outputs are longer by their endings."""
_MAX_DEPTH: Final = 100
"""Levels of lists and mappings in a card's front matter; cards have three."""


def general_keys(
    checkpoint: Checkpoint, total: int, size_label: str | None, model_name: str | None
) -> dict[str, Value]:
    """Return the ``general.*`` keys that the gguf package finds in the model card, the configs and the name.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    total
        Number of weights.
    size_label
        ``general.size_label`` where nothing else names one.
    model_name
        ``general.name``, instead of the card's or the directory's.

    Raises
    ------
    CheckpointError
        The card, config.json or generation_config.json holds a value of another kind than its reader takes.
    """
    import gguf

    for name in ("gguf.metadata", "gguf.gguf_writer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sampling = Facts(checkpoint.path / "generation_config.json", checkpoint.generation_config)
    companions.check_sampling(sampling)
    config = Facts(checkpoint.path / "config.json", checkpoint.config)
    companions.check_special_ids(config)
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(),
        read_card(checkpoint.path / CARD_NAME),
        {"_name_or_path": config.text("_name_or_path", None)},
        Path(checkpoint.name),
        total,
    )
    for name, key in companions.SAMPLING.items():
        setattr(found, f"sampling_{name}", sampling.find(key))
    found.name = model_name or found.name or checkpoint.name
    found.size_label = found.size_label or size_label
    writer = gguf.GGUFWriter(None, "none")
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    return {
        key: _from_gguf(value)
        for keys in writer.kv_data
        for key, value in keys.items()
        if key != "general.architecture"
    }


def _from_gguf(value: Any) -> Value:
    kind = ValueType(int(value.type))
    if kind is ValueType.ARRAY:
        items = list(value.value)
        element = ValueType.STRING if not items or isinstance(items[0], str) else ValueType.INT32
        return Value.array(element, items)
    return Value.f32(value.value) if kind is ValueType.FLOAT32 else Value(kind, value.value)


# The card -------------------------------------------------------------------------------------------------------


def read_card(path: Path) -> dict[str, Any]:
    """Return the entries of a model card's front matter that decide keys: texts, and lists of texts or of mappings of texts.

    Numbers, dates and truth values are taken as texts, an empty entry as none. A card that is not there, or has no front
    matter, has no entries.

    Raises
    ------
    CheckpointError
        The card is too large, no UTF-8, no YAML, repeats parts of itself by aliases, or an entry is of another kind.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_CARD_NBYTES + 1)
    except FileNotFoundError:
        return {}
    if len(data) > _MAX_CARD_NBYTES:
        raise _unreadable(path, f"it has more than {_MAX_CARD_NBYTES} bytes")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    # Two corrections that the gguf package makes, too: Norway's language code is no truth value, and tabs are no blanks.
    text = ("\n".join(lines[1:end]) + "\n").replace("- no\n", '- "no"\n').replace("\t", "  ")
    entries = _parse(path, text)
    card: dict[str, Any] = {key: _text(path, key, entries[key]) for key in _TEXTS if key in entries}
    card |= {key: _list(path, key, entries[key]) for key in _LISTS if key in entries}
    card |= {key: _list(path, key, entries[key], mappings=True) for key in _SOURCES if key in entries}
    return {key: value for key, value in card.items() if value is not None}


def _parse(path: Path, text: str) -> Mapping[Any, Any]:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # Nine levels of nine aliases are 400 million entries, whatever becomes of them later.
            if isinstance(event, yaml.AliasEvent):
                raise _unreadable(path, "its front matter uses YAML aliases (*name), which no card needs")
            # Each level makes reading every character after it slower.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise _unreadable(path, f"its front matter is nested more than {_MAX_DEPTH} levels deep")
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _unreadable(path, " ".join(str(error).split())) from None
    except ValueError as error:  # a date such as 2020-13-01
        raise _unreadable(path, str(error)) from None
    return entries if isinstance(entries, dict) else {}


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: the model card cannot be read ({reason}); mend or remove it")


def _wrong(path: Path, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: the model card's {key} is {shown(value)}, expected {expected}; mend or remove it")


def _scalar(value: object) -> str | None:
    """Return a scalar of YAML as a text; ``None`` for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, str | int | float) else None


def _text(path: Path, key: str, value: object) -> str | None:
    text = _scalar(value)
    if text is None and value is not None:
        raise _wrong(path, key, value, "a text")
    return text


def _list(path: Path, key: str, value: object, *, mappings: bool = False) -> list[Any] | None:
    if value is None:
        return None
    expected = "a text or a list of texts" + (" and mappings of texts" if mappings else "")
    items: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        if mappings and isinstance(item, dict):
            pairs = {_scalar(name): _scalar(text) for name, text in item.items() if text is not None}
            text: Any = None if None in pairs or None in pairs.values() else pairs
        else:
            text = _scalar(item)
        if text is None and item is not None:
            raise _wrong(path, key, value, expected)
        if item is not None:
            items.append(text)
    return items


# Names ----------------------------------------------------------------------------------------------------------


def file_name(*words: str | None) -> str:
    """Return texts as one file name, joined by ``-``: without separators, control characters and blanks, not hidden.

    The words come from files that anybody wrote: ``../x`` among them must not name another folder.
    """
    name = "-".join(_UNSAFE.sub("-", word.strip()) for word in words if word)
    name = name.strip(".-") or "ggml-model"
    return name.encode("utf-8")[:_MAX_NAME_NBYTES].decode("utf-8", "ignore")
