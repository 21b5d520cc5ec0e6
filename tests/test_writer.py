"""GGUFs written from arrays: read back by the gguf package, refused where they would not be, never left half done."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from test_hostile_files import build, kv, line, string, u32

import ggufx
from ggufx.errors import (
    CodecError,
    DiskError,
    GGUFError,
    NonFiniteError,
    OutOfRangeError,
    OutputExists,
    PlanError,
    UnknownDialect,
    UnknownType,
)
from ggufx.outputs import OutputWarning
from ggufx.values import Value, ValueType

BF16 = ml_dtypes.bfloat16
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": BF16, "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def read(path: Path) -> tuple[dict[str, tuple[int, list[int], bytes]], dict[str, tuple[list[int], Any]]]:
    """Return tensors (type id, dims in the file's order, bytes) and keys (types, value), as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: (int(t.tensor_type), [int(n) for n in t.shape], np.asarray(t.data).tobytes()) for t in reader.tensors
    }
    keys = {
        key: ([int(kind) for kind in field.types], field.contents())
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    return tensors, keys


def listed() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_every_byte_of_a_small_file(workplace: Path, declared: bool) -> None:
    values = np.array([[1.0, 2.0, 3.0]], "<f4")
    with ggufx.Writer("w.gguf", {"general.name": "x", "n": 7}, architecture="llama") as writer:
        if declared:
            writer.declare("a", (1, 3), "F32")
            writer.declare("b", (2,), "i8")
            writer.add("b", np.array([5, -1], np.int8))
            writer.add("a", values)
        else:
            writer.add("a", values)
            writer.add("b", np.array([5, -1], np.int8))
    expected = build(
        (
            kv("general.architecture", 8, string("llama")),
            kv("general.name", 8, string("x")),
            kv("n", 4, u32(7)),
        ),
        (line("a", (3, 1), 0, 0), line("b", (2,), 24, 32)),
        values.tobytes() + bytes(20) + b"\x05\xff" + bytes(30),
    )
    assert (workplace / "w.gguf").read_bytes() == expected
    assert listed() == ["w.gguf"]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_dtypes_are_kept(name: str, dtype: Any, order: str) -> None:
    values = (numbers(3, 5, 4) * 50).astype(dtype)
    given = values.astype(values.dtype.newbyteorder(order)) if values.dtype.kind != "V" else values
    ggufx.save("d.gguf", {"cube": given, "turned": given.transpose(2, 1, 0), "none": given[0, 0, 0]})
    tensors, _ = read(Path("d.gguf"))
    assert tensors["cube"] == (gguf.GGMLQuantizationType[name], [4, 5, 3], values.tobytes())
    assert tensors["turned"][1:] == ([3, 5, 4], values.transpose(2, 1, 0).tobytes())
    assert tensors["none"][1:] == ([1], values[0, 0, 0].tobytes())
    loaded = ggufx.load_file("d.gguf")
    assert loaded["cube"].dtype == np.dtype(dtype)
    assert loaded["cube"].tobytes() == values.tobytes()
    assert loaded["none"].tolist() == [values[0, 0, 0]]


def test_bits_that_are_kept_are_not_looked_at() -> None:
    odd = np.array([0x7F800001, 0xFFC12345, 0x7F800000, 1], "<u4").view("<f4")
    half = np.array([0x7C01, 0xFE02, 0x7C00, 1], "<u2")
    ggufx.save("n.gguf", {"f": odd, "h": half.view("<f2"), "b": half.view(BF16)})
    tensors, _ = read(Path("n.gguf"))
    assert tensors["f"][2] == odd.tobytes()
    assert tensors["h"][2] == half.tobytes()
    loaded = ggufx.load_file("n.gguf")
    assert loaded["f"].tobytes() == odd.tobytes()
    assert loaded["b"].tobytes() == half.tobytes()


def test_metadata_as_the_gguf_package_reads_it() -> None:
    keys = {
        "bool": True,
        "u32": 2**32 - 1,
        "i32": -1,
        "u64": 2**63,
        "i64": -(2**40),
        "f32": 0.1,
        "f64": 1e300,
        "text": "é\n",
        "ints": [1, -2],
        "floats": (1, 2.5),
        "texts": ["a", "", "ü"],
        "bools": [True, False],
        "array": np.array([1, 2], ">u2"),
        "scalar": np.int8(-3),
        "half": np.float16(0.5),
        "typed": Value(ValueType.UINT16, 9),
        "empty": Value.array(ValueType.STRING, []),
    }
    ggufx.save("k.gguf", {}, keys, architecture="llama")
    _, found = read(Path("k.gguf"))
    assert list(found) == ["general.architecture", *keys]
    kinds = {key: types for key, (types, _) in found.items()}
    assert kinds == {
        "general.architecture": [8], "bool": [7], "u32": [4], "i32": [5], "u64": [10], "i64": [11], "f32": [6], "f64": [12],
        "text": [8], "ints": [9, 5], "floats": [9, 6], "texts": [9, 8], "bools": [9, 7], "array": [9, 2], "scalar": [1],
        "half": [6], "typed": [2], "empty": [9],
    }  # fmt: skip
    values = {key: value for key, (_, value) in found.items()}
    assert values["f32"] == np.float32(0.1)
    assert (values["u64"], values["i64"], values["f64"], values["text"]) == (2**63, -(2**40), 1e300, "é\n")
    assert (values["ints"], values["floats"], values["texts"]) == ([1, -2], [1.0, 2.5], ["a", "", "ü"])
    assert (values["bools"], values["array"], values["scalar"], values["half"]) == ([True, False], [1, 2], -3, 0.5)
    assert (values["typed"], values["bool"]) == (9, True)


def test_the_metadata_of_an_open_file_is_taken_over() -> None:
    raw = b"\xff\xfe odd"
    keys = (
        kv("general.architecture", 8, string("llama")),
        kv("odd", 8, string(raw)),
        kv("split.no", 2, b"\0\0"),
        kv("nan", 6, bytes.fromhex("0100807f")),
    )
    Path("s.gguf").write_bytes(build(keys, (line("t", (4,), 0, 0),), bytes(32)))
    with ggufx.open("s.gguf") as f:
        ggufx.save("t.gguf", f, f.metadata)
    expected = build((keys[0], keys[1], keys[3]), (line("t", (4,), 0, 0),), bytes(32))
    assert Path("t.gguf").read_bytes() == expected


def test_alignment() -> None:
    ggufx.save("a.gguf", {"a": np.ones(3, np.int8), "b": np.ones(3, np.int8)}, alignment=64)
    _, keys = read(Path("a.gguf"))
    assert keys == {"general.alignment": ([4], 64)}
    with ggufx.open("a.gguf") as f:
        assert [tensor.file_offset % 64 for tensor in f.tensors] == [0, 0]
        assert f["b"].position - f["a"].position == 64
    ggufx.save("b.gguf", {"a": np.ones(3, np.int8)}, {"general.alignment": 8})
    assert read(Path("b.gguf"))[1] == {"general.alignment": ([4], 8)}
    for wrong in (3, 0, 1 << 22, True):
        with pytest.raises(PlanError, match="power of two"):
            ggufx.save("c.gguf", {}, alignment=wrong)
    with pytest.raises(PlanError, match="give one of them"):
        ggufx.save("c.gguf", {}, {"general.alignment": 8}, alignment=16)


# Quantizing ------------------------------------------------------------------------------------------------------------


def test_quantized_tensors_are_the_encoders_bytes() -> None:
    weights, importance = numbers(6, 3, 512), np.abs(numbers(6, 512, seed=1)) + 0.1
    with ggufx.Writer("q.gguf") as writer:
        writer.add("q8", weights[0].astype(BF16), "q8_0")
        writer.add("experts", weights, "IQ4_NL", importance=importance)
        writer.add("one", weights, "IQ4_NL", importance=importance[0])
        writer.add("half", weights[0], "F16")
    tensors, keys = read(Path("q.gguf"))
    codec = ggufx.types.get("IQ4_NL")
    assert keys == {"general.quantization_version": ([4], 2)}
    assert tensors["q8"] == (8, [512, 3], ggufx.types.get("Q8_0").encode(weights[0].astype(BF16)).tobytes())
    assert tensors["experts"][2] == b"".join(
        codec.encode(part, row).tobytes() for part, row in zip(weights, importance, strict=True)
    )
    assert tensors["one"][2] == codec.encode(weights, importance[0]).tobytes()
    assert tensors["experts"][2] != tensors["one"][2]
    assert tensors["half"] == (1, [512, 3], weights[0].astype("<f2").tobytes())
    # The gguf package's own decoder agrees with ours on what was written.
    ours = ggufx.load_file("q.gguf")["q8"]
    theirs = gguf.quants.dequantize(
        np.frombuffer(tensors["q8"][2], np.uint8).reshape(3, -1), gguf.GGMLQuantizationType.Q8_0
    )
    assert np.array_equal(ours, theirs)


def test_types_of_save() -> None:
    tensors = {
        "blk.0.ffn_up.weight": numbers(4, 256),
        "blk.0.ffn_gate_inp.weight": numbers(4, 256),
        "blk.0.attn_norm.weight": numbers(256),
        "blk.0.exps.bias": numbers(4, 256),
        "conv": numbers(4, 256).astype(np.float16),
        "ids": np.ones((4, 256), np.int32),
        "packed": ggufx.Packed(ggufx.quantize_array(numbers(2, 64), "Q4_0"), "Q4_0"),
    }

    def kinds(types: Any, **options: Any) -> list[str]:
        ggufx.save("t.gguf", tensors, types=types, overwrite=True, **options)
        with ggufx.open("t.gguf") as f:
            return [tensor.type for tensor in f.tensors]

    assert kinds(None) == ["F32", "F32", "F32", "F32", "F16", "I32", "Q4_0"]
    assert kinds("q8_0") == ["Q8_0", "F32", "F32", "F32", "Q8_0", "I32", "Q4_0"]
    assert kinds({"conv": "BF16", "blk.0.attn_norm.weight": "F16"}) == [
        "F32",
        "F32",
        "F16",
        "F32",
        "BF16",
        "I32",
        "Q4_0",
    ]
    rules = ggufx.recipe.Recipe.parse("ffn_up=iq4_ks|q5_0\n!attn_norm=bf16\nconv=native\n.*=q8_0")
    assert kinds(rules) == ["IQ4_KS", "F32", "BF16", "F32", "F16", "I32", "Q4_0"]
    assert kinds(rules, dialect="llama.cpp") == ["Q5_0", "F32", "BF16", "F32", "F16", "I32", "Q4_0"]
    with pytest.raises(PlanError, match=r"'convv'.*did you mean 'conv'"):
        kinds({"convv": "Q8_0"})
    with pytest.raises(PlanError, match="none of the 7 tensors"):
        ggufx.save("u.gguf", iter(tensors.items()), types={"convv": "Q8_0"})
    assert listed() == ["t.gguf"]
    with pytest.raises(GGUFError, match="did you mean"):
        kinds("Q8_00")
    with pytest.raises(PlanError, match="packed as Q4_0"):
        kinds({"packed": "Q8_0"})


def test_the_dialect_is_the_first_that_holds_all_types() -> None:
    ggufx.save("i.gguf", {"a": numbers(2, 256), "b": numbers(2, 256)}, types={"a": "IQ4_KS"})
    tensors, keys = read_ids(Path("i.gguf"))
    assert tensors == {"a": 144, "b": 0}
    assert keys["ggufx.dialect"] == "ik_llama.cpp"
    with pytest.raises(PlanError, match=r"'b': ik_llama.cpp cannot hold F8_E4M3_B128 \(beside IQ4_KS\)"):
        ggufx.save("j.gguf", {"a": numbers(2, 256), "b": numbers(2, 256)}, types={"a": "IQ4_KS", "b": "F8_E4M3_B128"})
    with pytest.raises(PlanError, match=r"llama\.cpp cannot hold IQ4_KS"):
        ggufx.save("j.gguf", {"a": numbers(2, 256)}, types="IQ4_KS", dialect="llama.cpp")
    with pytest.raises(UnknownDialect):
        ggufx.save("j.gguf", {}, dialect="llama")
    with ggufx.open("i.gguf") as f:
        ggufx.save("k.gguf", f, f.metadata)
        ggufx.save("l.gguf", f, {**f.metadata.typed(), "ggufx.dialect": "newer"})
    assert read_ids(Path("k.gguf")) == read_ids(Path("l.gguf")) == (tensors, keys)
    Path("k.gguf").unlink()
    Path("l.gguf").unlink()
    assert listed() == ["i.gguf"]


def read_ids(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """As far as it can be read without knowing the types."""
    with ggufx.open(path) as f:
        return {tensor.name: tensor.type_id for tensor in f.tensors}, dict(f.metadata)


def test_packed_bytes_and_tensors_of_open_files_are_copied() -> None:
    rows = ggufx.quantize_array(numbers(40, 3, 256), "Q6_K")
    ggufx.save("a.gguf", {"t": ggufx.Packed(rows, "q6_k"), "flat": ggufx.Packed(rows.tobytes(), "Q6_K", (120, 256))})
    with ggufx.open("a.gguf") as f:
        ggufx.save("b.gguf", {"again": f["t"], "f16": lambda: f["flat"]})
    tensors, _ = read(Path("b.gguf"))
    assert tensors["again"] == (14, [256, 3, 40], rows.tobytes())
    assert tensors["f16"] == (14, [256, 120], rows.tobytes())
    ggufx.save("plain.gguf", {"w": numbers(4, 256)})
    with ggufx.open("plain.gguf") as f:
        ggufx.save("c.gguf", {"w": f["w"]}, types="Q8_0")
    assert read(Path("c.gguf"))[0]["w"][2] == ggufx.quantize_array(numbers(4, 256), "Q8_0").tobytes()


# Laziness and splits -----------------------------------------------------------------------------------------------------


def test_lazy_arrays_are_made_one_after_the_other() -> None:
    alive: list[int] = []

    def make(number: int) -> Callable[[], np.ndarray]:
        def made() -> np.ndarray:
            alive.append(number)
            return np.full((2, 32), number, np.float32)

        return made

    def rows() -> Iterator[np.ndarray]:
        for number in range(5):
            yield np.full((number, 32), number, np.float32)

    lazies: dict[str, Any] = {f"t{n}": ggufx.Lazy((2, 32), "float32", make(n)) for n in range(3)}
    ggufx.save("a.gguf", {**lazies, "rows": ggufx.Lazy((2, 5, 32), np.float32, rows)})
    ggufx.save("b.gguf", ((f"t{n}", make(n)) for n in range(3)))
    assert alive == [0, 1, 2, 0, 1, 2]
    loaded = ggufx.load_file("a.gguf")
    assert loaded["rows"].reshape(10, 32)[:, 0].tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert [int(loaded[f"t{n}"][0, 0]) for n in range(3)] == [0, 1, 2]
    assert list(read(Path("b.gguf"))[1]) == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: np.zeros((2, 32), np.float16), r"declared as float32\[2, 32\].*float16\[2, 32\]"),
        (lambda: np.zeros((3, 32), np.float32), r"gives float32\[3, 32\]"),
        (lambda: [np.zeros((1, 32), np.float32)], r"1 rows came, \[2, 32\] has 2"),
        (lambda: [np.zeros((2, 32), np.float32)] * 2, r"more rows than \[2, 32\]"),
        (lambda: [np.zeros((2, 16), np.float32)], r"gives float32\[2, 16\]"),
        (lambda: "text", "str is no array"),
    ],
)
def test_lazy_arrays_that_are_not_what_they_said(make: Any, says: str) -> None:
    with pytest.raises(PlanError, match=f"'w'.*{says}"):
        ggufx.save("l.gguf", {"w": ggufx.Lazy((2, 32), np.float32, make)})
    assert listed() == []


