"""ggufx set, split and merge-splits: what changes, and that nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import xxhash

import ggufx
from ggufx import edit as edit_module
from ggufx.assignments import parse_assignments
from ggufx.container import Value, ValueType
from ggufx.edit import plan_edit, set_keys
from ggufx.errors import ContainerError, PlanError
from ggufx.rewrite import rewrite
from ggufx.verify import verify

from .conftest import Run, assert_one_line
from .oracle import Gguf
from .test_retarget import write_gguf

Converted = Callable[..., Gguf]
Cli = Callable[..., Run]


@pytest.fixture
def path(converted: Converted, tmp_path: Path) -> Path:
    """A file to be changed."""
    return Path(shutil.copy(converted("mini").path, tmp_path / "m.gguf"))


# set: values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "data"),
    [
        ("u8:255", 0, 255), ("i8:-128", 1, -128), ("u16:0x10", 2, 16), ("i16:-5", 3, -5), ("u32:4294967295", 4, 2**32 - 1),
        ("i32:-1", 5, -1), ("f32:0.1", 6, float(np.float32(0.1))), ("f32:nan", 6, None), ("f32:-inf", 6, -np.inf),
        ("bool:true", 7, True), ("bool:0", 7, False), ("str:a=b:c", 8, "a=b:c"), ("str:", 8, ""), ("str:é 😀\n", 8, "é 😀\n"),
        ("u64:18446744073709551615", 10, 2**64 - 1), ("i64:-9223372036854775808", 11, -(2**63)), ("f64:1e300", 12, 1e300),
        ("arr[i32]:[1, -2]", 9, (5, [1, -2])), ("arr[i32]:1,-2", 9, (5, [1, -2])), ("arr[u64]:[]", 9, (10, [])),
        ("arr[f32]:[1, 2.5]", 9, (6, [1.0, 2.5])), ("arr[bool]:[true, false]", 9, (7, [True, False])),
        ('arr[str]:["a", "é"]', 9, (8, ["a", "é"])), ("arr[f64]:[1e300, Infinity, 7]", 9, (12, [1e300, float("inf"), 7.0])),
        # llama-quantize's
        ("int:7", 4, 7), ("int:-7", 11, -7), ("int:4294967296", 11, 2**32), ("float:0.5", 6, 0.5),
    ],
)  # fmt: skip
def test_every_type(text: str, kind: int, data: Any, path: Path, cli: Cli) -> None:
    before = Gguf(path)
    assert cli("set", path, f"test.key={text}").code == 0
    after = Gguf(path)
    found = after.kv.pop("test.key")
    assert found[0] == kind
    assert np.isnan(found[1]) if data is None else found[1] == data
    assert after.kv == before.kv
    assert after.raw[after.data_offset :] == before.raw[before.data_offset :]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("k", "KEY=TYPE:VALUE"), ("k=5", "KEY=TYPE:VALUE"), ("=u8:5", "KEY=TYPE:VALUE"), ("k=u7:5", "'u7' is no type"),
        ("k=u8:256", "256 is outside u8, 0 to"), ("k=i8:-129", "outside"), ("k=u32:-1", "outside"), ("k=u8:1.5", "is no u8"),
        ("k=u8:", "is no u8"), ("k=f32:1e39", "more than f32"), ("k=f32:x", "is no f32"), ("k=bool:yes", "no bool"),
        ("k=arr[i32]:[1.5]", "no i32"), ("k=arr[i32]:[true]", "no i32"), ("k=arr[i32]:[", "no JSON list"),
        ("k=arr[str]:a,b", "no JSON list"), ("k=arr[str]:[1]", "no str"), ("k=arr[arr[i32]]:[]", "is no type"),
        ("a b=u8:5", "without spaces"), ("k=arr[bool]:[1]", "no bool"), ("\udce9=u8:5", "a key is printable"),
        ("k=f32:1e400", "1e400 is more than f32"), ("k=f64:1e999", "more than f64"), ("k=arr[f32]:[1e400]", "more than f32"),
        (f"k=arr[f64]:[1{'0' * 400}]", "more than f64"), (f"k=u32:1{'0' * 400}", "outside u32"), ("k=int:1.5", "is no i64"),
        ('k=arr[str]:["\\ud800"]', "not valid UTF-8"), ("k=str:\udce9", "not valid UTF-8"), ("k=arr[str]:[1.5]", "no str"),
        (f"k=arr[i32]:{'[' * 100_000}", "no JSON list"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(text: str, needed: str, path: Path, cli: Cli) -> None:
    before = path.read_bytes()
    assert_one_line(cli("set", path, text), needed)
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["general.alignment", "general.architecture", "split.count", "ggufx.dialect"])
def test_keys_that_the_file_rests_on(key: str, path: Path, cli: Cli) -> None:
    before = path.read_bytes()
    assert_one_line(cli("set", path, f"{key}=u32:64"), str(path), key, "cannot be changed by itself")
    assert_one_line(cli("set", path, "--remove", key), str(path), key, "cannot be changed by itself")
    assert path.read_bytes() == before


# set: the file ------------------------------------------------------------------------------------------------------


def test_what_fits_is_changed_in_place_and_the_rest_is_not_touched(path: Path, cli: Cli) -> None:
    before, inode = Gguf(path), path.stat().st_ino
    run = cli("set", path, "deepseek4.context_length=u32:4096", "general.name=str:Minx")
    assert (run.code, path.stat().st_ino) == (0, inode)
    assert "2 keys, in place" in run.out
    after = Gguf(path)
    changed = {key: after.kv[key][1] for key in after.kv if after.kv[key] != before.kv[key]}
    assert changed.keys() <= {"deepseek4.context_length", "general.name"}
    assert after.kv["deepseek4.context_length"] == (4, 4096)
    assert list(after.kv) == list(before.kv)
    assert after.raw[after.data_offset :] == before.raw[before.data_offset :]
    assert list(path.parent.iterdir()) == [path]


def test_what_does_not_fit_is_written_anew(path: Path, cli: Cli) -> None:
    before = Gguf(path)
    run = cli("set", path, "test.long=str:" + "x" * 1000, "--remove", "general.license", "--dry-run")
    assert "anew (dry run)" in run.out
    assert path.read_bytes() == before.raw
    path.chmod(0o640)
    run = cli("set", path, "test.long=str:" + "x" * 1000, "--remove", "general.license")
    assert run.code == 0, run.err
    assert path.stat().st_mode & 0o777 == 0o640
    after = Gguf(path)
    assert list(after.kv) == [key for key in before.kv if key != "general.license"] + ["test.long"]
    assert after.raw[after.data_offset :] == before.raw[before.data_offset :]
    assert list(path.parent.iterdir()) == [path]
    assert cli("set", path, "test.long=str:" + "x" * 1000).out == "nothing changes\n"
    assert cli("set", path, "general.license=str:mit", "--remove", "test.long").code == 0
    assert Gguf(path).kv == before.kv


def test_nothing_to_do_and_contradictions(path: Path, cli: Cli) -> None:
    assert_one_line(cli("set", path), "nothing to do")
    run = cli("set", path, "--remove", "no.such")
    assert (run.code, run.out) == (0, "nothing changes\n")
    assert "note: no.such is not in the file" in run.err
    assert_one_line(cli("set", path, "general.name=str:x", "--remove", "general.name"), "both set and removed")
    assert_one_line(cli("set", path.with_name("gone.gguf"), "a=u8:1"), "gone.gguf")
    before = path.read_bytes()
    assert_one_line(cli("set", path, "general.name=str:x", "general.name=str:y"), "general.name", "twice")
    assert path.read_bytes() == before


def test_a_name_like_a_members_does_not_make_one(path: Path, cli: Cli) -> None:
    named = path.rename(path.with_name("m-00002-of-00003.gguf"))
    other = Path(shutil.copy(named, path.with_name("m-00001-of-00003.gguf")))
    before = other.read_bytes()
    assert cli("set", named, "general.name=str:Minx").code == 0
    assert Gguf(named).kv["general.name"] == (8, "Minx")
    assert other.read_bytes() == before


@pytest.mark.parametrize("content", [b"", bytes(500), b"GGUF" + bytes(100), b"my own notes"])
def test_a_file_that_has_the_backups_name(content: bytes, path: Path, cli: Cli) -> None:
    """What a power cut leaves of a backup may be empty, or zeros; anybody else's file stays, and is in the way."""
    mine = path.with_name(path.name + ".header")
    mine.write_bytes(content)
    before = path.read_bytes()
    run = cli("set", path, "deepseek4.context_length=u32:4096")
    if not any(content):
        assert run.code == 0
        assert not mine.exists()
        return
    assert_one_line(run, str(mine), "not ggufx's", "move it away")
    assert mine.read_bytes() == content
    assert path.read_bytes() == before


