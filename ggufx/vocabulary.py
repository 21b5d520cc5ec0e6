"""Tokenizer of a checkpoint as GGUF metadata: tokens, types, merges, special ids, chat templates.

Merges and special tokens come from the ``gguf`` package's ``SpecialVocab``. Its ``BpeVocab`` takes every added token for
a control token and demands ids in sequence, which DeepSeek's tokenizer has not, so the token list is built here from
tokenizer.json, as llama.cpp's converter does: unused ids up to the vocabulary size are padded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, ValueType
from ggufx.errors import CheckpointError
from ggufx.typed import Facts, open_regular, read_object, shown

__all__ = [
    "DEFAULT_TEMPLATE",
    "chat_templates",
    "is_named_template",
    "split_expressions",
    "template_keys",
    "tokenizer_keys",
]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_type

TOKENIZER_NAME: Final = "tokenizer.json"
DEFAULT_TEMPLATE: Final = "default"
"""Name of the chat template that a runtime takes when none is asked for."""
_MAX_TEMPLATE_NBYTES: Final = 1 << 20
_MAX_VOCAB_LEN: Final = 1 << 31


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
        The tokenizer is missing, not byte-level BPE, larger than the embedding, or gives two tokens one id.
    """
    path = checkpoint.path / TOKENIZER_NAME
    vocabulary = _Vocabulary(path, _read(path))
    tokens, kinds = vocabulary.tokens(vocab_len)
    special = _special(checkpoint, vocabulary, vocab_len)
    if not special.merges:
        raise CheckpointError(f"{path}: has no merges")
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
        stages = _read(checkpoint.path / TOKENIZER_NAME)["pre_tokenizer"]
        found = [stage["pattern"]["Regex"] for stage in stages["pretokenizers"] if stage["type"] == "Split"]
    except (KeyError, TypeError):
        return ()
    # An end of a line may stand in an expression as itself.
    return tuple(str(text).replace("\r", r"\r").replace("\n", r"\n") for text in found)


@lru_cache(maxsize=1)
def _parsed(path: Path, state: tuple[int, int]) -> dict[str, Any]:
    return read_object(path, constants=False)


def _read(path: Path) -> dict[str, Any]:
    """Return tokenizer.json, of some ten megabytes: parsed once while it does not change."""
    try:
        status = path.stat()
    except OSError:
        raise CheckpointError(f"{path}: missing; the tokenizer is read from it") from None
    return _parsed(path, (status.st_size, status.st_mtime_ns))


class _Vocabulary:
    """Tokens of a tokenizer.json under the ids that the tokenizers library gives them."""

    def __init__(self, path: Path, tokenizer: Mapping[str, Any]) -> None:
        self.path = path
        facts = Facts(path, tokenizer)
        model = facts.object("model")
        decoder = facts.object("decoder", None)
        kind = model.text("type")
        byte_level = decoder is not None and decoder.text("type", None) == "ByteLevel"
        if kind != "BPE" or not byte_level or model.flag("byte_fallback", False):
            raise CheckpointError(f"{path}: the tokenizer is {shown(kind)}, expected byte-level BPE")
        self._check_merges(model.find("merges"))
        vocab = model.object("vocab")
        self.vocab: dict[str, int] = {text: vocab.integer(text, most=_MAX_VOCAB_LEN) for text in model.find("vocab")}
        self._highest = -1
        self.added: dict[str, tuple[int, bool]] = {}
        """Text of an added token -> its id, and whether it is a control token."""
        added = facts.find("added_tokens")
        if added is not None and not isinstance(added, list):
            raise facts.wrong("added_tokens", "an array")
        for number, entry in enumerate(added or ()):
            if not isinstance(entry, dict):
                raise CheckpointError(f"{path}: added_tokens[{number}] is {shown(entry)}, expected an object")
            self._add(facts.within(f"added_tokens[{number}].", entry))

    def _check_merges(self, merges: Any) -> None:
        """Merges are texts of two parts, or pairs of texts, all of one kind; the gguf package looks at the first alone."""
        sound = merges is None or (
            isinstance(merges, list)
            and (
                all(isinstance(merge, str) for merge in merges)
                or all(
                    isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)
                    for merge in merges
                )
            )
        )
        if not sound:
            raise CheckpointError(f"{self.path}: model.merges is not an array of texts, or of pairs of texts")

    def _add(self, entry: Facts) -> None:
        text, special = entry.text("content"), entry.flag("special", False)
        if not text or text in self.added:
            return
        # The library takes the id of a token of the model, and else counts on, whatever the file says: AddedVocabulary's
        # add_tokens of the tokenizers library, 0.23.
        token_id = self.vocab.get(text)
        if token_id is None:
            token_id = max(self._highest + 1, len(self.vocab))
        self._highest = max(self._highest, token_id)
        self.added[text] = token_id, special or _looks_special(text)

    def tokens(self, vocab_len: int) -> tuple[list[str], list[int]]:
        """Return texts and llama.cpp's kinds of ``vocab_len`` tokens; raises CheckpointError for two with one id."""
        placed: dict[int, tuple[str, int]] = {}
        owners: dict[int, str] = {}
        for text, token_id in [*self.vocab.items(), *((text, number) for text, (number, _) in self.added.items())]:
            if owners.setdefault(token_id, text) != text:
                raise CheckpointError(
                    f"{self.path}: tokens {shown(owners[token_id])} and {shown(text)} have one id, {token_id}; correct the "
                    "file, or download it again"
                )
            placed[token_id] = text, _NORMAL
        for text, (token_id, control) in self.added.items():
            placed[token_id] = (text, _CONTROL) if control else (text.replace("▁", " "), _USER_DEFINED)
        beyond = max(placed, default=0)
        if beyond >= vocab_len:
            raise CheckpointError(
                f"{self.path}: token id {beyond} is outside the vocabulary of {vocab_len} (vocab_size)"
            )
        full = [placed.get(token_id, (f"[PAD{token_id}]", _UNUSED)) for token_id in range(vocab_len)]
        return [text for text, _ in full], [kind for _, kind in full]


