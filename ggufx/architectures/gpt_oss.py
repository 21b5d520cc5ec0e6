"""gpt-oss (``gpt-oss``): attention in BF16, routed experts in MXFP4, a layer's experts in one tensor each.

The rows of ``gate_up_proj`` are gate and up by turns. Blocks hold the even element of a pair in the low half, as
DeepSeek-V4's do, so that they are packed the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Final

from ggufx.architectures.base import FP4_BLOCK, Architecture, Family, Output, Part
from ggufx.architectures.rope import Rope
from ggufx.checkpoint import Checkpoint, SourceTensor
from ggufx.container import Value
from ggufx.errors import CheckpointError, PlanError

__all__ = ["GptOss"]


LAYER: Final = (
    Family("input_layernorm.weight", "vector", "hidden"),
    Family("post_attention_layernorm.weight", "vector", "hidden"),
    Family("self_attn.q_proj.weight", "matrix", "heads*head hidden"),
    Family("self_attn.q_proj.bias", "vector", "heads*head"),
    Family("self_attn.k_proj.weight", "matrix", "kv_heads*head hidden"),
    Family("self_attn.k_proj.bias", "vector", "kv_heads*head"),
    Family("self_attn.v_proj.weight", "matrix", "kv_heads*head hidden"),
    Family("self_attn.v_proj.bias", "vector", "kv_heads*head"),
    Family("self_attn.o_proj.weight", "matrix", "hidden heads*head"),
    Family("self_attn.o_proj.bias", "vector", "hidden"),
    Family("self_attn.sinks", "vector", "heads"),
    Family("mlp.router.weight", "router", "experts hidden"),
    Family("mlp.router.bias", "vector", "experts"),
    Family("mlp.experts.down_proj_bias", "vector", "experts hidden"),
    Family("mlp.experts.gate_up_proj_bias", "vector", "experts 2*inter"),
)
BLOCKS: Final = (
    Family("mlp.experts.down_proj_blocks", "expert", "experts hidden inter"),
    Family("mlp.experts.gate_up_proj_blocks", "expert", "experts 2*inter hidden"),
)
"""Their shapes are the logical ones: in the checkpoint the last axis is blocks of 16 bytes."""
GLOBAL: Final = (
    Family("model.embed_tokens.weight", "matrix", "vocab hidden"),
    Family("model.norm.weight", "vector", "hidden"),
    Family("lm_head.weight", "matrix", "vocab hidden"),
)

ASSUMED: Final[Mapping[str, object]] = {
    "hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "tie_word_embeddings": False,
}  # fmt: skip
"""Values of config.json that no key of a file says and every program takes for granted."""
SLIDING: Final = ("sliding_attention", "full_attention")
"""Layers of even and of odd numbers."""
DEFAULT_YARN: Final[Mapping[str, Any]] = {
    "factor": 32.0, "context": 4096, "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
}  # fmt: skip
"""What transformers' GptOssConfig has where config.json names no scaling."""

_LAYER_NAME = re.compile(r"^model\.layers\.(?P<number>0|[1-9]\d*)\.(?P<rest>.+)$")


