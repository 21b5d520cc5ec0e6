"""ggufx: convert native FP8/FP4 checkpoints to GGUF without losing a bit, and read every fork's GGUF into numpy."""

from ggufx import types
from ggufx.errors import GGUFError
from ggufx.file import File, Tensor, open
from ggufx.quality import Quality, quality

__version__ = "0.1.0"

__all__ = ["File", "GGUFError", "Quality", "Tensor", "__version__", "open", "quality", "types"]