@pytest.mark.parametrize("declared", [True, False])
def test_splits(declared: bool) -> None:
    tensors = {f"t{n}": numbers(4, 32, seed=n) for n in range(5)}
    given = tensors if declared else iter(tensors.items())
    paths = ggufx.save("s.gguf", given, {"general.name": "n"}, split_max_nbytes=1100, alignment=64)
    names = [f"s-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert [path.name for path in paths] == names == listed()
    members = [read(path) for path in paths]
    assert [list(found) for found, _ in members] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert {name: data for found, _ in members for name, (_, _, data) in found.items()} == {
        name: values.tobytes() for name, values in tensors.items()
    }
    assert [keys for _, keys in members] == [
        {
            **({"general.name": ([8], "n")} if number == 0 else {}),
            "general.alignment": ([4], 64),
            "split.no": ([2], number),
            "split.count": ([2], 3),
            "split.tensors.count": ([5], 5),
        }
        for number in range(3)
    ]
    with ggufx.open(paths[2]) as f:
        assert list(f) == list(tensors)
    with pytest.raises(OutputExists):
        ggufx.save("s.gguf", tensors, split_max_tensors=1)
    with pytest.raises(PlanError, match="sets the keys of a split itself"):
        ggufx.save("u.gguf", tensors, {"split.no": 0})
    assert len(ggufx.save("s.gguf", tensors, split_max_tensors=2, overwrite=True)) == 3


def test_room_for_the_header_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # A file that is "large": its data stays where it was written, and a key fills the room; unless the header outgrew it.
    monkeypatch.setattr("ggufx.partial.MOVED_NBYTES", 100)
    with ggufx.Writer("pad.gguf") as writer:
        for number in range(3):
            writer.add(f"t{number}", numbers(5, 7, seed=number))
        writer.metadata["late"] = 1
    tensors, keys = read(Path("pad.gguf"))
    assert {name: data for name, (_, _, data) in tensors.items()} == {
        f"t{n}": numbers(5, 7, seed=n).tobytes() for n in range(3)
    }
    assert list(keys) == ["late", "ggufx.padding"]
    assert set(keys["ggufx.padding"][1]) == {" "}
    with ggufx.open("pad.gguf") as f:
        assert f["t0"].position > 1 << 20
        assert not f.notes
    with ggufx.Writer("grown.gguf") as writer:
        for number in range(3):
            writer.add(f"t{number}", numbers(5, 7, seed=number))
        writer.metadata["late"] = "x" * (3 << 20)
    tensors, keys = read(Path("grown.gguf"))
    assert {name: data for name, (_, _, data) in tensors.items()} == {
        f"t{n}": numbers(5, 7, seed=n).tobytes() for n in range(3)
    }
    assert list(keys) == ["late"]
    with pytest.raises(PlanError, match="fixed"), ggufx.Writer("f.gguf") as writer:  # noqa: PT012
        writer.declare("t", (2,), "F32")
        writer.add("t", numbers(2))
        writer.metadata["late"] = 1


def test_data_is_moved_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces smaller than the way that the data goes, and larger.
    big = numbers(300, 1000)
    for piece in (1 << 12, 8 << 20):
        monkeypatch.setattr("ggufx.partial._PIECE_NBYTES", piece)
        for extra in (0, (1 << 20) - 200, (1 << 20) - 64, 2 << 20):
            with ggufx.Writer("m.gguf", overwrite=True) as writer:
                writer.add("a", big)
                writer.add("b", np.arange(3, dtype=np.int8))
                writer.metadata["k"] = "x" * extra
            content = Path("m.gguf").read_bytes()
            assert content[-32:] == b"\0\1\2" + bytes(29)
            assert content[-32 - big.nbytes : -32] == big.tobytes()
            assert read(Path("m.gguf"))[1] == {"k": ([8], "x" * extra)}


# Refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "type", "error", "says"),
    [
        ("w", np.zeros((2, 100), np.float32), "Q4_K", CodecError, "100 elements is not a multiple of the block of 256"),
        ("w", np.array([[1.0, np.nan] * 16], np.float32), "Q8_0", NonFiniteError, "'w': found nan at row 0, column 1"),
        ("w", np.full((2, 3, 32), np.inf, np.float16), "Q8_0", NonFiniteError, "found inf at expert 0, row 0"),
        ("w", np.array([[1e6] * 32], np.float32), "F16", OutOfRangeError, "'w': found 1e\\+06 at row 0, column 0"),
        ("w", np.array([[1e30] * 32], np.float32), "Q8_0", OutOfRangeError, "beyond what Q8_0 can hold"),
        ("w", np.zeros(4, np.uint8), None, CodecError, "uint8 is no type of a GGUF; give packed bytes as ggufx.Packed"),
        ("w", np.zeros((1, 34), np.uint8), "Q8_0", CodecError, "ggufx.Packed"),
        ("w", np.zeros(4, ml_dtypes.float8_e4m3fn), None, CodecError, "no type that keeps float8_e4m3fn; name a type"),
        ("w", np.zeros(4, np.complex64), "F32", CodecError, "real numbers, got complex64"),
        ("w", np.zeros(4, np.bool_), None, CodecError, "no type that keeps bool"),
        ("w", np.zeros(4, np.uint32), None, CodecError, "no type that keeps uint32"),
        ("w", np.array(["a"]), None, CodecError, "no type that keeps <U1"),
        ("w", np.array([3e9]), "I32", CodecError, "holds integers"),
        ("w", [1.0, 2.0], None, PlanError, "a list is no array"),
        ("w", None, None, PlanError, "a NoneType is no array"),
        ("w", np.zeros(4, np.float32), "Q9_9", UnknownType, "Q9_9"),
        ("", np.zeros(4, np.float32), None, PlanError, "1 to 65535 bytes"),
        ("n" * 65536, np.zeros(4, np.float32), None, PlanError, "65536 bytes"),
        ("\ud800", np.zeros(4, np.float32), None, PlanError, "surrogate"),
        (7, np.zeros(4, np.float32), None, PlanError, "must be a str, got int"),
        ("first", np.zeros(4, np.float32), None, PlanError, "written already"),
    ],
)
def test_what_a_writer_refuses(name: Any, data: Any, type: str | None, error: Any, says: str) -> None:
    with ggufx.Writer("w.gguf") as writer:
        writer.add("first", np.arange(5, dtype=np.float32))
        with pytest.raises(error, match=says) as caught:
            writer.add(name, data, type)
        assert "\n" not in str(caught.value)
        # It goes on as if it had not been asked for.
        writer.add("last", np.arange(6, dtype=np.float32))
    tensors, _ = read(Path("w.gguf"))
    assert {key: np.frombuffer(value[2], "<f4").tolist() for key, value in tensors.items()} == {
        "first": [0, 1, 2, 3, 4],
        "last": [0, 1, 2, 3, 4, 5],
    }


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "leave the key out"),
        (b"bytes", "np.frombuffer"),
        ({"a": 1}, "json.dumps"),
        ([], "no element type"),
        ([1, "a"], "must be of one type"),
        ([[[[[[[[[1]]]]]]]]], "more than 8 deep"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        ([1e300, 1], "more than FLOAT32 holds"),
        (np.zeros((2, 2)), "2 axes"),
        (np.array([1j]), "complex128"),
        ("\udfff\ud800", "surrogate"),
        (Value(ValueType.UINT8, 256), "'256' is no UINT8"),
        (Value(ValueType.STRING, 5), "'5' is no STRING"),
    ],
)
def test_values_that_no_key_can_have(value: Any, says: str) -> None:
    with pytest.raises(PlanError, match=f"'the.key'.*{says}"):
        ggufx.Writer("w.gguf", {"the.key": value})
    assert listed() == []