def test_a_cut_off_change_in_place_is_undone_by_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    class PowerCut(BaseException):
        pass

    def torn(descriptor: int, header: bytes) -> None:
        os.pwrite(descriptor, header[:300], 0)
        os.pwrite(descriptor, b"\xff" * 50, 300)
        raise PowerCut

    change = {"deepseek4.context_length": Value.u32(4096)}
    with monkeypatch.context() as patched:
        patched.setattr(edit_module, "_write_header", torn)
        planned = plan_edit(path, change)
        with pytest.raises(PowerCut):
            set_keys(planned)
    assert path.read_bytes() != before
    with pytest.raises(ContainerError, match="ggufx set of this file puts the old header back"):
        ggufx.open(path)
    set_keys(plan_edit(path, {"deepseek4.context_length": Value.u32(65536)}))  # the old value: nothing changes
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    # A backup that is itself torn was followed by no change; one of another file that had the name says nothing.
    backup = path.with_name("m.gguf.header")
    identity = (path.stat().st_ino, path.stat().st_size)
    for head in (
        (*identity, xxhash.xxh3_64_intdigest(bytes(900))),
        (identity[0] + 1, identity[1], xxhash.xxh3_64_intdigest(bytes(1000))),
        (identity[0], identity[1] + 32, xxhash.xxh3_64_intdigest(bytes(1000))),
    ):
        backup.write_bytes(struct.pack("<8sQQQ", b"ggufx\0h1", *head) + bytes(1000))
        plan_edit(path, change)
        assert path.read_bytes() == before
        assert not backup.exists()
    set_keys(plan_edit(path, change))
    assert Gguf(path).kv["deepseek4.context_length"] == (4, 4096)


