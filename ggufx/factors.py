"""Factors beside weights: a tensor ``NAME.scale`` of float32 by which programs multiply the products of ``NAME.weight``.

NVFP4 needs one. Its block scales are E4M3 numbers, so that values of less than 2^-10 would all become zeros. NVIDIA's
checkpoints have a second level of scales for that, which llama.cpp's converter writes as such a tensor, [1] or one for each
expert.

llama.cpp's loader reads these tensors for every architecture, but not every graph multiplies by them: a file would load
and be wrong. :data:`APPLIED` has the weights for which they do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

__all__ = ["APPLIED", "NVFP4_LARGEST", "factor_lost", "factor_of", "is_applied", "is_loaded", "name_of"]

NVFP4_LARGEST: Final = 2688.0
"""The largest value of NVFP4, 448 times 6: with the factor ``largest / 2688`` a tensor uses all of the scales' range."""

# What llama.cpp's loader looks for (llama-model.cpp), whatever type and architecture; the head's only where it is NVFP4.
_LOADED = re.compile(
    r"blk\.\d+\.((?P<a>attn_(q|k|v|output|qkv))|(?P<f>ffn_(gate|down|up))|(?P<s>ffn_(gate|down|up)_shexp)"
    r"|(?P<e>ffn_(gate|down|up)_exps)|(?P<l>attn_gate|ssm_(in|out|alpha|beta))|nextn\.(eh_proj|shared_head_head))\.weight"
)
_HEAD: Final = "output.weight"

# Letters: a attention, f feed-forward, e routed experts, s shared experts, l linear attention, h head.
_GRAPHS: Final = {
    "ah": (
        "afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bloom chameleon chatglm codeshell command-r dbrx "
        "deepseek dots1 dream ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 glm4 "
        "glm4moe gpt-oss gpt2 gptneox granite granite_swa granitehybrid grok grovemoe hunyuan-moe hunyuan_vl internlm2 "
        "jais jais2 jamba lfm2 llada llada-moe llama4 maincoder minimax-m3 mpt muse-glimmer nemotron olmo orion "
        "paddleocr pangu-embedded phi2 phi3 plamo pockettts qwen qwen2 qwen2moe qwen2vl qwen3vl qwen3vlmoe refact rnd1 "
        "seed_oss smallthinker smollm3 stablelm starcoder starcoder2 t5 xverse"
    ),
    "h": (
        "arwkv7 cogvlm deci deepseek2 gemma3n graniteswitch mamba mimo2 minicpm3 minimax-01 minimax-m2 olmo2 olmoe "
        "openelm plamo2 plamo3 plm rwkv6 rwkv6qwen2 rwkv7 step35"
    ),
    "a": "bert eurobert gemma-embedding laguna modern-bert neo-bert talkie",
    "afh": "cohere2 nanbeige qwen3",
    "afeh": "llama mistral3",
    "aeh": "mellum qwen3moe",
    "fesh": "deepseek32 glm-dsa",
    "fh": "deepseek4 dflash",
    "afesh": "hy_v3 nemotron_h",
    "feh": "gemma4",
    "afes": "cohere2moe",
    "fes": "dots3note",
    "af": "bitnet",
    "aesh": "nemotron_h_moe",
    "esh": "qwen3next",
    "aflh": "qwen35",
    "aeslh": "qwen35moe",
}
APPLIED: Final[Mapping[str, str]] = {name: groups for groups, names in _GRAPHS.items() for name in names.split()}
"""``general.architecture`` -> letters of the weights whose factors llama.cpp's graph multiplies by in every place where it uses
the weight. Read off ``src/models`` of 3af988fab (2026-08-21)."""


def name_of(weight: str) -> str:
    """Return what the factor beside a weight is called."""
    return weight.removesuffix("weight") + "scale"


def is_loaded(weight: str, kind: str) -> bool:
    """Return whether llama.cpp's loader looks for a factor beside a weight of type ``kind``."""
    return (weight == _HEAD and kind == "NVFP4") or _LOADED.fullmatch(weight) is not None


def is_applied(weight: str, kind: str, target: str, architecture: object) -> bool:
    """Return whether a factor beside a weight of type ``kind`` has its effect in the programs of the dialect ``target``."""
    groups = APPLIED.get(str(architecture), "") if target == "llama.cpp" else ""
    if weight == _HEAD:
        return kind == "NVFP4" and "h" in groups
    found = _LOADED.fullmatch(weight)
    return found is not None and any(found[group] is not None for group in "afesl" if group in groups)


def factor_lost(weight: str, kind: str, target: str, architecture: object) -> str:
    """Return why the target's programs would not apply the factor beside a weight of type ``kind``; empty where they do."""
    # As in llama-load-tensors.cpp there, which reads .scale for BitNet's architectures.
    if target == "ik_llama.cpp" and not str(architecture).startswith("bitnet"):
        what = "ik_llama.cpp reads such factors for BitNet only"
    elif weight == _HEAD and kind != "NVFP4":
        what = f"llama.cpp reads the head's only where the head is NVFP4, here it would be {kind}"
    else:
        return ""
    return f"tensor {weight!r} has a factor in {name_of(weight)}, and {what}: its values would be wrong there"


def factor_of(largest: float) -> np.float32:
    """Return the factor of a matrix whose largest magnitude is ``largest``; 1 for a matrix of zeros."""
    found = np.float32(largest / NVFP4_LARGEST)
    # A subnormal factor would lose bits of every value.
    return np.float32(1) if not largest else max(found, np.finfo(np.float32).tiny)
