"""The registry of quant types.

``get("IQ2_KS")`` gives a codec by name, in any case. Types of this package are registered here, third-party types
through the entry-point group ``ggufx.types`` (each entry point is a :class:`Codec` subclass).
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ggufx import kernels
from ggufx.errors import PluginError, UnknownType
from ggufx.types.codec import Codec, Effort, ImportanceWarning, Layout, Objective, Search
from ggufx.types.words import Array, Fields, Words

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "Array",
    "Codec",
    "Effort",
    "Fields",
    "ImportanceWarning",
    "Layout",
    "Objective",
    "Search",
    "Words",
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
    for module, cuda in ((codec.kernel_module, False), (codec.cuda_module, True)):
        if module is not None:
            kernels.provide(codec.name, module, cuda=cuda)
    return codec


_plugins_lock = threading.RLock()
_plugins_state = "unread"


def _load_plugins() -> None:
    """Register the installed third-party types, once, on the first look into the registry.

    A plug-in that cannot be loaded raises at every look, and ``import ggufx`` does not look: a type that goes missing in
    silence would change what the ids of a file mean.
    """
    global _plugins_state  # noqa: PLW0603 (the registry is the module's state)
    if _plugins_state == "read":
        return
    with _plugins_lock:
        if _plugins_state != "unread":
            return  # another thread was faster, or a plug-in looks a type up while it is imported: it sees ours
        from importlib import metadata  # 20 ms that `import ggufx` need not pay

        names, ids = dict(_by_name), dict(_by_id)
        _plugins_state = "reading"
        try:
            for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
                _load_plugin(entry_point)
        except BaseException:
            # The others go too, so that the next look tries, and says, the same again.
            _plugins_state = "unread"
            _by_name.clear()
            _by_name.update(names)
            _by_id.clear()
            _by_id.update(ids)
            raise
        _plugins_state = "read"


def _load_plugin(entry_point: EntryPoint) -> None:
    distribution = "an unnamed distribution" if entry_point.dist is None else entry_point.dist.name
    try:
        codec_class = entry_point.load()
        if not (isinstance(codec_class, type) and issubclass(codec_class, Codec)):
            raise TypeError(f"it is {codec_class!r}, not a subclass of ggufx.types.Codec")
        register(codec_class)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(
            f"type plug-in {entry_point.name!r} ({entry_point.value}, group {ENTRY_POINT_GROUP}) of {distribution} does not "
            f"load: {type(error).__name__}: {reason}; fix or uninstall {distribution}"
        ) from error


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
