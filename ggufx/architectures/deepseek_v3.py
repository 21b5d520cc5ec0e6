"""DeepSeek-V3, R1 and V3.1 (``deepseek2``): FP8 under float32 scales, latent attention, experts after dense layers.

Names come from the ``gguf`` package's tensor map. What it cannot say is here: the roles and shapes, the latent
attention's ``kv_b`` taken apart, and where ik_llama.cpp's files differ from upstream's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Final

from ggufx.architectures.base import FP8_TILE, Architecture, Family, Output, Part
from ggufx.architectures.rope import Rope
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value
from ggufx.errors import CheckpointError, PlanError

__all__ = ["DeepSeekV3", "foreign_latent"]

_HEADS = re.compile(r"blk\.\d+\.attn_[kv]_b\.weight")


def foreign_latent(shapes: Mapping[str, tuple[int, ...]], target: str) -> str:
    """Return what keeps a ``deepseek2`` GGUF from being a target's, for a warning; empty if nothing does.

    Parameters
    ----------
    shapes
        Of its tensors, numpy order.
    target
        A dialect. ik_llama.cpp loads upstream's files, too; the others have the heads as an axis of their own.
    """
    odd = next((name for name, shape in shapes.items() if _HEADS.fullmatch(name) and len(shape) == 2), None)
    if odd is None or target == "ik_llama.cpp":
        return ""
    return (
        f"{odd} has its heads in one matrix, as ik_llama.cpp's files have; programs for {target} do not load that, nor its "
        f"keys: start from the checkpoint, with --target {target}"
    )


LAYER: Final = (
    Family("input_layernorm.weight", "vector", "hidden"),
    Family("post_attention_layernorm.weight", "vector", "hidden"),
    Family("self_attn.kv_a_proj_with_mqa.weight", "dense", "(kv_lora+rope) hidden"),
    Family("self_attn.kv_a_layernorm.weight", "vector", "kv_lora"),
    Family("self_attn.kv_b_proj.weight", "dense", "heads*(nope+value) kv_lora"),
    Family("self_attn.o_proj.weight", "dense", "hidden heads*value"),
)
QUERY_LOW_RANK: Final = (
    Family("self_attn.q_a_proj.weight", "dense", "q_lora hidden"),
    Family("self_attn.q_a_layernorm.weight", "vector", "q_lora"),
    Family("self_attn.q_b_proj.weight", "dense", "heads*(nope+rope) q_lora"),
)
QUERY: Final = (Family("self_attn.q_proj.weight", "dense", "heads*(nope+rope) hidden"),)
"""Of models without ``q_lora_rank``."""
DENSE_FFN: Final = (
    Family("mlp.gate_proj.weight", "dense", "ffn hidden"),
    Family("mlp.up_proj.weight", "dense", "ffn hidden"),
    Family("mlp.down_proj.weight", "dense", "hidden ffn"),
)
ROUTER_BIAS: Final = Family("mlp.gate.e_score_correction_bias", "vector", "experts")
EXPERTS_FFN: Final = (
    Family("mlp.gate.weight", "router", "experts hidden"),
    Family("mlp.shared_experts.gate_proj.weight", "dense", "shared*inter hidden"),
    Family("mlp.shared_experts.up_proj.weight", "dense", "shared*inter hidden"),
    Family("mlp.shared_experts.down_proj.weight", "dense", "hidden shared*inter"),
    Family("mlp.experts.{E}.gate_proj.weight", "expert", "inter hidden"),
    Family("mlp.experts.{E}.up_proj.weight", "expert", "inter hidden"),
    Family("mlp.experts.{E}.down_proj.weight", "expert", "hidden inter"),
)
GLOBAL: Final = (
    Family("model.embed_tokens.weight", "matrix", "vocab hidden"),
    Family("model.norm.weight", "vector", "hidden"),
)
HEAD: Final = Family("lm_head.weight", "matrix", "vocab hidden")

MTP_ONLY: Final = "eh_proj.weight"
"""What an MTP block has and no other layer: it joins the hidden state with the next token's embedding."""

