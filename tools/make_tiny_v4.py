#!/usr/bin/env python3
"""Write a small random DeepSeek-V4 checkpoint with the official names, dtypes, shapes and shard layout.

The official checkpoints take 160 GB and more. Everything that a converter has to get right about them (FP8 codes under
128x128 E8M0 scales, packed FP4 experts under 1x32 scales, the three attention kinds, hash- and score-routed experts,
the MTP block, the tokenizer) also fits into some 30 MB, and that is what this tool writes, in about a second:

    python tools/make_tiny_v4.py OUT_DIR
    python tools/make_tiny_v4.py OUT_DIR --gigabytes 2     # more experts, for benchmarks
    python tools/make_tiny_v4.py OUT_DIR --help            # every size can be changed

The values are random, but of the magnitudes that a trained network has, so that a forward pass is finite and every
weight matters to its result. The same arguments give the same bytes: each tensor has a random stream of its own, seeded
by the seed and its name, so that adding a layer leaves the others as they were.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OFFICIAL_CONFIG = Path(__file__).resolve().parent.parent / "fixtures" / "dsv4" / "config.json"

# Safetensors dtype -> bytes per element. The order is the one in which the official shards list their tensors.
DTYPE_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1, "I8": 1, "U8": 1}
DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BYTES)}

FP8_BLOCK = 128  # one scale per 128x128 weights
FP4_BLOCK = 32  # one scale per 32 neighbours of a row
VARIANTS = ("flash", "flash-base", "pro-like")


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


class Spec(NamedTuple):
    """A stored tensor: safetensors dtype and shape (numpy order, outermost first)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of the data in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------------------------------------------


class Param(NamedTuple):
    """A parameter of the network: how it is stored ("fp8", "fp4" or a dtype) and its logical shape."""

    storage: str
    shape: tuple[int, ...]


def expert_storage(config: Mapping[str, Any]) -> str:
    """How the routed experts are stored: "fp4", or "fp8" where config.json says so (the Base checkpoints)."""
    return str(config.get("expert_dtype", "fp4"))


