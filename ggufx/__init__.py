"""ggufx: convert native FP8/FP4 checkpoints to GGUF without losing a bit, and read and write every fork's GGUF from NumPy.

``open`` and ``load_file`` read; ``save``, ``save_file`` and ``Writer`` write arrays; ``quantize_array`` and ``dequantize`` are
for arrays in memory. The modules ``convert``, ``verify``, ``diff``, ``inspect``, ``merge``, ``rewrite``, ``measure`` hold the
commands as functions of the same name (``ggufx.convert.convert(...)``), and ``torch`` is the way to a GPU. What is not needed
to open a file loads on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ggufx import dialects, types
from ggufx.distortion import Quality, quality
from ggufx.errors import GGUFError
from ggufx.file import File, Tensor
from ggufx.hybrid import open
from ggufx.version import __version__

if TYPE_CHECKING:
    # The alias says that a name is public: a checker knows ggufx.convert so.
    from ggufx import budget as budget
    from ggufx import convert as convert
    from ggufx import diff as diff
    from ggufx import edit as edit
    from ggufx import export as export
    from ggufx import imatrix as imatrix
    from ggufx import inspect as inspect
    from ggufx import measure as measure
    from ggufx import merge as merge
    from ggufx import quantize as quantize
    from ggufx import recipe as recipe
    from ggufx import retarget as retarget
    from ggufx import rewrite as rewrite
    from ggufx import testing as testing
    from ggufx import torch as torch
    from ggufx import values as values
    from ggufx import verify as verify
    from ggufx.arrays import Lazy, Packed, dequantize, quantize_array
    from ggufx.saving import load_file, save, save_file
    from ggufx.writer import Writer

__all__ = [
    "File",
    "GGUFError",
    "Lazy",
    "Packed",
    "Quality",
    "Tensor",
    "Writer",
    "__version__",
    "dequantize",
    "dialects",
    "load_file",
    "open",
    "quality",
    "quantize_array",
    "save",
    "save_file",
    "types",
]

_MODULES = frozenset(
    {
        "budget",
        "convert",
        "diff",
        "edit",
        "errors",
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
        "values",
        "verify",
    }
)
_HOMES = {
    "Lazy": "arrays",
    "Packed": "arrays",
    "Writer": "writer",
    "dequantize": "arrays",
    "load_file": "saving",
    "quantize_array": "arrays",
    "save": "saving",
    "save_file": "saving",
}
"""Modules of the functions and classes that load on first use."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
