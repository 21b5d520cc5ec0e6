"""ggufx: convert native FP8/FP4 checkpoints to GGUF without losing a bit, and read every fork's GGUF into numpy.

``ggufx.open`` reads; the modules ``convert``, ``verify``, ``diff``, ``inspect``, ``merge``, ``rewrite``, ``measure`` hold the
commands as functions of the same name and load on first use (``ggufx.convert.convert(...)``), and so does ``torch``, the way
to a GPU.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ggufx import dialects, types
from ggufx.distortion import Quality, quality
from ggufx.errors import GGUFError
from ggufx.file import File, Tensor
from ggufx.hybrid import open
from ggufx.version import __version__

__all__ = ["File", "GGUFError", "Quality", "Tensor", "__version__", "dialects", "open", "quality", "types"]

_MODULES = frozenset(
    {
        "budget",
        "convert",
        "diff",
        "edit",
        "export",
        "imatrix",
        "inspect",
        "measure",
        "merge",
        "quantize",
        "recipe",
        "retarget",
        "rewrite",
        "testing",
        "torch",
        "verify",
    }
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
