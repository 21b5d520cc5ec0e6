"""Which types llama.cpp's own quantizer gives the tensors of models of several kinds, asked with its dry run.

``python -m tests.interop.upstream_mixes`` writes ``fixtures/mixes.json``. Nothing in here comes from ggufx: the files are the
gguf package's, sparse, with as many layers, heads and experts as the models have and small matrices.
"""

from __future__ import annotations

import ctypes
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from .llama import recorded_log

FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
"""llama.h's numbers of the mixes."""

Shape = tuple[int, ...]
_DONE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = +(\S+), size = [^\n]*?(?:\((\w+)\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """A model: its metadata (without the architecture's prefix) and tensors; ``blk.*`` is every layer of the range."""

    architecture: str
    keys: Mapping[str, Any]
    globals: Mapping[str, Shape]
    layers: Sequence[tuple[range, Mapping[str, Shape]]]

    @property
    def tensors(self) -> dict[str, Shape]:
        """Name -> shape, numpy order."""
        found = dict(self.globals)
        for numbers, family in self.layers:
            for number in numbers:
                found.update({f"blk.{number}.{rest}.weight": shape for rest, shape in family.items()})
        return found


def _keys(n_layers: int, heads: int, shared: int, n_experts: int = 0, **more: Any) -> dict[str, Any]:
    keys = {
        "block_count": n_layers, "context_length": 256, "embedding_length": 512, "feed_forward_length": 512,
        "attention.head_count": heads, "attention.head_count_kv": shared, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    if n_experts:
        keys |= {"expert_count": n_experts, "expert_used_count": 2}
    return keys | {key.replace("__", "."): value for key, value in more.items()}


_ENDS = {"token_embd.weight": (64, 512), "output_norm.weight": (512,), "output.weight": (64, 512)}
_ATTENTION = {
    "attn_norm": (512,), "attn_q": (512, 512), "attn_k": (64, 512), "attn_v": (64, 512), "attn_output": (512, 512),
    "ffn_norm": (512,),
}  # fmt: skip
_DENSE = {"ffn_gate": (512, 512), "ffn_up": (512, 512), "ffn_down": (512, 512)}
_ROUTED = {
    "ffn_gate_inp": (8, 512), "ffn_gate_exps": (8, 256, 512), "ffn_up_exps": (8, 256, 512),
    "ffn_down_exps": (8, 512, 256),
}  # fmt: skip
_SHARED = {"ffn_gate_shexp": (256, 512), "ffn_up_shexp": (256, 512), "ffn_down_shexp": (512, 256)}
_LATENT = {
    "attn_norm": (512,), "attn_q_a": (256, 512), "attn_q_a_norm": (256,), "attn_q_b": (512, 256), "attn_kv_a_mqa": (64, 512),
    "attn_kv_a_norm": (256,), "attn_k_b": (4, 256, 128), "attn_v_b": (4, 128, 256), "attn_output": (512, 512),
    "ffn_norm": (512,),
}  # fmt: skip
_LATENT_KEYS: dict[str, Any] = {
    "attention__q_lora_rank": 256, "attention__kv_lora_rank": 256, "attention__key_length": 128,
    "attention__value_length": 128, "attention__key_length_mla": 64, "attention__value_length_mla": 64,
    "leading_dense_block_count": 3, "expert_shared_count": 1, "expert_feed_forward_length": 256,
    "expert_weights_scale": 2.5, "expert_gating_func": 2, "rope__dimension_count": 64,
}  # fmt: skip
_FUSED = {"attn_norm": (512,), "attn_qkv": (640, 512), "attn_output": (512, 512), "ffn_up": (512, 512)}

RECORDED: dict[str, Kind] = {
    "80 layers, 8 heads of values to 64": Kind("llama", _keys(80, 64, 8), _ENDS, [(range(80), _ATTENTION | _DENSE)]),
    "8 experts, 32 layers": Kind("llama", _keys(32, 32, 8, 8), _ENDS, [(range(32), _ATTENTION | _ROUTED)]),
    "32 layers, as many values as queries": Kind(
        "llama", _keys(32, 32, 32), _ENDS, [(range(32), _ATTENTION | _DENSE)]
    ),
    "DeepSeek-V3, 61 layers": Kind(
        "deepseek2", _keys(61, 128, 1, 256, **_LATENT_KEYS), _ENDS,
        [(range(3), _LATENT | _DENSE), (range(3, 61), _LATENT | _ROUTED | _SHARED)],
    ),
    "no head of its own, rows of 640": Kind(
        "gemma3", _keys(18, 4, 1, attention__sliding_window=512),
        {"token_embd.weight": (64, 640), "output_norm.weight": (640,)},
        [
            (range(18), {
                "attn_norm": (640,), "attn_q": (1024, 640), "attn_k": (256, 640), "attn_v": (256, 640),
                "attn_output": (640, 1024), "ffn_gate": (2048, 640), "ffn_up": (2048, 640), "ffn_down": (640, 2048),
            }),
        ],
    ),
    "falcon, 60 layers": Kind(
        "falcon", _keys(60, 128, 8, attention__layer_norm_epsilon=1e-5), _ENDS,
        [(range(60), _FUSED | {"ffn_down": (512, 512)})],
    ),
}  # fmt: skip
"""Models of which the fixture has the answers."""

FURTHER: dict[str, Kind] = {
    "qwen2, 80 layers": Kind("qwen2", _keys(80, 64, 8), _ENDS, [(range(80), _ATTENTION | _DENSE)]),
    "qwen2, 24 layers, tied": Kind(
        "qwen2", _keys(24, 14, 2), {k: v for k, v in _ENDS.items() if k != "output.weight"},
        [(range(24), _ATTENTION | _DENSE)],
    ),
    "qwen3moe, 48 layers": Kind(
        "qwen3moe", _keys(48, 32, 4, 128, expert_feed_forward_length=256), _ENDS, [(range(48), _ATTENTION | _ROUTED)]
    ),
    "8 experts, 80 layers": Kind("llama", _keys(80, 64, 8, 8), _ENDS, [(range(80), _ATTENTION | _ROUTED)]),
    "4 experts": Kind("llama", _keys(20, 16, 16, 4), _ENDS, [(range(20), _ATTENTION | _ROUTED)]),
    "phi3, fused": Kind(
        "phi3", _keys(40, 40, 10, rope__dimension_count=16), _ENDS,
        [(range(40), _FUSED | {"ffn_down": (512, 512)})],
    ),
    "DeepSeek-V2-Lite with kv_b": Kind(
        "deepseek2", _keys(27, 16, 16, 64, **_LATENT_KEYS | {"leading_dense_block_count": 1}), _ENDS,
        [
            (range(1), _LATENT | {"attn_kv_b": (1024, 256)} | _DENSE),
            (range(1, 27), _LATENT | {"attn_kv_b": (1024, 256)} | _ROUTED | _SHARED),
        ],
    ),
    "gpt-oss, rows of 2880": Kind(
        "gpt-oss",
        _keys(24, 64, 8, 32, attention__sliding_window=128, expert_feed_forward_length=2880), {
            "token_embd.weight": (64, 2880), "output_norm.weight": (2880,), "output.weight": (64, 2880),
        },
        [
            (range(24), {
                "attn_norm": (2880,), "attn_q": (512, 2880), "attn_k": (64, 2880), "attn_v": (64, 2880),
                "attn_output": (2880, 512), "ffn_gate_inp": (32, 2880), "ffn_gate_exps": (4, 64, 2880),
                "ffn_up_exps": (4, 64, 2880), "ffn_down_exps": (4, 64, 2880),
            }),
        ],
    ),
    "heads by the layer": Kind(
        "deci", _keys(80, 8, 8) | {"attention.head_count": [64] * 80, "attention.head_count_kv": [8] * 80,
                                   "feed_forward_length": [512] * 80},
        _ENDS, [(range(80), _ATTENTION | _DENSE)],
    ),
    "two tables of embeddings": Kind(
        "gemma3n", _keys(30, 8, 2, attention__sliding_window=512, embedding_length_per_layer_input=256),
        {"token_embd.weight": (64, 512), "per_layer_token_embd.weight": (64, 512), "output_norm.weight": (512,)},
        [(range(30), _ATTENTION | _DENSE | {"laurel_l": (64, 512), "inp_gate": (256, 512)})],
    ),
    "what is left alone": Kind(
        "llama", _keys(2, 4, 4),
        _ENDS | {
            f"{name}.weight": (64, 512)
            for name in (
                "position_embd", "token_types", "v.position_embd", "v.patch_embd", "v.patch_embd.1", "mm.patch_merger",
                "sam.pos_embd", "sam.neck.0", "sam.net_2", "v.blk.0.rel_pos_h", "a.rvq.codebook", "mm.a.code_embd",
                "per_layer_model_proj", "altup_proj", "altup_unembd_proj", "mm.input_projection", "cls", "cls.output",
            )
        },
        [
            (range(2), _ATTENTION | dict.fromkeys(
                (
                    "ffn_gate_inp", "ffn_gate_tid2eid", "altup_router", "laurel_l", "laurel_r", "ssm_conv1d", "ssm_conv1d_q",
                    "shortconv.conv", "shortconv.in_proj", "indexer.k_proj", "indexer.q_proj", "attn_rel_b", "ssm_in", "ssm_x",
                    "time_mix_first", "time_mix_w0", "time_mix_w1", "time_mix_w2", "time_mix_v0", "time_mix_v1",
                    "time_mix_v2", "time_mix_a0", "time_mix_a1", "time_mix_a2", "time_mix_g1", "time_mix_g2",
                    "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused", "time_mix_key", "time_mix_value",
                    "time_mix_receptance", "time_mix_gate", "time_mix_output", "channel_mix_key", "channel_mix_value",
                    "channel_mix_receptance", "attn_sub_norm", "inp_gate", "proj", "nextn.eh_proj",
                    "nextn.embed_tokens", "nextn.shared_head_head", "attn_gate", "ssm_ba", "ssm_out", "ssm_beta_alpha",
                    "enc.attn_rel_b",
                ),
                (64, 512),
            )),
        ],
    ),
    "rows that nothing divides": Kind(
        "llama", _keys(8, 4, 4), {"token_embd.weight": (64, 100), "output_norm.weight": (100,), "output.weight": (64, 100)},
        [
            (range(8), {"attn_q": (100, 100), "attn_k": (100, 100), "attn_v": (100, 100), "attn_output": (100, 96),
                        "ffn_up": (96, 96), "ffn_gate": (1, 512), "ffn_down": (512, 128)}),
        ],
    ),
}  # fmt: skip
"""Models that are only compared."""


def write(kind: Kind, path: Path) -> Path:
    """Write a model as a sparse file: vectors and routers in F32, everything else in F16."""
    writer = gguf.GGUFWriter(path, kind.architecture)
    for key, value in {f"{kind.architecture}.{key}": value for key, value in kind.keys.items()}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    end = 0
    for name, shape in kind.tensors.items():
        plain = len(shape) == 1 or "_inp." in name
        number = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType.F16
        nbytes = (4 if plain else 2) * prod(shape)
        writer.add_tensor_info(name, shape, np.dtype("f4" if plain else "f2"), nbytes, number)
        end += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        header = file.seek(0, 2)
        file.truncate(-(-header // 32) * 32 + end)
    return path


def ask(
    path: Path,
    mix: str,
    *,
    has_imatrix: bool = False,
    pure: bool = False,
    output_type: int | None = None,
    embedding_type: int | None = None,
    tensor_types: Sequence[tuple[str, int]] = (),
    outfile: Path | None = None,
) -> dict[str, str]:
    """Return the type of every tensor that llama_model_quantize would write, in upper case; types are ggml's numbers.

    With ``outfile`` it does write them.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.dry_run, params.pure = 2, FILE_TYPES[mix], outfile is None, pure
    params.allow_requantize = True
    if output_type is not None:
        params.output_tensor_type = output_type
    if embedding_type is not None:
        params.token_embedding_type = embedding_type
    value = (ctypes.c_float * 1)(1.0)
    entries = (llama_cpp.llama_model_imatrix_data * 2)()
    if has_imatrix:
        entries[0].name, entries[0].data, entries[0].size = b"any", value, 1
        params.imatrix = entries
    overrides = (llama_cpp.llama_model_tensor_override * (len(tensor_types) + 1))()
    for place, (pattern, number) in zip(overrides, tensor_types, strict=False):
        place.pattern, place.type = pattern.encode(), number
    if tensor_types:
        params.tt_overrides = overrides
    with recorded_log() as pieces:
        target = str(outfile or "/dev/null").encode()
        status = llama_cpp.llama_model_quantize(str(path).encode(), target, ctypes.byref(params))
    text = "".join(pieces)
    if status:
        raise ValueError(f"{mix}: llama.cpp refuses {path}: {text[-600:]}")
    return {name: (after or before).upper() for name, before, after in _DONE.findall(text)}


def packed(found: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the types in few words: family -> type -> layers as ranges (empty for what is no layer's)."""
    families: dict[str, dict[str, list[int]]] = {}
    for name, kind in found.items():
        match = re.match(r"blk\.(\d+)\.(.+)", name)
        family, layer = (f"blk.*.{match[2]}", [int(match[1])]) if match else (name, [])
        families.setdefault(family, {}).setdefault(kind, []).extend(layer)
    return {
        family: {kind: ranges(layers) for kind, layers in sorted(kinds.items())}
        for family, kinds in sorted(families.items())
    }


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ``0-7,9``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def record(target: Path) -> None:
    """Write the fixture; what stays F32 (norms, routers) is left out of the answers."""
    models = {}
    for label, kind in RECORDED.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write(kind, Path(folder) / "model.gguf")
            answers: dict[str, Any] = {}
            for mix in FILE_TYPES:
                plain = ask(path, mix)
                answers[mix] = packed({name: kind for name, kind in plain.items() if kind != "F32"})
                weighted = ask(path, mix, has_imatrix=True)
                if weighted != plain:
                    changed = {name: kind for name, kind in weighted.items() if plain[name] != kind}
                    answers[f"{mix} with imatrix"] = packed(changed)
        metadata = {"general.architecture": kind.architecture}
        metadata |= {f"{kind.architecture}.{key}": value for key, value in kind.keys.items()}
        tensors = packed({name: "x".join(map(str, shape)) for name, shape in kind.tensors.items()})
        models[label] = {"metadata": metadata, "tensors": tensors, "types": answers}
    text = json.dumps({"file_types": FILE_TYPES, "models": models}, indent=1)
    # A family's types on one line.
    text = re.sub(
        r"\{\n\s+((?:\"[^\"\n]*\": \"[^\"\n]*\",?\n\s+)+)\}", lambda m: "{" + " ".join(m[1].split()) + "}", text
    )
    target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(__file__).resolve().parents[2] / "fixtures" / "mixes.json")
