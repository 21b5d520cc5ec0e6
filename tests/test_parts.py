"""Named tensors of a split whose other members are absent, and of a download that is not complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from command import Run

from ggufx.errors import ContainerError, GGUFError
from ggufx.file import open_parts

Cli = Callable[..., Run]


def values(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((8, 256)).astype(np.float32)


@pytest.fixture
def members(tmp_path: Path) -> list[Path]:
    """A split of four members with two tensors each, made by the gguf package."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_block_count(8)
    for number in range(8):
        writer.add_tensor(f"blk.{number}.ffn_up.weight", values(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert len(found) == 4
    return found


def test_quantizing_tensors_of_one_member(members: list[Path], tmp_path: Path, cli: Cli) -> None:
    for path in (members[0], members[1], members[3]):
        path.unlink()
    run = cli("quantize", members[2], tmp_path / "o.gguf", "q8_0", "--tensors", "blk.[45].*")
    assert run.code == 0, run
    assert "note: 3 of 4 split members are missing: " in run.err
    reader = gguf.GGUFReader(tmp_path / "o.gguf")
    assert [t.name for t in reader.tensors] == ["blk.4.ffn_up.weight", "blk.5.ffn_up.weight"]
    for number, tensor in zip((4, 5), reader.tensors, strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(found - values(number)).max() < 0.02
    assert not any(key.startswith("split.") for key in reader.fields)


def test_tensors_of_a_whole_file(members: list[Path], tmp_path: Path, cli: Cli) -> None:
    run = cli("quantize", members[0], tmp_path / "o.gguf", "q4_k", "--tensors", "blk.1.*", "--tensors", "blk.7.*")
    assert run.code == 0, run
    reader = gguf.GGUFReader(tmp_path / "o.gguf")
    assert [t.name for t in reader.tensors] == ["blk.1.ffn_up.weight", "blk.7.ffn_up.weight"]
    assert reader.fields["llama.block_count"].contents() == 8


def test_measuring_tensors_of_one_member(members: list[Path], cli: Cli) -> None:
    for path in members[1:]:
        path.unlink()
    run = cli("measure", members[0], "--types", "q8_0", "--tensors", "blk.0.*", "--json")
    assert run.code == 0, run
    (record,) = json.loads(run.out)["tensors"]
    assert record["tensor"] == "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    "command", [("quantize", "@", "o.gguf", "q8_0", "--tensors"), ("measure", "@", "--types", "q8_0", "--tensors")]
)
def test_tensors_that_are_not_there_are_refused(
    command: tuple[str, ...], members: list[Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [members[3] if word == "@" else word for word in command]
    members[1].unlink()
    run = cli(*words, "blk.3.*")
    assert run.code == 1
    assert "'blk.3.*' matches none of the 6 tensors that are there (1 of 4 split members are missing: " in run.err
    assert cli(*words[: -1 if "--tensors" in words else None]).code == 1  # all of it needs all members
    cut = members[3].read_bytes()
    members[3].write_bytes(cut[: len(cut) - 4096])
    run = cli(*words, "blk.[67].*")
    assert run.code == 1
    assert "the bytes of tensor 'blk.7.ffn_up.weight' are not all there" in run.err
    assert cli(*words, "blk.6.*").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".gguf") == []


def test_a_split_is_not_kept_of_some_tensors(members: list[Path], tmp_path: Path, cli: Cli) -> None:
    run = cli("quantize", members[0], tmp_path / "o.gguf", "q8_0", "--tensors", "blk.1.*", "--keep-split")
    assert run.code == 1
    assert "--keep-split and --tensors exclude each other" in run.err


def test_from_python(members: list[Path]) -> None:
    members[1].unlink()
    with open_parts(members[0], ["blk.0.*", "blk.6.*"]) as file:
        assert not file.complete
        found = file.matching(["blk.0.*", "blk.6.*"])
        assert [tensor.name for tensor in found] == ["blk.0.ffn_up.weight", "blk.6.ffn_up.weight"]
        np.testing.assert_array_equal(found[1].numpy(), values(6))
    with pytest.raises(GGUFError, match="matches none of the 6 tensors"):
        open_parts(members[0], ["blk.2.*"])
    members[0].write_bytes(b"GGUF\0\0\0\0")
    with pytest.raises(ContainerError):
        open_parts(members[0], ["blk.0.*"])
