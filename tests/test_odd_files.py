"""Files that others write and open: trailing bytes, odd text, many axes, nested arrays, old and big-endian files, parts.

All are built by hand, byte by byte, with the helpers of :mod:`test_hostile_files`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from command import Run
from test_hostile_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I16,
    STRING,
    U8,
    U16,
    U32,
    build,
    kv,
    line,
    string,
    u32,
    u64,
)

import ggufx
import ggufx.torch
from ggufx.errors import AmbiguousDialect, CodecError, ContainerError, GGUFError, UnknownDialect, UnsupportedType
from ggufx.measure import measure
from ggufx.rewrite import rewrite

Cli = Callable[..., Run]
OPTIONS = {"retarget": ("--target", "llama.cpp"), "quantize": ("--tensor-type", "none=q8_0")}
"""What a command needs beside its file and the output."""

NUMBERS = np.arange(32, dtype="<f4") - 7.5
ROW = NUMBERS.tobytes()
LLAMA = kv("general.architecture", STRING, string("llama"))
X, Y = line("x"), line("y", (32,), 0, 128)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


# Bytes that belong to no tensor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [None, "llama.cpp"])
@pytest.mark.parametrize("tail", [b"\0", b"garbage", bytes(32), bytes(100), bytes(1_000_000)], ids=len)
def test_bytes_after_the_last_tensor_are_noted_and_left_out(
    tail: bytes, dialect: str | None, path: Path, tmp_path: Path
) -> None:
    good = build((LLAMA,), (X, Y), ROW + ROW)
    with ggufx.open(write(path, good + tail), dialect=dialect) as f:
        assert f["y"].numpy().tolist() == NUMBERS.tolist()
        assert f["y"].nbytes == 128
        assert f.complete
        (note,) = f.notes
        assert note.startswith(f"{len(tail)} bytes follow the last tensor of m.gguf at byte {len(good)}; ")
    (out,) = rewrite(path, tmp_path / "out.gguf")
    assert out.read_bytes() == good


def test_what_commands_say_of_trailing_bytes(path: Path, tmp_path: Path, cli: Cli) -> None:
    good = build((LLAMA,), (X,), ROW)
    write(path, good + bytes(64))
    expected = f"64 bytes follow the last tensor of m.gguf at byte {len(good)}"
    looked = cli("inspect", path)
    assert (looked.code, looked.out.count("F32")) == (0, 2)
    assert looked.err.startswith(f"note: {expected}")
    assert json.loads(cli("inspect", path, "--json").out)["file"]["notes"][0].startswith(expected)
    for command in ("rewrite", "split", "quantize", "retarget"):
        options = OPTIONS.get(command, ())
        run = cli(command, path, "--outfile", tmp_path / f"{command}.gguf", *options)
        assert run.code == 0, run
        assert f"note: {expected}" in run.err, command
    # A change of metadata changes nothing else.
    assert cli("set", path, f"general.name=str:{'n' * 100}").code == 0
    assert path.read_bytes().endswith(ROW + bytes(64))


def test_a_file_without_tensors_may_have_bytes_after_its_header(path: Path, cli: Cli) -> None:
    head = build((LLAMA,))
    for tail in (bytes(5), bytes(32), b"x" * 1000):
        write(path, head + bytes(-len(head) % 32) + tail)
        with ggufx.open(path) as f:
            assert list(f) == []
            assert f.notes[0].startswith(f"{len(tail)} bytes follow the header of m.gguf at byte ")
    run = cli("set", path, f"general.name=str:{'n' * 100}")
    assert run.code == 0
    assert "- 1000 bytes behind the header, which belong to no tensor" in run.out
    write(path, head)
    with ggufx.open(path) as f:
        assert f.notes == ()


def test_padding_is_no_trailing_byte(path: Path) -> None:
    data = build((LLAMA,), (line("q", (32,), 8),), bytes(34))
    for padding in (0, 1, 30):  # up to the alignment
        with ggufx.open(write(path, data + bytes(padding))) as f:
            assert f.notes == ()
            assert f["q"].nbytes == 34


def test_several_ggufs_in_one_file(path: Path) -> None:
    one = build((LLAMA,), (X,), ROW)
    two = build((LLAMA,), (line("z", (32, 2), 8),), bytes(68) + bytes(28))
    with ggufx.open(write(path, one + two + one)) as f:
        assert list(f) == ["x"]
        assert f["x"].numpy().tolist() == NUMBERS.tolist()
        assert f"2 more GGUF files follow in m.gguf at byte {len(one)}" in f.notes[0]
    # A magic without a file behind it still says that it begins here.
    with ggufx.open(write(path, one + b"GGUF")) as f:
        assert f"1 more GGUF file follows in m.gguf at byte {len(one)}" in f.notes[0]


def test_members_of_a_split_that_were_concatenated_are_named(tmp_path: Path) -> None:
    count = kv("split.count", U16, struct.pack("<H", 2))
    members = [
        build((count, kv("split.no", U16, struct.pack("<H", number))), (line(f"t{number}"),), ROW) for number in (0, 1)
    ]
    path = write(tmp_path / "cat.gguf", b"".join(members))
    with pytest.raises(
        ContainerError, match=f"1 more GGUF file follows .* byte {len(members[0])}.*concatenated"
    ) as caught:
        ggufx.open(path)
    assert caught.value.rule == "split-name"
    # One that was only renamed gets the old advice.
    with pytest.raises(ContainerError, match="rename the members as they were"):
        ggufx.open(write(tmp_path / "renamed.gguf", members[0]))


def test_bytes_after_a_tensor_never_make_it_another_type(path: Path) -> None:
    # 64 x 128 weights of 129 bytes a row are F8_E4M3_B128; as Q2_0 they would be 2304 bytes and 5952 more.
    write(path, build((LLAMA,), (line("w", (128, 64), 42),), bytes(64 * 129)))
    with ggufx.open(path) as f:
        assert f["w"].type == "F8_E4M3_B128"
        assert f.notes == ()
    with pytest.raises(UnknownDialect, match="2304 bytes as Q2_0"):
        ggufx.open(path, dialect="llama.cpp")


def test_a_tensor_without_elements_does_not_make_a_file_ambiguous(path: Path) -> None:
    lines = (line("none", (128, 0), 42), X)
    with ggufx.open(write(path, build((LLAMA,), lines, ROW))) as f:
        assert f["none"].shape == (0, 128)
        assert f["none"].numpy().shape == (0, 128)
        assert f["none"].packed.size == 0
        assert f["x"].numpy().tolist() == NUMBERS.tolist()
    # With elements whose bytes both meanings have, it is.
    with pytest.raises(AmbiguousDialect, match="F8_E4M3_B128"):
        ggufx.open(
            write(
                path,
                build(
                    (kv("general.alignment", U32, u32(256)),),
                    (line("w", (128,), 42), line("x", (32,), 0, 256)),
                    bytes(256) + ROW,
                    alignment=256,
                ),
            )
        )


# Text that is not UTF-8 -----------------------------------------------------------------------------------------------

ODD = build(
    (
        LLAMA,
        kv(b"k\xff", STRING, string(b"v\xfe\xff")),
        kv("tokens", ARRAY, u32(STRING) + u64(3) + string("a") + string(b"\xff\xc3") + string("é")),
    ),
    (line(b"w\xc3\x28"),),
    ROW,
)


def test_odd_text_is_shown_escaped_and_keeps_its_bytes(path: Path) -> None:
    with ggufx.open(write(path, ODD)) as f:
        tokens = f.metadata["tokens"]
        assert [tokens.element_bytes(i) for i in range(3)] == [b"a", b"\xff\xc3", "é".encode()]
        assert tokens[2] == "é"
        assert [text.encode("utf-8", "surrogateescape") for text in tokens] == [b"a", b"\xff\xc3", "é".encode()]
        (name,) = f
        assert name.encode("utf-8", "surrogateescape") == b"w\xc3("
        assert f[name].numpy().tolist() == NUMBERS.tolist()
        assert json.loads(json.dumps(f.metadata.to_json())) == {
            "general.architecture": "llama",
            "k\\xff": "v\\xfe\\xff",
            "tokens": ["a", "\\xff\\xc3", "é"],
        }


def test_one_odd_token_does_not_hide_the_file(path: Path, cli: Cli) -> None:
    write(path, ODD)
    shown = cli("inspect", path)
    assert shown.code == 0
    for text in ("k\\xff", "v\\\\xfe\\\\xff", "\\\\xff\\\\xc3", "w\\xc3("):
        assert text in shown.out, text
    run = cli("inspect", path, "--json")
    found = json.loads(run.out)
    assert "\\ud" not in run.out  # no lone surrogate, which strict parsers refuse
    assert found["metadata"]["tokens"]["value"] == ["a", "\\xff\\xc3", "é"]
    assert found["tensors"][0]["name"] == "w\\xc3("


def test_odd_text_is_copied_byte_for_byte_and_can_be_repaired(path: Path, tmp_path: Path, cli: Cli) -> None:
    write(path, ODD)
    assert cli("rewrite", path, "--outfile", tmp_path / "copy.gguf").code == 0
    assert (tmp_path / "copy.gguf").read_bytes() == ODD
    assert cli("diff", path, tmp_path / "copy.gguf").code == 0
    assert cli("split", path, "--outfile", tmp_path / "s", "--split-max-tensors", 1).code == 0
    assert string(b"k\xff") in (tmp_path / "s-00001-of-00001.gguf").read_bytes()
    assert cli("quantize", path, "--tensor-type", "none=q8_0", "--dry-run", "--json").code == 0
    key = b"k\xff".decode("utf-8", "surrogateescape")  # as the shell gives it
    assert cli("set", path, "--remove", key, 'tokens=arr[str]:["a", "b", "c"]').code == 0
    with ggufx.open(path) as f:
        assert list(f.metadata) == ["general.architecture", "tokens"]
        assert list(f.metadata["tokens"]) == ["a", "b", "c"]
        assert f.tensors[0].numpy().tolist() == NUMBERS.tolist()


def test_a_scalar_string_of_odd_bytes_can_be_set(path: Path, cli: Cli) -> None:
    write(path, build((kv("general.name", STRING, string(b"\xff\xfe")),), (X,), ROW))
    assert cli("set", path, "general.name=str:Mine").code == 0
    assert gguf.GGUFReader(path).fields["general.name"].contents() == "Mine"


def test_a_signalling_nan_stays_one(path: Path, tmp_path: Path, cli: Cli) -> None:
    nan = bytes.fromhex("0100a07f")  # 0x7fa00001: the quiet bit, 0x00400000, is not set
    stored = kv("a.nan", F32, nan)
    write(path, build((LLAMA, stored), (X,), ROW))
    with ggufx.open(path) as f:
        assert np.isnan(f.metadata["a.nan"])
    assert cli("rewrite", path, "--outfile", tmp_path / "copy.gguf").code == 0
    assert cli("split", path, "--outfile", tmp_path / "s", "--split-max-tensors", 1).code == 0
    assert cli("set", path, f"general.name=str:{'n' * 500}").code == 0
    assert cli("set", path, "general.name=str:other").code == 0
    for copy in (path, tmp_path / "copy.gguf", tmp_path / "s-00001-of-00001.gguf"):
        assert stored in copy.read_bytes(), copy


# Many axes, nested arrays, long names ---------------------------------------------------------------------------------


def test_tensors_of_more_than_four_axes(path: Path, tmp_path: Path, cli: Cli) -> None:
    patches = np.arange(128, dtype="<f4")
    q8 = struct.pack("<e", 0.5) + bytes(range(32))
    lines = (line("patch_embedding.weight", (2, 2, 1, 4, 8)), line("q", (32, 1, 2, 1, 3, 1), 8, 512))
    data = build((LLAMA,), lines, patches.tobytes() + q8 * 6 + bytes(-len(q8 * 6) % 32))
    assert tuple(gguf.GGUFReader(write(path, data)).tensors[0].data.shape) == (8, 4, 1, 2, 2)
    for dialect in ("llama.cpp", "ik_llama.cpp", "nisparks"):
        with ggufx.open(path, dialect=dialect) as f:
            w = f["patch_embedding.weight"]
            assert w.shape == (8, 4, 1, 2, 2)
            assert w.numpy().tolist() == patches.reshape(8, 4, 1, 2, 2).tolist()
            assert w[7, 3, 0, 1].tolist() == [126.0, 127.0]
            assert f["q"].shape == (1, 3, 1, 2, 1, 32)
            assert f["q"][0, 2, 0, 1, 0].tolist() == [0.5 * n for n in range(32)]
    run = cli("rewrite", path, "--outfile", tmp_path / "copy.gguf")
    assert run.code == 0
    assert "note: 2 tensors have more than 4 axes, such as 'patch_embedding.weight'" in run.err
    assert "llama.cpp refuses" in run.err
    assert (tmp_path / "copy.gguf").read_bytes() == data
    assert cli("inspect", path, "--dialect", "opaque").code == 0


def test_as_many_axes_as_numpy_has(path: Path) -> None:
    with ggufx.open(write(path, build((LLAMA,), (line("x", (32, *[1] * 63)),), ROW))) as f:
        assert f["x"].shape == (*[1] * 63, 32)
        assert f["x"].numpy().reshape(-1).tolist() == NUMBERS.tolist()


def test_arrays_of_arrays(path: Path, tmp_path: Path, cli: Cli) -> None:
    numbers = u32(I16) + u64(3) + struct.pack("<3h", 1, -2, 3)
    texts = u32(STRING) + u64(2) + string("a") + string(b"\xff")
    deeper = u32(ARRAY) + u64(2) + (u32(BOOL) + u64(1) + b"\1") + (u32(F64) + u64(0))
    data = build((kv("nested", ARRAY, u32(ARRAY) + u64(3) + numbers + texts + deeper),), (X,), ROW)
    with ggufx.open(write(path, data)) as f:
        first, second, third = f.metadata["nested"]
        assert first.tolist() == [1, -2, 3]
        assert (second[0], len(second)) == ("a", 2)
        assert [part.tolist() for part in third] == [[True], []]
    run = cli("rewrite", path, "--outfile", tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == data
    assert (
        "note: the value of key 'nested' is an array of arrays: other readers take that, llama.cpp refuses" in run.err
    )
    assert cli("diff", path, tmp_path / "copy.gguf").code == 0
    found = json.loads(cli("inspect", path, "--json").out)["metadata"]["nested"]
    assert found == {"type": "ARRAY[ARRAY]", "length": 3, "value": [[1, -2, 3], ["a", "\\xff"], [[True], []]]}
    assert cli("inspect", path).code == 0
    assert cli("set", path, "general.name=str:n").code == 0
    assert numbers + texts + deeper in path.read_bytes()


@pytest.mark.parametrize("command", ["rewrite", "split", "quantize", "retarget"])
def test_what_llama_cpp_refuses_is_said(command: str, path: Path, tmp_path: Path, cli: Cli) -> None:
    write(path, build((kv("", U8, b"\1"),), (line("n" * 64), line("m" * 63, (32,), 0, 128)), ROW + ROW))
    options = OPTIONS.get(command, ())
    run = cli(command, path, "--outfile", tmp_path / "out.gguf", *options)
    assert run.code == 0
    assert f"note: 1 tensors have names of more than 63 bytes, such as '{'n' * 64}'" in run.err
    assert "note: a key is empty: " in run.err
    write(path, build((kv("k", U8, b"\1"),), (line("m" * 63),), ROW))
    run = cli(command, path, "--outfile", tmp_path / "out.gguf", "--overwrite", *options)
    assert run.code == 0
    assert "llama.cpp refuses" not in run.err


def test_a_long_name_does_not_make_a_long_message(path: Path) -> None:
    name = "n" * 65535
    for data in (
        build((), (line(name, (32,), 0, 32),), ROW),
        build((), (line(name), line(name, (32,), 0, 128)), ROW),
        build((), (line(name),), ROW[:-1]),
        build((kv(name, 13, b""),)),
        build((), (line(name, (33, 0), 8),)),
    ):
        with pytest.raises(GGUFError, match="nnn'") as caught:
            ggufx.open(write(path, data))
        assert len(str(caught.value)) < 1000
        assert "(65535 characters)" in str(caught.value)
    # Of every command, wherever the message is made.
    with ggufx.open(write(path, build((), (line(name, (32,), 999),), ROW))) as f, pytest.raises(GGUFError) as caught:
        ggufx.torch.load(f.path)[name].dequantize()
    assert len(str(caught.value)) < 1000
    assert len(str(CodecError(f"tensor {name!r} of the model's file's part"))) < 300


# Old and big-endian files ---------------------------------------------------------------------------------------------


def test_version_1(path: Path, tmp_path: Path) -> None:
    def text(data: bytes) -> bytes:
        return u32(len(data)) + data

    keys = (
        text(b"general.architecture") + u32(STRING) + text(b"llama"),
        text(b"tokens") + u32(ARRAY) + u32(STRING) + u32(3) + text(b"a") + text(b"") + text("é".encode()),
        text(b"scores") + u32(ARRAY) + u32(F32) + u32(2) + struct.pack("<2f", 1, 2),
        text(b"nested") + u32(ARRAY) + u32(ARRAY) + u32(1) + u32(STRING) + u32(1) + text(b"n"),
    )
    directory = (
        text(b"x") + u32(1) + u32(32) + u32(0) + u64(0) + text(b"y") + u32(2) + u32(16) + u32(2) + u32(0) + u64(128)
    )
    head = b"GGUF" + u32(1) + u32(2) + u32(4) + b"".join(keys) + directory
    write(path, head + bytes(-len(head) % 32) + ROW + ROW[::-1])
    (out,) = rewrite(path, tmp_path / "v3.gguf")
    for name, version in ((path, 1), (out, 3)):
        with ggufx.open(name) as f:
            assert f.version == version
            assert list(f.metadata["tokens"]) == ["a", "", "é"]
            assert f.metadata["scores"].tolist() == [1.0, 2.0]
            assert list(f.metadata["nested"][0]) == ["n"]
            assert f["x"].numpy().tolist() == NUMBERS.tolist()
            assert f["y"].shape == (2, 16)
    reader = gguf.GGUFReader(out)
    assert reader.fields["tokens"].contents() == ["a", "", "é"]
    assert reader.tensors[1].data.tobytes() == ROW[::-1]


def big(data: np.ndarray) -> bytes:
    """Numbers with their highest byte first."""
    return data.astype(data.dtype.newbyteorder(">")).tobytes()


def test_big_endian(path: Path, tmp_path: Path, cli: Cli) -> None:
    def text(data: bytes) -> bytes:
        return struct.pack(">Q", len(data)) + data

    def key(name: bytes, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack(">I", kind) + value

    keys = (
        key(b"u32", U32, struct.pack(">I", 7)),
        key(b"f64", F64, struct.pack(">d", 0.25)),
        key(b"nan", F32, bytes.fromhex("7fa00001")),
        key(b"tokens", ARRAY, struct.pack(">IQ", STRING, 2) + text(b"ab") + text("é".encode())),
        key(b"shorts", ARRAY, struct.pack(">IQ3h", I16, 3, 1, -2, 300)),
    )
    halves = np.array([0.5, -2, 3] * 32, "<f2")
    longs = np.array([1, -(2**40), 5], "<i8")
    # A block of Q8_0 has its scale highest byte first, of Q6_K at its end; MXFP4 has single bytes only.
    q8 = struct.pack(">e", 0.25) + bytes(range(32))
    q6 = bytes([0x11] * 128 + [0xAA] * 64 + [2] * 16) + struct.pack(">e", 0.5)
    mxfp4 = bytes([128]) + bytes([0x21] * 16)
    tensors = [
        ("f32", (32,), 0, big(NUMBERS)),
        ("f16", (32, 3), 1, big(halves)),
        ("i64", (3,), 27, big(longs)),
        ("q8", (32, 2), 8, q8 + q8),
        ("q6", (256,), 14, q6),
        ("mx", (32,), 39, mxfp4),
        ("bf16", (32,), 30, bytes(64)),
    ]
    directory, data = b"", b""
    for name, dims, kind, packed in tensors:
        directory += text(name.encode()) + struct.pack(f">I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += packed + bytes(-len(packed) % 32)
    head = b"GGUF" + struct.pack(">IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + directory
    write(path, head + bytes(-len(head) % 32) + data)
    with ggufx.open(path) as f:
        assert f.version == 3
        assert (f.metadata["u32"], f.metadata["f64"]) == (7, 0.25)
        assert f.metadata.value("nan").encode().hex() == "060000000100a07f"
        assert list(f.metadata["tokens"]) == ["ab", "é"]
        assert f.metadata["shorts"].tolist() == [1, -2, 300]
        assert f["f32"].numpy().tolist() == NUMBERS.tolist()
        assert f["f16"].numpy().reshape(-1).tolist() == halves.tolist()
        assert f["f16"][1, :2].tolist() == [3.0, 0.5]  # element 32 of 0.5, -2, 3
        assert f["i64"].numpy().tolist() == longs.tolist()
        assert f["q8"].numpy().tolist() == [[0.25 * n for n in range(32)]] * 2
        assert f["q8"][[1]].tolist() == [[0.25 * n for n in range(32)]]
        assert f["mx"].numpy().tolist() == [1.0] * 16 + [2.0] * 16
        # ql 1 in both nibbles, qh 2 for all: 33 - 32 = 1, times scale 2, times 0.5.
        assert f["q6"].numpy().tolist() == [1.0] * 256
        with pytest.raises(UnsupportedType, match=r"'bf16': BF16 of a big-endian file .* gguf-convert-endian"):
            f["bf16"].numpy()
        assert "big-endian" in f.notes[0]
    shown = cli("inspect", path)
    assert shown.code == 0
    assert "big-endian" in shown.err
    before = path.read_bytes()
    for command in (
        ("rewrite", path, "--outfile", tmp_path / "out.gguf"),
        ("split", path, "--outfile", tmp_path / "s"),
        ("set", path, "u32=u32:8"),
        ("quantize", path, tmp_path / "q.gguf", "q8_0"),
        ("diff", path, path),
    ):
        run = cli(*command)
        assert (run.code, run.err.count("\n")) == (2 if command[0] == "diff" else 1, 1), run
        assert "gguf-convert-endian" in run.err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Parts of files -------------------------------------------------------------------------------------------------------

WHOLE = build((LLAMA,), (line("x", (32, 2), 8), line("y", (32,), 0, 96)), bytes(range(68)) + bytes(28) + ROW)
DATA = len(WHOLE) - 96 - 128


@pytest.mark.parametrize("nbytes", [DATA - 3, DATA, DATA + 96, DATA + 100, len(WHOLE) - 1])
def test_a_file_that_ends_early_is_shown(nbytes: int, path: Path, cli: Cli) -> None:
    write(path, WHOLE[:nbytes])
    there = max(0, nbytes - DATA)
    note = f"note: tensor data is incomplete: {there} of 224 bytes are there\n"
    with pytest.raises(GGUFError):
        ggufx.open(path)
    with ggufx.open(path, header_only=True) as f:
        assert not f.complete
        assert [(t.name, t.shape, t.type, t.nbytes) for t in f.tensors] == [
            ("x", (2, 32), "Q8_0", 68),
            ("y", (32,), "F32", 128),
        ]
        with pytest.raises(ContainerError, match=f"ends at byte {nbytes}") as caught:
            f["y"].numpy()
        assert caught.value.rule == "truncated"
        with pytest.raises(ContainerError):
            _ = f["y"].packed
        if there >= 68:
            assert f["x"].packed.tobytes() == bytes(range(68))
            assert f["x"].numpy().shape == (2, 32)
    run = cli("inspect", path, "--header-only")
    assert (run.code, run.err) == (0, note)
    assert "Q8_0" in run.out
    run = cli("inspect", path)
    assert run.code == 1
    assert run.err.startswith(note + "error: ")
    assert "Q8_0" in run.out
    found = json.loads(cli("inspect", path, "--json").out)
    assert found["file"]["complete"] is False
    assert [tensor["type"] for tensor in found["tensors"]] == ["Q8_0", "F32"]


def test_a_whole_file_is_complete_with_header_only_too(path: Path, cli: Cli) -> None:
    write(path, WHOLE)
    run = cli("inspect", path, "--header-only", "--json")
    assert (run.code, run.err) == (0, "")
    assert json.loads(run.out)["file"]["complete"] is True
    # What is wrong in the header stays an error.
    for command in (("inspect",), ("inspect", "--header-only")):
        run = cli(*command, write(path, WHOLE[: DATA - 40]))
        assert (run.code, run.out) == (1, "")
        assert "[rule: truncated]" in run.err


def test_a_member_alone(tmp_path: Path, cli: Cli) -> None:
    def member(number: int, *lines: bytes) -> bytes:
        keys = (
            kv("split.no", U16, struct.pack("<H", number)),
            kv("split.count", U16, struct.pack("<H", 3)),
            kv("split.tensors.count", 5, struct.pack("<i", 2)),
        )
        return build((LLAMA, *keys) if number == 0 else keys, lines, ROW * len(lines))

    first = write(tmp_path / "m-00001-of-00003.gguf", member(0))
    with ggufx.open(first, splits=False) as f:
        assert (f.metadata["general.architecture"], len(f)) == ("llama", 0)
    with ggufx.open(first, header_only=True) as f:
        assert f.notes == ("2 of 3 split members are missing: m-00002-of-00003.gguf, m-00003-of-00003.gguf",)
    run = cli("inspect", first)
    assert (run.code, "llama" in run.out) == (1, True)
    assert "note: 2 of 3 split members are missing" in run.err
    run = cli("inspect", first, "--header-only")
    assert (run.code, run.err.count("\n")) == (0, 1)
    third = write(tmp_path / "m-00003-of-00003.gguf", member(2, line("z")))
    with ggufx.open(third, header_only=True) as f:
        assert f["z"].numpy().tolist() == NUMBERS.tolist()
        assert f.paths == [first, third]
        assert f.notes == ("1 of 3 split members are missing: m-00002-of-00003.gguf",)


# What is no file ------------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, cli: Cli) -> None:
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ContainerError, match=r"a pipe or a device without a size") as caught:
            ggufx.open(odd)
        assert caught.value.rule == "magic"
        run = cli("inspect", odd)
        assert (run.code, run.err.count("\n")) == (1, 1)
        assert str(odd) in run.err


def test_errors_of_decoding_name_file_and_tensor(path: Path) -> None:
    with (
        ggufx.open(write(path, WHOLE)) as f,
        pytest.raises(GGUFError, match=r"m\.gguf: tensor 'x': out is float32\[3\]"),
    ):
        f["x"].numpy(out=np.empty(3, np.float32))


def test_measure_of_a_file_that_was_shortened(path: Path) -> None:
    write(path, build((LLAMA,), (line("w", (32, 64)),), ROW * 64))
    with ggufx.open(path) as f:
        os.truncate(path, 4096)
        with pytest.raises(ContainerError, match="ends at byte 4096"):
            f["w"].numpy()
    with pytest.raises(GGUFError):
        measure(path, ["Q8_0"])
