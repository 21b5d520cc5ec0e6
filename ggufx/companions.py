"""The small files beside a checkpoint's weights, rebuilt from GGUF metadata: tokenizer, generation config, model card.

What :mod:`ggufx.vocabulary` and :mod:`ggufx.convert` read out of them is put back, so that converting again gives the same
keys. What a GGUF does not hold (training remarks, the card's text, other tokenizer settings) is not made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ggufx.typed import Facts

__all__ = ["SAMPLING", "check_sampling", "check_special_ids", "generation_config", "model_card", "tokenizer_files"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_type

PRE_TOKENIZERS: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
    ("joyai-llm", "deepseek-v3"),
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
)
"""By llama.cpp's name of a pre-tokenizer, the expressions that it splits text with, one after the other."""

_SPECIAL: Final = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "seperator": "sep",
    "padding": "pad",
    "cls": "cls",
    "mask": "mask",
}
SAMPLING: Final = {
    "sequence": "sequence", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold", "temp": "temperature", "penalty_last_n": "penalty_last_n",
    "penalty_repeat": "penalty_repeat", "mirostat": "mirostat", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}  # fmt: skip
_INTEGERS: Final = ("top_k", "penalty_last_n", "mirostat")
"""Sampling parameters that are integers; ``sequence`` is a text, and the others are float32."""
# general.* and the model card's name for it, as the gguf package reads cards.
_CARD: Final = {
    "name": "model_name", "author": "model_author", "version": "model_version", "organization": "model_organization",
    "description": "model_description", "finetune": "model_finetune", "basename": "model_basename",
    "size_label": "model_size_label", "license": "license", "license.name": "license_name", "license.link": "license_link",
    "tags": "tags", "languages": "language",
}  # fmt: skip
_LISTS: Final = ("tags", "languages")


def tokenizer_files(facts: Facts, builtin_template: str) -> tuple[dict[str, Any], list[str]]:
    """Return the content of tokenizer.json and tokenizer_config.json by file name, and what could not be rebuilt.

    Parameters
    ----------
    facts
        Metadata of the GGUF.
    builtin_template
        The chat template that a conversion writes when a checkpoint has none: it is not put into one.
    """
    model, pre = (facts.text(f"tokenizer.ggml.{name}", None) for name in ("model", "pre"))
    if model != "gpt2" or pre is None or pre not in PRE_TOKENIZERS:
        return {}, [
            f"no tokenizer is written: only gpt2 with {', '.join(PRE_TOKENIZERS)} can be rebuilt, this is {model}, {pre}"
        ]
    tokens, merges = (facts.texts(f"tokenizer.ggml.{name}", None) for name in ("tokens", "merges"))
    kinds = facts.integers("tokenizer.ggml.token_type", None)
    if tokens is None or merges is None or kinds is None or len(kinds) != len(tokens):
        return {}, [
            "no tokenizer is written: tokenizer.ggml.tokens, token_type and merges are not there, or are not a type for each "
            "token"
        ]
    vocab: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    notes = []
    for number, (text, token_kind) in enumerate(zip(tokens, kinds, strict=True)):
        if token_kind == _UNUSED:
            if text != f"[PAD{number}]":
                notes.append(f"token {number} {text!r} is marked unused; it is left out of tokenizer.json")
            continue
        # Tokens with a meaning of their own stand in both lists: their ids are those of the vocabulary then.
        if token_kind == _NORMAL and text in vocab:
            notes.append(f"token {number} {text!r} occurs twice; the second is left out of tokenizer.json")
        vocab.setdefault(text, number)
        if token_kind in (_CONTROL, _USER_DEFINED):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added.append({"id": number, "content": text, **flags, "special": token_kind == _CONTROL})
    splits = [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in PRE_TOKENIZERS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
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
            "vocab": vocab,
            "merges": list(merges),
        },
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    texts = {entry["id"]: entry["content"] for entry in added}
    for name, kind in _SPECIAL.items():
        token = _token_id(facts, name)
        if token in texts:
            config[f"{kind}_token"] = texts[token]
        elif token is not None:
            notes.append(f"the {kind} token, {token}, is no added token; only config.json names it")
        flag = facts.flag(f"tokenizer.ggml.add_{name}_token", None)
        if flag is not None:
            config[f"add_{kind}_token"] = flag
    template = facts.text("tokenizer.chat_template", None)
    named = [
        {"name": name, "template": facts.text(f"tokenizer.chat_template.{name}")}
        for name in facts.texts("tokenizer.chat_templates", ())
    ]
    if template == builtin_template:
        template = None
    if named:
        default = [] if template is None else [{"name": "default", "template": template}]
        config["chat_template"] = default + named
    elif template is not None:
        config["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}, notes


def special_ids(facts: Facts) -> dict[str, int]:
    """Return config.json's ``bos_token_id`` and the like, from a GGUF's metadata."""
    found = {kind: _token_id(facts, name) for name, kind in _SPECIAL.items()}
    return {f"{kind}_token_id": number for kind, number in found.items() if number is not None}


def generation_config(facts: Facts) -> dict[str, Any]:
    """Return generation_config.json: the sampling parameters and special tokens of a GGUF's metadata."""
    config: dict[str, Any] = {key: number for key, number in special_ids(facts).items() if key[:3] in ("bos", "eos")}
    for name, key in SAMPLING.items():
        value = _sampling(facts, name, f"general.sampling.{name}")
        if isinstance(value, float) and value == np.float32(value):
            value = float(str(np.float32(value)))  # the shortest number that is the same float32
        if value is not None:
            config[key] = value
    return config


def check_sampling(config: Facts) -> None:
    """Raise the error of a sampling parameter in generation_config.json that is none of its type."""
    for name, key in SAMPLING.items():
        _sampling(config, name, key)


def check_special_ids(config: Facts) -> None:
    """Raise the error of a special token's id in config.json that is no id, nor a list of ids; gguf passes over them."""
    for kind in _SPECIAL.values():
        key = f"{kind}_token_id"
        if isinstance(config.find(key), list):
            config.integers(key)
        else:
            config.integer(key, None)


def _sampling(facts: Facts, name: str, key: str) -> str | int | float | None:
    if name == "sequence":
        return facts.text(key, None)
    return facts.integer(key, None, least=-(2**31), most=2**31 - 1) if name in _INTEGERS else facts.number(key, None)


def model_card(facts: Facts) -> str:
    """Return README.md: the front matter that a conversion reads its ``general.*`` keys from."""
    lines = ["---"]
    for name, key in _CARD.items():
        own = f"general.{name}"
        value = facts.texts(own, None) if name in _LISTS else facts.text(own, None)
        if value is not None:
            # JSON is YAML. Not escaped: YAML reads the halves of an escaped surrogate pair as two characters.
            content = value if isinstance(value, str) else list(value)
            lines.append(f"{key}: {json.dumps(content, ensure_ascii=False)}")
    return "\n".join([*lines, "---", "", "Exported from a GGUF by ggufx.", ""])


def _token_id(facts: Facts, name: str) -> int | None:
    return facts.integer(f"tokenizer.ggml.{name}_token_id", None)
