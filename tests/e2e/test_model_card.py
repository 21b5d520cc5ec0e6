"""What a checkpoint says of itself: cards of any kind, names that cannot leave a folder, Hugging Face's cache."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import ggufx
from ggufx.checkpoint import Checkpoint
from ggufx.convert import plan_convert
from ggufx.errors import CheckpointError
from ggufx.model_card import file_name, read_card

from .conftest import Run, assert_one_line
from .oracle import Source

Cli = Callable[..., Run]


def card(folder: Path, front_matter: str) -> Path:
    path = folder / "README.md"
    path.write_text(f"---\n{front_matter}\n---\nText.\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["model_finetune", "model_version", "model_size_label", "model_basename", "model_name"])
@pytest.mark.parametrize(
    "word", ["x/../../../evil", "..", "/etc/x", "a\\b", "a\x1b[31m\nb", ".hidden", "-o", "x" * 400]
)
def test_no_word_of_a_card_leaves_the_folder(editable: Source, key: str, word: str) -> None:
    card(editable.path, f"{key}: {ascii(word) if chr(27) not in word else repr(word)[1:-1].join(chr(34) * 2)}")
    (path,) = (file.path for file in plan_convert(editable.path, target="llama.cpp").files)
    assert path.parent == editable.path
    assert path.name.isprintable()
    assert not path.name.startswith((".", "-"))
    assert "\\" not in path.name
    assert len(path.name.encode()) <= 210
    assert path.suffix == ".gguf"


def test_the_command_writes_into_the_folder_that_it_names(editable: Source, cli: Cli) -> None:
    card(editable.path, 'model_finetune: "x/../../../evil"')
    before = {path for path in editable.path.parent.rglob("*") if editable.path not in path.parents}
    assert cli("convert", editable.path, "--target", "llama.cpp").code == 0
    assert {path for path in editable.path.parent.rglob("*") if editable.path not in path.parents} == before
    (made,) = editable.path.glob("*.gguf")
    # The card's own words are still what the metadata says.
    assert ggufx.open(made).metadata["general.finetune"] == "x/../../../evil"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("DeepSeek V4", "16x12M", None, "v2", "MXFP4_MOE"), "DeepSeek-V4-16x12M-v2-MXFP4_MOE"),
        (("a/b", None), "a-b"),
        (("..", None), "ggml-model"),
        (("Größe 7B",), "Größe-7B"),
        (("é" * 200,), "é" * 100),
        (("a\ud800b",), "a-b"),
    ],
)
def test_names_of_files_are_one_part_of_a_path(words: tuple[str | None, ...], name: str) -> None:
    assert file_name(*words) == name


@pytest.mark.parametrize(
    ("line", "entries"),
    [
        ("license: 2020-01-01", {"license": "2020-01-01"}),
        ("model_version: 1.5", {"model_version": "1.5"}),
        ("model_name: 3", {"model_name": "3"}),
        ("license:", {}),
        ("tags: x", {"tags": ["x"]}),
        ("tags: [a, 2, null]", {"tags": ["a", "2"]}),
        ("language:\n- no\n- en", {"language": ["no", "en"]}),
        ("base_model: [a/b, {name: c, version: 1}]", {"base_model": ["a/b", {"name": "c", "version": "1"}]}),
        ("other: [[[1]]]", {}),
        ("- a list", {}),
    ],
)
def test_scalars_of_a_card_are_texts(tmp_path: Path, line: str, entries: dict[str, object]) -> None:
    assert read_card(card(tmp_path, line)) == entries


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model_name: [1]", ["model_name is [1]", "expected a text"]),
        ("license: [[a]]", ["license is [['a']]"]),
        ("model_description: [x]", ["model_description is ['x']"]),
        ("license_name: {a: b}", ["license_name is {'a': 'b'}"]),
        ("tags: [[a]]", ["tags is [['a']]", "a list of texts"]),
        ("language: {a: 1}", ["language is {'a': 1}"]),
        ("base_model: [[x]]", ["base_model is [['x']]", "mappings of texts"]),
        ("datasets: [{a: [1]}]", ["datasets is [{'a': [1]}]"]),
        ("license: 2020-13-01", ["month must be in 1..12"]),
        ("license: [", ["cannot be read", "expected the node content"]),
        ("a: " + "[" * 500_000, ["nested more than 100 levels deep"]),
        ("a: " + "{b: " * 5000, ["nested more than 100 levels deep"]),
        ("license: !!python/object/apply:os.system ['true']", ["cannot be read"]),
        ("a: &a [x, x]\nb: *a", ["YAML aliases"]),
    ],
)
def test_a_card_of_another_kind_is_one_error(editable: Source, cli: Cli, line: str, words: list[str]) -> None:
    card(editable.path, line)
    assert_one_line(cli("convert", editable.path, "--dry-run"), "README.md", "mend or remove it", *words)


def test_a_bomb_of_aliases_takes_no_memory(editable: Source) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = card(editable.path, "\n".join([*lines, "tags: *a8"]))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="YAML aliases"):
            read_card(path)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_card_that_is_no_small_text_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert read_card(path) == {}
    path.write_bytes(b"---\nlicense: \xff\n---\n")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_card(path)
    path.write_bytes(b"---\n" + b"x: y\n" * 1_000_000)
    with pytest.raises(CheckpointError, match="more than 4194304 bytes"):
        read_card(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a device, a pipe or a socket"):
        read_card(path)


# Hugging Face's cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def cached(editable: Source, tmp_path: Path) -> Path:
    """The checkpoint as the hub's client lays it: blobs, and a snapshot of links to them."""
    root = tmp_path / "hub" / "models--deepseek-ai--DeepSeek-V4-Mini"
    snapshot = root / "snapshots" / "abc123"
    for folder in (root / "blobs", snapshot, root / "refs"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(editable.path.iterdir())):
        shutil.copyfile(path, root / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (root / "refs" / "main").write_text("abc123")
    return root


@pytest.mark.parametrize("part", ["", "snapshots/abc123", "snapshots/abc123/"])
def test_a_snapshot_is_named_after_its_repository_and_not_written_to(
    cached: Path, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_convert(f"{cached}/{part}" if part else cached)
    assert plan.files[0].path.parent == Path()
    assert plan.files[0].path.name.startswith("DeepSeek-V4-Mini-")
    assert plan.files[0].metadata["general.name"].data == "DeepSeek V4 Mini"


def test_a_repository_without_a_snapshot_says_so(cached: Path) -> None:
    (cached / "refs" / "main").write_text("../../../etc")
    with pytest.raises(CheckpointError, match="names no snapshot that is there"):
        Checkpoint(cached)
    (cached / "refs" / "main").unlink()
    assert Checkpoint(cached).name == "DeepSeek-V4-Mini"
    (cached / "snapshots" / "def456").mkdir()
    with pytest.raises(CheckpointError, match="names no snapshot that is there"):
        Checkpoint(cached)