def test_declarations_are_kept() -> None:
    def declared() -> ggufx.Writer:
        writer = ggufx.Writer("d.gguf")
        writer.declare("a", (2, 32), "Q8_0")
        return writer

    with pytest.raises(PlanError, match="'a' was declared and is not written"), declared():
        pass
    with pytest.raises(PlanError, match=r"declared as \[2, 32\], and has \[3, 32\]"), declared() as writer:
        writer.add("a", numbers(3, 32))
    with pytest.raises(PlanError, match="declared as Q8_0, not as F32"), declared() as writer:
        writer.add("a", numbers(2, 32), "F32")
    with pytest.raises(PlanError, match="'b': was not declared"), declared() as writer:
        writer.add("b", numbers(2, 32))
    with pytest.raises(PlanError, match="declared already"), declared() as writer:
        writer.declare("a", (2,), "F32")
    with pytest.raises(PlanError, match="before the first one"), declared() as writer:  # noqa: PT012
        writer.add("a", numbers(2, 32))
        writer.declare("b", (2,), "F32")
    with pytest.raises(PlanError, match="written already"), declared() as writer:  # noqa: PT012
        writer.add("a", numbers(2, 32))
        writer.add("a", numbers(2, 32))
    assert listed() == []


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggufx.container.MAX_HEADER_NBYTES", 1 << 16)
    with pytest.raises(PlanError, match="at least 1, got"):
        ggufx.save("a.gguf", {}, split_max_tensors=0)
    with pytest.raises(PlanError, match=r"less than 2\^60 elements"):
        ggufx.save("a.gguf", {"w": ggufx.Lazy((1 << 30, 1 << 30), np.int8, lambda: None)})
    with pytest.raises(PlanError, match=r"take 656\d\d bytes; no more than 65536 are read"):
        ggufx.save("a.gguf", {}, {"k": " " * (1 << 16)})
    assert listed() == []


