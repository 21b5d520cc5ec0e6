"""Files of a checkpoint that are not what their names say: headers, JSON, devices, links, directories."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from ggufx.checkpoint import INDEX_NAME, Checkpoint, read_shard
from ggufx.errors import CheckpointError, GGUFError
from ggufx.hybrid import HybridFile
from ggufx.typed import MAX_JSON_NBYTES, Facts, parse_object, read_object

# Headers, as the safetensors library takes them -----------------------------------------------------------------


def shard(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], end: int, begin: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HEADERS: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    # name: header, bytes of data, and what our error says ("" for none)
    "F4": ({"a": entry("F4", [3, 2], 3)}, 3, ""),
    "F4 of whole bytes in rows of three": ({"a": entry("F4", [2, 3], 3)}, 3, ""),
    "F4 within a byte": ({"a": entry("F4", [3], 1)}, 1, "'a' F4[3] takes 1 bytes and 4 bits"),
    "F4 within a longer one": ({"a": entry("F4", [3], 2)}, 2, "must end with a byte"),
    "F6_E2M3": ({"a": entry("F6_E2M3", [4], 3)}, 3, ""),
    "F6_E3M2": ({"a": entry("F6_E3M2", [2, 4], 6)}, 6, ""),
    "F6 within a byte": ({"a": entry("F6_E3M2", [3], 3)}, 3, "F6_E3M2[3] takes 2 bytes and 2 bits"),
    "C64": ({"a": entry("C64", [2], 16)}, 16, ""),
    "F8_E4M3FNUZ": ({"a": entry("F8_E4M3FNUZ", [2], 2)}, 2, ""),
    "F8_E5M2FNUZ": ({"a": entry("F8_E5M2FNUZ", [2], 2)}, 2, ""),
    "C64 of wrong size": ({"a": entry("C64", [2], 8)}, 8, "takes 16 bytes; its data_offsets give 8 bytes"),
    "blanks around": (b"  " + ONE + b"}  ", 1, ""),
    "more in an entry": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":[1]}}', 1, ""),
    "remarks": (ONE + b',"__metadata__":{"a":"b"}}', 1, ""),
    "no remarks": (ONE + b',"__metadata__":null}', 1, ""),
    "remarks that are no texts": (ONE + b',"__metadata__":{"a":1}}', 1, "__metadata__ of the header is {'a': 1}"),
    "remarks in a list": (ONE + b',"__metadata__":[]}', 1, "__metadata__ of the header is []"),
    "remarks twice": (ONE + b',"__metadata__":{},"__metadata__":{}}', 1, "'__metadata__' occurs twice"),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "'dtype' occurs twice"),
    "UTF-16": (json.dumps({"a": entry("U8", [1], 1)}).encode("utf-16"), 1, "cannot be read as JSON ('utf-8' codec"),
    "UTF-16 without a mark": (json.dumps({"a": entry("U8", [1], 1)}).encode("utf-16-le"), 1, "cannot be read as JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + ONE + b"}", 1, "cannot be read as JSON (Unexpected UTF-8 BOM"),
    "NaN": (ONE[:-1] + b',"x":NaN}}', 1, "NaN is no JSON number"),
    "Infinity": (ONE[:-1] + b',"x":-Infinity}}', 1, "-Infinity is no JSON number"),
    "zeros behind": (ONE + b"}\0\0", 1, "cannot be read as JSON (Extra data"),
    "a control character": (b'{"a\x01":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "Invalid control character"),
    "depth": (ONE[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 1, "nested too deeply"),
    "a hole": ({"a": entry("U8", [1], 2, 1)}, 2, "overlaps or leaves a hole"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_taken_as_the_library_takes_them(case: str, tmp_path: Path) -> None:
    header, nbytes, needed = HEADERS[case]
    path = shard(tmp_path / "m.safetensors", header, bytes(nbytes))
    if not needed:
        theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(path.read_bytes())}
        tensors = read_shard(path, 0)[1]
        assert {t.name: (t.dtype, t.shape) for t in tensors} == theirs
        assert sum(t.nbytes for t in tensors) == nbytes
        return
    with pytest.raises(SafetensorError):
        deserialize(path.read_bytes())
    with pytest.raises(CheckpointError) as caught:
        read_shard(path, 0)
    assert needed in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    """The format forbids it; the library's parser takes the last one, other readers the first."""
    path = shard(tmp_path / "m.safetensors", ONE + b',"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"\0")
    assert deserialize(path.read_bytes())[0][1]["dtype"] == "I8"
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        read_shard(path, 0)


def test_a_dtype_that_nobody_knows_refuses_nothing_else(tmp_path: Path) -> None:
    header = {"a": entry("F8_E3M4", [2, 3], 5), "b": entry("F32", [1], 9, 5)}
    path = shard(tmp_path / "m.safetensors", header, bytes(9))
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in read_shard(path, 0)[1]] == [
        ("a", "F8_E3M4", (2, 3), 5), ("b", "F32", (1,), 4),
    ]  # fmt: skip


# Which files ------------------------------------------------------------------------------------------------------

