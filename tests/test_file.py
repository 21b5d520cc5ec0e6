"""Files written by the ``gguf`` package, read by ggufx, compared with the package's own reader and with numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from oracle import VECTORS, assert_same_bits

import ggufx
from ggufx.container import StringArray, ValueType, encode_header, read_container
from ggufx.errors import ContainerError, UnknownType
from ggufx.types import Codec

RNG_SEED = 11
TOKENS = ["<s>", "", "héllo", "日本", "a\nb", "\0"] + [f"token {i}" for i in range(50)]


def packed_vector(name: str) -> np.ndarray:
    """Reference bytes uint8 [12, row_nbytes] of rows of 1024."""
    with np.load(VECTORS / f"{name.lower()}.npz") as archive:
        return archive["packed"]


def add_all_kinds(writer: gguf.GGUFWriter) -> None:
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -128)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -32768)
    writer.add_uint32("k.u32", 2**32 - 1)
    writer.add_int32("k.i32", -(2**31))
    writer.add_float32("k.f32", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_bool("k.not", False)
    writer.add_string("k.string", "grüße")
    writer.add_string("k.empty", "")
    writer.add_uint64("k.u64", 2**64 - 1)
    writer.add_int64("k.i64", -(2**63))
    writer.add_float64("k.f64", 0.1)
    writer.add_array("a.i32", [1, -2, 3])
    writer.add_array("a.f32", [0.5, 1.5])
    writer.add_array("a.bool", [True, False, True])
    writer.add_array("a.string", TOKENS)


def tensors() -> dict[str, tuple[np.ndarray, T | None]]:
    """Name -> (array, raw type): of a raw type the array is packed bytes."""
    rng = np.random.default_rng(RNG_SEED)
    q8, q4, fp4 = packed_vector("Q8_0"), packed_vector("Q4_0"), packed_vector("MXFP4")
    return {
        "f32": (rng.standard_normal((3, 5)).astype(np.float32), None),
        "f16": (rng.standard_normal(7).astype(np.float16), None),
        "i32": (rng.integers(-(2**31), 2**31, (2, 3)).astype(np.int32), None),
        "f64": (rng.standard_normal((2, 3)), None),
        "bf16": (rng.standard_normal((2, 4)).astype(ml_dtypes.bfloat16).view(np.uint8).reshape(2, 8), T.BF16),
        "q8_0": (q8, T.Q8_0),
        "q4_0": (q4[:5], T.Q4_0),
        "q4_k": (packed_vector("Q4_K"), T.Q4_K),
        "experts": (fp4.reshape(4, 3, -1), T.MXFP4),
        "deep": (q8.reshape(2, 3, 2, -1), T.Q8_0),
        "last": (rng.standard_normal((1, 1)).astype(np.float32), None),
    }


def write_gguf(
    path: Path, *, alignment: int | None = None, fill: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    add_all_kinds(writer)
    for name, (array, raw_type) in tensors().items():
        writer.add_tensor(name, array, raw_dtype=raw_type)
    if fill is not None:
        fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def reference(model: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(model)


def expected_values(name: str) -> np.ndarray:
    array, raw_type = tensors()[name]
    if raw_type is None:
        return array if array.dtype in (np.int32, np.float64) else array.astype(np.float32)
    if raw_type is T.BF16:
        return array.view(ml_dtypes.bfloat16).astype(np.float32)
    return gguf.quants.dequantize(array, raw_type)


# Metadata -----------------------------------------------------------------------------------------------------------


def test_keys_types_and_values_are_those_of_the_gguf_reader(model: Path, reference: gguf.GGUFReader) -> None:
    with ggufx.open(model) as f:
        fields = {k: v for k, v in reference.fields.items() if not k.startswith("GGUF.")}
        assert list(f.metadata) == list(fields)
        for key, field in fields.items():
            value = f.metadata.value(key)
            assert [value.type] + ([value.element] if value.element is not None else []) == list(field.types), key
            if ValueType.FLOAT32 in (value.type, value.element):
                # As short as can be, and the same float32.
                assert np.array_equal(np.float32(value.to_json()), np.float32(field.contents())), key
            else:
                assert value.to_json() == field.contents(), key
        assert f.metadata.value("k.f32").to_json() == 0.1


def test_scalars_are_python_values(model: Path) -> None:
    with ggufx.open(model) as f:
        m = f.metadata
        assert m["general.architecture"] == "llama"
        assert (m["k.u64"], m["k.i64"], m["k.i8"]) == (2**64 - 1, -(2**63), -128)
        assert m["k.bool"] is True
        assert m["k.not"] is False
        assert type(m["k.u8"]) is int
        assert type(m["k.f32"]) is float
        assert m["k.f32"] == float(np.float32(0.1))
        assert m["k.f64"] == 0.1
        assert m["a.f32"].dtype == np.float32
        assert not m["a.i32"].flags.writeable
        assert m.value("k.u16").type is ValueType.UINT16
        assert m.get("no such key") is None
        with pytest.raises(KeyError):
            m.value("no such key")


def test_string_arrays_are_decoded_on_access_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    element_bytes = StringArray.element_bytes

    def spy(self: StringArray, index: int) -> bytes:
        decoded.append(index)
        return element_bytes(self, index)

    walks: list[int] = []
    walk = StringArray._index

    def spy_walk(self: StringArray) -> list[int]:
        walks.append(1)
        return walk(self)

    monkeypatch.setattr(StringArray, "element_bytes", spy)
    monkeypatch.setattr(StringArray, "_index", spy_walk)
    with ggufx.open(model) as f:
        tokens = f.metadata["a.string"]
        assert len(tokens) == len(TOKENS)
        assert len(f.metadata.value("a.string").encode()) > 0
        assert decoded == walks == []
        assert tokens[2] == TOKENS[2]
        assert decoded == [2]
        assert tokens[-1] == TOKENS[-1]
        assert decoded == [2, len(TOKENS) - 1]


def test_string_arrays_behave_as_sequences(model: Path) -> None:
    with ggufx.open(model) as f, ggufx.open(model) as again:
        tokens = f.metadata["a.string"]
        assert isinstance(tokens, StringArray)
        assert list(tokens) == TOKENS
        for index in (0, 5, -1, -len(TOKENS)):
            assert tokens[index] == TOKENS[index]
        for cut in (slice(None), slice(2, 7), slice(None, None, -1), slice(-3, None), slice(40, 1000, 3), slice(5, 5)):
            assert tokens[cut] == TOKENS[cut]
        for index in (len(TOKENS), -len(TOKENS) - 1):
            with pytest.raises(IndexError, match=str(len(TOKENS))):
                tokens[index]
        assert tokens == TOKENS
        assert tokens == tuple(TOKENS)
        assert tokens == again.metadata["a.string"]
        assert tokens != TOKENS[:-1]
        assert tokens != [*TOKENS[:-1], "other"]
        assert tokens != "<s>"
        assert "日本" in tokens
        assert tokens.index("日本") == 3
        assert tokens.element_bytes(3) == "日本".encode()


# Tensors ------------------------------------------------------------------------------------------------------------


def test_the_directory_is_that_of_the_gguf_reader(model: Path, reference: gguf.GGUFReader) -> None:
    with ggufx.open(model) as f:
        assert f.version == 3
        assert f.alignment == 32
        assert list(f) == [t.name for t in reference.tensors]
        for theirs in reference.tensors:
            ours = f[theirs.name]
            assert ours.type == theirs.tensor_type.name
            assert ours.type_id == theirs.tensor_type
            assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert (ours.size, ours.nbytes) == (theirs.n_elements, theirs.n_bytes)
            assert ours.file_offset == theirs.data_offset
            assert ours.packed.tobytes() == theirs.data.tobytes()
            assert not ours.packed.flags.writeable
            assert ours.bits_per_weight == 8 * ours.nbytes / ours.size
        assert f.data_nbytes == sum(t.n_bytes for t in reference.tensors)
        with pytest.raises(KeyError, match="has no tensor 'nope'"):
            f["nope"]


@pytest.mark.parametrize("name", list(tensors()))
def test_decoded_values_are_those_of_the_gguf_package(model: Path, name: str) -> None:
    expected = expected_values(name)
    with ggufx.open(model) as f:
        tensor = f[name]
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype
        assert_same_bits(tensor.numpy(), expected)
        assert_same_bits(np.asarray(tensor), expected)
        assert_same_bits(np.asarray(tensor, dtype=np.float64), expected.astype(np.float64))
        out = np.empty(expected.shape, np.float32)
        assert tensor.numpy(out=out) is out
        assert_same_bits(out, expected.astype(np.float32))
        with pytest.raises(ValueError, match="without decoding"):
            np.array(tensor, copy=False)


def test_version_2_reads_the_same(model: Path, tmp_path: Path) -> None:
    data = bytearray(model.read_bytes())
    data[4:8] = (2).to_bytes(4, "little")
    path = tmp_path / "v2.gguf"
    path.write_bytes(data)
    with ggufx.open(path) as two, ggufx.open(model) as three:
        assert (two.version, three.version) == (2, 3)
        assert {k: v.encode() for k, v in two.metadata.typed().items()} == {
            k: v.encode() for k, v in three.metadata.typed().items()
        }
        for name in three:
            assert_same_bits(two[name].numpy(), three[name].numpy())


@pytest.mark.parametrize("alignment", [64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    path = write_gguf(tmp_path / "aligned.gguf", alignment=alignment)
    with ggufx.open(path) as f:
        assert f.alignment == alignment
        assert all(t.file_offset % alignment == 0 for t in f.tensors)
        assert_same_bits(f["experts"].numpy(), expected_values("experts"))


def test_a_last_tensor_without_final_padding_is_valid(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "unpadded.gguf"
    path.write_bytes(model.read_bytes()[:-28])  # "last" is one float32
    with ggufx.open(path) as f:
        assert_same_bits(f["last"].numpy(), expected_values("last"))


# Slices -------------------------------------------------------------------------------------------------------------

INDEX_2D = [
    0,
    -1,
    np.int64(2),
    slice(None),
    slice(1, 4),
    slice(None, None, -2),
    slice(2, 2),
    ...,
    (),
    [0, 3, 3],
    np.array([-1, 0]),
    (1, 5),
    (1, -1),
    (slice(1, 3), slice(10, 100, 7)),
    (..., 3),
    (2, ...),
    (slice(None), [0, 5, 31]),
    (0, [0, 5, 31]),
    ([0, 1], 4),
    ([0, 1, 2], [7, 8, 9]),
    ([0, 1], slice(0, 3)),
    (np.array([[0, 1], [2, 3]]), 3),
    ([-1, 11, 0], [-1, -1, 2]),
    ([], 3),
]
INDEX_3D = [
    2,
    -4,
    (1, 2),
    (1, -1, 3),
    (slice(None), 1),
    (slice(None), 1, slice(0, 9)),
    ([3, 0], 1),
    ([3, 0], slice(None), slice(2, 5)),
    ([3, 0], [1, 2]),
    ([3, 0], [1, 2], [5, 6]),
    ([3, 0], slice(None), [5, 6]),
    (0, slice(None), [1, 2]),
    (slice(None), [1, 2], 3),
    (slice(None), [1, 2], [3, 4]),
    (..., [3, 4]),
    (1, ..., 0),
    (..., -1),
    (slice(None, None, 3), slice(None, None, -1), slice(None, None, -1)),
    (slice(4, None),),
]
INDEX_4D = [
    (slice(None), [0, 1], slice(None), 3),
    (1, slice(None), [0, 1]),
    (slice(None), 0, ..., slice(0, 5)),
    ([1, 0], ..., [1, 2]),
    (0, 1, 1, 2),
]
SLICES = (
    [("q8_0", i) for i in INDEX_2D]
    + [("experts", i) for i in INDEX_3D]
    + [("deep", i) for i in INDEX_4D]
    + [("f16", i) for i in (0, -1, slice(1, 5, 2), [1, 1, 0], ..., ())]
    + [("i32", i) for i in (0, (1, 2), (slice(None), 1))]
)


@pytest.mark.parametrize(("name", "index"), SLICES, ids=lambda v: str(v).replace("\n", ""))
def test_slices_are_numpys_of_the_decoded_tensor(model: Path, name: str, index: object) -> None:
    expected = np.asarray(expected_values(name)[index])
    with ggufx.open(model) as f:
        assert_same_bits(np.asarray(f[name][index]), expected)


@pytest.mark.parametrize(
    "index", [12, -13, (0, 1024), (0, 0, 0), (0, ..., 0, 0), (..., ...), None, (None, 0), True, [99], ([99], 0)]
)
def test_bad_indices_raise_index_error(model: Path, index: object) -> None:
    with ggufx.open(model) as f, pytest.raises(IndexError):
        f["q8_0"][index]


@pytest.mark.parametrize(
    ("name", "index", "fraction"),
    [
        ("experts", 3, 1 / 4),
        ("experts", (3, 1), 1 / 12),
        ("experts", ([0, 2],), 1 / 2),
        ("experts", (slice(1, 3), 0), 1 / 6),
        ("experts", (3, slice(None), slice(0, 8)), 1 / 4),
        ("experts", (3, slice(None), [0, 8]), 1 / 4),
        ("experts", ([1, 2], slice(None), 5), 1 / 2),
        ("q8_0", 5, 1 / 12),
    ],
    ids=str,
)
def test_only_what_is_asked_is_decoded(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, index: object, fraction: float
) -> None:
    seen: list[int] = []
    decode_rows_of = Codec._decode_rows_of

    def spy(self: Codec, rows_of: Callable[[int, int], np.ndarray], *args: object, **kwargs: object) -> None:
        def counted(start: int, stop: int) -> np.ndarray:
            seen.append(rows_of(start, stop).nbytes)
            return rows_of(start, stop)

        decode_rows_of(self, counted, *args, **kwargs)

    with ggufx.open(model) as f:
        nbytes = f[name].nbytes
        monkeypatch.setattr(Codec, "_decode_rows_of", spy)
        assert seen == []
        f[name][index]
        assert sum(seen) == round(nbytes * fraction)


def test_len_and_shape_attributes(model: Path) -> None:
    with ggufx.open(model) as f:
        assert len(f["experts"]) == 4
        assert f["experts"].ndim == 3
        assert f["experts"].shape == (4, 3, 1024)
        assert f["experts"].packed.shape == (4, 3, 544)
        assert "experts MXFP4[4, 3, 1024]" in repr(f["experts"])
        assert "11 tensors" in repr(f)


# Unknown types ------------------------------------------------------------------------------------------------------


def patch_type(path: Path, name: str, type_id: int) -> None:
    """Overwrite the type of a tensor in the directory, and nothing else."""
    data = bytearray(path.read_bytes())
    at = data.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
    n_dims = int.from_bytes(data[at : at + 4], "little")
    at += 4 + 8 * n_dims
    data[at : at + 4] = type_id.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("type_id", [200, 999, 2**32 - 1])
def test_an_unknown_type_opens_lists_and_copies_but_does_not_decode(tmp_path: Path, type_id: int) -> None:
    path = write_gguf(tmp_path / "unknown.gguf")
    patch_type(path, "q4_0", type_id)
    with ggufx.open(path) as f:
        tensor = f["q4_0"]
        array, _ = tensors()["q4_0"]
        assert tensor.type == f"id {type_id}"
        assert tensor.codec is None
        assert tensor.shape == (5, 1024)
        assert tensor.packed.dtype == np.uint8
        assert tensor.packed.ndim == 1
        assert tensor.packed[: array.nbytes].tobytes() == array.tobytes()
        assert not tensor.packed[array.nbytes :].any()
        assert str(type_id) in repr(tensor)
        for read in (tensor.numpy, lambda: np.asarray(tensor), lambda: tensor[0], lambda: tensor.dtype):
            with pytest.raises(UnknownType, match=f"'q4_0' has type id {type_id}"):
                read()
        assert_same_bits(f["experts"].numpy(), expected_values("experts"))


# Header round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_parsed_header_encodes_to_the_bytes_it_came_from(tmp_path: Path, alignment: int | None) -> None:
    path = write_gguf(tmp_path / "file.gguf", alignment=alignment)
    container = read_container(path)
    directory = [(e.name, e.shape, e.type_id, e.offset) for e in container.entries]
    header = encode_header(container.metadata.typed(), directory, container.alignment)
    assert len(header) == container.data_offset
    assert header == path.read_bytes()[: container.data_offset]


# Splits -------------------------------------------------------------------------------------------------------------


def write_splits(
    folder: Path,
    *,
    numbers: tuple[int, ...] = (0, 1, 2),
    total: int | None = 3,
    names: tuple[str, ...] = ("x", "y", "z"),
) -> list[Path]:
    paths = []
    for k, (number, name) in enumerate(zip(numbers, names, strict=True)):
        path = folder / f"m-{k + 1:05d}-of-00003.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        if total is not None:
            writer.add_int32("split.tensors.count", total)
        if k == 0:
            writer.add_string("only.first", "here")
        writer.add_tensor(name, np.full((2, 3), k, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_any_member_opens_the_whole_split(tmp_path: Path) -> None:
    paths = write_splits(tmp_path)
    for path in paths:
        with ggufx.open(path) as f:
            assert f.paths == paths
            assert f.path == paths[0]
            assert list(f) == ["x", "y", "z"]
            assert f.metadata["only.first"] == "here"
            for k, name in enumerate("xyz"):
                assert (f[name].numpy() == k).all()
                assert f[name].path == paths[k]
    with ggufx.open(paths[1], splits=False) as f:
        assert list(f) == ["y"]


def test_a_split_without_a_total_opens(tmp_path: Path) -> None:
    with ggufx.open(write_splits(tmp_path, total=None)[2]) as f:
        assert len(f) == 3


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_member_is_named(tmp_path: Path, gone: int) -> None:
    paths = write_splits(tmp_path)
    paths[gone].unlink()
    with pytest.raises(ContainerError, match=paths[gone].name) as caught:
        ggufx.open(paths[(gone + 1) % 3])
    assert caught.value.rule == "split-missing"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"numbers": (0, 2, 1)}, "split-number"),
        ({"numbers": (1, 2, 3)}, "split-number"),
        ({"total": 4}, "split-tensors"),
        ({"names": ("x", "y", "x")}, "duplicate-tensor"),
    ],
)
def test_members_that_do_not_belong_together(tmp_path: Path, change: dict[str, object], rule: str) -> None:
    paths = write_splits(tmp_path, **change)
    for path in paths:
        with pytest.raises(ContainerError) as caught:
            ggufx.open(path)
        assert caught.value.rule == rule


@pytest.mark.parametrize("name", ["renamed.gguf", "m-00001-of-00004.gguf", "m-00000-of-00003.gguf"])
def test_a_renamed_member_is_refused(tmp_path: Path, name: str) -> None:
    renamed = write_splits(tmp_path)[0].rename(tmp_path / name)
    with pytest.raises(ContainerError, match="invalid split file") as caught:
        ggufx.open(renamed)
    assert caught.value.rule == "split-name"


# Closing ------------------------------------------------------------------------------------------------------------


def test_a_closed_file_reads_no_more_but_its_arrays_live(model: Path) -> None:
    with ggufx.open(model) as f:
        tensor = f["q8_0"]
        packed = tensor.packed
        scores = f.metadata["a.i32"]
    assert all(c.closed for c in f.containers)
    for read in (tensor.numpy, lambda: tensor.packed, lambda: tensor[0]):
        with pytest.raises(ValueError, match=r"model\.gguf is closed"):
            read()
    assert packed.tobytes() == tensors()["q8_0"][0].tobytes()
    assert scores.tolist() == [1, -2, 3]
    f.close()  # a second time does nothing


def test_leaving_the_with_block_by_an_error_closes_too(model: Path) -> None:
    with pytest.raises(ZeroDivisionError), ggufx.open(model) as f:
        raise ZeroDivisionError
    assert f.containers[0].closed