def test_what_llama_cpp_does_not_load_is_said() -> None:
    with pytest.warns(OutputWarning, match="names of more than 63 bytes"):
        ggufx.save("a.gguf", {"n" * 64: numbers(2)})
    with pytest.warns(OutputWarning, match="more than 4 axes"):
        ggufx.save("b.gguf", {"w": numbers(1, 1, 1, 1, 2)})


# Outputs -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_what_failed(workplace: Path) -> None:
    writer = ggufx.Writer("a.gguf")
    writer.add("w", numbers(3))
    assert [name for name in listed() if not name.startswith(".a.gguf.")] == []
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert listed() == []
    with pytest.raises(ValueError, match="is discarded"):
        writer.add("w", numbers(3))
    forgotten = ggufx.Writer("a.gguf", split_max_tensors=1)
    forgotten.add("v", numbers(3))
    forgotten.add("w", numbers(3))
    assert len(listed()) == 2
    del forgotten
    gc.collect()
    assert listed() == []

    def failing() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", numbers(2)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        ggufx.save("a.gguf", failing())
    with pytest.raises(FileNotFoundError):
        ggufx.save("a.gguf", {"w": lambda: np.load("absent.npy")})
    assert listed() == []


def test_outputs_that_exist() -> None:
    Path("a.gguf").write_text("mine")
    with pytest.raises(OutputExists):
        ggufx.Writer("a.gguf")
    ggufx.save("b.gguf", {"w": numbers(2)})
    with pytest.raises(OutputExists):
        ggufx.save_file({"w": numbers(2)}, "b.gguf")
    # One that comes into being meanwhile is kept, and so is what a failed run would have replaced.
    with pytest.raises(OutputExists), ggufx.Writer("c.gguf") as writer:  # noqa: PT012
        writer.add("w", numbers(2))
        Path("c.gguf").write_text("theirs")
    with pytest.raises(NonFiniteError):
        ggufx.save("a.gguf", {"w": np.array([[np.nan] * 32])}, types="Q8_0", overwrite=True)
    assert (Path("a.gguf").read_text(), Path("c.gguf").read_text()) == ("mine", "theirs")
    ggufx.save("a.gguf", {"w": numbers(2)}, overwrite=True)
    assert list(read(Path("a.gguf"))[0]) == ["w"]
    assert listed() == ["a.gguf", "b.gguf", "c.gguf"]
    with pytest.raises(PlanError, match="there is no folder absent"):
        ggufx.save("absent/a.gguf", {})
    assert Path("a.gguf").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_member_whose_first_tensor_failed_is_none() -> None:
    with ggufx.Writer("s.gguf", split_max_tensors=1) as writer:
        writer.add("a", numbers(2))
        with pytest.raises(NonFiniteError):
            writer.add("b", np.full((1, 32), np.nan), "Q8_0")
    assert listed() == ["s-00001-of-00001.gguf"]
    assert read(Path("s-00001-of-00001.gguf"))[1]["split.tensors.count"] == ([5], 1)


