"""The registry of quant types.

``get("IQ2_KS")`` gives a codec by name, in any case. Types of this package are registered here, third-party types
through the entry-point group ``ggufx.types`` (each entry point is a :class:`Codec` subclass).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache

from ggufx.errors import UnknownType
from ggufx.types.codec import Codec, Effort, ImportanceWarning, Layout, Objective, Search

__all__ = [
    "Codec",
    "Effort",
    "ImportanceWarning",
    "Layout",
    "Objective",
    "Search",
    "all_codecs",
    "by_id",
    "get",
    "register",
]

ENTRY_POINT_GROUP = "ggufx.types"

_by_name: dict[str, Codec] = {}
_by_id: dict[tuple[str, int], Codec] = {}


def register(codec_class: type[Codec]) -> Codec:
    """Register a type; returns its codec.

    Raises
    ------
    ValueError
        Its name, or one of its (dialect, id) pairs, is taken.
    """
    codec = codec_class()
    key = codec.name.upper()
    if key in _by_name:
        raise ValueError(f"a type named {codec.name} is already registered")
    for pair in codec.ids.items():
        if pair in _by_id:
            raise ValueError(f"{codec.name} claims id {pair[1]} of {pair[0]}, which is {_by_id[pair].name}")
    _by_name[key] = codec
    for pair in codec.ids.items():
        _by_id[pair] = codec
    return codec


@cache
def _load_plugins() -> None:
    from importlib import metadata  # 20 ms that `import ggufx` need not pay

    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        register(entry_point.load())


def get(name: str) -> Codec:
    """Return the codec of type ``name`` (any case); raises UnknownType."""
    _load_plugins()
    codec = _by_name.get(name.upper())
    if codec is None:
        raise UnknownType(f"{name!r} is not a known type; known: {', '.join(sorted(c.name for c in all_codecs()))}")
    return codec


def by_id(dialect: str, type_id: int) -> Codec | None:
    """Return the codec that claims ``type_id`` in ``dialect`` itself (not in its parents), or ``None``."""
    _load_plugins()
    return _by_id.get((dialect, type_id))


def all_codecs() -> Iterator[Codec]:
    """Iterate over every registered codec: this package's by id, then third-party ones in order of registration."""
    _load_plugins()
    return iter(list(_by_name.values()))


def _own_classes() -> list[type[Codec]]:
    """Collect the codecs that the modules of this package define (or list in ``CODECS``), by id."""
    found: list[type[Codec]] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += getattr(module, "CODECS", ())
        found += [
            value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, Codec)
            and value.__module__ == module.__name__
            and not name.startswith("_")
            and hasattr(value, "ids")
            and value not in found
        ]
    return sorted(found, key=lambda codec: min(codec.ids.values()))


for _class in _own_classes():
    register(_class)
