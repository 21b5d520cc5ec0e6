"""Chat templates for checkpoints that come without one: DeepSeek-V4's, which publishes Python code instead.

What the code of the release gives for a conversation, the template gives, too (fixtures/chat holds both to it): thinking or
not, earlier reasoning left out, tools, their calls and results, the schema of the answer, the effort of reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from ggufx.typed import open_regular

__all__ = ["Release", "deepseek_v4", "release_of"]

Release = Literal["preview", "0731"]

_THOROUGH: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and "
    "rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND: Final = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause "
    "rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no "
    "assumption remains unchecked and no error remains undiscovered.\n\n"
)
_EFFORTS: Final[Mapping[Release, Mapping[str, str]]] = {
    "preview": {"max": _THOROUGH},
    "0731": {"high": _THOROUGH, "max": _BEYOND},
}
"""What each release begins a prompt with, by ``reasoning_effort``; other efforts have no words."""


_ENCODING: Final = ("encoding", "encoding_dsv4.py")
"""The code that official checkpoints have in place of a template."""
_MAX_ENCODING_NBYTES: Final = 1 << 20


def release_of(checkpoint: Path | None, name: str) -> Release:
    """Return which release of DeepSeek-V4 a model is of.

    Parameters
    ----------
    checkpoint
        Its directory: the published code in it tells. ``None`` or without that code, the name tells, as for llama.cpp's
        converter.
    name
        Of the model, or of its directory.
    """
    if checkpoint is not None:
        try:
            with open_regular(checkpoint.joinpath(*_ENCODING)) as file:
                code = file.read(_MAX_ENCODING_NBYTES).decode("utf-8", "replace")
            return "0731" if _BEYOND.partition(" —")[0] in code else "preview"
        except FileNotFoundError:
            pass
    return "0731" if "0731" in name else "preview"


@cache
def deepseek_v4(release: Release) -> str:
    """Return the template of a release of DeepSeek-V4: ``preview`` (April 2026) or ``0731``.

    Its variables are ``messages``, ``tools``, ``response_format``, ``add_generation_prompt``, ``thinking`` or
    ``enable_thinking`` (off by default), ``drop_thinking`` (on) and ``reasoning_effort``.
    """
    text = resources.files("ggufx").joinpath("templates", "deepseek-v4.jinja").read_text(encoding="utf-8")
    return text.replace("EFFORTS", json.dumps(_EFFORTS[release], ensure_ascii=False), 1)
