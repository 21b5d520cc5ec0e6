#!/usr/bin/env python3
"""Write a small random DeepSeek-V3 checkpoint with the official names, dtypes, shapes and ways of storing.

    python tools/make_tiny_v3.py OUT_DIR
    python tools/make_tiny_v3.py OUT_DIR --scales ue8m0    # V3.1: powers of two, but for self_attn.o_proj
    python tools/make_tiny_v3.py OUT_DIR --weights bf16    # as if dequantized
    python tools/make_tiny_v3.py OUT_DIR --help            # every size can be changed

FP8 codes under float32 scales of 128x128 tiles, latent attention, dense layers before those with experts, the MTP layer
after the last: what a converter has to get right, in some 30 MB. The tensor list of the full models is
`params_from_table` of fixtures/dsv3/config.json. Values, files and tokenizer are made as make_tiny_v4.py makes them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from make_tiny_v4 import (
    ADDED_TOKENS,
    FP8_BLOCK,
    TEXT,
    Param,
    Spec,
    Values,
    ceil_div,
    learn_merges,
    to_bf16,
    token_count,
    tokenizer_json,
    write_checkpoint,
    write_companions,
    write_json,
)

OFFICIAL_CONFIG = Path(__file__).resolve().parent.parent / "fixtures" / "dsv3" / "config.json"
SCALES = ("float", "ue8m0")
WEIGHTS = ("fp8", "bf16")
_SCALE_SUFFIX = "_scale_inv"
_E4M3_SIGMA = 32.0  # as make_tiny_v4's codes have it

# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------------------------------------------


def _feed_forward(prefix: str, inter: int, hidden: int) -> dict[str, Param]:
    """The three matrices of a gated feed-forward network."""
    return {
        f"{prefix}gate_proj.weight": Param("fp8", (inter, hidden)),
        f"{prefix}up_proj.weight": Param("fp8", (inter, hidden)),
        f"{prefix}down_proj.weight": Param("fp8", (hidden, inter)),
    }


def _layer_params(config: Mapping[str, Any], *, dense: bool) -> dict[str, Param]:
    """Parameters of a transformer layer, by their name inside the layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    params = {
        "input_layernorm.weight": Param("BF16", (hidden,)),
        "post_attention_layernorm.weight": Param("BF16", (hidden,)),
        "self_attn.kv_a_layernorm.weight": Param("BF16", (kv_lora,)),
        "self_attn.kv_a_proj_with_mqa.weight": Param("fp8", (kv_lora + rope, hidden)),
        "self_attn.kv_b_proj.weight": Param("fp8", (heads * (nope + value), kv_lora)),
        "self_attn.o_proj.weight": Param("fp8", (hidden, heads * value)),
    }
    if q_lora is None:
        params["self_attn.q_proj.weight"] = Param("fp8", (heads * (nope + rope), hidden))
    else:
        params["self_attn.q_a_layernorm.weight"] = Param("BF16", (q_lora,))
        params["self_attn.q_a_proj.weight"] = Param("fp8", (q_lora, hidden))
        params["self_attn.q_b_proj.weight"] = Param("fp8", (heads * (nope + rope), q_lora))
    if dense:
        return params | _feed_forward("mlp.", config["intermediate_size"], hidden)
    inter, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    params["mlp.gate.weight"] = Param("BF16", (experts, hidden))
    params["mlp.gate.e_score_correction_bias"] = Param("F32", (experts,))
    params |= _feed_forward("mlp.shared_experts.", inter * config["n_shared_experts"], hidden)
    for expert in range(experts):
        params |= _feed_forward(f"mlp.experts.{expert}.", inter, hidden)
    return params


