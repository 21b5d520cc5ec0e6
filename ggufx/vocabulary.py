"""Tokenizer of a checkpoint as GGUF metadata: tokens, types, merges, special ids, chat template.

Merges and special tokens come from the ``gguf`` package's ``SpecialVocab``. Its ``BpeVocab`` takes every added token for
a control token and demands ids in sequence, which DeepSeek's tokenizer has not, so the token list is built here from
tokenizer.json, as llama.cpp's converter does: unused ids up to the vocabulary size are padded.
"""

from __future__ import annotations

import logging
from typing import Any

from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, ValueType
from ggufx.errors import CheckpointError
from ggufx.typed import read_object

__all__ = ["chat_template", "split_expressions", "tokenizer_keys"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_type


def tokenizer_keys(checkpoint: Checkpoint, pre: str, vocab_len: int) -> dict[str, Value]:
    """Return the ``tokenizer.ggml.*`` keys in the order that llama.cpp's converter writes them.

    Parameters
    ----------
    checkpoint
        Directory with tokenizer.json and tokenizer_config.json.
    pre
        llama.cpp's name of the pre-tokenizer.
    vocab_len
        Rows of the embedding.

    Raises
    ------
    CheckpointError
        The tokenizer is missing, not byte-level BPE, or larger than the embedding.
    """
    tokens, kinds = _tokens(checkpoint, vocab_len)
    special = _special(checkpoint, vocab_len)
    if not special.merges:
        raise CheckpointError(f"{checkpoint.path / 'tokenizer.json'}: has no merges")
    keys = {
        "tokenizer.ggml.model": Value.string("gpt2"),
        "tokenizer.ggml.pre": Value.string(pre),
        "tokenizer.ggml.tokens": Value.array(ValueType.STRING, tokens),
        "tokenizer.ggml.token_type": Value.array(ValueType.INT32, kinds),
        "tokenizer.ggml.merges": Value.array(ValueType.STRING, special.merges),
    }
    names = {"pad": "padding", "unk": "unknown", "sep": "seperator"}  # the GGUF key is spelled so
    for kind, token_id in special.special_token_ids.items():
        keys[f"tokenizer.ggml.{names.get(kind, kind)}_token_id"] = Value.u32(token_id)
    for kind, flag in special.add_special_token.items():
        keys[f"tokenizer.ggml.add_{kind}_token"] = Value.boolean(flag)
    return keys


def split_expressions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the expressions that tokenizer.json splits text with, one after the other; none where it does so otherwise."""
    try:
        stages = read_object(checkpoint.path / "tokenizer.json", constants=False)["pre_tokenizer"]
        found = [stage["pattern"]["Regex"] for stage in stages["pretokenizers"] if stage["type"] == "Split"]
    except (KeyError, TypeError):
        return ()
    # An end of a line may stand in an expression as itself.
    return tuple(str(text).replace("\r", r"\r").replace("\n", r"\n") for text in found)


def chat_template(checkpoint: Checkpoint) -> str | None:
    """Return the checkpoint's chat template, from tokenizer_config.json or chat_template.jinja/.json, or ``None``."""
    template = _special(checkpoint, None).chat_template
    if isinstance(template, list):
        # Several named templates: the default one is what a runtime shows.
        named = {str(entry.get("name")): entry.get("template") for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _special(checkpoint: Checkpoint, vocab_len: int | None) -> Any:
    from gguf import SpecialVocab

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    # gguf passes over damaged files without a word; these raise.
    _ = checkpoint.tokenizer_config, checkpoint.generation_config
    try:
        return SpecialVocab(checkpoint.path, load_merges=vocab_len is not None, n_vocab=vocab_len)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: tokenizer.json and the files beside it cannot be read ({error!r})"
        ) from None


def _tokens(checkpoint: Checkpoint, vocab_len: int) -> tuple[list[str], list[int]]:
    path = checkpoint.path / "tokenizer.json"
    tokenizer = read_object(path, needed="the tokenizer is read from it", constants=False)
    try:
        model = tokenizer["model"]
        kind, vocab = model["type"], model["vocab"]
        added = tokenizer.get("added_tokens") or []
        byte_level = (tokenizer.get("decoder") or {}).get("type") == "ByteLevel" and not model.get("byte_fallback")
        placed = {int(token_id): (token, _NORMAL) for token, token_id in vocab.items()}
        for entry in added:
            text = str(entry["content"])
            if entry.get("special") or _looks_special(text):
                placed[int(entry["id"])] = (text, _CONTROL)
            else:
                placed[int(entry["id"])] = (text.replace("▁", " "), _USER_DEFINED)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error!r})") from None
    if kind != "BPE" or not byte_level:
        raise CheckpointError(f"{path}: the tokenizer is {kind}, expected byte-level BPE")
    beyond = [token_id for token_id in placed if not 0 <= token_id < vocab_len]
    if beyond:
        raise CheckpointError(f"{path}: token id {max(beyond)} is outside the vocabulary of {vocab_len} (vocab_size)")
    tokens, kinds = [], []
    for token_id in range(vocab_len):
        text, token_kind = placed.get(token_id, (f"[PAD{token_id}]", _UNUSED))
        tokens.append(text)
        kinds.append(token_kind)
    return tokens, kinds


def _looks_special(text: str) -> bool:
    """Return whether a token is a control token by its spelling, marked so or not (DeepSeek's are not all marked)."""
    framed = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>") or any(text.startswith(a) and text.endswith(b) for a, b in framed)