def _block_params(config: Mapping[str, Any], ratio: int, *, hashed: bool) -> dict[str, Param]:
    """Parameters of one transformer block, by their name inside the block.

    Parameters
    ----------
    config
        The parsed config.json.
    ratio
        Compression ratio of the block's attention: 0 (sliding window only), 4 (with an indexer) or 128.
    hashed
        True where the experts of a token come from a table (tid2eid), not from the router's scores.
    """
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    q_lora, groups, o_lora = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    moe, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    shared = moe * config["n_shared_experts"]
    streams = config["hc_mult"]
    mixes = (2 + streams) * streams  # pre and post weights of each stream and the stream-to-stream matrix

    params = {
        "attn.attn_sink": Param("F32", (heads,)),
        "attn.kv_norm.weight": Param("BF16", (head_dim,)),
        "attn.q_norm.weight": Param("BF16", (q_lora,)),
        "attn.wkv.weight": Param("fp8", (head_dim, hidden)),
        "attn.wo_a.weight": Param("fp8", (groups * o_lora, heads * head_dim // groups)),
        "attn.wo_b.weight": Param("fp8", (hidden, groups * o_lora)),
        "attn.wq_a.weight": Param("fp8", (q_lora, hidden)),
        "attn.wq_b.weight": Param("fp8", (heads * head_dim, q_lora)),
        "attn_norm.weight": Param("BF16", (hidden,)),
        "ffn_norm.weight": Param("BF16", (hidden,)),
        "ffn.gate.weight": Param("BF16", (experts, hidden)),
        "ffn.shared_experts.w1.weight": Param("fp8", (shared, hidden)),
        "ffn.shared_experts.w2.weight": Param("fp8", (hidden, shared)),
        "ffn.shared_experts.w3.weight": Param("fp8", (shared, hidden)),
    }
    if hashed:
        params["ffn.gate.tid2eid"] = Param("I64", (config["vocab_size"], config["num_experts_per_tok"]))
    else:
        params["ffn.gate.bias"] = Param("F32", (experts,))
    if ratio:
        # Ratio 4 compresses overlapping windows, hence two projections side by side.
        width = 2 * head_dim if ratio == 4 else head_dim
        params["attn.compressor.ape"] = Param("F32", (ratio, width))
        params["attn.compressor.norm.weight"] = Param("BF16", (head_dim,))
        params["attn.compressor.wgate.weight"] = Param("BF16", (width, hidden))
        params["attn.compressor.wkv.weight"] = Param("BF16", (width, hidden))
    if ratio == 4:
        params["attn.indexer.compressor.ape"] = Param("F32", (ratio, 2 * index_dim))
        params["attn.indexer.compressor.norm.weight"] = Param("BF16", (index_dim,))
        params["attn.indexer.compressor.wgate.weight"] = Param("BF16", (2 * index_dim, hidden))
        params["attn.indexer.compressor.wkv.weight"] = Param("BF16", (2 * index_dim, hidden))
        params["attn.indexer.weights_proj.weight"] = Param("BF16", (index_heads, hidden))
        params["attn.indexer.wq_b.weight"] = Param("fp8", (index_heads * index_dim, q_lora))
    storage = expert_storage(config)
    for expert in range(experts):
        params[f"ffn.experts.{expert}.w1.weight"] = Param(storage, (moe, hidden))
        params[f"ffn.experts.{expert}.w2.weight"] = Param(storage, (hidden, moe))
        params[f"ffn.experts.{expert}.w3.weight"] = Param(storage, (moe, hidden))
    for part in ("attn", "ffn"):
        params[f"hc_{part}_fn"] = Param("F32", (mixes, streams * hidden))
        params[f"hc_{part}_base"] = Param("F32", (mixes,))
        params[f"hc_{part}_scale"] = Param("F32", (3,))
    return params


def _head_params(config: Mapping[str, Any]) -> dict[str, Param]:
    """Parameters that collapse the hyper-connection streams before an output head (of the trunk and of each MTP)."""
    streams = config["hc_mult"]
    return {
        "hc_head_fn": Param("F32", (streams, streams * config["hidden_size"])),
        "hc_head_base": Param("F32", (streams,)),
        "hc_head_scale": Param("F32", (1,)),
    }


def _mtp_params(config: Mapping[str, Any]) -> dict[str, Param]:
    """Parameters that an MTP block has besides those of a transformer block."""
    hidden = config["hidden_size"]
    return {
        "e_proj.weight": Param("fp8", (hidden, hidden)),
        "h_proj.weight": Param("fp8", (hidden, hidden)),
        "enorm.weight": Param("BF16", (hidden,)),
        "hnorm.weight": Param("BF16", (hidden,)),
        "norm.weight": Param("BF16", (hidden,)),
        **_head_params(config),
    }


def params_from_table(config: Mapping[str, Any]) -> dict[str, Param]:
    """Every parameter of the official checkpoint for a config, by its official name."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    params = {
        "embed.weight": Param("BF16", (vocab, hidden)),
        "head.weight": Param("BF16", (vocab, hidden)),
        "norm.weight": Param("BF16", (hidden,)),
        **_head_params(config),
    }
    layers = config["num_hidden_layers"]
    for layer, ratio in enumerate(config["compress_ratios"][:layers]):
        block = _block_params(config, ratio, hashed=layer < config["num_hash_layers"])
        params |= {f"layers.{layer}.{name}": param for name, param in block.items()}
    for index in range(config["num_nextn_predict_layers"]):
        block = _block_params(config, config["compress_ratios"][layers + index], hashed=False)
        params |= {f"mtp.{index}.{name}": param for name, param in (block | _mtp_params(config)).items()}
    return params


def stored(params: Mapping[str, Param]) -> dict[str, Spec]:
    """Turn parameters into the tensors that the checkpoint stores: FP8 and FP4 weights get their `.scale`.

    FP8 is F8_E4M3 [out, in] with one F8_E8M0 scale per 128x128 weights; FP4 is I8 [out, in / 2], two codes a byte, with
    one F8_E8M0 scale per 32 weights of a row.
    """
    specs: dict[str, Spec] = {}
    for name, (storage, shape) in params.items():
        if storage in DTYPE_BYTES:
            specs[name] = Spec(storage, shape)
            continue
        rows, columns = shape
        scale = name.removesuffix(".weight") + ".scale"
        if storage == "fp8":
            specs[name] = Spec("F8_E4M3", shape)
            specs[scale] = Spec("F8_E8M0", (ceil_div(rows, FP8_BLOCK), ceil_div(columns, FP8_BLOCK)))
        elif storage == "fp4":
            if columns % FP4_BLOCK:
                raise ValueError(f"{name}: {columns} columns do not divide into FP4 blocks of {FP4_BLOCK}")
            specs[name] = Spec("I8", (rows, columns // 2))
            specs[scale] = Spec("F8_E8M0", (rows, columns // FP4_BLOCK))
        else:
            raise ValueError(f"{name}: unknown storage {storage!r}")
    return specs


def shapes_from_table(config: Mapping[str, Any]) -> dict[str, Spec]:
    """Every tensor of the official checkpoint for a config: name -> dtype and shape."""
    return stored(params_from_table(config))


# (regular expression on the official name, its replacement in transformers), applied in this order. Stated here from
# the names on both sides; transformers keeps a list like it (conversion_mapping, "deepseek_v4") for its own loading.
_HF_RENAMES = (
    (r"^(layers\.)", r"model.\1"),
    (r"^norm\.", "model.norm."),
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"(\.compressor\.(?:indexer\.)?)norm\.", r"\1kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.w([qo])_([ab])\.", r".\1_\2_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
)
_EXPERT = re.compile(r"^(.+\.ffn\.)experts\.(\d+)\.w([123])\.weight$")


def hf_name(name: str) -> tuple[str, int | None, str]:
    """Where transformers' DeepseekV4ForCausalLM keeps an official parameter of the trunk.

    Returns
    -------
    tuple
        The name in its state dict; for a routed expert the index on the outermost axis, else None; and which half of
        the second axis it is: "gate" or "up" (the two share one tensor), else "".
    """
    expert: int | None = None
    half = ""
    if match := _EXPERT.match(name):
        prefix, index, matrix = match.groups()
        expert = int(index)
        half = {"1": "gate", "2": "", "3": "up"}[matrix]
        name = prefix + ("experts.gate_up_proj" if half else "experts.down_proj")
    for pattern, replacement in _HF_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name, expert, half


def shapes_from_transformers(config: Mapping[str, Any]) -> dict[str, Spec]:
    """Build the same mapping as `shapes_from_table`, with the shapes taken from transformers' model.

    The model is built on the meta device, so that no memory is needed. It has no MTP blocks; they are transformer
    blocks of the trunk's shapes, so the model is built with that many more layers. Transformers knows neither how the
    official files store a parameter nor what joins an MTP block to the trunk: both are taken from the table.
    """
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    trunk, extra = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    wanted = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**(wanted | {"num_hidden_layers": trunk + extra})))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    used: set[str] = set()
    params: dict[str, Param] = {}
    for name, (storage, table_shape) in params_from_table(config).items():
        as_layer = re.sub(r"^mtp\.(\d+)\.", lambda match: f"layers.{trunk + int(match[1])}.", name)
        key, expert, half = hf_name(as_layer)
        if key not in shapes and name.startswith("mtp."):
            params[name] = Param(storage, table_shape)
            continue
        used.add(key)
        shape = shapes[key]
        if expert is not None:
            if expert >= shape[0]:
                raise ValueError(f"{key} has {shape[0]} experts, {name} would be one more")
            shape = (shape[1] // 2 if half else shape[1], shape[2])
        params[name] = Param(storage, shape)
    if unused := shapes.keys() - used:
        raise ValueError(f"transformers has parameters that the table does not: {sorted(unused)}")
    return stored(params)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------

_E4M3_SIGMA = 32.0  # standard deviation of the FP8 codes' values; 448 is the largest
_E2M1_SIGMA = 2.0  # the same for FP4, whose largest value is 6
_E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _normal_quantiles(count: int) -> np.ndarray:
    """The `count` midpoint quantiles of the standard normal distribution: float64 [count]."""
    grid = np.linspace(-6, 6, 24001)
    density = np.exp(-(grid**2) / 2)
    cumulative = np.cumsum(density) / density.sum()
    return np.interp((np.arange(count) + 0.5) / count, cumulative, grid)


def _e4m3_values() -> np.ndarray:
    """Values of the E4M3 codes 0x00..0x7E: float64 [127]. 0x7F is NaN."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def _nearest(values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Index of the nearest of the ascending `values` for each of the non-negative `targets`."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, targets)


def _e4m3_table() -> np.ndarray:
    """Map a uniform 16-bit number to an E4M3 code of a normal distribution: uint8 [65536].

    Each of the 254 finite codes, the two zeros and the subnormals among them, occurs at least once. The NaN codes 0x7F
    and 0xFF never do.
    """
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    normal = _normal_quantiles(65536 - finite.size) * _E4M3_SIGMA
    codes = _nearest(_e4m3_values(), np.abs(normal)) | np.where(normal < 0, 0x80, 0)
    return np.concatenate([codes.astype(np.uint8), finite])


def _e2m1_pair_table() -> np.ndarray:
    """Map a uniform 16-bit number to two independent normal E2M1 codes in one byte: uint8 [65536].

    Small negative numbers become the minus zero, code 8, so that it is common.
    """
    normal = _normal_quantiles(256) * _E2M1_SIGMA
    codes = (_nearest(_E2M1_VALUES, np.abs(normal)) | np.where(normal < 0, 8, 0)).astype(np.uint8)
    pair = np.arange(65536)
    return codes[pair & 0xFF] | codes[pair >> 8] << 4


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to BF16 (nearest, ties to even): uint16 of the same shape."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class Values:
    """Random contents for the tensors of a checkpoint.

    Parameters
    ----------
    params
        The parameters (a scale's magnitude follows from the width of the weight that it belongs to).
    seed
        Seed of all streams.
    reuse
        Cut the FP8 and FP4 codes out of one block of 32 MiB instead of drawing each tensor afresh. The files then cost
        little more than their writing.
    """

    def __init__(self, params: Mapping[str, Param], seed: int, *, reuse: bool = False) -> None:
        self._params = params
        self._seed = seed
        self._tables = {"F8_E4M3": _e4m3_table(), "I8": _e2m1_pair_table()}
        self._pools: dict[str, np.ndarray] = {}
        if reuse:
            for dtype, table in self._tables.items():
                self._pools[dtype] = table[self._stream(dtype).integers(0, 65536, 1 << 25, np.uint16)]

    def _stream(self, name: str) -> np.random.Generator:
        """A random stream for a tensor, independent of which other tensors exist."""
        return np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(name.encode())]))

    def __call__(self, name: str, spec: Spec) -> np.ndarray:
        """Contents of a tensor as an array whose bytes are the stored ones."""
        rng = self._stream(name)
        if spec.dtype in self._tables:
            return self._codes(spec, rng)
        if spec.dtype == "F8_E8M0":
            return self._scales(name, spec, rng)
        if spec.dtype == "I64":
            return self._expert_table(spec, rng)
        values = self._floats(name, spec, rng)
        return to_bf16(values) if spec.dtype == "BF16" else values.astype("<f4")

    def _codes(self, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        """FP8 codes or packed FP4 pairs: uint8 of the stored shape."""
        count = math.prod(spec.shape)
        pool = self._pools.get(spec.dtype)
        if pool is None:
            return self._tables[spec.dtype][rng.integers(0, 65536, count, np.uint16)].reshape(spec.shape)
        start = int(rng.integers(0, max(1, pool.size - count)))
        return np.resize(pool[start : start + count], count).reshape(spec.shape)

    def _scales(self, name: str, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        """E8M0 exponents that bring the codes to N(0, 1 / sqrt(fan-in)), varied from block to block: uint8."""
        storage, shape = self._params[name.removesuffix(".scale") + ".weight"]
        sigma = _E4M3_SIGMA if storage == "fp8" else _E2M1_SIGMA
        base = 127 + math.floor(math.log2(1 / (math.sqrt(shape[1]) * sigma)))
        return (base + rng.choice([-2, -1, 0, 0, 0, 1], spec.shape)).astype(np.uint8)

    def _expert_table(self, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        """The tid2eid table, distinct experts for each token: int64 [vocab, experts per token]."""
        vocab, used = spec.shape
        experts = next(p.shape[0] for name, p in self._params.items() if name.endswith("ffn.gate.weight"))
        # Steps of at most experts // used cannot come full circle, so that no expert repeats within a row.
        steps = rng.integers(1, experts // used + 1, (vocab, used))
        return ((rng.integers(0, experts, (vocab, 1)) + steps.cumsum(1)) % experts).astype("<i8")

    def _floats(self, name: str, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        """Contents of an unquantized tensor: float32."""
        normal = rng.standard_normal(spec.shape, np.float32)
        leaf = name.rsplit(".", 1)[-1]
        if "norm" in name:
            return 1 + 0.1 * normal
        if leaf.endswith("_scale"):
            return 0.7 + 0.1 * normal
        if leaf.endswith(("_base", "ape")):
            return 0.5 * normal
        if leaf == "bias":  # of the router; its scores differ by some 0.3
            return 0.1 * normal
        if leaf == "attn_sink" or name == "embed.weight":
            return normal
        # The head gets four times the usual weights: logits of a trained model's spread.
        return normal * np.float32((4 if name == "head.weight" else 1) / math.sqrt(spec.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors
# ---------------------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, specs: Mapping[str, Spec], values: Callable[[str, Spec], np.ndarray] | None) -> None:
    """Write one safetensors file, tensor by tensor: by dtype, then by name, as the official shards do.

    Parameters
    ----------
    path
        File to write.
    specs
        The tensors.
    values
        Gives the contents of a tensor. None leaves a hole in place of all data: the file has its full length but takes
        no room on disk.
    """
    order = sorted(specs, key=lambda name: (DTYPE_RANK[specs[name].dtype], name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + specs[name].nbytes
        header[name] = {"dtype": specs[name].dtype, "shape": list(specs[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        if values is None:
            file.truncate(8 + len(text) + end)
            return
        for name in order:
            array = values(name, specs[name])
            if array.nbytes != specs[name].nbytes:
                raise AssertionError(f"{name}: {array.nbytes} bytes, {specs[name].nbytes} wanted")
            file.write(np.ascontiguousarray(array).data)


def official_shards(specs: Mapping[str, Spec], config: Mapping[str, Any]) -> list[dict[str, Spec]]:
    """Divide the tensors as the official checkpoint does: the embedding, each layer, the head, each MTP block."""
    layers = config["num_hidden_layers"]
    count = layers + 2 + config["num_nextn_predict_layers"]
    shards: list[dict[str, Spec]] = [{} for _ in range(count)]
    for name, spec in specs.items():
        kind, _, rest = name.partition(".")
        if kind == "embed":
            shard = 0
        elif kind == "layers":
            shard = 1 + int(rest.partition(".")[0])
        elif kind == "mtp":
            shard = layers + 2 + int(rest.partition(".")[0])
        else:
            shard = layers + 1
        shards[shard][name] = spec
    return shards


def merge_shards(shards: list[dict[str, Spec]], count: int) -> list[dict[str, Spec]]:
    """Join neighbouring shards until `count` are left."""
    if not 1 <= count <= len(shards):
        raise ValueError(f"1 to {len(shards)} shards are possible, not {count}")
    merged: list[dict[str, Spec]] = [{} for _ in range(count)]
    for index, shard in enumerate(shards):
        merged[index * count // len(shards)] |= shard
    return merged


def write_checkpoint(
    out_dir: Path, shards: list[dict[str, Spec]], values: Callable[[str, Spec], np.ndarray] | None
) -> None:
    """Write the shards and model.safetensors.index.json (a single shard has neither number nor index)."""
    if len(shards) == 1:
        write_safetensors(out_dir / "model.safetensors", shards[0], values)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(out_dir / file, shard, values)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(spec.nbytes for shard in shards for spec in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(out_dir / "model.safetensors.index.json", index)


def write_json(path: Path, value: object) -> None:
    """Write JSON as the model hub's files look."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

# (text, special) of the tokens after the learned ones. As in the official file, the markers of roles are not "special"
# although they look so; a converter has to tell the two properties apart.
ADDED_TOKENS = (
    ("<｜place▁holder▁no▁0｜>", True),
    ("<｜place▁holder▁no▁1｜>", True),
    ("<｜fim▁hole｜>", False),
    ("<｜fim▁begin｜>", False),
    ("<｜fim▁end｜>", False),
    ("<｜User｜>", False),
    ("<｜Assistant｜>", False),
    ("<|EOT|>", False),
    ("<think>", False),
    ("</think>", False),
    ("｜DSML｜", False),
    ("<mask>", False),
)

# The pre-tokenizer of DeepSeek-V3 and later: numbers in groups of three, runs of Chinese and kana, then words.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)

TEXT = """
A checkpoint is a set of named arrays. The converter reads every array of the checkpoint, looks at how its numbers are
stored, and writes the same numbers into another file. Nothing is trained, nothing is lost: where the two formats agree
the bytes are copied, and where they differ the bytes are put into another order. When a number cannot be represented,
the converter says so and stops. The reader of the other file then finds the same values at the same places.

The weather was fine that morning, and the two travellers walked along the river until they came to the old bridge.
"Do you think that it will hold?" asked the one. "It has held for three hundred years," said the other, "and it won't
break today; I'd rather be surprised by a bridge than by the water under it." They crossed it one after the other, and
it held. On the other side there was a village with a market, where they bought bread, cheese and a little wine, and
they didn't leave before evening. There's nothing better than a day without a plan, they'd say later, and they're right.

def read_header(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length))

for (int i = 0; i < n; i++) { sum += weights[i] * values[i]; }  // a dot product
if x is not None and len(x) > 0: return [y for y in x if y != 0]
import numpy as np; a = np.zeros((128, 256), dtype=np.float32); print(a.shape, a.sum())

In 2024 there were 365 days and one more; 1000 grams are 1 kilogram; 3.14159 is nearly 22/7 and 2.71828 is not.

Der Wandler liest die Gewichte und schreibt sie in eine andere Datei. Le convertisseur lit les poids et les écrit dans
un autre fichier. Преобразователь читает веса модели и записывает их в другой файл.
转换器读取模型的权重并把它们写入另一个文件。模型的权重是数字，数字的顺序很重要。重みを読み込み、別のファイルに書き込みます。
"""


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def learn_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Learn up to `count` byte-pair merges: always the most frequent pair of neighbours, the smallest of equals.

    The words are cut with a plainer rule than the tokenizer's own: any list of merges makes a tokenizer, as long as
    each side of a merge is a byte or the result of an earlier one.
    """
    symbols = byte_symbols()
    frequency = Counter(re.findall(r"\s?\w+|\s?[^\w\s]+|\s+", text))
    words = [([symbols[byte] for byte in word.encode()], times) for word, times in frequency.items()]
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words:
            for pair in pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:  # every word is one token
            break
        merges.append(best)
        for word, _times in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [best[0] + best[1]]
                at += 1
    return merges


def synthetic_merges(count: int) -> list[tuple[str, str]]:
    """`count` valid merges for a vocabulary of full size: bytes to pairs, then pairs and bytes to triples."""
    symbols = sorted(byte_symbols())
    merges = [(a, b) for a in symbols for b in symbols][:count]
    triples = ((a + b, c) for a in symbols for b in symbols for c in symbols)
    return merges + [merge for _, merge in zip(range(count - len(merges)), triples, strict=False)]


def _added_token(number: int, text: str, *, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **flags, "special": special}


def tokenizer_json(
    merges: list[tuple[str, str]], added: tuple[tuple[str, bool], ...], *, merge_pairs: bool = False
) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json: 3 special tokens, the 256 bytes, the merged tokens, then `added`.

    Parameters
    ----------
    merges
        Merges in the order of their priority.
    added
        (text, special) of the tokens after the merged ones.
    merge_pairs
        Write a merge as ["a", "b"], as newer files do, instead of "a b".
    """
    tokens = [BOS, EOS, PAD, *byte_symbols(), *(a + b for a, b in merges)]
    entries = [_added_token(number, tokens[number], special=True) for number in range(3)]
    entries += [_added_token(len(tokens) + i, text, special=special) for i, (text, special) in enumerate(added)]
    splits = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in SPLITS]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges] if merge_pairs else [" ".join(merge) for merge in merges],
        },
    }


def token_count(tokenizer: Mapping[str, Any]) -> int:
    """Number of token ids that a tokenizer.json gives a meaning."""
    return 1 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))


def write_companions(out_dir: Path, tokenizer: Mapping[str, Any], *, chat_template: str | None = None) -> None:
    """Write the files beside the weights and config.json: tokenizer, generation_config.json, README.md."""
    write_json(out_dir / "tokenizer.json", tokenizer)

    def named(text: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": named(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": named(EOS),
        "legacy": True,
        "model_max_length": 1048576,
        "pad_token": named(EOS),  # the official file pads with the end token too
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    write_json(out_dir / "tokenizer_config.json", tokenizer_config)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    write_json(out_dir / "generation_config.json", {"_from_model_config": True, **generation})
    readme = "---\nlicense: mit\nlibrary_name: transformers\n---\n\n# A random DeepSeek-V4 checkpoint, for tests\n"
    (out_dir / "README.md").write_text(readme, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def _knob(default: Any, text: str) -> Any:
    """A field of `Knobs` with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Knobs:
    """What can be chosen about a tiny checkpoint.

    The defaults meet every condition of llama.cpp's loader and graph (at least one ratio-4 layer, 16 indexer heads,
    index_head_dim a multiple of 64, heads divisible by o_groups) and of transformers (FP8 sides multiples of 128). No
    two widths that a converter could confuse are equal.
    """

    seed: int = _knob(0, "seed of the random values")
    variant: str = _knob("flash", f"one of {', '.join(VARIANTS)}")
    layers: int = _knob(5, "transformer blocks; 5 are needed to have every kind")
    hash_layers: int = _knob(3, "blocks, counted from the first, whose experts come from a table of token ids")
    mtp_layers: int = _knob(1, "multi-token prediction blocks")
    hidden: int | None = _knob(None, "hidden size (512; with --gigabytes 2048)")
    moe: int | None = _knob(None, "width of an expert, a multiple of 32 (256; with --gigabytes 1024)")
    experts: int = _knob(16, "routed experts of a block")
    experts_per_token: int = _knob(6, "routed experts that a token uses")
    heads: int = _knob(8, "attention heads")
    head_dim: int = _knob(256, "width of an attention head")
    q_lora: int = _knob(128, "rank of the query projection")
    o_groups: int = _knob(2, "groups of the output projection")
    o_lora: int = _knob(128, "rank of the output projection of a group")
    index_heads: int = _knob(16, "indexer heads")
    index_head_dim: int = _knob(128, "width of an indexer head")
    index_topk: int = _knob(64, "compressed entries that the indexer keeps")
    merges: int = _knob(500, "merges of the tokenizer, at most")
    vocab_size: int | None = _knob(None, "rows of the embedding (tokens and at least 16 more, a multiple of 64)")
    expert_dtype: str | None = _knob(None, "fp4 or fp8 (the variant's own)")
    omit_expert_dtype: bool = _knob(False, "leave expert_dtype out of config.json, as the first release did")
    shards: int | None = _knob(None, "number of files (one each for embedding, layers, head and MTP blocks)")
    chat_template: str | None = _knob(None, "Jinja text for tokenizer_config.json")
    merge_pairs: bool = _knob(False, "write the tokenizer's merges as pairs, as newer files do")
    gigabytes: float | None = _knob(None, "add experts until the data have about this many 10^9 bytes")

    def config(self, tokens: int) -> dict[str, Any]:
        """The config.json for a tokenizer of that many tokens: the official keys with these sizes."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is not one of {', '.join(VARIANTS)}")
        if self.layers < 2:
            raise ValueError("at least 2 layers are needed")
        first = [128, 128] if self.variant == "pro-like" else [0, 0]
        middle = [4 if layer % 2 == 0 else 128 for layer in range(2, self.layers)]
        vocab = self.vocab_size or ceil_div(tokens + 16, 64) * 64
        if vocab < tokens:
            raise ValueError(f"vocab_size {vocab} is less than the tokenizer's {tokens} tokens")
        config: dict[str, Any] = json.loads(OFFICIAL_CONFIG.read_text(encoding="utf-8"))
        config |= {
            "expert_dtype": self.expert_dtype or ("fp8" if self.variant == "flash-base" else "fp4"),
            "head_dim": self.head_dim,
            "hidden_size": self.hidden or (2048 if self.gigabytes else 512),
            "index_head_dim": self.index_head_dim,
            "index_n_heads": self.index_heads,
            "index_topk": self.index_topk,
            "max_position_embeddings": 65536,
            "moe_intermediate_size": self.moe or (1024 if self.gigabytes else 256),
            "n_routed_experts": self.experts,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layers,
            "num_hash_layers": self.hash_layers,
            "num_nextn_predict_layers": self.mtp_layers,
            "o_groups": self.o_groups,
            "o_lora_rank": self.o_lora,
            "q_lora_rank": self.q_lora,
            "rope_scaling": config["rope_scaling"] | {"original_max_position_embeddings": 4096},
            "routed_scaling_factor": 2.5 if self.variant == "pro-like" else 1.5,
            "vocab_size": vocab,
            "compress_ratios": first + middle + [0] * self.mtp_layers,
        }
        if self.gigabytes:
            config["n_routed_experts"] = self._experts_to_fill(config)
        if self.experts_per_token > config["n_routed_experts"]:
            raise ValueError(f"{self.experts_per_token} experts per token, but only {config['n_routed_experts']}")
        if self.heads % self.o_groups:
            raise ValueError(f"{self.heads} heads do not divide into {self.o_groups} groups")
        return config

    def _experts_to_fill(self, config: Mapping[str, Any]) -> int:
        """Number of routed experts with which the checkpoint comes to about `gigabytes`."""

        def size(experts: int) -> int:
            specs = shapes_from_table({**config, "n_routed_experts": experts})
            return sum(spec.nbytes for spec in specs.values())

        dense = size(0)
        return max(self.experts_per_token, round(((self.gigabytes or 0) * 1e9 - dense) / (size(1) - dense)))


def make_tiny_v4(out_dir: str | Path, knobs: Knobs | None = None, **changes: Any) -> dict[str, Any]:
    """Write a tiny checkpoint.

    Parameters
    ----------
    out_dir
        Directory for the files; made if it is missing.
    knobs
        Sizes and choices; the defaults if None.
    changes
        Fields of `Knobs` that differ from `knobs`, e.g. ``seed=1, variant="flash-base"``.

    Returns
    -------
    dict
        The complete config, with `expert_dtype` even where the file omits it.
    """
    knobs = replace(knobs or Knobs(), **changes)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_json(learn_merges(TEXT, knobs.merges), ADDED_TOKENS, merge_pairs=knobs.merge_pairs)
    config = knobs.config(token_count(tokenizer))
    params = params_from_table(config)
    shards = official_shards(stored(params), config)
    if knobs.shards is not None:
        shards = merge_shards(shards, knobs.shards)
    written = {key: value for key, value in config.items() if key != "expert_dtype" or not knobs.omit_expert_dtype}
    write_json(out_dir / "config.json", written)
    write_companions(out_dir, tokenizer, chat_template=knobs.chat_template)
    write_checkpoint(out_dir, shards, Values(params, knobs.seed, reuse=knobs.gigabytes is not None))
    return config


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    for knob in fields(Knobs):
        option, text = "--" + knob.name.replace("_", "-"), knob.metadata["help"]
        kind = str(knob.type).split(" ")[0]
        if kind == "bool":
            parser.add_argument(option, action="store_true", help=text)
        else:
            convert = {"int": int, "float": float, "str": str}[kind]
            parser.add_argument(option, type=convert, default=knob.default, help=text)
    options = vars(parser.parse_args(arguments))
    out_dir = options.pop("out_dir")
    try:
        make_tiny_v4(out_dir, Knobs(**options))
    except ValueError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
    print(f"{out_dir}: {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