def _mtp_params(config: Mapping[str, Any]) -> dict[str, Param]:
    """Parameters that an MTP layer has besides those of a layer with experts."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    return {
        "eh_proj.weight": Param("BF16", (hidden, 2 * hidden)),
        "embed_tokens.weight": Param("BF16", (vocab, hidden)),
        "enorm.weight": Param("BF16", (hidden,)),
        "hnorm.weight": Param("BF16", (hidden,)),
        "shared_head.head.weight": Param("BF16", (vocab, hidden)),
        "shared_head.norm.weight": Param("BF16", (hidden,)),
    }


def params_from_table(config: Mapping[str, Any]) -> dict[str, Param]:
    """Every parameter of the official checkpoint for a config, by its official name, layer after layer."""
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    params = {"model.embed_tokens.weight": Param("BF16", (vocab, hidden))}
    for layer in range(layers + config["num_nextn_predict_layers"]):
        block = _layer_params(config, dense=layer < config["first_k_dense_replace"])
        if layer >= layers:
            block |= _mtp_params(config)
        params |= {f"model.layers.{layer}.{name}": block[name] for name in sorted(block)}
    params["model.norm.weight"] = Param("BF16", (hidden,))
    params["lm_head.weight"] = Param("BF16", (vocab, hidden))
    return params


def stored(params: Mapping[str, Param], weights: str = "fp8") -> dict[str, Spec]:
    """Turn parameters into the tensors that the checkpoint stores: FP8 weights with their `_scale_inv`, or BF16."""
    specs: dict[str, Spec] = {}
    for name, (storage, shape) in params.items():
        if storage == "fp8" and weights == "fp8":
            specs[name] = Spec("F8_E4M3", shape)
            specs[name + _SCALE_SUFFIX] = Spec("F32", (ceil_div(shape[0], FP8_BLOCK), ceil_div(shape[1], FP8_BLOCK)))
        else:
            specs[name] = Spec("BF16" if storage == "fp8" else storage, shape)
    return specs


def split(specs: Mapping[str, Spec], count: int) -> list[dict[str, Spec]]:
    """Divide the tensors among `count` files of about equal length, in their order, through the midst of layers."""
    if not 1 <= count <= len(specs):
        raise ValueError(f"1 to {len(specs)} shards are possible, not {count}")
    total, end = sum(spec.nbytes for spec in specs.values()), 0
    shards: list[dict[str, Spec]] = [{} for _ in range(count)]
    for name, spec in specs.items():
        shards[min(count - 1, end * count // total)][name] = spec
        end += spec.nbytes
    return [shard for shard in shards if shard]


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


class ValuesV3(Values):
    """Random contents for the tensors of a checkpoint; `scales` and `weights` as in `Knobs`."""

    def __init__(
        self, params: Mapping[str, Param], seed: int, *, scales: str, weights: str, reuse: bool = False
    ) -> None:
        super().__init__(params, seed, reuse=reuse)
        self._power_of_two = scales == "ue8m0"
        self._weights = weights

    def __call__(self, name: str, spec: Spec) -> np.ndarray:
        """Contents of a tensor as an array whose bytes are the stored ones."""
        if name.endswith(_SCALE_SUFFIX):
            return self.tile_scales(name.removesuffix(_SCALE_SUFFIX))
        if self._weights == "bf16" and self._params[name].storage == "fp8":
            return self._dequantized(name)
        return super().__call__(name, spec)

    def tile_scales(self, name: str) -> np.ndarray:
        """Scales that bring a weight's codes to N(0, 1 / sqrt(fan-in)), varied from tile to tile: float32."""
        rows, columns = self._params[name].shape
        rng = self._stream(name + _SCALE_SUFFIX)
        exponent = rng.uniform(-2, 1, (ceil_div(rows, FP8_BLOCK), ceil_div(columns, FP8_BLOCK)))
        # V3.1's output projections are the ones whose scales are none.
        if self._power_of_two and ".o_proj." not in name:
            exponent = np.floor(exponent)
            return np.exp2(exponent + math.floor(-math.log2(math.sqrt(columns) * _E4M3_SIGMA))).astype("<f4")
        return (np.exp2(exponent) / (math.sqrt(columns) * _E4M3_SIGMA)).astype("<f4")

    def _dequantized(self, name: str) -> np.ndarray:
        """The same weight as it is without FP8, rounded to BF16: uint16."""
        import ml_dtypes

        shape = self._params[name].shape
        codes = super().__call__(name, Spec("F8_E4M3", shape)).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scales = np.repeat(np.repeat(self.tile_scales(name), FP8_BLOCK, axis=0), FP8_BLOCK, axis=1)
        return to_bf16(codes * scales[: shape[0], : shape[1]])

    def _floats(self, name: str, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        """Contents of an unquantized tensor: float32."""
        normal = rng.standard_normal(spec.shape, np.float32)
        if "norm" in name:
            return 1 + 0.1 * normal
        if name.endswith("e_score_correction_bias"):  # the router's scores differ by some 0.3
            return 0.1 * normal
        if name.endswith("embed_tokens.weight"):
            return normal
        # The head gets four times the usual weights: logits of a trained model's spread.
        return normal * np.float32((4 if "head" in name else 1) / math.sqrt(spec.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def _knob(default: Any, text: str) -> Any:
    """A field of `Knobs` with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Knobs:
    """What can be chosen about a tiny checkpoint. No two widths of a tensor that a converter could confuse are equal."""

    seed: int = _knob(0, "seed of the random values")
    scales: str = _knob("float", f"one of {', '.join(SCALES)}")
    weights: str = _knob("fp8", f"one of {', '.join(WEIGHTS)}")
    layers: int = _knob(3, "transformer layers")
    dense_layers: int = _knob(1, "layers without experts, counted from the first")
    mtp_layers: int = _knob(1, "multi-token prediction layers")
    hidden: int = _knob(512, "hidden size")
    ffn: int = _knob(896, "width of a dense layer's network")
    moe: int = _knob(256, "width of an expert")
    experts: int = _knob(16, "routed experts of a layer")
    experts_per_token: int = _knob(4, "routed experts that a token uses")
    shared: int = _knob(1, "shared experts")
    groups: int = _knob(4, "groups of experts")
    top_groups: int = _knob(2, "groups that a token uses")
    heads: int = _knob(4, "attention heads")
    nope: int = _knob(128, "width of a head's keys without the rotated part")
    rope: int = _knob(64, "width of the rotated part")
    value: int = _knob(256, "width of a head's values")
    q_lora: int = _knob(640, "rank of the query projection; 0 for a plain one")
    kv_lora: int = _knob(384, "rank of the latent")
    merges: int = _knob(500, "merges of the tokenizer, at most")
    vocab_size: int | None = _knob(None, "rows of the embedding (tokens and at least 16 more, a multiple of 64)")
    shards: int = _knob(3, "number of files; they divide layers")
    chat_template: str | None = _knob(None, "Jinja text for tokenizer_config.json")
    gigabytes: float | None = _knob(None, "add experts until the data have about this many 10^9 bytes")

    def config(self, tokens: int) -> dict[str, Any]:
        """The config.json for a tokenizer of that many tokens: the official keys with these sizes."""
        for name, known in (("scales", SCALES), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        vocab = self.vocab_size or ceil_div(tokens + 16, 64) * 64
        if vocab < tokens:
            raise ValueError(f"vocab_size {vocab} is less than the tokenizer's {tokens} tokens")
        config: dict[str, Any] = json.loads(OFFICIAL_CONFIG.read_text(encoding="utf-8"))
        config |= {
            "first_k_dense_replace": self.dense_layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "kv_lora_rank": self.kv_lora,
            "moe_intermediate_size": self.moe,
            "n_group": self.groups,
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": self.mtp_layers,
            "q_lora_rank": self.q_lora or None,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "topk_group": self.top_groups,
            "v_head_dim": self.value,
            "vocab_size": vocab,
        }
        if self.weights == "bf16":
            del config["quantization_config"]
        elif self.scales == "ue8m0":
            config["quantization_config"] |= {"scale_fmt": "ue8m0"}
        if self.gigabytes:
            config["n_routed_experts"] = self._experts_to_fill(config)
        if config["n_routed_experts"] % self.groups:
            raise ValueError(f"{config['n_routed_experts']} experts do not divide into {self.groups} groups")
        return config

    def _experts_to_fill(self, config: Mapping[str, Any]) -> int:
        """Number of routed experts with which the checkpoint comes to about `gigabytes`."""

        def size(experts: int) -> int:
            specs = stored(params_from_table({**config, "n_routed_experts": experts}), self.weights)
            return sum(spec.nbytes for spec in specs.values())

        dense = size(0)
        wanted = ((self.gigabytes or 0) * 1e9 - dense) / (size(1) - dense)
        return max(self.groups, round(wanted / self.groups) * self.groups)


def make_tiny_v3(out_dir: str | Path, knobs: Knobs | None = None, **changes: Any) -> dict[str, Any]:
    """Write a tiny checkpoint.

    Parameters
    ----------
    out_dir
        Directory for the files; made if it is missing.
    knobs
        Sizes and choices; the defaults if None.
    changes
        Fields of `Knobs` that differ from `knobs`, e.g. ``seed=1, scales="ue8m0"``.

    Returns
    -------
    dict
        The config.
    """
    knobs = replace(knobs or Knobs(), **changes)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_json(learn_merges(TEXT, knobs.merges), ADDED_TOKENS)
    config = knobs.config(token_count(tokenizer))
    params = params_from_table(config)
    values = ValuesV3(params, knobs.seed, scales=knobs.scales, weights=knobs.weights, reuse=knobs.gigabytes is not None)
    write_json(out_dir / "config.json", config)
    write_companions(out_dir, tokenizer, chat_template=knobs.chat_template)
    write_checkpoint(out_dir, split(stored(params, knobs.weights), knobs.shards), values)
    return config


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    for knob in fields(Knobs):
        option, text = "--" + knob.name.replace("_", "-"), knob.metadata["help"]
        convert = {"int": int, "float": float, "str": str}[str(knob.type).split(" ")[0]]
        parser.add_argument(option, type=convert, default=knob.default, help=text)
    options = vars(parser.parse_args(arguments))
    out_dir = options.pop("out_dir")
    try:
        make_tiny_v3(out_dir, Knobs(**options))
    except ValueError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
    print(f"{out_dir}: {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
