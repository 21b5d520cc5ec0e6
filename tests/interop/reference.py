"""Logits of a checkpoint in the official format, computed by transformers in float32.

The weights are dequantized here, by numpy and from the published definitions of the formats, so that neither ggufx nor
transformers' own FP8 code has a part in the reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_tiny_v4 import hf_name
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Decode E4M3FN: uint8 -> float32 of the same shape. 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinity."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    table = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    table[code & 0x7F == 0x7F] = np.nan
    return (np.where(code & 0x80, -table, table)).astype(np.float32)[codes]


def e8m0(codes: np.ndarray) -> np.ndarray:
    """Decode E8M0: uint8 -> float32 powers of two, 2^(code - 127)."""
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def dequantize_fp8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """FP8 weights [out, in] under scales [ceil(out / 128), ceil(in / 128)] -> float32 [out, in]."""
    rows, columns = codes.shape
    full = np.repeat(np.repeat(e8m0(scales), 128, axis=0), 128, axis=1)
    return e4m3(codes) * full[:rows, :columns]


def dequantize_fp4(pairs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """FP4 weights [out, in / 2], the even element in the low half, under scales [out, in / 32] -> float32 [out, in]."""
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)
    return E2M1[codes] * np.repeat(e8m0(scales), 32, axis=1)


def read_tensors(checkpoint: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint: name -> safetensors dtype and raw values (one-byte types as uint8)."""
    kinds = {"I64": "<i8", "F32": "<f4", "BF16": "<u2", "F8_E8M0": "u1", "F8_E4M3": "u1", "I8": "u1", "U8": "u1"}
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(data[start + begin : start + end].tobytes(), kinds[entry["dtype"]])
            tensors[name] = entry["dtype"], raw.reshape(entry["shape"])
    return tensors


def read_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every parameter of a checkpoint by its official name, dequantized: float32, int64 for tid2eid."""
    tensors = read_tensors(checkpoint)
    weights: dict[str, np.ndarray] = {}
    for name, (dtype, raw) in tensors.items():
        if dtype == "F8_E4M3":
            weights[name] = dequantize_fp8(raw, tensors[name.removesuffix("weight") + "scale"][1])
        elif dtype == "I8":
            weights[name] = dequantize_fp4(raw, tensors[name.removesuffix("weight") + "scale"][1])
        elif dtype == "BF16":
            weights[name] = (raw.astype(np.uint32) << 16).view(np.float32)
        elif dtype != "F8_E8M0":
            weights[name] = raw
    return weights


def load_reference(checkpoint: Path, weights: dict[str, np.ndarray] | None = None) -> DeepseekV4ForCausalLM:
    """Build transformers' model in float32 with a checkpoint's weights.

    Parameters
    ----------
    checkpoint
        Directory in the official format.
    weights
        Official name -> float32 values to load in place of the checkpoint's own.
    """
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config")  # the weights are loaded dequantized
    config["torch_dtype"] = "float32"
    model = DeepseekV4ForCausalLM._from_config(DeepseekV4Config(**config), attn_implementation="eager").eval()
    state = model.state_dict()
    filled: dict[str, int] = dict.fromkeys(state, 0)
    for name, values in (weights or read_weights(checkpoint)).items():
        if name.startswith("mtp."):
            continue  # transformers has no MTP block
        key, expert, half = hf_name(name)
        target = state[key]
        if expert is not None:
            target = target[expert]
            if half:
                target = target.chunk(2)[0 if half == "gate" else 1]
        tensor = torch.tensor(values)
        if target.shape != tensor.shape or target.dtype != tensor.dtype:
            raise AssertionError(f"{name}: {tensor.dtype} {tensor.shape}, {key} is {target.dtype} {target.shape}")
        target.copy_(tensor)
        filled[key] += tensor.numel()
    missing = [key for key, count in filled.items() if count != state[key].numel()]
    if missing:
        raise AssertionError(f"not (fully) in the checkpoint: {missing}")
    return model


def reference_logits(model: DeepseekV4ForCausalLM, tokens: Sequence[int]) -> np.ndarray:
    """Logits of every position of a prompt: float32 [tokens, vocab]."""
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
