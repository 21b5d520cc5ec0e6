"""Importance matrices: files built by hand with struct and by the gguf package, read back by the gguf package."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command import Run

import ggufx
from ggufx import imatrix
from ggufx.container import ValueType
from ggufx.errors import DiskError, GGUFError, OutputExists
from ggufx.imatrix import ColumnEnergy, RowImportance, energy
from ggufx.measure import measure

Cli = Callable[..., Run]
RNG = np.random.default_rng(5)
DOWN, UP = "blk.1.ffn_down_exps.weight", "blk.1.ffn_up_exps.weight"
TAIL = struct.pack("<ii", 7, 4) + b"wiki"


def legacy(entries: list[tuple[str, int, Any]], tail: bytes = TAIL) -> bytes:
    """Return the bytes of a legacy file: (name, calls, values times calls) each."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        data = np.asarray(values, "<f4")
        parts.append(struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", calls, data.size))
        parts.append(data.tobytes())
    return b"".join(parts) + tail


def modern(
    path: Path, entries: dict[str, tuple[Any, Any]], datasets: tuple[str, ...] = ("a", "b"), chunk_size: int = 512
) -> Path:
    """Write a GGUF matrix, name -> (sums [n_rows, length], counts [n_rows]), with the gguf package."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", 12)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_modern(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read tensors and keys with the gguf package."""
    reader = gguf.GGUFReader(path)
    return {t.name: np.array(t.data) for t in reader.tensors}, {k: f.contents() for k, f in reader.fields.items()}


def read_legacy(path: Path) -> tuple[dict[str, tuple[int, np.ndarray]], bytes]:
    """Read a legacy file as llama.cpp's loader walks it; the tail is returned as bytes."""
    data, entries = path.read_bytes(), {}
    (count,), at = struct.unpack_from("<i", data), 4
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        calls, size = struct.unpack_from("<ii", data, at)
        entries[name] = calls, np.frombuffer(data, "<f4", size, at + 8)
        at += 8 + 4 * size
    return entries, data[at:]


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def sums() -> np.ndarray:
    return (RNG.random(64) * 10).astype(np.float32)


# Reading --------------------------------------------------------------------------------------------------------------


def test_the_legacy_format(tmp_path: Path, sums: np.ndarray) -> None:
    path = put(tmp_path / "imatrix.gguf", legacy([("blk.0.ffn_down.weight", 4, sums)]))  # the suffix says nothing
    found = imatrix.load(path)
    assert (found.format, found.chunk_count, found.chunk_size, found.datasets) == ("dat", 7, 0, ("wiki",))
    name = "blk.0.ffn_down.weight"
    assert np.array_equal(found[name], (sums / np.float32(4)).reshape(1, -1))
    assert np.array_equal(found.sums(name), sums.reshape(1, -1))
    assert found.counts(name).tolist() == [4]
    values, missing = found.rows(name, (8, 64))
    assert np.array_equal(values, found[name])
    assert (values.dtype, missing) == (np.float32, 0)
    assert np.array_equal(found.rows(name, (2, 8, 32)).values, found[name].reshape(2, 32))
    assert found.rows(name, (5, 8, 64)).values.shape == (1, 64)
    assert found.rows("other.weight", (8, 64)) is None
    assert "other.weight" not in found


def test_values_without_calls_are_taken_as_they_are(tmp_path: Path) -> None:
    found = imatrix.load(put(tmp_path / "m", legacy([("x", 0, [1, 2])])))
    assert found["x"].tolist() == [[1, 2]]


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 7), struct.pack("<ii", 7, 0), TAIL])
def test_the_tail_of_a_legacy_file_is_optional(tmp_path: Path, tail: bytes) -> None:
    found = imatrix.load(put(tmp_path / "m", legacy([("x", 1, [1, 2])], tail)))
    assert found.chunk_count == (7 if tail else 0)
    assert found.datasets == (("wiki",) if tail == TAIL else ())


