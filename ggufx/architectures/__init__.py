"""Model architectures: tensor names, roles, shapes and metadata, per dialect. Data, little code."""

from __future__ import annotations

from ggufx.architectures.base import Architecture, Output, Part, Role
from ggufx.architectures.deepseek_v3 import DeepSeekV3
from ggufx.architectures.deepseek_v4 import DeepSeekV4
from ggufx.architectures.gpt_oss import GptOss
from ggufx.checkpoint import Checkpoint
from ggufx.errors import CheckpointError
from ggufx.typed import shown

__all__ = ["Architecture", "DeepSeekV3", "DeepSeekV4", "GptOss", "Output", "Part", "Role", "find"]

_BY_MODEL_TYPE: dict[str, type[Architecture]] = {
    "deepseek_v3": DeepSeekV3,
    "deepseek_v4": DeepSeekV4,
    "gpt_oss": GptOss,
}


def find(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a checkpoint by ``model_type`` of its config.json; raises CheckpointError."""
    if any(name.endswith(".ggml_type") or name.startswith("blk.") for name in checkpoint):
        raise CheckpointError(
            f"{checkpoint.path}: is a hybrid, FP8 tensors of a checkpoint with experts of a GGUF, not a checkpoint; start from "
            "these two: ggufx merge --format gguf makes one file of them"
        )
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _BY_MODEL_TYPE:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: model_type {shown(model_type)} is not supported; supported: "
            f"{', '.join(_BY_MODEL_TYPE)}"
        )
    return _BY_MODEL_TYPE[model_type](checkpoint)
