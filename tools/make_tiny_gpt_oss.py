#!/usr/bin/env python3
"""Write a small random gpt-oss checkpoint with the official names, dtypes and ways of storing.

    python tools/make_tiny_gpt_oss.py OUT_DIR
    python tools/make_tiny_gpt_oss.py OUT_DIR --help            # every size can be changed

Attention in BF16 with biases and sinks, by turns with a sliding window; routed experts in MXFP4, a layer's in one tensor,
gate and up by turns. Values, files and tokenizer are made as make_tiny_v4.py makes them; the tokenizer's pre-tokenizer is
DeepSeek's, not the real one's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from make_tiny_v4 import (
    ADDED_TOKENS,
    FP4_BLOCK,
    TEXT,
    Spec,
    Values,
    ceil_div,
    learn_merges,
    merge_shards,
    token_count,
    tokenizer_json,
    write_checkpoint,
    write_companions,
    write_json,
)

_E2M1_SIGMA = 2.0  # as make_tiny_v4's codes have it


def specs_from_table(config: Mapping[str, Any]) -> list[dict[str, Spec]]:
    """Every tensor of the official checkpoint for a config: name -> dtype and shape; a dict for each layer, then the rest."""
    hidden, vocab, inter = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    query, key = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    experts = config["num_local_experts"]
    shards = []
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": Spec("BF16", (hidden,)),
            "post_attention_layernorm.weight": Spec("BF16", (hidden,)),
            "self_attn.sinks": Spec("BF16", (config["num_attention_heads"],)),
            "mlp.router.weight": Spec("BF16", (experts, hidden)),
            "mlp.router.bias": Spec("BF16", (experts,)),
        }
        for name, rows, columns in (
            ("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)
        ):  # fmt: skip
            block[f"self_attn.{name}_proj.weight"] = Spec("BF16", (rows, columns))
            block[f"self_attn.{name}_proj.bias"] = Spec("BF16", (rows,))
        for name, rows, columns in (("gate_up", 2 * inter, hidden), ("down", hidden, inter)):
            if columns % FP4_BLOCK:
                raise ValueError(f"{name}: {columns} columns do not divide into blocks of {FP4_BLOCK}")
            blocks = (experts, rows, columns // FP4_BLOCK)
            block[f"mlp.experts.{name}_proj_blocks"] = Spec("U8", (*blocks, FP4_BLOCK // 2))
            block[f"mlp.experts.{name}_proj_scales"] = Spec("U8", blocks)
            block[f"mlp.experts.{name}_proj_bias"] = Spec("BF16", (experts, rows))
        shards.append({f"model.layers.{layer}.{name}": spec for name, spec in block.items()})
    everywhere = {
        "model.embed_tokens.weight": Spec("BF16", (vocab, hidden)),
        "model.norm.weight": Spec("BF16", (hidden,)),
        "lm_head.weight": Spec("BF16", (vocab, hidden)),
    }
    return [*shards, everywhere]


class ValuesGptOss(Values):
    """Random contents for the tensors of a checkpoint."""

    def __init__(self, seed: int) -> None:
        super().__init__({}, seed)

    def __call__(self, name: str, spec: Spec) -> np.ndarray:
        """Contents of a tensor as an array whose bytes are the stored ones."""
        if name.endswith("_blocks"):
            return super().__call__(name, Spec("I8", spec.shape))
        if name.endswith("_scales"):
            base = 127 + math.floor(math.log2(1 / (math.sqrt(spec.shape[-1] * FP4_BLOCK) * _E2M1_SIGMA)))
            return (base + self._stream(name).choice([-2, -1, 0, 0, 0, 1], spec.shape)).astype(np.uint8)
        return super().__call__(name, spec)

    def _floats(self, name: str, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        """Contents of an unquantized tensor: float32."""
        normal = rng.standard_normal(spec.shape, np.float32)
        if "norm" in name:
            return 1 + 0.1 * normal
        if name.endswith("bias"):
            return 0.1 * normal
        if name.endswith(("sinks", "embed_tokens.weight")):
            return normal
        # The head gets four times the usual weights: logits of a trained model's spread.
        return normal * np.float32((4 if name == "lm_head.weight" else 1) / math.sqrt(spec.shape[-1]))


def _knob(default: Any, text: str) -> Any:
    """A field of `Knobs` with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Knobs:
    """What can be chosen about a tiny checkpoint. No two widths of a tensor that a converter could confuse are equal."""

    seed: int = _knob(0, "seed of the random values")
    layers: int = _knob(4, "transformer layers, every other one with a sliding window")
    hidden: int = _knob(288, "hidden size, a multiple of 32")
    inter: int = _knob(224, "width of an expert, a multiple of 32")
    experts: int = _knob(12, "routed experts of a layer")
    experts_per_token: int = _knob(4, "routed experts that a token uses")
    heads: int = _knob(6, "attention heads")
    kv_heads: int = _knob(2, "heads of keys and values")
    head_dim: int = _knob(64, "width of an attention head")
    window: int = _knob(32, "tokens that a layer with a sliding window sees")
    merges: int = _knob(500, "merges of the tokenizer, at most")
    shards: int = _knob(2, "number of files")
    chat_template: str | None = _knob(None, "Jinja text for tokenizer_config.json")

    def config(self, tokens: int) -> dict[str, Any]:
        """The config.json for a tokenizer of that many tokens: the official keys with these sizes."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 1,
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": self.inter,
            "layer_types": [
                "full_attention" if layer % 2 else "sliding_attention" for layer in range(self.layers)
            ],
            "max_position_embeddings": 131072,
            "model_type": "gpt_oss",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": False,
            "pad_token_id": 2,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.window,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.55.0.dev0",
            "use_cache": True,
            "vocab_size": ceil_div(tokens + 16, 64) * 64,
        }  # fmt: skip


def make_tiny_gpt_oss(out_dir: str | Path, knobs: Knobs | None = None, **changes: Any) -> dict[str, Any]:
    """Write a tiny checkpoint.

    Parameters
    ----------
    out_dir
        Directory for the files; made if it is missing.
    knobs
        Sizes and choices; the defaults if None.
    changes
        Fields of `Knobs` that differ from `knobs`, e.g. ``seed=1, layers=2``.

    Returns
    -------
    dict
        The config.
    """
    knobs = replace(knobs or Knobs(), **changes)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_json(learn_merges(TEXT, knobs.merges), ADDED_TOKENS, merge_pairs=True)
    config = knobs.config(token_count(tokenizer))
    shards = merge_shards(specs_from_table(config), knobs.shards)
    write_json(out_dir / "config.json", config)
    write_companions(out_dir, tokenizer, chat_template=knobs.chat_template)
    write_checkpoint(out_dir, shards, ValuesGptOss(knobs.seed))
    return config


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    for knob in fields(Knobs):
        option, text = "--" + knob.name.replace("_", "-"), knob.metadata["help"]
        convert = {"int": int, "str": str}[str(knob.type).split(" ")[0]]
        parser.add_argument(option, type=convert, default=knob.default, help=text)
    options = vars(parser.parse_args(arguments))
    out_dir = options.pop("out_dir")
    try:
        make_tiny_gpt_oss(out_dir, Knobs(**options))
    except ValueError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
    print(f"{out_dir}: {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