def test_the_gguf_format_with_an_expert_that_saw_nothing(tmp_path: Path) -> None:
    sums, counts = RNG.random((3, 32)).astype(np.float32), np.array([2.0, 0.0, 5.0], np.float32)
    found = imatrix.load(modern(tmp_path / "imatrix.dat", {UP: (sums, counts)}))
    assert (found.format, found.chunk_count, found.chunk_size, found.datasets) == ("gguf", 12, 512, ("a", "b"))
    assert np.array_equal(found[UP][[0, 2]], sums[[0, 2]] / counts[[0, 2], None])
    assert not found[UP][1].any()
    assert np.array_equal(found.sums(UP), sums)
    assert found.counts(UP).tolist() == [2, 0, 5]
    values, missing = found.rows(UP, (3, 7, 32))
    assert np.array_equal(values[[0, 2]], found[UP][[0, 2]])
    assert values[1].tolist() == [1] * 32
    assert missing == 1


def test_one_count_serves_all_matrices_of_a_dense_stack(tmp_path: Path) -> None:
    # llama-imatrix writes attn_k_b so: the sums of all heads in one row.
    sums = RNG.random((1, 4 * 16)).astype(np.float32)
    found = imatrix.load(modern(tmp_path / "m", {"blk.0.attn_k_b.weight": (sums, [8])}))
    values, missing = found.rows("blk.0.attn_k_b.weight", (4, 32, 16))
    assert np.array_equal(values, (sums / np.float32(8)).reshape(4, 16))
    assert missing == 0


def test_counts_are_rounded_as_llama_cpp_does(tmp_path: Path) -> None:
    found = imatrix.load(modern(tmp_path / "m", {UP: (np.ones((3, 2)), [0.4, 0.5, 2.5])}))
    assert found.counts(UP).tolist() == [0, 1, 3]


def test_rows_without_data_become_one_and_are_counted(tmp_path: Path) -> None:
    zero_sum = modern(tmp_path / "m.gguf", {UP: ([[1, 2], [0, 0], [0, 3]], [4, 4, 4])})
    values, missing = imatrix.load(zero_sum).rows(UP, (3, 5, 2))
    assert values.tolist() == [[0.25, 0.5], [1, 1], [0, 0.75]]
    assert missing == 1
    # A legacy stack: expert 0 has data, 1 has zeros, 2 what llama-imatrix writes for no data, 3 happens to have one 1.
    old = put(tmp_path / "m.dat", legacy([(UP, 4, [1, 2, 0, 0, 4, 4, 4, 2]), ("flat", 4, [4, 4]), ("zero", 4, [0, 0])]))
    matrix = imatrix.load(old)
    values, missing = matrix.rows(UP, (4, 5, 2))
    assert values.tolist() == [[0.25, 0.5], [1, 1], [1, 1], [1, 0.5]]
    assert missing == 2
    assert matrix.rows("flat", (5, 2)).missing == 0
    assert matrix.rows("zero", (5, 2)).missing == 1
    assert matrix.rows("zero", (5, 2)).values.tolist() == [[1, 1]]


def test_the_average_leaves_out_experts_without_data() -> None:
    assert RowImportance(np.array([[2, 4], [1, 1], [4, 6]], np.float32), 1).average().tolist() == [3, 5]
    assert RowImportance(np.ones((2, 2), np.float32), 2).average().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 128), r"imatrix size 64 is different from tensor size 128 for blk\.0\.ffn_down\.weight \(1 x 128\)"),
        ((3, 8, 32), r"imatrix size 64 is different from tensor size 96 for blk\.0\.ffn_down\.weight \(3 x 32\)"),
        ((8, 32), r"imatrix size 64 is different from tensor size 32"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, sums: np.ndarray, shape: tuple[int, ...], message: str
) -> None:
    found = imatrix.load(put(tmp_path / "m", legacy([("blk.0.ffn_down.weight", 4, sums)])))
    with pytest.raises(GGUFError, match=message):
        found.rows("blk.0.ffn_down.weight", shape)


