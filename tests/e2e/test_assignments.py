"""``ggufx set``: values from files, the type that a key has, one element of an array, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import ggufx
from ggufx.container import Value, ValueType, encode_header

from .conftest import Run, assert_one_line

Cli = Callable[..., Run]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    keys = {
        "general.architecture": Value.string("llama"),
        "general.name": Value.string("tiny"),
        "general.file_type": Value.u32(1),
        "llama.rope.freq_base": Value.f32(10000),
        "tokenizer.ggml.add_bos_token": Value.boolean(True),
        "tokenizer.ggml.tokens": Value.array(ValueType.STRING, ["a", "b", "c"]),
        "tokenizer.ggml.token_type": Value.array(ValueType.INT32, [1, 1, 1]),
        "tokenizer.ggml.eos_token_id": Value.u32(1),
        "odd[2]": Value.u32(5),
    }
    file = tmp_path / "m.gguf"
    file.write_bytes(encode_header(keys, [], 32))
    return file


def values(path: Path) -> dict[str, object]:
    return {k: v if isinstance(v, int | float | str) else list(v) for k, v in ggufx.open(path).metadata.items()}


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("general.name=Mine", "general.name", "Mine"),
        ("general.name=https://x.y/z", "general.name", "https://x.y/z"),
        ("general.name=string:Mine", "general.name", "Mine"),
        ("general.name=@@home", "general.name", "@home"),
        ("general.file_type=7", "general.file_type", 7),
        ("general.file_type=UINT32:7", "general.file_type", 7),
        ("general.file_type=int:7", "general.file_type", 7),
        ("llama.rope.freq_base=5e5", "llama.rope.freq_base", 500000.0),
        ("llama.rope.freq_base=float:1", "llama.rope.freq_base", 1.0),
        ("tokenizer.ggml.add_bos_token=false", "tokenizer.ggml.add_bos_token", False),
        ("tokenizer.ggml.token_type=[3,1,1]", "tokenizer.ggml.token_type", [3, 1, 1]),
        ("tokenizer.ggml.token_type=arr[int32]:[3,1,1]", "tokenizer.ggml.token_type", [3, 1, 1]),
        ("tokenizer.ggml.token_type[1]=4", "tokenizer.ggml.token_type", [1, 4, 1]),
        ("tokenizer.ggml.token_type[1]=i32:4", "tokenizer.ggml.token_type", [1, 4, 1]),
        ("tokenizer.ggml.tokens[2]=str:<end>", "tokenizer.ggml.tokens", ["a", "b", "<end>"]),
        ("odd[2]=6", "odd[2]", 6),
        ("new.key=u8:3", "new.key", 3),
    ],
)
def test_a_value_takes_the_type_that_its_key_has(text: str, key: str, expected: object, path: Path, cli: Cli) -> None:
    before = ggufx.open(path).metadata.typed()
    assert cli("set", path, text).code == 0
    after = ggufx.open(path).metadata.typed()
    assert values(path)[key] == expected
    if key in before:
        assert (after[key].type, after[key].element) == (before[key].type, before[key].element)


def test_two_elements_of_one_array(path: Path, cli: Cli) -> None:
    run = cli("set", path, "tokenizer.ggml.token_type[0]=3", "tokenizer.ggml.token_type[2]=4")
    assert run.code == 0, run
    assert values(path)["tokenizer.ggml.token_type"] == [3, 1, 4]


@pytest.mark.parametrize("text", ["{{ messages }}\n", "ä\r\nb\n\n", "@x"])
def test_a_text_from_a_file_is_as_it_is(text: str, path: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(text.encode())
    for assignment in (f"tokenizer.chat_template=str:@{tmp_path / 't.jinja'}", f"general.name=@{tmp_path / 't.jinja'}"):
        assert cli("set", path, assignment).code == 0
    assert values(path)["tokenizer.chat_template"] == values(path)["general.name"] == text


def test_an_array_from_a_file_is_json(path: Path, cli: Cli, tmp_path: Path) -> None:
    # Longer than an argument of a command can be.
    (tmp_path / "t.json").write_text(json.dumps([f"token {n}" for n in range(20_000)]))
    assert cli("set", path, f"tokenizer.ggml.tokens=@{tmp_path / 't.json'}").code == 0
    assert values(path)["tokenizer.ggml.tokens"] == [f"token {n}" for n in range(20_000)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("general.file_type=str:hello", ["general.file_type: is UINT32 in the file", "--change-type"]),
        ("general.file_type=u64:1", ["is UINT32 in the file", "not UINT64"]),
        ("general.file_type=hello", ["'hello' is no u32"]),
        ("tokenizer.ggml.token_type=arr[u32]:[1]", ["an array of INT32", "an array of UINT32"]),
        ("tokenizer.ggml.token_type[3]=1", ["has 3 elements, the last one is 2"]),
        ("tokenizer.ggml.token_type[0]=str:x", ["is STRING, the elements of tokenizer.ggml.token_type are INT32"]),
        ("general.name[0]=x", ["general.name is STRING, no array"]),
        ("no.such[0]=1", ["no.such is not in the file"]),
        ("no.such=1", ["expected KEY=TYPE:VALUE"]),
        ("no.such=uint33:1", ["'uint33' is no type"]),
        ("general.name=@/no/such/file", ["/no/such/file is not there", "@@ is an @"]),
        ("general.name=@/dev/zero", ["/dev/zero: is a device"]),
        ("tokenizer.ggml.eos_token_id=99999999", ["is 99999999, but the vocabulary has 3 tokens"]),
        ("tokenizer.ggml.pad_token_id=u32:3", ["is 3, but the vocabulary has 3 tokens"]),
    ],
)
def test_what_is_refused(text: str, words: list[str], path: Path, cli: Cli) -> None:
    before = path.read_bytes()
    assert_one_line(cli("set", path, text), *words)
    assert path.read_bytes() == before


def test_another_type_on_request(path: Path, cli: Cli) -> None:
    assert cli("set", path, "general.file_type=str:hello", "--change-type").code == 0
    assert values(path)["general.file_type"] == "hello"