def test_the_second_member_of_a_split_exists() -> None:
    with pytest.raises(OutputExists), ggufx.Writer("s.gguf", split_max_tensors=1) as writer:  # noqa: PT012
        writer.add("a", numbers(2))
        writer.add("b", numbers(2))
        Path("s-00002-of-00002.gguf").write_text("theirs")
    assert listed() == ["s-00002-of-00002.gguf"]


def test_a_full_disk_is_one_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import resource, signal, numpy as np, ggufx\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, -1))\n"
        "for lazy in (False, True):\n"
        "    try:\n"
        "        data = np.ones(1 << 20, np.float32)\n"
        "        ggufx.save('f.gguf', {'w': (lambda: data) if lazy else data})\n"
        "    except ggufx.errors.DiskError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("f.gguf: cannot be written (") == 2
    assert listed() == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits
    assert issubclass(DiskError, GGUFError)


def test_memory_is_bounded() -> None:
    code = (
        "import resource, numpy as np, ggufx\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "make = lambda: (np.full((64, 8192), n, np.float32) for n in range(60))\n"
        "ggufx.save('m.gguf', {'w': ggufx.Lazy((3840, 8192), np.float32, make)})\n"
        "with ggufx.open('m.gguf') as f: ggufx.save('n.gguf', f)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 60 * 1024  # of 126 MB
    Path("m.gguf").unlink()
    Path("n.gguf").unlink()