def test_counts_that_do_not_fit_the_experts_are_refused_by_name(tmp_path: Path) -> None:
    found = imatrix.load(modern(tmp_path / "m", {UP: (np.ones((4, 4)), [1, 1, 1, 1])}))
    assert found.rows(UP, (4, 3, 4)).missing == 0  # all 1, but a GGUF says by its counts what has data
    with pytest.raises(GGUFError, match=r"imatrix has 4 counts for the 8 experts of blk\.1\.ffn_up_exps\.weight"):
        found.rows(UP, (8, 3, 2))


def test_entries_of_single_experts_are_joined(tmp_path: Path) -> None:
    entries = [(f"blk.0.ffn_down.{e}.weight", 2, np.full(4, 2 * (e + 2))) for e in (0, 1, 3)]
    found = imatrix.load(put(tmp_path / "m", legacy(entries)))
    values, missing = found.rows("blk.0.ffn_down_exps.weight", (4, 9, 4))
    assert values[:, 0].tolist() == [2, 3, 1, 5]
    assert missing == 1
    assert found.rows("blk.0.ffn_down.3.weight", (9, 4)).values.tolist() == [[5] * 4]
    assert found.rows("blk.1.ffn_down_exps.weight", (4, 9, 4)) is None
    with pytest.raises(GGUFError, match=r"has 'blk\.0\.ffn_down\.3\.weight', but .* has 3 experts"):
        found.rows("blk.0.ffn_down_exps.weight", (3, 9, 4))
    with pytest.raises(GGUFError, match=r"imatrix size 4 is different from tensor size 8 for .*_exps.weight, of which"):
        found.rows("blk.0.ffn_down_exps.weight", (4, 9, 8))


def test_a_tensor_without_data_takes_that_of_one_with_the_same_input(tmp_path: Path) -> None:
    entries = [
        ("blk.0.attn_kv_b.weight", 1, [2, 3]),
        ("blk.0.ffn_up_exps.weight", 1, [4, 5, 6, 7]),
        ("blk.1.ffn_gate_up_exps.weight", 1, [8, 9]),
        ("blk.2.ffn_gate.weight", 1, [1, 2]),
        ("blk.2.ffn_up.weight", 1, [3, 4]),
    ]
    found = imatrix.load(put(tmp_path / "m", legacy(entries)))
    assert found.rows("blk.0.attn_v_b.weight", (3, 5, 2)).values.tolist() == [[2, 3]]
    assert found.rows("blk.0.attn_k_b.weight", (3, 5, 2)) is None  # transposed: it sees other activations
    assert found.rows("blk.0.attn_v_b.weight", (3, 5, 4)) is None  # lent only where it fits
    assert found.rows("blk.0.ffn_gate_exps.weight", (2, 5, 2)).values.tolist() == [[4, 5], [6, 7]]
    assert found.rows("blk.0.ffn_gate_up_exps.weight", (2, 5, 2)).values.tolist() == [[4, 5], [6, 7]]
    assert found.rows("blk.1.ffn_gate_exps.weight", (1, 5, 2)).values.tolist() == [[8, 9]]
    assert found.rows("blk.1.ffn_up_exps.weight", (1, 5, 2)).values.tolist() == [[8, 9]]
    assert found.rows("blk.2.ffn_gate.weight", (5, 2)).values.tolist() == [[1, 2]]  # its own comes first
    assert found.rows("blk.2.ffn_down.weight", (5, 2)) is None


