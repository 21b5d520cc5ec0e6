"""Copies of some of a GGUF's tensors, and of tensors under other names. Files are read back with the ``gguf`` package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from command import Run

from ggufx.errors import PlanError
from ggufx.rewrite import renamed, rewrite

Cli = Callable[..., Run]

NAMES = (
    "token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "v.blk.0.attn_q.weight", "v.patch_embd.weight",
    "output.weight",
)  # fmt: skip


def values(name: str) -> np.ndarray:
    """Return values that no other tensor of the file has."""
    return np.arange(64, dtype=np.float32).reshape(2, 32) + 100 * NAMES.index(name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    for name in NAMES:
        writer.add_tensor(name, values(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path: Path) -> dict[str, list[float]]:
    return {tensor.name: tensor.data.ravel().tolist() for tensor in gguf.GGUFReader(path).tensors}


def expected(**names: str) -> dict[str, list[float]]:
    return {new: values(old).ravel().tolist() for new, old in names.items()}


def of(*names: str) -> dict[str, list[float]]:
    return {name: values(name).ravel().tolist() for name in names}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (("--keep", "v.*"), NAMES[3:5]),
        (("--keep", "blk.*", "--keep", "output.weight"), (*NAMES[1:3], NAMES[5])),
        (("--drop", "v.*"), (*NAMES[:3], NAMES[5])),
        (("--keep", "*.weight", "--drop", "blk.[1-9].*", "--drop", "v.*"), (NAMES[0], NAMES[1], NAMES[5])),
    ],
)
def test_tensors_are_kept_and_dropped_by_pattern(
    options: tuple[str, ...], left: tuple[str, ...], model: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out.gguf"
    run = cli("rewrite", model, "--outfile", out, *options)
    assert run.code == 0, run
    assert contents(out) == of(*left)
    reader = gguf.GGUFReader(out)
    assert reader.fields["llama.block_count"].contents() == 2


def test_what_is_left_out_is_said(model: Path, tmp_path: Path, cli: Cli) -> None:
    run = cli("rewrite", model, "--outfile", tmp_path / "out.gguf", "--keep", "*.weight", "--drop", "v.*")
    assert "note: left out: 2 tensors: matches v.*\n" in run.err


def test_tensors_are_renamed_by_pattern(model: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out.gguf"
    run = cli(
        "rewrite", model, "--outfile", out, "--rename", "blk.*.ffn_*.weight=layers.*.mlp.*", "--rename",
        "output.weight=head",
    )  # fmt: skip
    assert run.code == 0, run
    names = ("token_embd.weight", "layers.0.mlp.up", "layers.1.mlp.up", *NAMES[3:5], "head")
    assert contents(out) == expected(**dict(zip(names, NAMES, strict=True)))


@pytest.mark.parametrize(
    ("name", "old", "new", "wanted"),
    [
        ("a.b", "a.b", "c", "c"),
        ("a.b", "a", "c", None),
        ("a.b", "*", "model.*", "model.a.b"),
        ("blk.12.up", "blk.*.*", "*/*", "12/up"),
        ("blk.12.up", "blk.*.*", "*", "12"),
        ("blk.12.up", "blk.*.*", "x", "x"),
        ("aXbXc", "*X*", "*|*", "a|bXc"),
        ("ab", "ab*b", "*", None),
        ("abb", "ab*b", "[*]", "[]"),
        ("a.[0].b", "a.[*].b", "a.*.b", "a.0.b"),
        ("x", "", "y", None),
    ],
)
def test_what_the_stars_of_a_new_name_take(name: str, old: str, new: str, wanted: str | None) -> None:
    assert renamed(name, old, new) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--drop", "vision.*"), "'vision.*' matches no tensor of the 6"),
        (("--keep", "blk.*", "--keep", "zzz"), "'zzz' matches no tensor of the 6"),
        (("--rename", "zzz=a"), "'zzz' matches no tensor of the 6"),
        (("--drop", "*"), "no tensor is left of the 6"),
        (
            ("--rename", "blk.*.ffn_up.weight=up"),
            "'blk.0.ffn_up.weight' and 'blk.1.ffn_up.weight' would both be called 'up'",
        ),
        (("--rename", "output.weight=token_embd.weight"), "would both be called 'token_embd.weight'"),
        (("--rename", "v.*=*.*"), "the new name of a tensor has 2 *, the old one 1"),
        (("--rename", "v.*="), "the new name of a tensor is empty"),
        (("--rename", "v.x"), "--rename v.x: expected OLD=NEW"),
        (("--rename", "a=b", "--rename", "a=c"), "--rename a=c: a has the new name b already"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(
    options: tuple[str, ...], message: str, model: Path, tmp_path: Path, cli: Cli
) -> None:
    run = cli("rewrite", model, "--outfile", tmp_path / "out.gguf", *options)
    assert run.code == 1
    assert message in run.err
    assert list(tmp_path.iterdir()) == [model]


def test_a_name_may_move_to_one_that_is_dropped(model: Path, tmp_path: Path) -> None:
    rewrite(model, tmp_path / "out.gguf", drop=["output.weight"], rename={"token_embd.weight": "output.weight"})
    assert contents(tmp_path / "out.gguf")["output.weight"] == values("token_embd.weight").ravel().tolist()


def test_a_dry_run_shows_the_plan(model: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("rewrite", model, "--outfile", tmp_path / "o.gguf", "--keep", "v.*", "--rename", "v.*=*", "--dry-run")
    run = cli(*arguments)
    assert run.code == 0
    assert "2 tensors, 128 weights, 512 bytes of data" in run.out
    found = json.loads(cli(*arguments, "--json").out)
    assert [tensor["name"] for tensor in found["tensors"]] == ["blk.0.attn_q.weight", "patch_embd.weight"]
    assert list(tmp_path.iterdir()) == [model]


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    path = tmp_path / "nvfp4.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 36), np.uint8), raw_dtype=gguf.GGMLQuantizationType.NVFP4)
    writer.add_tensor("blk.0.ffn_up.scale", np.array([0.5], np.float32))
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"drop": ["*.scale"]}, "which would be left out, expected 'blk.0.ffn_up.scale'"),
        ({"keep": ["*.weight"]}, "which would be left out, expected 'blk.0.ffn_up.scale'"),
        ({"rename": {"*_up.weight": "*_dn.weight"}}, "would be called 'blk.0.ffn_up.scale', expected 'blk.0.ffn_dn.scale'"),
    ],
)  # fmt: skip
def test_a_weight_keeps_its_factor(options: dict[str, object], problem: str, scaled: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        rewrite(scaled, tmp_path / "out.gguf", **options)
    assert "tensor 'blk.0.ffn_up.weight' has a factor in 'blk.0.ffn_up.scale'" in str(caught.value)
    assert problem in str(caught.value)
    rewrite(scaled, tmp_path / "both.gguf", rename={"blk.0.*": "blk.7.*"})
    rewrite(scaled, tmp_path / "neither.gguf", drop=["*ffn_up*"])
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "both.gguf").tensors]
    assert names == ["blk.7.ffn_up.weight", "blk.7.ffn_up.scale", "blk.7.ffn_norm.weight"]