EXPERT_ORDER: Final = ("down_proj", "gate_proj", "up_proj")
"""Of upstream's files."""

TOPK_METHODS: Final = ("noaux_tc", "greedy")
"""Ways of choosing experts that programs have: V3's, and the plain one. V2's by groups is another than V3's."""
ASSUMED: Final[Mapping[str, object]] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip
"""Values of config.json that no key of a file says and every program takes for granted."""

_SIDE: Final = (
    (re.compile(r"\.rotary_emb\.inv_freq$"), "computed from config.json"),
    (re.compile(r"\.(input_scale|activation_scale)$"), "a scale of activations, which no target uses"),
)
_LAYER_NAME = re.compile(r"^model\.layers\.(?P<number>0|[1-9]\d*)\.(?P<rest>.+)$")
_EXPERT_NAME = re.compile(r"^mlp\.experts\.(?P<expert>0|[1-9]\d*)\.(?P<proj>gate_proj|up_proj|down_proj)\.weight$")
_SCALES: Final = "_scale_inv"


class DeepSeekV3(Architecture):
    """The architecture over one checkpoint.

    Raises
    ------
    CheckpointError
        config.json lacks a value, or its values contradict each other.
    """

    name: ClassVar[str] = "deepseek2"
    tokenizer_pre: ClassVar[str] = "deepseek-v3"
    float_scales: ClassVar[bool] = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_layers = self.counted("num_hidden_layers")
        self.n_mtp = self.count("num_nextn_predict_layers")
        self.n_dense = self.count("first_k_dense_replace")
        self.q_lora = self.count("q_lora_rank")
        self.tied = self.facts.flag("tie_word_embeddings", False)

    @property
    def n_experts(self) -> int:
        """Number of routed experts."""
        return self.counted("n_routed_experts")

    @cached_property
    def dimensions(self) -> dict[str, int]:
        """The names that :class:`Family` shapes are written in."""
        return {
            "hidden": self.integer("hidden_size"),
            "vocab": self.integer("vocab_size"),
            "heads": self.integer("num_attention_heads"),
            "q_lora": self.q_lora,
            "kv_lora": self.integer("kv_lora_rank"),
            "nope": self.integer("qk_nope_head_dim"),
            "rope": self.integer("qk_rope_head_dim"),
            "value": self.integer("v_head_dim"),
            "ffn": self.integer("intermediate_size"),
            "inter": self.integer("moe_intermediate_size"),
            "shared": self.integer("n_shared_experts"),
            "experts": self.n_experts,
        }

    @cached_property
    def families(self) -> tuple[dict[str, Family], dict[str, Family], dict[str, Family]]:
        """Families by their names: of a dense layer, of a layer with experts, global ones."""
        attention = (*LAYER, *(QUERY_LOW_RANK if self.q_lora else QUERY))
        experts: tuple[Family, ...] = EXPERTS_FFN
        # The bias came with V3's way of choosing ("noaux_tc"); a config that names another has none.
        if self.facts.choice("topk_method", TOPK_METHODS, TOPK_METHODS[0]) == "noaux_tc":
            experts = (*experts, ROUTER_BIAS)
        everywhere = GLOBAL if self.tied else (*GLOBAL, HEAD)
        return (
            {family.source: family for family in (*attention, *DENSE_FFN)},
            {family.source: family for family in (*attention, *experts)},
            {family.source: family for family in everywhere},
        )

    # Tensors ----------------------------------------------------------------------------------------------------

    def scale_name(self, name: str) -> str:
        """Return the name of a weight's scales; empty for a name that does not end in ``.weight``: it has none."""
        return name + _SCALES if name.endswith(".weight") else ""

    def outputs(
        self, target: str, *, mtp: bool, skip: Callable[[str], bool]
    ) -> tuple[list[Output], list[tuple[str, str]]]:
        """Map the checkpoint to output tensors, in the target's order (see :meth:`Architecture.outputs`)."""
        if mtp:
            raise PlanError(
                "--mtp: deepseek2 files have no form for the MTP block, upstream's converter leaves it out; convert without"
            )
        self.check_quantization("fp8", [FP8_TILE, FP8_TILE])
        self.check_assumed(ASSUMED, f"programs for {self.name} files")
        found: list[Output] = []
        skipped: list[tuple[str, str]] = []
        experts: dict[tuple[int, str], dict[int, Part]] = {}
        places: dict[int, int] = {}
        unknown: list[str] = []
        for tensor in self.in_order():
            name = tensor.name
            if name.endswith(_SCALES) and name.removesuffix(_SCALES) in self.checkpoint:
                continue  # goes with its weight
            reason = "left out by --skip" if skip(name) else self._side_reason(name)
            scale = self.scale_name(name)
            if reason is not None:
                skipped.append((name, reason))
                if scale in self.checkpoint:
                    skipped.append((scale, reason))
                continue
            match = _LAYER_NAME.match(name)
            layer = int(match["number"]) if match else -1
            rest = match["rest"] if match else name
            expert = _EXPERT_NAME.match(rest) if match else None
            pattern = f"mlp.experts.{{E}}.{expert['proj']}.weight" if expert else rest
            family = self._families_of(layer).get(pattern)
            if family is None:
                unknown.append(name)
                continue
            part = self.part(tensor, family.role, family.shape, self.dimensions)
            if part.scale is None and scale in self.checkpoint:
                skipped.append((scale, f"{name} is {tensor.dtype}, which takes no scales"))
            if expert is not None:
                # Where the last expert of a layer stands, upstream's converter has all it needs.
                places[layer] = len(found)
                experts.setdefault((layer, expert["proj"]), {})[int(expert["expert"])] = part
            elif rest == "self_attn.kv_b_proj.weight":
                found += self._latent(target, name, part)
            else:
                found.append(Output(self._gguf_name(name), family.role, ((part,),)))
        self.unmapped(unknown)
        self.complete(self._expected(), skip)
        for layer, place in sorted(places.items(), key=lambda item: item[1], reverse=True):
            found[place:place] = [
                self.stacked(
                    self._gguf_name(f"model.layers.{layer}.mlp.experts.{proj}.weight"),
                    f"layer {layer}'s experts ({proj})",
                    experts[layer, proj],
                )
                for proj in EXPERT_ORDER
                if (layer, proj) in experts
            ]
        return found, skipped

    def _families_of(self, layer: int) -> dict[str, Family]:
        dense, experts, everywhere = self.families
        if layer < 0:
            return everywhere
        return dense if layer < self.n_dense else experts

    def _side_reason(self, name: str) -> str | None:
        for pattern, reason in _SIDE:
            if pattern.search(name):
                return reason
        if name == HEAD.source and self.tied:
            return "the embedding is used for the output, too (tie_word_embeddings)"
        match = _LAYER_NAME.match(name)
        if match and int(match["number"]) >= self.n_layers:
            layer = int(match["number"])
            # An MTP block is known by what no other layer has: a config that counts too few would lose layers in silence.
            if f"model.layers.{layer}.{MTP_ONLY}" not in self.checkpoint:
                raise CheckpointError(
                    f"{self.checkpoint.path / 'config.json'}: num_hidden_layers is {self.n_layers}, but the checkpoint has "
                    f"{name!r} and layer {layer} is no MTP block (it has no {MTP_ONLY}): the config and the weights are of "
                    "different models; leave it out with --skip GLOB if that is meant"
                )
            return (
                f"layer {layer} is past the model's {self.n_layers} (num_hidden_layers), of the {self.n_mtp} MTP blocks "
                "(num_nextn_predict_layers): deepseek2 files have no form for them"
            )
        return None

    def _gguf_name(self, name: str) -> str:
        found: str | None = self._tensor_map.get_name(
            name.replace("e_score_correction_bias", "e_score_correction.bias"), (".weight", ".bias")
        )
        if found is None:
            raise CheckpointError(f"{self.checkpoint.path}: gguf's tensor map has no name for {name!r}")
        return found

    @cached_property
    def _tensor_map(self) -> Any:
        import gguf

        return gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, self.n_layers)

    def _latent(self, target: str, name: str, part: Part) -> list[Output]:
        """Take ``kv_b`` apart: of every head's rows the first make keys, the others values.

        Keys are turned, so that llama.cpp can multiply queries with them. ik_llama.cpp's files hold ``kv_b`` beside them,
        and both as matrices; upstream's hold one more axis, the heads, and no ``kv_b``.
        """
        dims = self.dimensions
        nope, value, kv_lora = dims["nope"], dims["value"], dims["kv_lora"]
        starts = [head * (nope + value) for head in range(dims["heads"])]
        keys = tuple((replace(part, shape=(kv_lora, nope), start=start, transposed=True),) for start in starts)
        values = tuple((replace(part, shape=(value, kv_lora), start=start + nope),) for start in starts)
        ik = target == "ik_llama.cpp"
        outputs = [Output(self._gguf_name(name), "dense", ((part,),))] if ik else []
        for letter, stack in (("k", keys), ("v", values)):
            own = self._gguf_name(name.replace("kv_b_proj", f"{letter}_b_proj"))
            outputs.append(Output(own, "dense", stack, stacked=not ik))
        return outputs

    def _expected(self) -> Iterator[str]:
        yield from self.families[2]
        for layer in range(self.n_layers):
            for source, family in self._families_of(layer).items():
                name = f"model.layers.{layer}.{source}"
                if family.role == "expert":
                    yield from (name.replace("{E}", str(expert)) for expert in range(self.n_experts))
                else:
                    yield name

    # Metadata ---------------------------------------------------------------------------------------------------

    def keys(self, target: str, *, mtp: bool, file_type: int, chat_template: str | None) -> dict[str, Value]:
        """Return the architecture's metadata in the target's order, ``general.file_type`` among it."""
        import gguf

        key = gguf.Keys
        ik = target == "ik_llama.cpp"
        dims = self.dimensions
        # Upstream computes with the latent: one head of keys as wide as it. ik_llama.cpp counts the heads themselves.
        key_len, value_len = dims["nope"] + dims["rope"], dims["value"]
        rope = self.rope()
        keys = {
            key.LLM.BLOCK_COUNT: Value.u32(self.n_layers),
            key.LLM.CONTEXT_LENGTH: Value.u32(self.integer("max_position_embeddings")),
            key.LLM.EMBEDDING_LENGTH: Value.u32(dims["hidden"]),
            key.LLM.FEED_FORWARD_LENGTH: Value.u32(dims["ffn"]),
            key.Attention.HEAD_COUNT: Value.u32(dims["heads"]),
            key.Attention.HEAD_COUNT_KV: Value.u32(dims["heads"] if ik else 1),
            **{f"{{arch}}.{name}": value for name, value in rope.keys().items()},
            key.Rope.FREQ_BASE: Value.f32(rope.base),
            key.Attention.LAYERNORM_RMS_EPS: Value.f32(self.number("rms_norm_eps")),
            key.LLM.EXPERT_COUNT: Value.u32(self.n_experts),
            key.LLM.EXPERT_USED_COUNT: Value.u32(self.integer("num_experts_per_tok")),
            key.LLM.EXPERT_GROUP_COUNT: self._groups("n_group"),
            key.LLM.EXPERT_GROUP_USED_COUNT: self._groups("topk_group"),
            key.LLM.EXPERT_GATING_FUNC: Value.u32(self._gating()),
            key.Attention.KEY_LENGTH: Value.u32(key_len if ik else dims["kv_lora"] + dims["rope"]),
            key.Attention.VALUE_LENGTH: Value.u32(value_len if ik else dims["kv_lora"]),
            key.General.FILE_TYPE: Value.u32(file_type),
            key.LLM.LEADING_DENSE_BLOCK_COUNT: Value.u32(self.n_dense),
            key.LLM.VOCAB_SIZE: Value.u32(dims["vocab"]),
            key.Attention.Q_LORA_RANK: Value.u32(self.q_lora) if self.q_lora else None,
            key.Attention.KV_LORA_RANK: Value.u32(dims["kv_lora"]),
            key.Attention.KEY_LENGTH_MLA: None if ik else Value.u32(key_len),
            key.Attention.VALUE_LENGTH_MLA: None if ik else Value.u32(value_len),
            key.LLM.EXPERT_FEED_FORWARD_LENGTH: Value.u32(dims["inter"]),
            key.LLM.EXPERT_SHARED_COUNT: Value.u32(dims["shared"]),
            key.LLM.EXPERT_WEIGHTS_SCALE: Value.f32(self.number("routed_scaling_factor")),
            key.LLM.EXPERT_WEIGHTS_NORM: Value.boolean(True) if self.facts.flag("norm_topk_prob", True) else None,
            key.Rope.DIMENSION_COUNT: Value.u32(dims["rope"]),
            key.Rope.SCALING_YARN_LOG_MUL: self._log_multiplier(rope),
        }
        if ik:
            # Its converter writes no groups: it does not route by them.
            groups, used = self.facts.integer("n_group", 1), self.facts.integer("topk_group", 1)
            if used < groups:
                self.notes.append(
                    f"ik_llama.cpp does not choose experts by groups: it takes the best of all, where config.json has them "
                    f"taken from {used} of {groups} groups (topk_group, n_group)"
                )
            for name in (key.LLM.EXPERT_GROUP_COUNT, key.LLM.EXPERT_GROUP_USED_COUNT):
                del keys[name]
        return {name.format(arch=self.name): value for name, value in keys.items() if value is not None}

    def _groups(self, key: str) -> Value | None:
        """Return a number of groups of experts: V3's way of choosing needs it, and transformers has a default of its own."""
        grouped = self.facts.choice("topk_method", TOPK_METHODS, TOPK_METHODS[0]) == "noaux_tc"
        number = self.facts.integer(key, least=1) if grouped else self.facts.integer(key, None, least=1)
        return None if number is None else Value.u32(number)

    def target_notes(self, target: str) -> list[str]:
        """Return what a target's programs make of the model that users would not expect."""
        groups = self.facts.integer("n_group", 1, least=1)
        if target != "ik_llama.cpp" or groups == 1:
            return []
        return [
            f"ik_llama.cpp does not route by groups of experts (n_group is {groups}): it chooses among all of them, so its "
            "results differ from llama.cpp's, whatever the file"
        ]

    def _gating(self) -> int:
        import gguf

        functions = {"sigmoid": gguf.ExpertGatingFuncType.SIGMOID, "softmax": gguf.ExpertGatingFuncType.SOFTMAX}
        # transformers' own configuration of V3 does not name it: there is one.
        return int(functions[self.facts.choice("scoring_func", functions, "sigmoid")])

    def _log_multiplier(self, rope: Rope) -> Value | None:
        scales = rope.mscales or {}
        every = scales.get("mscale_all_dim")
        # Programs take the two for equal where there are both: their quotient, which scales the rotation, is 1 then.
        if scales.get("mscale", every) not in (every, 1.0 if every is None else every):
            raise CheckpointError(
                f"{self.facts.where}: {rope.name}.mscale is {scales['mscale']} and mscale_all_dim {every}: programs for "
                f"{self.name} files read the latter only, and take the former for {1.0 if every is None else every}"
            )
        # The factor 0.1 of YaRN's formula stands in the file; llama.cpp takes it out again.
        return None if every is None else Value.f32(0.1 * every)