def test_heads_below_each_other_have_weights_of_their_own(tmp_path: Path) -> None:
    """As llama-imatrix records attn_k_b, which has three axes in its files and two in ik_llama.cpp's."""
    rows = np.arange(1, 4 * 32 + 1, dtype=np.float32).reshape(4, 32)
    path = put(tmp_path / "i.dat", legacy([("blk.0.attn_k_b.weight", 1, rows), ("blk.0.attn_q_b.weight", 1, rows)]))
    matrix = imatrix.load(path)
    for shape in ((4, 64, 32), (256, 32)):
        found = matrix.rows("blk.0.attn_k_b.weight", shape)
        assert found is not None
        assert np.array_equal(found.values, rows)
    for name, shape in (("k_b", (255, 32)), ("k_b", (256, 48)), ("q_b", (256, 32))):
        with pytest.raises(GGUFError, match="imatrix size 128 is different"):
            matrix.rows(f"blk.0.attn_{name}.weight", shape)


def test_values_stay_in_the_file_until_asked_for(tmp_path: Path) -> None:
    big = 6_000_000
    head = struct.pack("<ii", 3, 1)
    entry = struct.pack("<ii", 1, big) + np.full(big, 2, "<f4").tobytes()
    data = head + b"a" + entry + struct.pack("<i", 1) + b"b" + entry + struct.pack("<i", 1) + b"c"
    path = put(tmp_path / "m", data + struct.pack("<iif", 1, 1, 3.0))
    del data, entry
    tracemalloc.start()
    found = imatrix.load(path)
    imatrix.summary(found)
    imatrix.save(found, tmp_path / "out.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 < path.stat().st_size
    assert found.rows("c", (2, 1)).values.tolist() == [[3]]


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = put(tmp_path / "m", legacy([("x", 1, [1, 2])]))
    found = imatrix.load(path)
    again = pickle.loads(pickle.dumps(found))
    assert again["x"].tolist() == [[1, 2]]
    put(path, legacy([("x", 1, [1, 2, 3])]))
    with pytest.raises(GGUFError, match="changed since it was loaded"):
        found["x"]


# Hostile files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "failed reading the number of entries"),
        (b"\xff\xff\xff\x7f", "not an importance matrix"),
        (struct.pack("<i", -1) + bytes(99), "claims -1 entries"),
        (struct.pack("<i", 0) + bytes(99), "claims 0 entries"),
        (struct.pack("<iii", 1, 2**30, 0) + bytes(99), "failed reading name"),
        (struct.pack("<iii", 1, -1, 0) + bytes(99), r"failed reading name for entry 0 \(length -1\)"),
        (struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<iif", 1, 1, 1.0), "not UTF-8"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**30) + bytes(99), "failed reading data for entry 0"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, -4) + bytes(99), r"entry 0, 'x' \(-4 values\)"),
        (legacy([("x", 1, [np.nan, 1])]), "1 values that are NaN"),
        (legacy([("x", 1, [-1, 1])]), "negative"),
        (legacy([("x", 1, [1]), ("x", 1, [1])]), "'x' occurs twice"),
        (legacy([("x", 1, [1, 2])], struct.pack("<i", -2)), "claims -2 chunks"),
        (legacy([("x", 1, [1, 2])], struct.pack("<ii", 1, -2)), r"name of the data set \(length -2\)"),
        (legacy([("x", 1, [1, 2])], struct.pack("<ii", 1, 2**30)), "failed reading the name of the data set"),
        (legacy([("x", 1, [1, 2])], TAIL + b"!"), "1 bytes follow the last field"),
    ],
)
def test_damaged_importance_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        imatrix.load(put(tmp_path / "imatrix.dat", data))


def test_every_truncation_of_a_legacy_file_is_one_clear_error(tmp_path: Path, sums: np.ndarray) -> None:
    body = legacy([("a", 1, sums), ("bb", 2, sums[:5])], tail=b"")
    whole = body + TAIL
    for length in range(len(whole)):
        path = put(tmp_path / "imatrix.dat", whole[:length])
        if length in (len(body), len(body) + 4):  # what older tools write
            assert len(imatrix.load(path)) == 2
            continue
        with pytest.raises(GGUFError):
            imatrix.load(path)


