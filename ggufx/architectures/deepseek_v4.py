"""DeepSeek-V4 (``deepseek4``): from the official checkpoint naming to the nisparks and llama.cpp dialects.

The checkpoint is natively FP8 (dense projections, E8M0 scales of 128x128 tiles) and FP4 (routed experts, E8M0 scales of
1x32). Names, shapes and keys are tables here; :mod:`ggufx.convert` turns them into a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Final, NamedTuple

from ggufx import chat_templates
from ggufx.architectures.base import FP8_TILE, Architecture, Output, Part, Role
from ggufx.architectures.rope import Rope, read_ropes
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, ValueType
from ggufx.errors import CheckpointError

__all__ = ["DeepSeekV4"]


class Family(NamedTuple):
    """One family of tensors; ``{L}`` is the layer, ``{E}`` the expert."""

    source: str
    role: Role
    shape: str
    """Expressions in the dimensions of :meth:`DeepSeekV4.dimensions`, one per axis."""
    nisparks: str
    upstream: str


# Within a layer; the prefix is layers.{L}. or mtp.{M}. in the checkpoint and blk.{L}. in a GGUF.
LAYER: Final = (
    Family("attn.attn_sink", "vector", "heads", "attn_sinks", "attn_sinks.weight"),
    Family("attn.kv_norm.weight", "vector", "head", "attn_kv_a_norm.weight", "attn_kv_a_norm.weight"),
    Family("attn.q_norm.weight", "vector", "q_lora", "attn_q_a_norm.weight", "attn_q_a_norm.weight"),
    Family("attn_norm.weight", "vector", "hidden", "attn_norm.weight", "attn_norm.weight"),
    Family("ffn_norm.weight", "vector", "hidden", "ffn_norm.weight", "ffn_norm.weight"),
    Family("attn.wkv.weight", "dense", "head hidden", "attn_kv_latent.weight", "attn_kv.weight"),
    Family("attn.wq_a.weight", "dense", "q_lora hidden", "attn_q_a.weight", "attn_q_a.weight"),
    Family("attn.wq_b.weight", "dense", "heads*head q_lora", "attn_q_b.weight", "attn_q_b.weight"),
    Family(
        "attn.wo_a.weight", "dense", "o_groups*o_lora heads*head/o_groups", "attn_output_a.weight", "attn_output_a.weight"
    ),
    Family("attn.wo_b.weight", "dense", "hidden o_groups*o_lora", "attn_output_b.weight", "attn_output_b.weight"),
    Family(
        "attn.compressor.ape", "vector", "ratio overlap*head", "attn_compress_ape", "attn_compressor_ape.weight"
    ),
    Family(
        "attn.compressor.norm.weight", "vector", "head", "attn_compress_norm.weight", "attn_compressor_norm.weight"
    ),
    Family(
        "attn.compressor.wgate.weight", "matrix", "overlap*head hidden", "attn_compress_gate.weight",
        "attn_compressor_gate.weight",
    ),
    Family(
        "attn.compressor.wkv.weight", "matrix", "overlap*head hidden", "attn_compress_kv.weight",
        "attn_compressor_kv.weight",
    ),
    Family(
        "attn.indexer.compressor.ape", "vector", "ratio overlap*index_head", "indexer.compress_ape",
        "indexer_compressor_ape.weight",
    ),
    Family(
        "attn.indexer.compressor.norm.weight", "vector", "index_head", "indexer.compress_norm.weight",
        "indexer_compressor_norm.weight",
    ),
    Family(
        "attn.indexer.compressor.wgate.weight", "matrix", "overlap*index_head hidden", "indexer.compress_gate.weight",
        "indexer_compressor_gate.weight",
    ),
    Family(
        "attn.indexer.compressor.wkv.weight", "matrix", "overlap*index_head hidden", "indexer.compress_kv.weight",
        "indexer_compressor_kv.weight",
    ),
    Family("attn.indexer.weights_proj.weight", "matrix", "index_heads hidden", "indexer.proj.weight", "indexer.proj.weight"),
    Family(
        "attn.indexer.wq_b.weight", "dense", "index_heads*index_head q_lora", "indexer.attn_q_b.weight",
        "indexer.attn_q_b.weight",
    ),
    Family("ffn.gate.weight", "router", "experts hidden", "ffn_gate_inp.weight", "ffn_gate_inp.weight"),
    Family("ffn.gate.tid2eid", "table", "vocab used", "ffn_gate_tid2eid", "ffn_gate_tid2eid.weight"),
    Family("ffn.gate.bias", "vector", "experts", "exp_probs_b", "exp_probs_b.bias"),
    Family("ffn.shared_experts.w1.weight", "dense", "shared*inter hidden", "ffn_gate_shexp.weight", "ffn_gate_shexp.weight"),
    Family("ffn.shared_experts.w2.weight", "dense", "hidden shared*inter", "ffn_down_shexp.weight", "ffn_down_shexp.weight"),
    Family("ffn.shared_experts.w3.weight", "dense", "shared*inter hidden", "ffn_up_shexp.weight", "ffn_up_shexp.weight"),
    Family("ffn.experts.{E}.w1.weight", "expert", "inter hidden", "ffn_gate_exps.weight", "ffn_gate_exps.weight"),
    Family("ffn.experts.{E}.w2.weight", "expert", "hidden inter", "ffn_down_exps.weight", "ffn_down_exps.weight"),
    Family("ffn.experts.{E}.w3.weight", "expert", "inter hidden", "ffn_up_exps.weight", "ffn_up_exps.weight"),
    Family("hc_attn_fn", "vector", "hc*(hc+2) hc*hidden", "hc_attn_fn", "hc_attn_fn.weight"),
    Family("hc_attn_base", "vector", "hc*(hc+2)", "hc_attn_base", "hc_attn_base.weight"),
    Family("hc_attn_scale", "vector", "3", "hc_attn_scale", "hc_attn_scale.weight"),
    Family("hc_ffn_fn", "vector", "hc*(hc+2) hc*hidden", "hc_ffn_fn", "hc_ffn_fn.weight"),
    Family("hc_ffn_base", "vector", "hc*(hc+2)", "hc_ffn_base", "hc_ffn_base.weight"),
    Family("hc_ffn_scale", "vector", "3", "hc_ffn_scale", "hc_ffn_scale.weight"),
)  # fmt: skip

GLOBAL: Final = (
    Family("embed.weight", "matrix", "vocab hidden", "token_embd.weight", "token_embd.weight"),
    Family("head.weight", "matrix", "vocab hidden", "output.weight", "output.weight"),
    Family("norm.weight", "vector", "hidden", "output_norm.weight", "output_norm.weight"),
    Family("hc_head_fn", "vector", "hc hc*hidden", "hc_head_fn", "output_hc_fn.weight"),
    Family("hc_head_base", "vector", "hc", "hc_head_base", "output_hc_base.weight"),
    Family("hc_head_scale", "vector", "1", "hc_head_scale", "output_hc_scale.weight"),
)

# The multi-token-prediction block has a layer's families and these. e_proj and h_proj become one tensor, side by side.
MTP: Final = (
    Family("e_proj.weight", "dense", "hidden hidden", "", "nextn.eh_proj.weight"),
    Family("h_proj.weight", "dense", "hidden hidden", "", "nextn.eh_proj.weight"),
    Family("enorm.weight", "vector", "hidden", "", "nextn.enorm.weight"),
    Family("hnorm.weight", "vector", "hidden", "", "nextn.hnorm.weight"),
    Family("norm.weight", "vector", "hidden", "", "nextn.shared_head_norm.weight"),
)
MTP_GLOBAL: Final = GLOBAL[3:]
"""The block's own hyper-connection head takes the names of the main model's in an MTP file."""

EXPERT_ORDER: Final[Mapping[str, Sequence[str]]] = {"nisparks": ("w2", "w1", "w3"), "llama.cpp": ("w1", "w2", "w3")}

ROPES: Final = {
    "main": "main", "sliding_attention": "main",
    "compressed_sparse_attention": "compress", "heavily_compressed_attention": "compress", "compress": "compress",
}  # fmt: skip
"""Rotary embeddings by transformers' names of them, and of the types of layers that have them."""
ASSUMED: Final[Mapping[str, object]] = {
    "scoring_func": "sqrtsoftplus", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""Values of config.json that every program takes for granted, whatever a file says."""
SINKHORN: Final = 20
EPSILON: Final = 1e-6
"""``hc_sinkhorn_iters`` and ``hc_eps`` as readers of nisparks files, which have no keys for them, suppose them."""

# Tensors of newer releases that no target of ours has a form for.
SIDE: Final = (
    (re.compile(r"^(vision\.|aligner\.|image_)"), "part of the vision tower, which goes to a file of its own"),
    (re.compile(r"\.ffn\.gate\.bias_vl$"), "router bias for image tokens; the target has no form for it"),
    (re.compile(r"^mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\b"), "part of the DSpark draft heads"),
)

_LAYER_NAME = re.compile(r"^(?P<block>layers|mtp)\.(?P<number>0|[1-9]\d*)\.(?P<rest>.+)$")
_EXPERT_NAME = re.compile(r"^ffn\.experts\.(?P<expert>0|[1-9]\d*)\.(?P<proj>w[123])\.(?P<part>weight|scale)$")


class DeepSeekV4(Architecture):
    """The architecture over one checkpoint.

    Raises
    ------
    CheckpointError
        config.json lacks a value, or its values contradict each other.
    """

    name = "deepseek4"
    tokenizer_pre = "joyai-llm"
    """llama.cpp's name of the pre-tokenizer; its regular expressions are those of DeepSeek-V3's tokenizer."""
    dense: ClassVar[str] = "q8_0"
    dense_is_outtype: ClassVar[bool] = False
    router_in_float32: ClassVar[bool] = False
    nisparks_form: ClassVar[bool] = True
    template_first: ClassVar[bool] = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_layers = self.integer("num_hidden_layers")
        self.ratios = self._ratios()
        self.n_mtp = self.count("num_nextn_predict_layers")
        self.n_hash = self.count("num_hash_layers")

    @property
    def n_experts(self) -> int:
        """Number of routed experts."""
        return self.counted("n_routed_experts")

    # The config -------------------------------------------------------------------------------------------------

    def _ratios(self) -> list[int]:
        ratios = self.facts.integers("compress_ratios", None)
        if ratios is None or len(ratios) < self.n_layers or any(r not in (0, 4, 128) for r in ratios):
            raise self.facts.wrong("compress_ratios", f"0, 4 or 128 for each of {self.n_layers} layers")
        return ratios

    @cached_property
    def ropes(self) -> tuple[Rope, Rope]:
        """The rotary embeddings of layers without and with compression; only the latter is scaled.

        Raises
        ------
        CheckpointError
            config.json states them in a layout that is not known, or one that a file has no form for.
        """
        stated = read_ropes(self.facts, ROPES, attention=1.0)
        main = stated.get("main", Rope("rope_parameters.main")).with_theta(self.facts, "rope_theta")
        compress = stated.get("compress", Rope("rope_parameters.compress"))
        compress = compress.with_theta(self.facts, "compress_rope_theta")
        if main.scales:
            raise CheckpointError(
                f"{self.facts.where}: {main.name} is of type {main.kind}; programs for {self.name} files scale the rotary "
                "embedding of compressed layers only"
            )
        head, rotated = self.integer("head_dim"), self.integer("qk_rope_head_dim")
        for rope in (main, compress):
            if rope.partial is not None and int(head * rope.partial) != rotated:
                raise CheckpointError(
                    f"{self.facts.where}: {rope.name}.partial_rotary_factor is {rope.partial}, of heads of {head} values; "
                    f"qk_rope_head_dim says {rotated}"
                )
        return main, compress

    def dimensions(self, ratio: int) -> dict[str, int]:
        """Return the names that :class:`Family` shapes are written in, for a layer of compression ``ratio``."""
        return {
            "hidden": self.integer("hidden_size"),
            "vocab": self.integer("vocab_size"),
            "heads": self.integer("num_attention_heads"),
            "head": self.integer("head_dim"),
            "q_lora": self.integer("q_lora_rank"),
            "o_groups": self.integer("o_groups"),
            "o_lora": self.integer("o_lora_rank"),
            "inter": self.integer("moe_intermediate_size"),
            "shared": self.integer("n_shared_experts"),
            "experts": self.integer("n_routed_experts"),
            "used": self.integer("num_experts_per_tok"),
            "index_heads": self.integer("index_n_heads"),
            "index_head": self.integer("index_head_dim"),
            "hc": self.integer("hc_mult"),
            "ratio": ratio,
            # Windows of a ratio-4 compressor overlap, so it works on two of them at a time.
            "overlap": 2 if ratio == 4 else 1,
        }

    # Tensors ----------------------------------------------------------------------------------------------------

    def outputs(
        self, target: str, *, mtp: bool, skip: Callable[[str], bool]
    ) -> tuple[list[Output], list[tuple[str, str]]]:
        """Map the checkpoint to output tensors, in the target's order.

        Parameters
        ----------
        target
            ``nisparks``, ``llama.cpp`` or ``ik_llama.cpp`` (which reads upstream's names).
        mtp
            The file of the multi-token-prediction block instead of the main model's.
        skip
            Names the user asked to leave out.

        Returns
        -------
        outputs, and (name, reason) of every checkpoint tensor that is left out

        Raises
        ------
        CheckpointError
            A tensor is missing, unknown, or its shape or dtype disagrees with the config.
        """
        if "model.embed_tokens.weight" in self.checkpoint:
            raise CheckpointError(
                f"{self.checkpoint.path}: the tensors carry transformers' names (model.embed_tokens.weight); convert the "
                "official checkpoint, whose names are embed.weight and so on"
            )
        self.check_quantization("fp8", [FP8_TILE, FP8_TILE])
        dialect = "nisparks" if target == "nisparks" else "llama.cpp"
        found: list[Output] = []
        skipped: list[tuple[str, str]] = []
        experts: dict[tuple[str, str], dict[int, Part]] = {}
        places: dict[tuple[str, str], int] = {}
        projections: dict[str, dict[str, Part]] = {}
        unknown: list[str] = []
        for tensor in self.in_order():
            name = tensor.name
            if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in self.checkpoint:
                continue  # goes with its weight
            reason = "left out by --skip" if skip(name) else self._side_reason(name, target, mtp=mtp)
            if reason is not None:
                skipped.append((name, reason))
                if (scale := self.scale_name(name)) in self.checkpoint:
                    skipped.append((scale, reason))
                continue
            located = self._locate(name)
            if located is None:
                unknown.append(name)
                continue
            family, block, ratio, expert = located
            part = self.part(tensor, family.role, family.shape, self.dimensions(ratio))
            if part.scale is None and (scale := self.scale_name(name)) in self.checkpoint:
                skipped.append((scale, f"{name} is {tensor.dtype}, which takes no scales"))
            gguf_name = block + (family.nisparks if dialect == "nisparks" else family.upstream)
            if expert is not None:
                key = (block, family.source.split(".")[3])
                places.setdefault((block, ""), len(found))
                experts.setdefault(key, {})[expert] = part
            elif family.upstream == "nextn.eh_proj.weight":
                projections.setdefault(gguf_name, {})[family.source] = part
            else:
                found.append(Output(gguf_name, family.role, ((part,),)))
        self.unmapped(unknown)
        self._complete(mtp=mtp, skip=skip)
        stacks = {key: self._stacked(key, parts, dialect) for key, parts in experts.items()}
        if dialect == "nisparks":
            # Experts stand where the checkpoint has them, down before gate before up.
            for (block, _), place in sorted(places.items(), key=lambda item: item[1], reverse=True):
                found[place:place] = [stacks[block, proj] for proj in EXPERT_ORDER[dialect] if (block, proj) in stacks]
            return found, skipped
        tables = [output for output in found if output.role == "table"]
        rest = [output for output in found if output.role != "table"]
        blocks = sorted({block for block, _ in stacks}, key=lambda block: int(block.split(".")[1]))
        stacked = [stacks[b, proj] for b in blocks for proj in EXPERT_ORDER[dialect] if (b, proj) in stacks]
        joined = [self._joined(name, parts) for name, parts in projections.items()]
        return [*tables, *stacked, *joined, *rest], skipped

    def _side_reason(self, name: str, target: str, *, mtp: bool) -> str | None:
        for pattern, reason in SIDE:
            if pattern.search(name):
                return reason
        match = _LAYER_NAME.match(name)
        block = match["block"] if match else None
        if mtp:
            if block == "layers" or (block is None and name in {family.source for family in MTP_GLOBAL}):
                return "belongs to the main model; this is the MTP block's file"
            if match and int(match["number"]) >= self.n_mtp:
                return f"config.json counts {self.n_mtp} MTP blocks (num_nextn_predict_layers)"
            return None
        if block == "mtp":
            form = "the nisparks dialect has no form for it" if target == "nisparks" else "--mtp writes its own file"
            return f"part of the MTP block: {form}"
        if (
            match
            and match["rest"] == "ffn.gate.bias"
            and f"layers.{match['number']}.ffn.gate.tid2eid" in self.checkpoint
        ):
            return "a hash-routed layer does not use its router bias"
        return None

    def _locate(self, name: str) -> tuple[Family, str, int, int | None] | None:
        """Return (family, GGUF prefix, compression ratio, expert) of a checkpoint name, or None."""
        match = _LAYER_NAME.match(name)
        if match is None:
            family = next((f for f in GLOBAL if f.source == name), None)
            return None if family is None else (family, "", 0, None)
        number, rest = int(match["number"]), match["rest"]
        is_mtp = match["block"] == "mtp"
        layer = number + self.n_layers if is_mtp else number
        if not is_mtp and layer >= self.n_layers:
            return None
        ratio = self.ratios[layer] if layer < len(self.ratios) else 0
        prefix = f"blk.{layer}."
        expert = _EXPERT_NAME.match(rest)
        if expert is not None:
            pattern = f"ffn.experts.{{E}}.{expert['proj']}.weight"
            family = next(f for f in LAYER if f.source == pattern)
            return (family, prefix, ratio, int(expert["expert"])) if expert["part"] == "weight" else None
        if is_mtp:
            family = next((f for f in MTP_GLOBAL if f.source == rest), None)
            if family is not None:
                return family, "", ratio, None
            family = next((f for f in MTP if f.source == rest), None)
            if family is not None:
                return family, prefix, ratio, None
        family = _LAYER_BY_SOURCE.get(rest)
        return None if family is None else (family, prefix, ratio, None)

    def scale_name(self, name: str) -> str:
        """Return the name of a weight's scales; empty for a name that does not end in ``.weight``: it has none."""
        stem = name.removesuffix(".weight")
        return "" if stem == name else f"{stem}.scale"

    def _stacked(self, key: tuple[str, str], parts: Mapping[int, Part], dialect: str) -> Output:
        block, proj = key
        family = _LAYER_BY_SOURCE[f"ffn.experts.{{E}}.{proj}.weight"]
        name = block + (family.nisparks if dialect == "nisparks" else family.upstream)
        return self.stacked(name, f"{block}ffn experts ({proj})", parts)

    def _joined(self, name: str, parts: Mapping[str, Part]) -> Output:
        pair = [parts.get(source) for source in ("e_proj.weight", "h_proj.weight")]
        if pair[0] is None or pair[1] is None:
            raise CheckpointError(f"{self.checkpoint.path}: {name} needs both e_proj and h_proj of the MTP block")
        return Output(name, "dense", ((pair[0], pair[1]),))

    def _complete(self, *, mtp: bool, skip: Callable[[str], bool]) -> None:
        """Raise CheckpointError when a tensor that the config implies is not in the checkpoint."""
        expected = [family.source for family in GLOBAL if not (mtp and family in MTP_GLOBAL)]
        blocks = [("layers", number, self.ratios[number]) for number in range(0 if mtp else self.n_layers)]
        blocks += [("mtp", number, 0) for number in range(self.n_mtp if mtp else 0)]
        if mtp and self.n_mtp > 1:
            raise CheckpointError(
                f"{self.checkpoint.path}: config.json counts {self.n_mtp} MTP blocks (num_nextn_predict_layers); the target's "
                "form for the MTP block holds one"
            )
        if mtp and not blocks:
            raise CheckpointError(f"{self.checkpoint.path}: config.json counts no MTP block (num_nextn_predict_layers)")
        count = self.n_experts
        for block, number, ratio in blocks:
            families = [*LAYER, *(MTP + MTP_GLOBAL if block == "mtp" else ())]
            hashed = block == "layers" and number < self.n_hash
            for family in families:
                absent = (
                    (".compressor." in family.source and ratio == 0)
                    or (".indexer." in family.source and ratio != 4)
                    or family.source == ("ffn.gate.bias" if hashed else "ffn.gate.tid2eid")
                )
                if absent:
                    continue
                if family.role == "expert":
                    pattern = f"{block}.{number}.{family.source}"
                    expected += [pattern.replace("{E}", str(expert)) for expert in range(count)]
                else:
                    expected.append(f"{block}.{number}.{family.source}")
        self.complete(expected, skip)

    # Metadata ---------------------------------------------------------------------------------------------------

    def builtin_template(self) -> tuple[str, str]:
        """Return the release's template, and which it is: official checkpoints have code instead of one."""
        release = chat_templates.release_of(self.checkpoint.path, self.checkpoint.name)
        return chat_templates.deepseek_v4(release), f"the built-in one of DeepSeek-V4's {release} release is written"

    def keys(self, target: str, *, mtp: bool, file_type: int, chat_template: str | None) -> dict[str, Value]:
        """Return the architecture's metadata in the target's order, ``general.file_type`` among it."""
        return (
            self._nisparks_keys(file_type, chat_template or "")
            if target == "nisparks"
            else self._upstream_keys(mtp, file_type)
        )

    def _head(self) -> dict[str, Value]:
        main, compress = self.ropes
        self.check_assumed(ASSUMED, f"programs for {self.name} files")
        return {
            "context_length": Value.u32(self.integer("max_position_embeddings")),
            "embedding_length": Value.u32(self.integer("hidden_size")),
            "attention.head_count": Value.u32(self.integer("num_attention_heads")),
            "attention.head_count_kv": Value.u32(self.integer("num_key_value_heads")),
            **compress.keys(),
            "rope.freq_base": Value.f32(main.base),
            "attention.layer_norm_rms_epsilon": Value.f32(self.number("rms_norm_eps")),
        }

    def _indexer(self) -> dict[str, Value]:
        return {
            "attention.indexer.head_count": Value.u32(self.integer("index_n_heads")),
            "attention.indexer.key_length": Value.u32(self.integer("index_head_dim")),
            "attention.indexer.top_k": Value.u32(self.integer("index_topk")),
        }

    def _clamp(self, n_blocks: int) -> Value:
        return Value.array(ValueType.FLOAT32, [self.number("swiglu_limit")] * n_blocks)

    def _norm_topk(self) -> Value:
        return Value.boolean(self.facts.flag("norm_topk_prob", True))

    def _nisparks_keys(self, file_type: int, chat_template: str) -> dict[str, Value]:
        head = self._head()
        if not self.ropes[1].scales:
            # Without a key its readers suppose the family's YaRN: the published file of 45 keys has none.
            head["rope.scaling.type"] = Value.string("none")
        keys = {
            "block_count": Value.u32(self.n_layers),
            **head,
            "expert_used_count": Value.u32(self.integer("num_experts_per_tok")),
            "attention.key_length": Value.u32(self.integer("head_dim")),
            "attention.value_length": Value.u32(self.integer("head_dim")),
            "general.file_type": Value.u32(file_type),
            "tokenizer.chat_template": Value.string(chat_template),
            "vocab_size": Value.u32(self.integer("vocab_size")),
            "attention.q_lora_rank": Value.u32(self.integer("q_lora_rank")),
            "rope.dimension_count": Value.u32(self.integer("qk_rope_head_dim")),
            "attention.sliding_window": Value.u32(self.integer("sliding_window")),
            "rope.freq_base_swa": Value.f32(self.ropes[1].base),
            "leading_dense_block_count": Value.u32(0),
            "expert_feed_forward_length": Value.u32(self.integer("moe_intermediate_size")),
            "expert_count": Value.u32(self.integer("n_routed_experts")),
            "expert_shared_count": Value.u32(self.integer("n_shared_experts")),
            "expert_weights_scale": Value.f32(self.number("routed_scaling_factor")),
            "expert_weights_norm": self._norm_topk(),
            "swiglu_clamp_exp": self._clamp(self.n_layers),
            **self._indexer(),
        }
        return self.prefixed(keys | self._unlike_supposed())

    def _unlike_supposed(self) -> dict[str, Value]:
        """Return upstream's keys of values that readers of nisparks files would suppose wrongly: nothing else holds them."""
        stated = {
            "hyper_connection.sinkhorn_iterations": Value.u32(
                self.facts.integer("hc_sinkhorn_iters", SINKHORN, least=1)
            ),
            "hyper_connection.epsilon": Value.f32(self.facts.number("hc_eps", EPSILON)),
        }
        supposed = (Value.u32(SINKHORN), Value.f32(EPSILON))
        found = {key: value for (key, value), own in zip(stated.items(), supposed, strict=True) if not value.same(own)}
        self.notes += [
            f"key {self.name}.{key} = {value.data:.7g}: written, though nisparks files have none: readers that do not know it "
            "suppose the family's value"
            for key, value in found.items()
        ]
        return found

    def _upstream_keys(self, mtp: bool, file_type: int) -> dict[str, Value]:
        n_blocks = self.n_layers + (self.n_mtp if mtp else 0)
        keys = {
            "block_count": Value.u32(n_blocks),
            **self._head(),
            "expert_count": Value.u32(self.integer("n_routed_experts")),
            "expert_used_count": Value.u32(self.integer("num_experts_per_tok")),
            "expert_gating_func": Value.u32(4),  # LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS
            "attention.key_length": Value.u32(self.integer("head_dim")),
            "attention.value_length": Value.u32(self.integer("head_dim")),
            "general.file_type": Value.u32(file_type),
            "rope.dimension_count": Value.u32(self.integer("qk_rope_head_dim")),
            "attention.q_lora_rank": Value.u32(self.integer("q_lora_rank")),
            "attention.sliding_window": Value.u32(self.integer("sliding_window")),
            "expert_feed_forward_length": Value.u32(self.integer("moe_intermediate_size")),
            "expert_shared_count": Value.u32(self.integer("n_shared_experts")),
            "expert_weights_scale": Value.f32(self.number("routed_scaling_factor")),
            "expert_weights_norm": self._norm_topk(),
            "swiglu_clamp_exp": self._clamp(n_blocks),
            "swiglu_clamp_shexp": self._clamp(n_blocks),
            **self._indexer(),
            "attention.output_group_count": Value.u32(self.integer("o_groups")),
            "attention.output_lora_rank": Value.u32(self.integer("o_lora_rank")),
            "attention.compress_ratios": Value.array(ValueType.INT32, self.ratios),
            "attention.compress_rope_freq_base": Value.f32(self.ropes[1].base),
            "hyper_connection.count": Value.u32(self.integer("hc_mult")),
            "hyper_connection.sinkhorn_iterations": Value.u32(self.integer("hc_sinkhorn_iters")),
            "hyper_connection.epsilon": Value.f32(self.number("hc_eps")),
            "hash_layer_count": Value.u32(self.n_hash),
            "embedding_length_out": Value.u32(self.integer("hidden_size") * self.integer("hc_mult")),
        }
        if mtp:
            keys["nextn_predict_layers"] = Value.u32(self.n_mtp)
        return self.prefixed(keys)


_LAYER_BY_SOURCE = {family.source: family for family in LAYER}
