"""ggufx writes for llama.cpp what llama.cpp's own converter writes: names, order, types, bytes, metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import need

need("torch")
need("transformers")
gguf = need("gguf")

from make_tiny_v4 import make_tiny_v4  # noqa: E402

from .commands import convert, upstream_convert  # noqa: E402

pytestmark = pytest.mark.interop

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:90]}... ({len(text)} characters)"


def metadata(reader) -> dict[str, tuple[list[str], object]]:
    """Key -> names of the types and value, in the file's order; without the counts that differ with the rest."""
    return {
        key: ([kind.name for kind in entry.types], entry.contents())
        for key, entry in reader.fields.items()
        if key not in ("GGUF.tensor_count", "GGUF.kv_count")
    }


def first_disorder(expected: list[str], found: list[str]) -> list[str]:
    """Where the common part of two lists of names is first in another order."""
    common = set(expected) & set(found)
    pairs = zip((e for e in expected if e in common), (f for f in found if f in common), strict=True)
    return next(([f"order: {f} at the place of {e}"] for e, f in pairs if e != f), [])


def differences(expected: Path, found: Path, *, ignored: frozenset[str] = frozenset()) -> list[str]:
    """Everything in which two GGUF files differ, but the metadata keys of `ignored`."""
    left, right = gguf.GGUFReader(expected), gguf.GGUFReader(found)
    report: list[str] = []
    keys, other_keys = (
        {key: value for key, value in metadata(reader).items() if key not in ignored} for reader in (left, right)
    )
    report += [f"key {key} is missing ({shorten(keys[key])})" for key in keys.keys() - other_keys.keys()]
    report += [f"key {key} is too much ({shorten(other_keys[key])})" for key in other_keys.keys() - keys.keys()]
    for key in keys.keys() & other_keys.keys():
        if keys[key] != other_keys[key]:
            report.append(f"key {key}: {shorten(other_keys[key])} instead of {shorten(keys[key])}")
    report += first_disorder(list(keys), list(other_keys))
    tensors, others = ({tensor.name: tensor for tensor in reader.tensors} for reader in (left, right))
    report += [f"tensor {name} is missing" for name in tensors.keys() - others.keys()]
    report += [f"tensor {name} is too much" for name in others.keys() - tensors.keys()]
    report += first_disorder(list(tensors), list(others))
    for name in tensors.keys() & others.keys():
        mine, theirs = others[name], tensors[name]
        if (mine.tensor_type, mine.shape.tolist()) != (theirs.tensor_type, theirs.shape.tolist()):
            kinds = [f"{t.tensor_type.name} {t.shape.tolist()}" for t in (mine, theirs)]
            report.append(f"tensor {name}: {kinds[0]} instead of {kinds[1]}")
        elif mine.data.tobytes() != theirs.data.tobytes():
            unequal = np.count_nonzero(
                np.frombuffer(mine.data.tobytes(), np.uint8) != np.frombuffer(theirs.data.tobytes(), np.uint8)
            )
            report.append(f"tensor {name}: {unequal} of {mine.n_bytes} bytes differ")
    if left.alignment != right.alignment:
        report.append(f"alignment {right.alignment} instead of {left.alignment}")
    return sorted(report)


@pytest.mark.parametrize("arguments", [(), ("--mtp",)], ids=["main", "mtp"])
@pytest.mark.parametrize("dense", ["q8_0", "bf16"])
def test_same_file(llama_cpp_source, checkpoint, tmp_path, dense, arguments):
    expected = upstream_convert(llama_cpp_source, dense, checkpoint, tmp_path / "upstream.gguf", *arguments)
    own = arguments if dense == "q8_0" else ("--dense", dense, *arguments)
    found = convert(checkpoint, tmp_path / "ggufx.gguf", *own)
    # A checkpoint without a chat template gets one of llama.cpp's source tree from its converter.
    assert differences(expected, found, ignored=frozenset({"tokenizer.chat_template"})) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"chat_template": TEMPLATE},
        {"variant": "pro-like", "experts": 13, "moe": 96, "merge_pairs": True, "shards": 2},
        {"hash_layers": 0, "mtp_layers": 0, "omit_expert_dtype": True, "shards": 1},
    ],
    ids=["template", "pro-like", "score-routed"],
)
def test_same_file_of_other_checkpoints(llama_cpp_source, tmp_path, changes):
    checkpoint = tmp_path / "Tiny-DeepSeek-V4"
    make_tiny_v4(checkpoint, **changes)
    expected = upstream_convert(llama_cpp_source, "q8_0", checkpoint, tmp_path / "upstream.gguf")
    found = convert(checkpoint, tmp_path / "ggufx.gguf")
    ignored = frozenset() if "chat_template" in changes else frozenset({"tokenizer.chat_template"})
    assert differences(expected, found, ignored=ignored) == []
