"""A DeepSeek-V4 GGUF read backwards: which checkpoint tensor each of its tensors is, and the config it was made from.

The nisparks files lack keys that other readers demand (routing, hash layers, hyper-connections, compression, output
groups): shapes and the presence of tensors say most of it, the rest is the same for every model of the family. What was
found so is told, key by key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from ggufx.architectures.base import Output
from ggufx.architectures.deepseek_v4 import EPSILON, GLOBAL, LAYER, SINKHORN, DeepSeekV4, Family
from ggufx.checkpoint import Checkpoint, SourceTensor
from ggufx.container import Value
from ggufx.errors import CheckpointError, PlanError
from ggufx.file import File, Tensor
from ggufx.typed import ADVICE, Facts

__all__ = ["DeepSeekV4File", "Member"]

T = TypeVar("T")

GATING: Final[Mapping[int, str]] = {1: "softmax", 2: "sigmoid", 4: "sqrtsoftplus"}
"""llama.cpp's ``expert_gating_func`` and config.json's ``scoring_func``."""

ALIASES: Final[Mapping[str, str]] = {"attn_kv_a_mqa.weight": "attn.wkv.weight"}
"""Names that ik_llama.cpp accepts besides upstream's."""


def _bare(name: str) -> str:
    """Return a name without its suffix: writers differ in which tensors have one, and no two differ by it alone."""
    return name.removesuffix(".weight").removesuffix(".bias")


_BLOCK = re.compile(r"^blk\.(?P<layer>\d+)\.(?P<rest>.+)$")
_SOURCES: Final = {
    **{_bare(form): family for family in LAYER for form in (family.nisparks, family.upstream)},
    **{_bare(name): next(f for f in LAYER if f.source == source) for name, source in ALIASES.items()},
}
_GLOBALS: Final = {_bare(form): family for family in GLOBAL for form in (family.nisparks, family.upstream)}


class Member(NamedTuple):
    """What a tensor of the file is in the checkpoint; ``layer`` is -1 for the global ones."""

    tensor: Tensor
    family: Family
    layer: int

    @property
    def source(self) -> str:
        """Checkpoint name; of expert 0 for stacked experts."""
        return self.of_expert(0)

    def of_expert(self, expert: int) -> str:
        """Checkpoint name of one expert (of the tensor itself, if it is none)."""
        prefix = "" if self.layer < 0 else f"layers.{self.layer}."
        return prefix + self.family.source.replace("{E}", str(expert))