SMALL = {"a": entry("F32", [1], 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def index(folder: Path, *names: str) -> None:
    weight_map = {f"t{number}" if number else "a": name for number, name in enumerate(names)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def refused(folder: Path) -> str:
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert time.monotonic() - started < 5
    text = str(caught.value)
    assert len(text) < 1000
    assert "\n" not in text
    return text


def test_one_file_beside_an_old_index(folder: Path) -> None:
    """As transformers does: the single file is read, whatever an index of shards that are gone says."""
    shard(folder / "model.safetensors", SMALL, bytes(4))
    index(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    checkpoint = Checkpoint(folder)
    assert [path.name for path in checkpoint.shards] == ["model.safetensors"]
    assert list(checkpoint) == ["a"]
    for number in (1, 2):
        shard(folder / f"model-0000{number}-of-00002.safetensors", {}, b"")
    assert "two sets of weights" in refused(folder)


def test_an_index_of_one_file(folder: Path) -> None:
    shard(folder / "model.safetensors", SMALL, bytes(4))
    index(folder, "model.safetensors")
    assert list(Checkpoint(folder)) == ["a"]


def test_names_that_no_file_has(folder: Path) -> None:
    index(folder, "x" * 300 + ".safetensors")
    assert "1 of 1 shards of the index are not there" in refused(folder)
    index(folder, "a\0b.safetensors")
    assert "are not there" in refused(folder)
    index(folder, "gone.safetensors")
    (folder / "gone.safetensors").symlink_to("nowhere")
    assert "1 of 1 shards of the index are not there" in refused(folder)
    (folder / INDEX_NAME).unlink()
    assert "is a link to nowhere, which is not there; download it" in refused(folder)


def test_a_folder_called_like_a_shard(folder: Path) -> None:
    (folder / "x.safetensors").mkdir()
    assert "x.safetensors: is a directory, expected a regular file" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "x.safetensors"])
def test_pipes_and_devices_are_not_read(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: is a device, a pipe or a socket" in refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name}: is a device, a pipe or a socket" in refused(folder)


def test_the_small_files_of_a_checkpoint_are_read_alike(folder: Path) -> None:
    shard(folder / "m.safetensors", SMALL, bytes(4))
    for name in ("generation_config", "tokenizer_config"):
        os.mkfifo(folder / f"{name}.json")
        with pytest.raises(CheckpointError, match="is a device, a pipe"):
            getattr(Checkpoint(folder), name)
        (folder / f"{name}.json").unlink()
        (folder / f"{name}.json").symlink_to("gone")
        with pytest.raises(CheckpointError, match="is a link to gone"):
            getattr(Checkpoint(folder), name)
        (folder / f"{name}.json").unlink()
        assert getattr(Checkpoint(folder), name) == {}
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    packed = {"b.ggml_type": entry("I64", [1], 8), "b.weight": entry("U8", [1], 9, 8)}
    shard(folder / "m.safetensors", packed, bytes(9))
    with pytest.raises(GGUFError, match="is a device, a pipe"):
        HybridFile(folder, None)


# JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (b"", "cannot be read as JSON"),
        (b"[]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType, expected an object"),
        (b"\xff{}", "cannot be read as JSON ('utf-8'"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON (Unexpected UTF-8 BOM"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read as JSON (Exceeds the limit"),
    ],
)
def test_json_that_is_none(text: bytes, needed: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert needed in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_of_any_size_is_not_taken_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_NBYTES + 1)
    with pytest.raises(CheckpointError, match=f"more than {MAX_JSON_NBYTES} bytes"):
        read_object(path)
    assert read_object(tmp_path / "none.json") == {}
    with pytest.raises(CheckpointError, match=r"none.json: missing; it is the model's"):
        read_object(tmp_path / "none.json", needed="it is the model's")


def test_constants_are_numbers_only_where_transformers_writes_them() -> None:
    assert parse_object(b'{"a": [NaN, -Infinity]}', "f")["a"][1] == float("-inf")
    with pytest.raises(CheckpointError, match=r"f: cannot be read as JSON .NaN is no JSON number"):
        parse_object(b'{"a": NaN}', "f", constants=False)


def test_facts() -> None:
    facts = Facts(
        "F", {"n": 3, "x": 0.5, "t": "a", "f": False, "l": [1, 2], "o": {"n": None}, "big": 10**400, "null": None}
    )
    assert (facts.integer("n"), facts.number("n"), facts.number("x"), facts.text("t"), facts.flag("f")) == (
        3,
        3.0,
        0.5,
        "a",
        False,
    )
    assert (facts.integers("l"), facts.numbers("l"), facts.choice("t", ("a", "b"))) == ([1, 2], [1.0, 2.0], "a")
    assert (facts.integer("null", 7), facts.text("gone", None), facts.flag("gone", True)) == (7, None, True)
    assert "null" not in facts
    assert "f" in facts
    for read, needed in (
        (lambda: facts.integer("f"), "F: f is False, expected an integer from 0 to 4294967295; correct the file"),
        (lambda: facts.integer("n", least=4), "F: n is 3, expected an integer from 4"),
        (lambda: facts.integer("null"), "F: null is null, expected an integer"),
        (lambda: facts.number("f", 1.0), "F: f is False, expected a number that float32 can hold"),
        (lambda: facts.number("big"), f"F: big is 1{'0' * 59}..., expected a number"),
        (lambda: facts.flag("n", None), "F: n is 3, expected true or false"),
        (lambda: facts.text("gone"), "F: gone is missing, expected a text"),
        (lambda: facts.texts("l"), "F: l is [1, 2], expected an array of texts"),
        (lambda: facts.integers("o"), "F: o is {'n': None}, expected an array of integers"),
        (lambda: facts.choice("t", ("b", "c")), "F: t is 'a', expected b or c"),
        (lambda: facts.object("l"), "F: l is [1, 2], expected an object"),
        (lambda: facts.object("o").integer("n"), "F: o.n is null, expected an integer"),
        (lambda: facts.expect("x", 1.0, "who says"), "F: x is 0.5, expected 1.0: who says"),
        (lambda: facts.expect("n", True, "who says"), "F: n is 3, expected True: who says"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert str(caught.value).startswith(needed)
    facts.expect("gone", 1, "nobody")
    facts.expect("n", 3.0, "nobody")