def test_every_truncation_of_a_gguf_is_one_clear_error(tmp_path: Path) -> None:
    path = modern(tmp_path / "whole", {"a": ([[1, 2, 3]], [1])})
    whole = path.read_bytes()
    for length in range(len(whole) - 28):  # the last tensor has 4 bytes, the rest is padding
        with pytest.raises(GGUFError):
            imatrix.load(put(tmp_path / "m", whole[:length]))


def test_a_gguf_with_any_byte_changed_loads_or_is_refused(tmp_path: Path) -> None:
    whole = modern(tmp_path / "whole", {"a": ([[1, 2, 3], [4, 5, 6]], [1, 2])}).read_bytes()
    refused = 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 0xFF
        try:
            imatrix.load(put(tmp_path / "m", bytes(data)))
        except GGUFError:
            refused += 1
    assert refused > len(whole) // 4


def entry(writer: gguf.GGUFWriter, name: str, values: Any, dtype: Any = np.float32) -> None:
    writer.add_tensor(name, np.asarray(values, dtype))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda w: entry(w, "x", [1, 2]), "without .*in_sum2"),
        (lambda w: entry(w, "x.in_sum2", [1, 2]), "'x' has sums but no counts"),
        (lambda w: entry(w, "x.counts", [1, 2]), "'x' has counts but no sums"),
        (lambda w: (entry(w, "x.in_sum2", [1, 2, 3]), entry(w, "x.counts", [1, 2])), "3 sums for 2 counts"),
        (lambda w: (entry(w, "x.in_sum2", [1, 2], "f2"), entry(w, "x.counts", [1])), "of type F16"),
        (lambda w: (entry(w, "x.in_sum2", [1, 2]), entry(w, "x.counts", [1], "f2")), "of type F16"),
        (lambda w: (entry(w, "x.in_sum2", [1, np.inf]), entry(w, "x.counts", [1])), "1 values that are NaN, inf"),
        (lambda w: (entry(w, "x.in_sum2", [1, 2]), entry(w, "x.counts", [np.nan])), "'x.counts' has 1 values"),
        (lambda w: (entry(w, "x.in_sum2", [1, 2]), entry(w, "x.counts", [-3])), "'x.counts' has 1 values"),
        (lambda w: w.add_string("imatrix.datasets", "text"), "imatrix.datasets is .*, expected an array of texts"),
        (lambda w: w.add_array("imatrix.datasets", [1, 2]), "imatrix.datasets is .*, expected an array of texts"),
        (lambda w: w.add_string("imatrix.chunk_count", "7"), "imatrix.chunk_count is '7', expected an integer"),
        (lambda w: w.add_int32("imatrix.chunk_size", -7), "imatrix.chunk_size is -7"),
    ],
)
def test_damaged_gguf_entries_are_refused(tmp_path: Path, build: Any, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m", "none")
    build(writer)
    if "imatrix." in message or "array" in message:
        entry(writer, "y.in_sum2", [1, 2])
        entry(writer, "y.counts", [1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=message):
        imatrix.load(tmp_path / "m")


# Writing --------------------------------------------------------------------------------------------------------------


def test_legacy_to_gguf_and_back_gives_the_same_bytes(tmp_path: Path, sums: np.ndarray) -> None:
    many = (RNG.random(4096) * 10.0 ** RNG.integers(-9, 9, 4096)).astype(np.float32)
    old = legacy([(DOWN, 3, many), (UP, 7, np.r_[sums, np.zeros(8), np.full(8, 7)]), ("é", 1, [0.1])])
    source = imatrix.load(put(tmp_path / "old.dat", old))
    notes = imatrix.save(source, tmp_path / "new.gguf")
    assert notes == ["the source does not say how many tokens a chunk has: 512 assumed"]
    tensors, keys = read_modern(tmp_path / "new.gguf")
    assert list(tensors) == [f"{name}.{kind}" for name in (DOWN, UP, "é") for kind in ("in_sum2", "counts")]
    assert np.array_equal(tensors[f"{DOWN}.in_sum2"], many.reshape(1, -1) * 512)
    assert tensors[f"{UP}.counts"].tolist() == [[7 * 512]]
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["wiki"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (7, 512)
    types = gguf.GGUFReader(tmp_path / "new.gguf").fields
    assert types["imatrix.chunk_size"].types == types["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    new = imatrix.load(tmp_path / "new.gguf")
    assert all(np.array_equal(new[name], source[name]) for name in source)
    imatrix.save(new, tmp_path / "back.dat", "dat")
    assert (tmp_path / "back.dat").read_bytes() == old


def test_gguf_to_gguf_keeps_all(tmp_path: Path) -> None:
    entries = {DOWN: (RNG.random((3, 8)), [5, 0, 123457]), "blk.0.attn_k_b.weight": (RNG.random((1, 32)), [9])}
    path = modern(tmp_path / "a.gguf", entries, datasets=("one", "two"), chunk_size=300)
    assert imatrix.save(imatrix.load(path), tmp_path / "b.gguf") == []
    before, after = read_modern(path), read_modern(tmp_path / "b.gguf")
    assert before[0].keys() == after[0].keys()
    assert all(np.array_equal(before[0][name], after[0][name]) for name in before[0])
    wanted = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    assert [before[1][key] for key in wanted] == [after[1][key] for key in wanted]
    assert [key for key in after[1] if not key.startswith("GGUF.")] == list(wanted)


def test_gguf_to_legacy_is_what_llama_imatrix_writes(tmp_path: Path) -> None:
    sums = (RNG.random((3, 8)) * 1000).astype(np.float32)
    counts = np.array([513, 0, 1100], np.float32)
    path = modern(tmp_path / "a.gguf", {DOWN: (sums, counts), "blk.0.none.weight": (np.ones((1, 4)), [0])})
    notes = imatrix.save(imatrix.load(path), tmp_path / "b.dat", "dat")
    entries, tail = read_legacy(tmp_path / "b.dat")
    assert list(entries) == [DOWN]
    calls, values = entries[DOWN]
    assert calls == 3  # 1100 tokens are two chunks of 512 and a bit
    expected = np.where(counts[:, None] > 0, sums.astype(np.float64) / np.maximum(counts, 1)[:, None], 1) * 3
    np.testing.assert_allclose(values.reshape(3, 8), expected, rtol=2**-23)
    assert values[8:16].tolist() == [3] * 8
    assert tail == struct.pack("<ii", 12, 1) + b"b"
    assert notes == [
        "1 entries without any data are left out",
        "1 experts without data become weight 1, as llama-imatrix writes them",
        "1 entries lose the counts of their experts: a legacy entry has one for all",
        "1 entries keep their means, but their counts are rounded up to whole chunks",
        "of 2 data sets the last is named",
        "the tokens of a chunk (512) are not recorded",
    ]
    back = imatrix.load(tmp_path / "b.dat").rows(DOWN, (3, 5, 8))
    assert back.missing == 1
    np.testing.assert_allclose(back.values, imatrix.load(path).rows(DOWN, (3, 5, 8)).values, rtol=2**-22)


def test_whole_chunks_survive_the_way_through_the_legacy_format(tmp_path: Path) -> None:
    sums = (RNG.random((1, 999)) * 1e4).astype(np.float32)
    path = modern(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (sums, [512 * 12])}, datasets=("b",))
    imatrix.save(imatrix.load(path), tmp_path / "b.dat", "dat")
    imatrix.save(imatrix.load(tmp_path / "b.dat"), tmp_path / "c.gguf")
    before, after = read_modern(path), read_modern(tmp_path / "c.gguf")
    assert all(np.array_equal(before[0][name], after[0][name]) for name in before[0])
    assert after[1]["imatrix.chunk_size"] == 512


def test_an_output_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = imatrix.load(put(tmp_path / "m", legacy([("x", 1, [1, 2])])))
    out = put(tmp_path / "out.gguf", b"precious")
    with pytest.raises(OutputExists, match="--overwrite"):
        imatrix.save(source, out)
    assert out.read_bytes() == b"precious"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match=r"out\.gguf: No space left on device; nothing was written"):
            imatrix.save(source, out, overwrite=True)
    assert out.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out.gguf"]
    imatrix.save(source, out, overwrite=True)
    assert imatrix.load(out)["x"].tolist() == [[1, 2]]
    imatrix.save(source, tmp_path / "m", "gguf", overwrite=True)  # onto itself
    assert imatrix.load(tmp_path / "m").format == "gguf"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out.gguf"]


def test_what_the_other_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    name = "blk.0." + "x" * 44 + ".weight"
    long = imatrix.load(put(tmp_path / "long", legacy([(name, 1, [1])])))
    with pytest.raises(GGUFError, match="a tensor name of 64 bytes or more"):
        imatrix.save(long, tmp_path / "out.gguf")
    large = imatrix.load(put(tmp_path / "large", legacy([("x", 1, [3e38])])))
    with pytest.raises(GGUFError, match="'x' has values too large"):
        imatrix.save(large, tmp_path / "out.gguf")
    empty = imatrix.load(modern(tmp_path / "empty", {"x": ([[1]], [0])}))
    with pytest.raises(GGUFError, match="no entry has data"):
        imatrix.save(empty, tmp_path / "out.dat", "dat")
    with pytest.raises(GGUFError, match="'csv' is no format"):
        imatrix.save(large, tmp_path / "out.csv", "csv")
    with pytest.raises(DiskError, match="No such file or directory; nothing was written"):
        imatrix.save(large, tmp_path / "none" / "out.dat", "dat")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "large", "long"]


# Metadata and measure -------------------------------------------------------------------------------------------------


def test_the_keys_are_those_of_llama_quantize(tmp_path: Path) -> None:
    found = imatrix.load(modern(tmp_path / "m.gguf", {UP: ([[1, 2]], [1])}))
    keys = imatrix.metadata(found)
    assert {key: (value.type, value.data) for key, value in keys.items()} == {
        "quantize.imatrix.file": (ValueType.STRING, str(tmp_path / "m.gguf")),
        "quantize.imatrix.dataset": (ValueType.STRING, "a"),
        "quantize.imatrix.entries_count": (ValueType.UINT32, 1),
        "quantize.imatrix.chunks_count": (ValueType.UINT32, 12),
    }
    bare = imatrix.load(put(tmp_path / "m.dat", legacy([("x", 1, [1])], b"")))
    assert list(imatrix.metadata(bare)) == ["quantize.imatrix.file", "quantize.imatrix.entries_count"]


def test_measure_takes_the_mean_of_experts_with_data(tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 4, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    writer.add_tensor(UP, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = RNG.random(256).astype(np.float32) * 1e-3
    path = modern(tmp_path / "i.gguf", {UP: (np.stack([weights * 4, weights * 0]), [4, 0])})
    (found,) = measure(tmp_path / "m.gguf", ["iq2_xxs"], imatrix=imatrix.load(path))
    assert found.quality == ggufx.quality(x.reshape(-1, 256), "IQ2_XXS", weights)


# Energy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_len", [1, 2, 256, 1000])
def test_energy_is_the_mean_square_however_the_rows_come(row_len: int) -> None:
    x = (RNG.standard_normal((777, row_len)) * 10.0 ** RNG.integers(-6, 6, (777, 1))).astype(np.float32)
    whole = energy([x])
    assert (whole.dtype, whole.shape) == (np.float32, (row_len,))
    exact = np.array([sum(int(v * 2**200) ** 2 for v in column.tolist()) / (777 << 400) for column in x.T])
    np.testing.assert_allclose(whole, exact, rtol=2**-23)
    for step in (1, 7, 776):
        assert np.array_equal(whole, energy(x[at : at + step] for at in range(0, 777, step)))
    assert np.array_equal(whole, energy([np.asfortranarray(x)]))
    assert np.array_equal(whole, energy([x[:0], x]))


def test_energy_at_its_corners() -> None:
    assert energy([np.zeros((3, 2), np.float32)]).tolist() == [1, 1]
    assert energy([np.full((3, 1), 3e38, np.float32)]).tolist() == [np.finfo(np.float32).max]
    for rows, message in (
        (np.array([[1, np.nan]], np.float32), "NaN or infinite"),
        (np.zeros(3, np.float32), r"\[n, row_len\], not an array of shape \[3\]"),
    ):
        with pytest.raises(GGUFError, match=message):
            energy([rows])
    with pytest.raises(GGUFError, match="energy of no rows"):
        energy([])
    columns = ColumnEnergy()
    columns.add(np.ones((1, 2), np.float32))
    with pytest.raises(GGUFError, match="of 2 values was given rows of 3"):
        columns.add(np.ones((1, 3), np.float32))


# The command ----------------------------------------------------------------------------------------------------------


def test_info(tmp_path: Path, cli: Cli) -> None:
    path = modern(tmp_path / "m.gguf", {DOWN: ([[2, 4], [9, 9], [0, 0], [4, 6]], [2, 0, 3, 4])})
    found = json.loads(cli("imatrix", "info", path, "--json").out)
    assert (found["format"], found["datasets"], found["n_entries"], found["n_without_data"]) == (
        "gguf",
        ["a", "b"],
        1,
        2,
    )
    (line,) = found["entries"]
    assert line == {
        "name": DOWN, "length": 8, "rows": 4, "row_len": 2, "min_count": 0, "max_count": 4, "without_data": [1, 2],
        "min": 0.0, "mean": pytest.approx((1 + 2 + 1 + 1.5) / 6), "max": 2.0,
    }  # fmt: skip
    text = cli("imatrix", "info", path).out
    assert "2: 1, 2" in text
    assert "GGUF: 1 entries, 8 values, 12 chunks of 512 tokens, 2 rows without data" in text
    assert "data set: b" in text
    old = cli("imatrix", "info", put(tmp_path / "m.dat", legacy([("x", 4, [4, 8])]))).out
    assert "legacy (.dat): 1 entries, 2 values, 7 chunks, 0 rows without data" in old
    assert "does not say where experts begin" in old


def test_convert(tmp_path: Path, cli: Cli) -> None:
    path = modern(tmp_path / "m.gguf", {DOWN: ([[2, 4], [9, 9]], [2, 0])})
    done = cli("imatrix", "convert", path, "--outfile", tmp_path / "m.dat")
    assert done.code == 0, done.err
    assert "note: 1 experts without data become weight 1" in done.err
    assert read_legacy(tmp_path / "m.dat")[0][DOWN][1].tolist() == [1, 2, 1, 1]
    done = cli("imatrix", "convert", tmp_path / "m.dat", "--outfile", tmp_path / "out", "--format", "gguf")
    assert done.code == 0, done.err
    assert read_modern(tmp_path / "out")[0][f"{DOWN}.in_sum2"].tolist() == [[512, 1024, 512, 512]]
    again = cli("imatrix", "convert", path, "--outfile", tmp_path / "out")
    assert (again.code, len(again.err.strip().splitlines())) == (1, 1)
    assert "exists; choose another --outfile or pass --overwrite" in again.err
    assert cli("imatrix", "convert", path, "--outfile", tmp_path / "out", "--overwrite").code == 0
    assert cli("imatrix", "info", tmp_path / "none").code == 1