def test_a_killed_rewrite_keeps_the_old_file_and_goes_on(converted: Converted, tmp_path: Path) -> None:
    path = Path(shutil.copy(converted("long").path, tmp_path / "l.gguf"))
    before = path.read_bytes()

    class Stop(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    change = {"test.long": Value.string("x" * 1000)}
    with pytest.raises(Stop):
        set_keys(plan_edit(path, change), progress=stop, threads=1)
    assert path.read_bytes() == before
    set_keys(plan_edit(path, change))
    assert Gguf(path).kv["test.long"] == (8, "x" * 1000)
    assert list(tmp_path.iterdir()) == [path]
    report = verify(path, converted("long").path, allow_keys=["test.long"])
    assert (report.ok, report.allowed) == (True, ["test.long: not expected"])


def test_files_of_unknown_types_and_splits(tmp_path: Path, cli: Cli) -> None:
    path = write_gguf(tmp_path / "u.gguf", [("a", (5,), 999, bytes(range(77))), ("b", (2,), 0, bytes(8))])
    assert cli("set", path, "test.long=str:" + "x" * 100).code == 0
    with ggufx.open(path) as file:
        assert file["a"].packed[:77].tobytes() == bytes(range(77))
    assert cli("split", path, "--split-max-tensors", "1").code == 0
    members = sorted(tmp_path.glob("u-*.gguf"))
    assert cli("set", members[1], "general.name=str:Renamed").code == 0
    with ggufx.open(members[1]) as file:
        assert file.metadata["general.name"] == "Renamed"
        assert file["a"].packed[:77].tobytes() == bytes(range(77))


# split and merge ----------------------------------------------------------------------------------------------------


def test_split_has_llama_cpps_names_and_keys(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    whole = converted("flash", "llama.cpp", "bf16")
    run = cli("split", whole.path, "--outfile", tmp_path / "part", "--split-max-tensors", "40")
    assert run.code == 0, run.err
    members = sorted(tmp_path.iterdir())
    assert [path.name for path in members] == [f"part-{n:05d}-of-00004.gguf" for n in range(1, 5)]
    for number, member in enumerate(members):
        file = Gguf(member)
        split = {key: value for key, value in file.kv.items() if key.startswith("split.")}
        assert split == {"split.no": (2, number), "split.count": (2, 4), "split.tensors.count": (5, len(whole.tensors))}
        assert len(file.tensors) <= 40
        assert (file.kv.keys() - split.keys() == whole.kv.keys()) if number == 0 else len(file.kv) == 3
        assert len(gguf.GGUFReader(member).tensors) == len(file.tensors)
    run = cli("merge-splits", members[2])
    assert run.code == 0, run.err
    assert (tmp_path / "part.gguf").read_bytes() == whole.raw


def test_first_member_without_tensors_and_sizes(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    whole = converted("flash")
    arguments = ("split", whole.path, "--outfile", tmp_path / "p.gguf", "--split-max-size", "500K")
    data = json.loads(cli(*arguments, "--no-tensor-first-split", "--dry-run", "--json").out)
    assert data["file"]["file_type"] == "F8_E4M3_MXFP4"
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, "--no-tensor-first-split").code == 0
    members = sorted(tmp_path.iterdir())
    assert [str(path) for path in members] == data["file"]["paths"]
    assert len(Gguf(members[0]).tensors) == 0
    for member in members[1:]:
        tensors = Gguf(member).tensors
        assert len(tensors) == 1 or sum(t.data.size for t in tensors.values()) <= 500_000
    assert verify(members[0], whole.path).ok
    assert cli("merge-splits", members[0], "--outfile", tmp_path / "m.gguf").code == 0
    assert (tmp_path / "m.gguf").read_bytes() == whole.raw


def test_split_of_a_split_and_errors(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    whole = Path(shutil.copy(converted("mini").path, tmp_path / "w.gguf"))
    assert_one_line(cli("merge-splits", whole), str(whole), "not split")
    run = cli("split", whole, "--split-max-size", "1M", "--split-max-tensors", "3")
    assert_one_line(run, "one of them")
    assert cli("split", whole, "--split-max-tensors", "30").code == 0
    members = sorted(tmp_path.glob("w-*.gguf"))
    assert_one_line(cli("split", members[0], "--split-max-tensors", "30"), "is the source itself")
    assert cli("split", members[1], "--split-max-tensors", "20").code == 0
    assert verify(min(set(tmp_path.glob("w-*.gguf")) - set(members)), whole).ok
    assert_one_line(cli("merge-splits", members[0]), str(whole), "--overwrite")


@pytest.mark.parametrize("command", ["rewrite", "split", "merge-splits", "retarget"])
def test_outputs_that_are_directories(command: str, path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("split", path, "--split-max-tensors", "30").code == 0
    source = path.with_name("m-00001-of-00003.gguf") if command == "merge-splits" else path
    folder = path.parent / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    flags = ("--target", "llama.cpp") if command == "retarget" else ()
    name = {"split": "m-00001-of-00001.gguf", "retarget": "Tiny-mini-MXFP4_MOE.gguf"}.get(command, "m.gguf")
    for out, where in ((folder, folder), (f"{folder}/", folder), (".", folder), (f"{path.parent}/to-be/", "to-be")):
        assert cli(command, source, "--outfile", out, *flags).code == 0
        (made,) = (path.parent / where).iterdir()
        assert made.name == name
        made.unlink()
    assert_one_line(cli(command, source, "--outfile", "-", *flags), "--outfile -: an output is written at many places")


def test_a_split_of_one_merges_too(path: Path, cli: Cli) -> None:
    assert cli("split", path, "--split-max-size", "1G").code == 0
    member = path.with_name("m-00001-of-00001.gguf")
    assert Gguf(member).kv["split.count"] == (2, 1)
    assert cli("merge-splits", member, "--outfile", path.with_name("o.gguf")).code == 0
    assert path.with_name("o.gguf").read_bytes() == path.read_bytes()


def test_default_is_llama_gguf_splits(converted: Converted, tmp_path: Path, cli: Cli) -> None:
    whole = Path(shutil.copy(converted("flash").path, tmp_path / "w.gguf"))
    assert cli("split", whole).code == 0
    counts = [len(Gguf(path).tensors) for path in sorted(tmp_path.glob("w-*.gguf"))]
    assert counts == [128, len(converted("flash").tensors) - 128]


def test_an_alignment_of_its_own_is_in_every_member(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for number in range(4):
        writer.add_tensor(f"t{number}", np.full(5 + number, number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    members = rewrite(tmp_path / "a.gguf", tmp_path / "s.gguf", split_max_nbytes=300)
    assert len(members) == 2
    for member in members:
        assert gguf.GGUFReader(member).alignment == 128
    with ggufx.open(members[1]) as file:
        assert [file[f"t{n}"].numpy().tolist() for n in range(4)] == [[float(n)] * (5 + n) for n in range(4)]


def test_parse_gives_types() -> None:
    assert parse_assignments(["a=arr[u8]:[1]"])["a"].element is ValueType.UINT8
    with pytest.raises(PlanError):
        parse_assignments(["a=u8:1e3"])
