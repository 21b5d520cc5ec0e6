"""One small file per rule of the container, built by hand, each refused by name and without being believed."""

from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggufx
from ggufx.container import read_container
from ggufx.errors import ContainerError, GGUFError, UnknownDialect

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
HUGE = 2**63


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def kv(key: str | bytes, value_type: int, value: bytes) -> bytes:
    return string(key) + u32(value_type) + value


def line(name: str | bytes, dims: tuple[int, ...] = (32,), type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def build(
    kvs: tuple[bytes, ...] = (),
    lines: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + u32(version)
    head += u64(len(lines) if n_tensors is None else n_tensors) + u64(len(kvs) if n_kv is None else n_kv)
    head += b"".join(kvs) + b"".join(lines)
    return head + bytes(-len(head) % alignment) + data


ROW = bytes(range(128))  # 32 float32: a whole number of alignments
GOOD = build(
    (
        kv("general.architecture", STRING, string("llama")),
        kv("a.u8", U8, b"\x01"),
        kv("a.bool", BOOL, b"\x01"),
        kv("a.f64", F64, struct.pack("<d", 0.5)),
        kv("tokens", ARRAY, u32(STRING) + u64(3) + string("a") + string("bé") + string("")),
        kv("scores", ARRAY, u32(F32) + u64(2) + struct.pack("<2f", 1, 2)),
    ),
    (line("x", (32,)), line("y", (32, 2), 8, 128), line("z", (32,), 0, 224)),
    ROW + bytes(96) + ROW,
)
"""Valid; the second tensor (68 bytes of Q8_0) has padding, the last one ends with the file."""


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return path


def test_the_file_that_the_others_are_broken_from_is_valid(tmp_path: Path) -> None:
    with ggufx.open(write(tmp_path, GOOD)) as f:
        assert list(f) == ["x", "y", "z"]
        assert [t.shape for t in f.tensors] == [(32,), (2, 32), (32,)]
        assert list(f.metadata["tokens"]) == ["a", "bé", ""]
        assert f["z"].numpy().tobytes() == ROW


X = line("x")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "magic"),
    "one byte": (b"G", "magic"),
    "three bytes": (b"GGU", "magic"),
    "wrong magic": (build(magic=b"GGML"), "magic"),
    "swapped magic": (build(magic=b"FUGG"), "magic"),
    "magic alone": (b"GGUF", "truncated"),
    "version 0": (build(version=0), "version"),
    "version 4": (build(version=4), "version"),
    "big-endian version 1": (b"GGUF" + struct.pack(">III", 1, 0, 0) + bytes(8), "version"),
    "2^63 tensors": (build(n_tensors=HUGE), "count"),
    "2^63 keys": (build(n_kv=HUGE), "count"),
    "2^64 - 1 of both": (build(n_tensors=2**64 - 1, n_kv=2**64 - 1), "count"),
    "one tensor too many": (build((), (X,), ROW, n_tensors=9), "count"),
    "array of 2^63 strings": (build((kv("k", ARRAY, u32(STRING) + u64(HUGE)),)), "truncated"),
    "array of 2^63 u64": (build((kv("k", ARRAY, u32(U64) + u64(HUGE)),)), "truncated"),
    "array of 2^61 u64": (build((kv("k", ARRAY, u32(U64) + u64(2**61)),)), "truncated"),
    "array of 2^63 bools": (build((kv("k", ARRAY, u32(BOOL) + u64(HUGE)),)), "truncated"),
    "string of 2^63": (build((kv("k", STRING, u64(HUGE) + b"abc"),)), "truncated"),
    "string of 2^64 - 1": (build((kv("k", STRING, u64(2**64 - 1) + b"abc"),)), "truncated"),
    "first array element of 2^63": (
        build((kv("k", ARRAY, u32(STRING) + u64(3) + u64(HUGE) + string("b") + string("c")),)),
        "truncated",
    ),
    "last array element of 2^63": (
        build((kv("k", ARRAY, u32(STRING) + u64(2) + string("a") + u64(HUGE)),)),
        "truncated",
    ),
    "array elements past the end": (
        build((kv("k", ARRAY, u32(STRING) + u64(2) + u64(200) + bytes(8)),)),
        "truncated",
    ),
    "key of 2^63": (build((u64(HUGE) + b"k" + u32(U8) + b"\0",)), "string-length"),
    "key of 65536": (build((kv("k" * 65536, U8, b"\0"),)), "string-length"),
    "tensor name of 2^63": (build((), (u64(HUGE) + bytes(32),), ROW), "string-length"),
    "2^63 elements": (build((), (line("x", (2**32, 2**31)),), ROW), "dims"),
    "2^64 elements, which wrap to 0": (build((), (line("x", (2**32, 2**32)),), ROW), "dims"),
    "2^256 elements": (build((), (line("x", (2**63, 2**63, 2**63, 2**63)),), ROW), "dims"),
    "one dim of 2^63": (build((), (line("x", (HUGE,)),), ROW), "dims"),
    "a huge dim beside a 0": (build((), (line("x", (0, HUGE)),), ROW), "dims"),
    "huge dims beside a 0": (build((), (line("x", (2**62, 0, 2**62)),), ROW), "dims"),
    "65 dims": (build((), (line("x", (32, *[1] * 64)),), ROW), "dims"),
    "an empty tensor that NumPy cannot hold": (build((), (line("x", (2**60, 0)),)), "dims"),
    "2^32 - 1 dims": (build((), (string("x") + u32(2**32 - 1) + bytes(24),), ROW), "dims"),
    "alignment 0": (build((kv("general.alignment", U32, u32(0)),)), "alignment"),
    "alignment 3": (build((kv("general.alignment", U32, u32(3)),)), "alignment"),
    "alignment 48": (build((kv("general.alignment", U32, u32(48)),), (X,), ROW, alignment=48), "alignment"),
    "alignment as u64": (build((kv("general.alignment", U64, u64(32)),)), "alignment"),
    "alignment as a string": (build((kv("general.alignment", STRING, string("32")),)), "alignment"),
    "alignment as an array": (
        build((kv("general.alignment", ARRAY, u32(U32) + u64(1) + u32(32)),)),
        "alignment",
    ),
    "unaligned offset": (build((), (X, line("y", (32,), 0, 129)), ROW * 3), "offset"),
    "decreasing offset": (build((), (X, line("y", (32,), 0, 128), line("z", (32,), 0, 0)), ROW * 3), "offset"),
    "first offset not 0": (build((), (line("x", (32,), 0, 32),), ROW + bytes(32)), "offset"),
    "offset beyond the end": (build((), (X, line("y", (32,), 0, 2**40)), ROW * 2), "truncated"),
    "offset 2^64 - 32": (build((), (X, line("y", (32,), 0, 2**64 - 32)), ROW * 2), "truncated"),
    "duplicate tensor": (build((), (X, line("x", (32,), 0, 128)), ROW * 2), "duplicate-tensor"),
    "duplicate key": (build((kv("k", U8, b"\0"), kv("k", U8, b"\0"))), "duplicate-key"),
    "duplicate key of another type": (build((kv("k", U8, b"\0"), kv("k", U16, b"\0\0"))), "duplicate-key"),
    "alignment 2^31": (build((kv("general.alignment", U32, u32(2**31)),)), "alignment"),
    "alignment 2^22": (build((kv("general.alignment", U32, u32(2**22)),)), "alignment"),
    "arrays nested nine deep": (
        build((kv("k", ARRAY, (u32(ARRAY) + u64(1)) * 8 + u32(U8) + u64(1) + b"\0"),)),
        "nested-array",
    ),
    "array of 2^60 arrays": (build((kv("k", ARRAY, u32(ARRAY) + u64(2**60)),)), "truncated"),
    "array of an array of 2^63": (build((kv("k", ARRAY, u32(ARRAY) + u64(1) + u32(U8) + u64(HUGE)),)), "truncated"),
    "value type 13": (build((kv("k", 13, bytes(8)),)), "value-type"),
    "value type 2^32 - 1": (build((kv("k", 2**32 - 1, bytes(8)),)), "value-type"),
    "array of value type 13": (build((kv("k", ARRAY, u32(13) + u64(1) + bytes(8)),)), "value-type"),
    "bool 2": (build((kv("k", BOOL, b"\x02"),)), "bool"),
    "bool 255 in an array": (build((kv("k", ARRAY, u32(BOOL) + u64(3) + b"\0\1\xff"),)), "bool"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_by_its_rule(case: str, tmp_path: Path) -> None:
    data, rule = HOSTILE[case]
    path = write(tmp_path, data)
    tracemalloc.start()
    try:
        with pytest.raises(ContainerError) as caught:
            read_container(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.rule == rule
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert f"[rule: {rule}]" in str(caught.value)
    assert peak < 10_000_000, f"{peak} bytes were allocated on the file's word"


@pytest.mark.parametrize(
    ("value_type", "value", "rule"),
    [
        (STRING, u64(2**38), "header-length"),
        (ARRAY, u32(F32) + u64(2**36), "header-length"),
        (ARRAY, u32(STRING) + u64(2**36), "header-length"),
        (ARRAY, u32(ARRAY) + u64(2**36), "header-length"),
        (ARRAY, u32(ARRAY) + u64(2**20), "nested-array"),
    ],
)
def test_a_sparse_file_gets_no_memory_either(value_type: int, value: bytes, rule: str, tmp_path: Path) -> None:
    path = write(tmp_path, build((kv("k", value_type, value),)))
    os.truncate(path, 2**40)
    tracemalloc.start()
    try:
        with pytest.raises(ContainerError) as caught:
            read_container(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.rule == rule
    assert peak < 2**20


@pytest.mark.parametrize("case", ["array of 2^63 strings", "array of 2^63 u64", "2^63 tensors", "2^63 keys"])
def test_a_false_count_is_named(case: str, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=rf"claims .*{HUGE}"):
        read_container(write(tmp_path, HOSTILE[case][0]))


MISFITS = {
    "tensors that overlap": build((), (X, line("y", (32,), 0, 96)), ROW + ROW),
    "tensors at the same place": build((), (X, line("y", (32,), 0, 0)), ROW),
    "a row that is no multiple of the block": build((), (line("x", (33,), 8),), ROW),
    "less data than the last tensor takes": build((), (X,), ROW[:-1]),
    "no data at all": build((), (X,)),
    "a size that is not the type's": build((), (line("x", (32,), 28),), ROW),
    "an empty tensor whose rows are no whole blocks": build((), (line("x", (33, 0), 8),)),
}


@pytest.mark.parametrize("case", MISFITS)
def test_every_byte_is_accounted_for_or_the_file_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownDialect, match=r"tensor '.' .* the model is corrupted or incomplete"):
        ggufx.open(write(tmp_path, MISFITS[case]))


def test_a_gap_between_tensors_is_named_as_one(tmp_path: Path) -> None:
    data = build((), (X, line("y", (32,), 0, 160)), ROW + bytes(32) + ROW)
    with pytest.raises(
        UnknownDialect, match=r"'x' .* has 160 bytes .* takes 128 bytes as F32: there is a gap"
    ) as caught:
        ggufx.open(write(tmp_path, data))
    assert "corrupted" not in str(caught.value)


def open_and_read_all(path: Path) -> None:
    with ggufx.open(path) as f:
        for key in f.metadata:
            f.metadata.value(key).to_json()
        for tensor in f.tensors:
            repr(tensor)
            assert tensor.packed.nbytes == tensor.nbytes
            if tensor.codec is not None and tensor.codec.can_decode:
                tensor.numpy()


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    open_and_read_all(write(tmp_path, GOOD))
    for length in range(len(GOOD)):
        path = write(tmp_path, GOOD[:length])
        with pytest.raises((ContainerError, UnknownDialect)):
            ggufx.open(path)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_raise_nothing_but_our_errors(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, mask in flips:
        data[position] ^= mask
    with contextlib.suppress(GGUFError):
        open_and_read_all(write(tmp_path, bytes(data)))


def test_every_single_flipped_header_byte_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    header_nbytes = len(GOOD) - 128 - 96 - 128
    for position in range(header_nbytes):
        for mask in (0x01, 0x80, 0xFF):
            data = bytearray(GOOD)
            data[position] ^= mask
            with contextlib.suppress(GGUFError):
                open_and_read_all(write(tmp_path, bytes(data)))


@pytest.mark.parametrize(
    ("key", "value_type", "value"),
    [
        ("split.count", STRING, string("two")),
        ("split.count", ARRAY, u32(U16) + u64(2) + b"\2\0\2\0"),
        ("split.count", F32, struct.pack("<f", float("nan"))),
        ("split.count", F32, struct.pack("<f", float("inf"))),
        ("split.count", I32, struct.pack("<i", -1)),
        ("ggufx.dialect", U32, u32(7)),
        ("ggufx.dialect", STRING, string("no such fork")),
    ],
)
def test_our_keys_with_values_of_another_kind(tmp_path: Path, key: str, value_type: int, value: bytes) -> None:
    path = write(tmp_path, build((kv(key, value_type, value),), (X,), ROW))
    with contextlib.suppress(GGUFError):
        ggufx.open(path).close()


@pytest.mark.parametrize("key", ["split.no", "split.tensors.count"])
def test_split_keys_of_another_kind_are_refused(tmp_path: Path, key: str) -> None:
    value = {"split.no": kv("split.no", U16, b"\0\0"), "split.tensors.count": kv("split.tensors.count", I32, u32(1))}
    value[key] = kv(key, ARRAY, u32(U32) + u64(2) + u32(0) + u32(0))
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(build((kv("split.count", U16, b"\2\0"), *value.values()), (X,), ROW))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(
        build((kv("split.count", U16, b"\2\0"), kv("split.no", U16, b"\1\0")), (line("y"),), ROW)
    )
    with pytest.raises(ContainerError, match=rf"{key} has type ARRAY") as caught:
        ggufx.open(path)
    assert caught.value.rule == "split-key"


def test_a_missing_file_raises_as_open_does_and_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ggufx.open(tmp_path / "no.gguf")
    with pytest.raises(GGUFError, match="is no model"):
        ggufx.open(tmp_path)


def test_no_tensors_and_no_keys_is_a_valid_file(tmp_path: Path) -> None:
    for data in (build(), build()[:24]):
        with ggufx.open(write(tmp_path, data)) as f:
            assert len(f) == len(f.metadata) == 0


def test_scalars_and_empty_tensors_are_valid(tmp_path: Path) -> None:
    lines = (line("scalar", ()), line("none", (32, 0), 8, 32), line("x", (32,), 0, 32))
    with ggufx.open(write(tmp_path, build((), lines, ROW[:4] + bytes(28) + ROW))) as f:
        assert f["scalar"].shape == ()
        assert f["scalar"].numpy() == np.frombuffer(ROW[:4], "<f4")[0]
        assert f["none"].numpy().shape == (0, 32)
        assert f["x"].packed.tobytes() == ROW