def _special(checkpoint: Checkpoint, vocabulary: _Vocabulary, vocab_len: int) -> Any:
    from gguf import SpecialVocab

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    # gguf passes over damaged files without a word; these raise.
    config = checkpoint.tokenizer_config
    _ = checkpoint.generation_config
    try:
        special = SpecialVocab(checkpoint.path, load_merges=True, n_vocab=vocab_len)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: tokenizer.json and the files beside it cannot be read ({error!r})"
        ) from None
    for kind in special.special_token_ids:
        # gguf takes the ids of added tokens from the file, where the library's may differ.
        entry = config.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in vocabulary.added:
            special.special_token_ids[kind] = vocabulary.added[text][0]
    return special


def _looks_special(text: str) -> bool:
    """Return whether a token is a control token by its spelling, marked so or not (DeepSeek's are not all marked)."""
    framed = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>") or any(text.startswith(a) and text.endswith(b) for a, b in framed)


# Chat templates -------------------------------------------------------------------------------------------------


def chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """Return a checkpoint's chat templates by name; the one without a name is called :data:`DEFAULT_TEMPLATE`.

    They are looked for in tokenizer_config.json, in chat_template.jinja with additional_chat_templates/*.jinja, and in
    chat_template.json, in this order, as llama.cpp's converter does. An empty template is none.

    Raises
    ------
    CheckpointError
        A template is no text, or a file is too large for one.
    """
    for name, read in (
        ("tokenizer_config.json", lambda: checkpoint.tokenizer_config),
        ("chat_template.jinja", lambda: {"chat_template": _of_files(checkpoint.path)}),
        ("chat_template.json", lambda: read_object(checkpoint.path / "chat_template.json")),
    ):
        facts = Facts(checkpoint.path / name, read())
        found = facts.find("chat_template")
        if found is None:
            continue
        if not isinstance(found, list):
            found = [{"name": DEFAULT_TEMPLATE, "template": facts.text("chat_template")}]
        templates: dict[str, str] = {}
        for number, entry in enumerate(found):
            if not isinstance(entry, dict):
                raise facts.wrong("chat_template", "a text, or an array of objects with name and template")
            named = facts.within(f"chat_template[{number}].", entry)
            templates[named.text("name")] = named.text("template")
        return {name: text for name, text in templates.items() if text and name}
    return {}


def _of_files(folder: Path) -> list[dict[str, str]] | None:
    plain = _template(folder / "chat_template.jinja")
    if plain is None:
        return None
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return [{"name": DEFAULT_TEMPLATE, "template": plain}] + [
        {"name": path.stem, "template": _template(path) or ""} for path in others
    ]


def _template(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_TEMPLATE_NBYTES + 1)
        if len(data) > _MAX_TEMPLATE_NBYTES:
            raise CheckpointError(f"{path}: has more than {_MAX_TEMPLATE_NBYTES} bytes, which no chat template has")
        # As text files are read: universal newlines.
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def template_keys(templates: Mapping[str, str]) -> dict[str, Value]:
    """Return the keys of chat templates by name, as llama.cpp's converter writes them.

    The default one is ``tokenizer.chat_template``; each other is ``tokenizer.chat_template.NAME``, and
    ``tokenizer.chat_templates`` lists their names, of letters, digits and underscores.
    """
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name != DEFAULT_TEMPLATE}
    keys = {f"tokenizer.chat_template.{name}": Value.string(text) for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = Value.array(ValueType.STRING, sorted(named))
    if DEFAULT_TEMPLATE in templates:
        keys["tokenizer.chat_template"] = Value.string(templates[DEFAULT_TEMPLATE])
    return keys


def is_named_template(key: str) -> bool:
    """Return whether a key is one of those by which :func:`template_keys` gives chat templates other than the default."""
    return key == "tokenizer.chat_templates" or key.startswith("tokenizer.chat_template.")