class DeepSeekV4File:
    """The main model in a GGUF of any dialect.

    Attributes
    ----------
    file
        The open GGUF.
    members
        Checkpoint name -> its place in the file, in file order; experts by the name of expert 0.
    supposed
        (key as upstream calls it, sentence) of every fact that no key of the file states.

    Raises
    ------
    PlanError
        A tensor is none of the family's, a key is missing that nothing else tells, or what is there contradicts itself.
    """

    def __init__(self, file: File) -> None:
        self.file = file
        self.supposed: list[tuple[str, str]] = []
        self.members = {member.source: member for member in map(self._member, file.tensors)}
        if len(self.members) != len(file):
            raise PlanError(f"{file.path}: two tensors are the same one of the checkpoint, under two dialects' names")

    @staticmethod
    def recognises(file: File) -> bool:
        """Return whether the file holds a DeepSeek-V4 main model."""
        if file.architecture != DeepSeekV4.name:
            return False
        return not any(".nextn." in name for name in file)

    @staticmethod
    def form_of(file: File) -> str:
        """Whose names a main model's file has, ``nisparks`` or ``llama.cpp``: by the hyper-connections, which no two share."""
        return "nisparks" if any(_bare(name) == "hc_head_base" for name in file) else "llama.cpp"

    @property
    def form(self) -> str:
        """Whose names the file has: see :meth:`form_of`."""
        return self.form_of(self.file)

    @property
    def plainly_named(self) -> bool:
        """Whether every tensor has its form's own name, and none an alias or another form's."""
        nisparks = self.form == "nisparks"
        return all(
            _BLOCK.sub(r"\g<rest>", tensor.name) == (family.nisparks if nisparks else family.upstream)
            for tensor, family, _ in self.members.values()
        )

    def _member(self, tensor: Tensor) -> Member:
        match = _BLOCK.match(tensor.name)
        family = _SOURCES.get(_bare(match["rest"])) if match else _GLOBALS.get(_bare(tensor.name))
        if family is None:
            raise PlanError(
                f"{self.file.path}: tensor {tensor.name!r} is none of DeepSeek-V4's; the target has no name for it"
            )
        axes = len(family.shape.split()) + (family.role == "expert")
        # An expert or a row takes a byte at least: of an unknown type only the bytes that are there are known.
        if len(tensor.shape) != axes or not 0 < tensor.shape[0] <= tensor.nbytes or 0 in tensor.shape:
            stacked = " (experts stacked)" if family.role == "expert" else ""
            raise PlanError(
                f"{self.file.path}: tensor {tensor.name!r} is {list(tensor.shape)} in {tensor.nbytes} bytes, expected "
                f"{axes} dims{stacked}, and bytes for them"
            )
        return Member(tensor, family, int(match["layer"]) if match else -1)

    # The config -------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as far as the file tells it, in the official order."""
        return self.config_from(self.file.metadata.typed(), self.supposed)

    def config_from(self, metadata: Mapping[str, Value], supposed: list[tuple[str, str]]) -> dict[str, Any]:
        """Return the config that ``metadata`` and the tensors' shapes give, noting what was not stated."""
        facts = _Facts(self.file.path, metadata, supposed)
        layers = facts.positive("block_count")
        blocks = len({member.layer for member in self.members.values()} - {-1})
        if layers != blocks:
            raise PlanError(
                f"{self.file.path}: key {DeepSeekV4.name}.block_count is {layers}, the file has tensors of {blocks} blocks: "
                "this is not a whole model, or the metadata is of another"
            )
        heads, head = facts.positive("attention.head_count"), facts.positive("attention.key_length")
        groups, rank = self._output_groups(heads * head)
        found = self._ratios(layers)
        ratios = facts.integers("attention.compress_ratios", None)
        context = facts.positive("context_length")
        clamp = facts.numbers("swiglu_clamp_exp")
        if not clamp:
            raise facts.wrong("swiglu_clamp_exp", "a number for each block")
        config = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hc_eps": facts.or_suppose(facts.short, "hyper_connection.epsilon", EPSILON, "the family's"),
            "hc_mult": facts.or_suppose(
                facts.positive, "hyper_connection.count", self._shape("hc_head_base")[0], "length of hc_head_base"
            ),
            "hc_sinkhorn_iters": facts.or_suppose(
                facts.positive, "hyper_connection.sinkhorn_iterations", SINKHORN, "the family's"
            ),
            "head_dim": head,
            "hidden_act": "silu",
            "hidden_size": facts.positive("embedding_length"),
            "index_head_dim": facts.positive("attention.indexer.key_length"),
            "index_n_heads": facts.positive("attention.indexer.head_count"),
            "index_topk": facts.positive("attention.indexer.top_k"),
            "max_position_embeddings": context,
            "model_type": "deepseek_v4",
            "moe_intermediate_size": facts.positive("expert_feed_forward_length"),
            "n_routed_experts": facts.positive("expert_count"),
            "n_shared_experts": facts.positive("expert_shared_count"),
            "norm_topk_prob": facts.flag("expert_weights_norm"),
            "num_attention_heads": heads,
            "num_experts_per_tok": facts.positive("expert_used_count"),
            "num_hidden_layers": layers,
            "num_hash_layers": facts.or_suppose(
                facts.integer, "hash_layer_count", self._hash_layers(layers), "layers with a token-to-expert table"
            ),
            "num_key_value_heads": facts.positive("attention.head_count_kv"),
            "num_nextn_predict_layers": facts.or_suppose(
                facts.integer, "nextn_predict_layers", 1, "every release has one MTP block"
            ),
            "o_groups": facts.or_suppose(
                facts.positive, "attention.output_group_count", groups, "shape of attn_output_a"
            ),
            "o_lora_rank": facts.or_suppose(
                facts.positive, "attention.output_lora_rank", rank, "shape of attn_output_a"
            ),
            "q_lora_rank": facts.positive("attention.q_lora_rank"),
            "qk_rope_head_dim": facts.positive("rope.dimension_count"),
            "rms_norm_eps": facts.short("attention.layer_norm_rms_epsilon"),
            "rope_scaling": self._rope_scaling(facts, context),
            "rope_theta": _whole(facts.short("rope.freq_base")),
            "routed_scaling_factor": facts.short("expert_weights_scale"),
            "scoring_func": self._scoring(facts),
            "sliding_window": facts.positive("attention.sliding_window"),
            "swiglu_limit": _shortest(clamp[0]),
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self._shape("embed.weight")[0],
            "compress_rope_theta": _whole(self._compress_base(facts)),
        }
        if ratios is None:
            facts.suppose(
                "attention.compress_ratios",
                "from the compressors' shapes, and 0 for one MTP block, which every release has",
            )
            ratios = [*found, 0]
        if ratios[:layers] != found:
            raise PlanError(
                f"{self.file.path}: attention.compress_ratios is {str(ratios)[:200]}, the compressors' tensors say {found}: "
                "the metadata and the tensors are of different models"
            )
        config["compress_ratios"] = ratios
        return config

    def _shape(self, source: str) -> tuple[int, ...]:
        member = self.members.get(source)
        if member is None:
            raise PlanError(
                f"{self.file.path}: tensor {source!r} (checkpoint name) is missing: this is not a whole model"
            )
        return member.tensor.shape

    def _output_groups(self, width: int) -> tuple[int, int]:
        rows, row_len = self._shape("layers.0.attn.wo_a.weight")[-2:]
        groups = width // row_len
        if groups * row_len != width or groups == 0 or rows % groups:
            raise PlanError(
                f"{self.file.path}: the first layer's attn_output_a {[rows, row_len]} does not divide heads of {width} values "
                "into groups: the metadata and the tensors are of different models"
            )
        return groups, rows // groups

    def _ratios(self, layers: int) -> list[int]:
        """Compression ratio of every layer: the rows of its position table, 0 without one."""
        tables = [self.members.get(f"layers.{layer}.attn.compressor.ape") for layer in range(layers)]
        return [0 if table is None else table.tensor.shape[0] for table in tables]

    def _hash_layers(self, layers: int) -> int:
        return sum(f"layers.{layer}.ffn.gate.tid2eid" in self.members for layer in range(layers))

    def _scoring(self, facts: _Facts) -> str:
        number = facts.or_suppose(facts.integer, "expert_gating_func", 4, "sqrtsoftplus, the family's")
        if number not in GATING:
            raise PlanError(f"{self.file.path}: deepseek4.expert_gating_func is {number}; known: {sorted(GATING)}")
        return GATING[number]

    @staticmethod
    def _compress_base(facts: _Facts) -> float:
        """Both forms state it, each under a name of its own."""
        key = "attention.compress_rope_freq_base"
        return facts.short(key if key in facts else "rope.freq_base_swa")

    def _rope_scaling(self, facts: _Facts, context: int) -> dict[str, Any] | None:
        kind = facts.text("rope.scaling.type", None)
        if kind == "none" or (kind is None and self.form != "nisparks"):
            return None  # as llama.cpp reads it
        if kind is None:
            # The 45-key issue of the nisparks file: the family is YaRN by 16, up to the context length.
            for key in ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"):
                facts.suppose(f"rope.scaling.{key}", "the family's YaRN by 16, up to the context length")
            return {
                "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": max(1, context // 16),
                "type": "yarn",
            }  # fmt: skip
        return {
            "beta_fast": _whole(facts.or_suppose(facts.short, "rope.scaling.yarn_beta_fast", 32.0, "YaRN's default")),
            "beta_slow": _whole(facts.or_suppose(facts.short, "rope.scaling.yarn_beta_slow", 1.0, "YaRN's default")),
            "factor": _whole(facts.short("rope.scaling.factor")),
            "original_max_position_embeddings": facts.positive("rope.scaling.original_context_length"),
            "type": kind,
        }

    # The checkpoint it would be ---------------------------------------------------------------------------------

    def shard_names(self) -> list[Path]:
        """Names of the official shards: embedding, a layer each, head."""
        count = int(self.config["num_hidden_layers"]) + 2
        return [Path(f"model-{number:05d}-of-{count:05d}.safetensors") for number in range(1, count + 1)]

    def shard_of(self, member: Member) -> int:
        """Shard of a tensor in the official files."""
        if member.layer >= 0:
            return member.layer + 1
        return 0 if member.family.source == "embed.weight" else int(self.config["num_hidden_layers"]) + 1

    @cached_property
    def single_shard(self) -> bool:
        """Whether the file has the order of a checkpoint in one shard, rather than that of the official shards."""
        own = [tensor.name for tensor in self.file.tensors]
        if self._order(single=False) == own:
            return False
        return self._order(single=True) == own

    def _order(self, *, single: bool) -> list[str]:
        return [output.name for output in self._outputs(self.form, single=single)[0]]

    def outputs(self, target: str) -> tuple[list[Output], list[tuple[str, str]]]:
        """Return the tensors of a file for ``target``, as a conversion of the checkpoint arranges them, and what is left out.

        The sources of an :class:`~ggufx.architectures.deepseek_v4.Output` carry the names that :attr:`members` has; their
        bytes are not there.
        """
        return self._outputs(target, single=self.single_shard)

    def _outputs(self, target: str, *, single: bool) -> tuple[list[Output], list[tuple[str, str]]]:
        shards = [Path("model.safetensors")] if single else self.shard_names()
        tensors: list[SourceTensor] = []
        for member in self.members.values():
            shape = member.tensor.shape
            dtype = "I32" if member.family.role == "table" else "BF16"
            shard = 0 if single else self.shard_of(member)
            stacked = member.family.role == "expert"
            for expert in range(shape[0]) if stacked else (0,):
                inner = shape[1:] if stacked else shape
                tensors.append(SourceTensor(member.of_expert(expert), dtype, inner, shard, 0, 0))
        return self.arranged(target, shards, tensors)

    def arranged(
        self, target: str, shards: list[Path], tensors: list[SourceTensor]
    ) -> tuple[list[Output], list[tuple[str, str]]]:
        """Have the architecture check and order a checkpoint of these tensors; raises PlanError in the file's terms."""
        imagined = Checkpoint.imagined(self.file.path, self.config, shards, tensors)
        try:
            return DeepSeekV4(imagined).outputs(target, mtp=False, skip=lambda _: False)
        except CheckpointError as error:
            raise self.reworded(error) from None

    def keys(
        self, target: str, *, file_type: int, chat_template: str, notes: list[str] | None = None
    ) -> dict[str, Value]:
        """Return the architecture's keys in a target's form, from :attr:`config`; ``notes`` get what there is to say."""
        return self.keys_of(self.config, target, file_type=file_type, chat_template=chat_template, notes=notes)

    def keys_of(
        self,
        config: dict[str, Any],
        target: str,
        *,
        file_type: int,
        chat_template: str,
        notes: list[str] | None = None,
    ) -> dict[str, Value]:
        """Return the architecture's keys in a target's form, from any config."""
        try:
            architecture = DeepSeekV4(Checkpoint.imagined(self.file.path, config, (), ()))
            keys = architecture.keys(target, mtp=False, file_type=file_type, chat_template=chat_template)
        except CheckpointError as error:
            raise self.reworded(error) from None
        if notes is not None:
            notes += architecture.notes
        return keys

    def reworded(self, error: CheckpointError) -> PlanError:
        """Return an error about the imagined checkpoint as one about this file."""
        text = (
            str(error)
            .replace(f"{self.file.path / 'config.json'}", "its metadata")
            .replace(f"{self.file.path}: ", "")
            .replace(ADVICE, "correct it with ggufx set")
            .partition("; if they are not needed, leave them out")[0]  # a flag that is a conversion's
        )
        return PlanError(
            f"{self.file.path}: as a checkpoint (whose names follow): {text.replace('config.json', 'metadata')}"
        )


class _Facts(Facts):
    """Values of the architecture's keys; what no key states is noted."""

    def __init__(self, path: Path, metadata: Mapping[str, Value], supposed: list[tuple[str, str]]) -> None:
        values = {key: value.data for key, value in metadata.items()}
        super().__init__(
            path,
            values,
            error=PlanError,
            advice="correct it with ggufx set",
            label="key ",
            prefix=f"{DeepSeekV4.name}.",
        )
        self._supposed = supposed

    def suppose(self, key: str, why: str) -> None:
        """Note a fact that no key states."""
        self._supposed.append((f"{DeepSeekV4.name}.{key}", why))

    def or_suppose(self, read: Callable[[str], T], key: str, supposed: T, why: str) -> T:
        """Return what ``read`` says of a key, or without the key what is supposed, which is noted."""
        if key in self:
            return read(key)
        self.suppose(key, why)
        return supposed

    def positive(self, key: str) -> int:
        """Return an integer of at least 1."""
        return self.integer(key, least=1)

    def short(self, key: str) -> float:
        """Return a number as people wrote it into config.json."""
        return _shortest(self.number(key))


def _shortest(number: float) -> float:
    """Return the shortest decimal number that is the same float32: what people wrote into config.json."""
    return float(str(np.float32(number)))


def _whole(number: float) -> float | int:
    return int(number) if number.is_integer() else number