class GptOss(Architecture):
    """The architecture over one checkpoint.

    Raises
    ------
    CheckpointError
        config.json lacks a value, or its values contradict each other.
    """

    name: ClassVar[str] = "gpt-oss"
    tokenizer_pre: ClassVar[str] = "gpt-4o"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_layers = self.counted("num_hidden_layers")
        self.families = {family.source: family for family in (*LAYER, *BLOCKS)}
        self.everywhere = {family.source: family for family in GLOBAL}

    @property
    def n_experts(self) -> int:
        """Number of routed experts."""
        return self.integer("num_local_experts")

    @cached_property
    def dimensions(self) -> dict[str, int]:
        """The names that :class:`Family` shapes are written in."""
        return {
            "hidden": self.integer("hidden_size"),
            "vocab": self.integer("vocab_size"),
            "heads": self.integer("num_attention_heads"),
            "kv_heads": self.integer("num_key_value_heads"),
            "head": self.integer("head_dim"),
            "inter": self.integer("intermediate_size"),
            "experts": self.n_experts,
        }

    # Tensors ----------------------------------------------------------------------------------------------------

    def scale_name(self, name: str) -> str:
        """Return the name of the blocks' scales; empty for anything else."""
        return name.removesuffix("_blocks") + "_scales" if name.endswith("_blocks") else ""

    def outputs(
        self, target: str, *, mtp: bool, skip: Callable[[str], bool]
    ) -> tuple[list[Output], list[tuple[str, str]]]:
        """Map the checkpoint to output tensors, in upstream's order: experts first (see :meth:`Architecture.outputs`)."""
        if mtp:
            raise PlanError("--mtp: gpt-oss has no MTP block; convert without")
        self._check_config()
        packed: list[Output] = []
        found: list[Output] = []
        skipped: list[tuple[str, str]] = []
        unknown: list[str] = []
        for tensor in self.in_order():
            name = tensor.name
            if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in self.checkpoint:
                continue  # goes with its blocks
            if skip(name):
                skipped += [(n, "left out by --skip") for n in (name, self.scale_name(name)) if n in self.checkpoint]
                continue
            match = _LAYER_NAME.match(name)
            if match is not None and int(match["number"]) >= self.n_layers:
                match = None
            rest = match["rest"] if match else name
            family = self.families.get(rest) if match else self.everywhere.get(name)
            if family is None:
                self._refuse_unpacked(tensor)
                unknown.append(name)
            elif family.role == "expert":
                packed += self._experts(tensor, family)
            elif rest == "mlp.experts.gate_up_proj_bias":
                part = self.part(tensor, family.role, family.shape, self.dimensions)
                shape = (part.shape[0], part.shape[1] // 2)
                for start, proj in enumerate(("gate_proj", "up_proj")):
                    half = Part(tensor, part.kind, shape, start=start, step=2, elements=True)
                    own = self._gguf_name(name.replace("gate_up_proj_bias", f"{proj}.bias"))
                    found.append(Output(own, "vector", ((half,),)))
            else:
                part = self.part(tensor, family.role, family.shape, self.dimensions)
                own = self._gguf_name(name.replace("down_proj_bias", "down_proj.bias"))
                found.append(Output(own, family.role, ((part,),)))
        self.unmapped(unknown)
        self.complete(self._expected(), skip)
        return packed + found, skipped

    def _check_config(self) -> None:
        """Raise CheckpointError for values of config.json that a file could not say."""
        self.check_quantization("mxfp4", None)
        self.check_assumed(ASSUMED, f"programs for {self.name} files")
        kinds = self.facts.find("layer_types")
        if kinds is not None and kinds != [SLIDING[layer % 2] for layer in range(self.n_layers)]:
            raise self.facts.wrong(
                "layer_types", f"{' and '.join(SLIDING)} by turns for {self.n_layers} layers, which programs assume"
            )

    def rope(self) -> Rope:
        """Return the rotary embedding; where config.json has none, the one that transformers takes then."""
        found = super().rope()
        if self.facts.find("rope_scaling") or "rope_parameters" in self.facts:
            return found
        return replace(found, kind="yarn", **DEFAULT_YARN)

    def _refuse_unpacked(self, tensor: SourceTensor) -> None:
        if tensor.name.endswith((".gate_up_proj", ".down_proj")):
            raise CheckpointError(
                f"{self.where(tensor)} is {tensor.dtype}: experts that are not in MXFP4 (..._blocks and ..._scales) have no "
                "native form; convert the checkpoint as it was released"
            )

    def _experts(self, tensor: SourceTensor, family: Family) -> list[Output]:
        """Check a layer's blocks and scales and stack them; gate and up are every other row."""
        count, rows, width = (self._axis(axis) for axis in family.shape.split())
        expected = (count, rows, width // FP4_BLOCK, FP4_BLOCK // 2)
        if tensor.dtype != "U8" or width % FP4_BLOCK or tensor.shape != expected:
            raise CheckpointError(
                f"{self.where(tensor)} is {tensor.dtype}{list(tensor.shape)}, config.json says U8{list(expected)}: blocks of "
                f"{FP4_BLOCK} elements of {rows} rows of {width} for {count} experts"
            )
        scale_name = self.scale_name(tensor.name)
        scale = self.checkpoint.get(scale_name)
        if scale is None:
            raise CheckpointError(f"{self.where(tensor)}: its scales {scale_name!r} are missing")
        if scale.dtype != "U8" or scale.shape != expected[:3]:
            raise CheckpointError(
                f"{self.where(scale)} is {scale.dtype}{list(scale.shape)}, expected U8{list(expected[:3])}: one for each "
                f"{FP4_BLOCK} elements"
            )
        gate_up = "gate_up_proj" in tensor.name
        step = 2 if gate_up else 1
        outputs = []
        for first, proj in enumerate(("gate_proj", "up_proj") if gate_up else ("down_proj",)):
            stack = tuple(
                (
                    Part(
                        tensor,
                        "FP4",
                        (rows // step, width),
                        scale,
                        1,
                        FP4_BLOCK,
                        start=expert * rows + first,
                        step=step,
                    ),
                )
                for expert in range(count)
            )
            base = tensor.name.rpartition(".")[0]
            outputs.append(Output(self._gguf_name(f"{base}.{proj}.weight"), "expert", stack, stacked=True))
        return outputs

    def _axis(self, expression: str) -> int:
        twice = expression.removeprefix("2*")
        return self.dimensions[twice] * (1 if twice == expression else 2)

    def _gguf_name(self, name: str) -> str:
        # Upstream gives the sinks a suffix that they do not have.
        key = f"{name}.weight" if name.endswith(".sinks") else name
        found: str | None = self._tensor_map.get_name(key, (".weight", ".bias"))
        if found is None:
            raise CheckpointError(f"{self.checkpoint.path}: gguf's tensor map has no name for {name!r}")
        return found

    @cached_property
    def _tensor_map(self) -> Any:
        import gguf

        return gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, self.n_layers)

    def _expected(self) -> Iterator[str]:
        yield from self.everywhere
        for layer in range(self.n_layers):
            yield from (f"model.layers.{layer}.{source}" for source in self.families)

    # Metadata ---------------------------------------------------------------------------------------------------

    def keys(self, target: str, *, mtp: bool, file_type: int, chat_template: str | None) -> dict[str, Value]:
        """Return the architecture's metadata in upstream's order, ``general.file_type`` among it."""
        import gguf

        key = gguf.Keys
        dims = self.dimensions
        # The released config has both spellings.
        used = "num_experts_per_tok" if "num_experts_per_tok" in self.facts else "experts_per_token"
        if "experts_per_token" in self.facts and self.integer("experts_per_token") != self.integer(used):
            raise self.facts.wrong("experts_per_token", f"{self.integer(used)}, as num_experts_per_tok has it")
        rope = self.rope()
        keys = {
            key.LLM.BLOCK_COUNT: Value.u32(self.n_layers),
            key.LLM.CONTEXT_LENGTH: Value.u32(self.integer("max_position_embeddings")),
            key.LLM.EMBEDDING_LENGTH: Value.u32(dims["hidden"]),
            key.LLM.FEED_FORWARD_LENGTH: Value.u32(dims["inter"]),
            key.Attention.HEAD_COUNT: Value.u32(dims["heads"]),
            key.Attention.HEAD_COUNT_KV: Value.u32(dims["kv_heads"]),
            **{f"{{arch}}.{name}": value for name, value in rope.keys().items()},
            key.Rope.FREQ_BASE: Value.f32(rope.base),
            key.Attention.LAYERNORM_RMS_EPS: Value.f32(self.number("rms_norm_eps")),
            key.LLM.EXPERT_COUNT: Value.u32(self.n_experts),
            key.LLM.EXPERT_USED_COUNT: Value.u32(self.integer(used)),
            key.Attention.KEY_LENGTH: Value.u32(dims["head"]),
            key.Attention.VALUE_LENGTH: Value.u32(dims["head"]),
            key.General.FILE_TYPE: Value.u32(file_type),
            key.Attention.SLIDING_WINDOW: Value.u32(self.integer("sliding_window")),
            key.LLM.EXPERT_FEED_FORWARD_LENGTH: Value.u32(dims["inter"]),
        }
        return {name.format(arch=self.name): value for name, value in keys.items()}
