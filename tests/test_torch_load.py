"""From files to tensors: names, devices, shards, splits; what is read, how often, and in how much memory."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import double
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same_bits

import ggufx
import ggufx.torch as gt
from ggufx import execute, types
from ggufx.container import Value, encode_header, split_name
from ggufx.errors import CheckpointError, CodecError, UnknownType
from ggufx.torch import loading
from ggufx.torch.decoding import as_numpy

ROOT = Path(__file__).parent.parent
Reads = list[tuple[str, int, int]]
Shapes = dict[str, tuple[str, tuple[int, ...]]]
SHAPES: Shapes = {
    "q4_0": ("Q4_0", (6, 128)),
    "experts": ("MXFP4", (4, 6, 64)),
    "ks": ("IQ2_KS", (8, 1024)),
    "deep": ("Q8_0", (2, 3, 2, 64)),
    "f8": ("F8_E4M3_B128", (16, 512)),
    "norm": ("F32", (48,)),
    "half": ("BF16", (3, 5)),
    "ids": ("I32", (4, 6)),
    "mystery": ("id 999", (64,)),
}
KNOWN = [name for name in SHAPES if name != "mystery"]
MATRICES = ["q4_0", "ks", "f8"]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests may have switched on for Triton must not decide how CPU tensors are decoded here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def write_gguf(path: Path, shapes: Shapes, *, real: bool = True, metadata: dict[str, Value] | None = None) -> Path:
    """Write tensors of random bytes; without ``real`` the data is a hole, which reads as zeros."""
    directory, offset = [], 0
    for name, (type_name, shape) in shapes.items():
        if type_name.startswith("id"):
            type_id, nbytes = int(type_name[3:]), shape[0]
        else:
            codec = types.get(type_name)
            type_id, nbytes = next(iter(codec.ids.values())), codec.layout.nbytes(shape)
        directory.append((name, shape, type_id, offset))
        offset += -(-nbytes // 32) * 32
    with path.open("wb") as stream:
        stream.write(encode_header(metadata or {}, directory, 32))
        if real:
            stream.write(np.random.default_rng(3).integers(0, 256, offset, dtype=np.uint8).tobytes())
        else:
            stream.truncate(stream.tell() + offset)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("torch") / "model.gguf", SHAPES)


@pytest.fixture(params=["in place", "staged", "uploaded"])
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Run what a GPU gets on the CPU: buffers, readers, copies; streams and events are a double's.

    Returns the list of reads that do not go by functions of Python: path, offset and bytes.
    """
    if request.param == "staged":
        staging(monkeypatch)
    return double.install(monkeypatch).reads if request.param == "uploaded" else []


def staging(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(pieces: object, targets: object, pool: object, told: object) -> None:
        loading._fill_staged(pieces, targets, pool, told, loading._PIECE_NBYTES)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "_fill_in_place", fill)


def assert_same(tensor: gt.GGUFTensor, expected: np.ndarray) -> None:
    assert tensor.shape == expected.shape
    assert_same_bits(as_numpy(tensor.dequantize()), expected)


# Whole tensors ----------------------------------------------------------------------------------------------------------


def test_all_tensors_come_as_they_lie_in_the_file(model: Path, staged: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PIECE_NBYTES", 100)
    tensors = gt.load(model)
    with ggufx.open(model) as file:
        assert list(tensors) == list(file)
        for name, tensor in tensors.items():
            assert tensor.name == name
            assert tensor.type == file[name].type
            assert tensor.shape == file[name].shape
            assert tensor.nbytes == file[name].nbytes
            assert tensor.device == torch.device("cpu")
            assert np.array_equal(tensor.packed.numpy(), file[name].packed)
        for name in KNOWN:
            assert_same(tensors[name], file[name].numpy())


def test_a_name_a_few_names_or_a_predicate(model: Path) -> None:
    assert list(gt.load(model, names=["norm", "q4_0"])) == ["q4_0", "norm"]
    assert list(gt.load(model, names="ids")) == ["ids"]
    assert list(gt.load(model, names=lambda name: name.startswith("i"))) == ["ids"]
    assert gt.load(model, names=[]) == {}
    with pytest.raises(KeyError, match=r"has no tensor 'nor'"):
        gt.load(model, names=["nor"])


def test_the_lazy_mapping_reads_on_access_and_once_while_alive(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = recorded(monkeypatch)
    with gt.open(model, dtype=torch.bfloat16) as f:
        assert len(f) == len(SHAPES)
        assert list(f) == list(SHAPES)
        assert f.file["ks"].shape == (8, 1024)
        assert "ks" in f
        assert "nor" not in f
        assert f == f
        assert f != {}
        assert repr(f) == f"<TorchFile model.gguf: 9 tensors, {f.file.data_nbytes} bytes>"
        assert not reads
        w = f["ks"]
        assert sum(n for _, _, n in reads) == w.nbytes
        assert f["ks"] is w
        assert f.load(["ks", "norm"])["ks"] is w
        assert sum(n for _, _, n in reads) == w.nbytes + 48 * 4
        assert w.dequantize().dtype == torch.bfloat16
        del w
        gc.collect()
        f["ks"]
        assert sum(n for _, _, n in reads) == 2 * f.file["ks"].nbytes + 48 * 4
    with pytest.raises(ValueError, match="is closed"):
        f["norm"]


def test_a_relative_path_stays_that_of_the_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    with gt.open(model.name) as f:
        monkeypatch.chdir("/")
        assert f["norm"].shape == (48,)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return the list that every read is added to as (path, offset, bytes)."""
    reads: list[tuple[str, int, int]] = []
    read_into, read_strided = execute.read_into, execute.read_strided

    def recording(path: str, offset: int, buffer: np.ndarray) -> None:
        reads.append((path, offset, buffer.nbytes))
        read_into(path, offset, buffer)

    def recording_spans(path: str, offset: int, stride: int, spans: list[tuple[int, int]], buffer: np.ndarray) -> None:
        for unit in range(buffer.nbytes // sum(nbytes for _, nbytes in spans)):
            reads.extend((path, offset + unit * stride + start, nbytes) for start, nbytes in spans)
        read_strided(path, offset, stride, spans, buffer)

    monkeypatch.setattr(execute, "read_into", recording)
    monkeypatch.setattr(execute, "read_strided", recording_spans)
    return reads


def assert_disjoint(reads: Iterable[tuple[str, int, int]]) -> None:
    ordered = sorted(reads)
    for (path, offset, nbytes), (other, start, _) in pairwise(ordered):
        assert path != other or offset + nbytes <= start


def test_nothing_is_read_twice(model: Path, staged: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PIECE_NBYTES", 333)
    reads = recorded(monkeypatch)
    gt.load(model)
    reads += staged
    assert_disjoint(reads)
    with ggufx.open(model) as file:
        assert sum(n for _, _, n in reads) == file.data_nbytes


def test_progress_counts_the_bytes(model: Path, staged: Reads) -> None:
    told: list[tuple[int, int]] = []
    gt.load(model, progress=lambda done, total: told.append((done, total)))
    with ggufx.open(model) as file:
        assert told[0] == (0, file.data_nbytes)
        assert told[-1] == (file.data_nbytes, file.data_nbytes)
    assert told == sorted(told)


def test_a_bar_is_drawn(model: Path) -> None:
    assert len(gt.load(model, progress=True)) == len(SHAPES)


def test_devices_by_name(model: Path) -> None:
    tensors = gt.load(model, lambda name: "meta" if name == "norm" else "cpu")
    assert tensors["norm"].device.type == "meta"
    assert tensors["ks"].device.type == "cpu"
    by_name = gt.load(model, {"norm": "meta", "ks": "cpu"}, names=["norm", "ks"])
    assert [tensor.device.type for tensor in by_name.values()] == ["cpu", "meta"]
    with pytest.raises(KeyError, match="mapping of devices has nothing for tensor 'half'"):
        gt.load(model, {"norm": "cpu"}, names=["norm", "half"])


def test_a_file_that_ends_early_is_an_error_that_says_so(tmp_path: Path, staged: Reads) -> None:
    path = write_gguf(tmp_path / "cut.gguf", {"a": ("F32", (1000,)), "b": ("F32", (1000,))})
    with gt.open(path) as f:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match="ends at byte"):
            f.load()


def test_cut_rows_that_end_early_are_an_error_that_says_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "cut.gguf", {"a": ("F32", (4, 10_000))})
    with gt.open(path, shard=(1, 2), dim=1) as f:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match="ends at byte"):
            f["a"]


def test_a_split_file_is_one(tmp_path: Path, staged: Reads) -> None:
    whole = tmp_path / "whole.gguf"
    parts = [{name: SHAPES[name]} for name in ("ks", "norm", "q4_0")]
    for number, shapes in enumerate(parts):
        keys = {"split.no": number, "split.count": 3, "split.tensors.count": 3}
        metadata = {key: Value.u32(n) for key, n in keys.items()}
        write_gguf(split_name(whole, number + 1, 3), shapes, metadata=metadata)
    tensors = gt.load(split_name(whole, 2, 3))
    with ggufx.open(split_name(whole, 1, 3)) as file:
        assert list(tensors) == list(file) == ["ks", "norm", "q4_0"]
        for name, tensor in tensors.items():
            assert_same(tensor, file[name].numpy())


# Shards -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "dims"), [("ks", (0, 1, -1)), ("f8", (0, 1)), ("experts", (0, 1, 2)), ("deep", (0, 3))]
)
def test_shards_put_together_are_the_tensor(
    model: Path, staged: Reads, name: str, dims: tuple[int, ...], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_PIECE_NBYTES", 600)
    with ggufx.open(model) as file:
        expected = file[name].numpy()
    for dim in dims:
        shards = [gt.load(model, names=[name], shard=(rank, world), dim=dim)[name] for rank in range(world)]
        assert sum(shard.numel() for shard in shards) == expected.size
        assert_same_bits(np.concatenate([as_numpy(s.dequantize()) for s in shards], axis=dim), expected)


def any_cut(data: st.DataObject, folder: Path) -> tuple[Path, np.ndarray, int, int]:
    """Return a file, the values of its tensor ``w``, and a number of shards into which an axis of it divides."""
    codec = types.get(data.draw(st.sampled_from(["Q4_0", "IQ2_KS", "IQ4_KS", "F8_E4M3_B128", "F16"])))
    world = data.draw(st.integers(1, 3))
    shape = [data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(1, 3)))]
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= world
    blocks = [*shape[:-1], shape[-1] * codec.layout.block_len]
    path = folder / "any.gguf"
    write_gguf(path, {"first": ("F32", (3,)), "w": (codec.name, tuple(blocks))})
    with ggufx.open(path) as file:
        return path, file["w"].numpy(), world, dim


@given(data=st.data())
def test_any_shard_is_that_slice(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path, whole, world, dim = any_cut(data, tmp_path_factory.mktemp("shard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_PIECE_NBYTES", data.draw(st.integers(1, 2000)))
        patch.setattr(loading, "_THROUGH_NBYTES", data.draw(st.sampled_from([-1, 0, 4096])))
        reads = recorded(patch)
        for rank in range(world):
            shard = gt.load(path, names=["w"], shard=(rank, world), dim=dim)["w"]
            assert_same(shard, np.split(whole, world, axis=dim)[rank])
            assert_disjoint(reads)
            reads.clear()


def test_only_the_slice_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "wide.gguf", {"w": ("IQ4_KS", (4, 65536))})
    layout = types.get("IQ4_KS").layout
    reads = recorded(monkeypatch)
    rows = gt.load(path, shard=(1, 2), dim=0)["w"]
    assert sum(n for _, _, n in reads) == rows.nbytes == 2 * layout.row_nbytes(65536)
    reads.clear()
    columns = gt.load(path, shard=(3, 4), dim=1)["w"]
    # Every row's header travels with it.
    assert sum(n for _, _, n in reads) == columns.nbytes == 4 * (4 + 64 * 136)
    assert_disjoint(reads)


def test_what_does_not_divide_is_refused_by_name_before_anything_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = recorded(monkeypatch)
    with pytest.raises(gt.ShardError, match=r"'q4_0' Q4_0\[6, 128\]: axis 0 \(6\) does not divide into 4 shards"):
        gt.load(model, names=MATRICES, shard=(0, 4), dim=0)
    with pytest.raises(gt.ShardError, match=r"'ks' .* axis 1 \(4 blocks of 256 elements\) does not divide into 8"):
        gt.load(model, names=["ks"], shard=(0, 8), dim=1)
    with pytest.raises(gt.ShardError, match=r"'norm' \[48\] has no axis 1 to cut"):
        gt.load(model, names=["norm"], shard=(0, 2), dim=1)
    with pytest.raises(gt.ShardError, match=r"'mystery' cannot be cut: it has type id 999.* Load the others by names="):
        gt.load(model, names=["mystery"], shard=(0, 2))
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(gt.ShardError, match="0 <= rank < world"):
            gt.open(model, shard=shard)
    assert not reads


def test_options_that_make_no_sense_are_refused_before_anything_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = recorded(monkeypatch)
    for shard in ((0, 1, 2), 2, "01", (0.0, 2.0)):
        with pytest.raises(gt.ShardError, match=r"shard is \(rank, world\), two integers"):
            gt.load(model, shard=shard)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype is a torch\.dtype or None, got 'bfloat16'"):
        gt.open(model, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor 'ks': None is not a device"):
        gt.load(model, {"ks": None}.get, names=["ks"])  # type: ignore[arg-type]
    assert not reads


def test_axes_by_name(model: Path) -> None:
    def dim(name: str) -> int | None:
        return {"ks": 1, "f8": 0}.get(name)

    for dims in (dim, {"ks": 1, "f8": 0, "norm": None}):
        tensors = gt.load(model, names=["ks", "f8", "norm"], shard=(1, 2), dim=dims)
        assert [tensor.shape for tensor in tensors.values()] == [(8, 512), (8, 512), (48,)]


# GGUFTensor -------------------------------------------------------------------------------------------------------------


def test_a_tensor_tells_what_it_is(model: Path) -> None:
    tensors = gt.load(model)
    w = tensors["ks"]
    assert repr(w) == f"<GGUFTensor ks IQ2_KS[8, 1024] {w.nbytes} bytes, cpu>"
    assert (w.ndim, w.numel(), len(w), w.dtype) == (2, 8192, 8, torch.float32)
    assert tensors["ids"].dtype == torch.int32
    assert tensors["ids"].dequantize().dtype == torch.int32
    assert w.dequantize(torch.float16).dtype == torch.float16
    assert repr(tensors["mystery"]) == "<GGUFTensor mystery id 999[64] 64 bytes, cpu>"
    with pytest.raises(UnknownType, match="'mystery' is of type id 999"):
        tensors["mystery"].dequantize()


def test_slices_stay_packed(model: Path) -> None:
    experts = gt.load(model, dtype=torch.bfloat16)["experts"]
    whole = experts.dequantize()
    assert experts[2].packed.data_ptr() == experts.packed[2].data_ptr()
    for index in (2, slice(1, 3), (1, 2), (slice(None), slice(0, 2)), ..., (0, ...), [3, 0], torch.tensor([1, 1])):
        part = experts[index]
        assert part.dtype == torch.bfloat16
        assert torch.equal(part.dequantize().view(torch.int16), whole[index].view(torch.int16))
    for bad in ((0, 0, 0), (..., 0), None, True, "name", 1.5):
        with pytest.raises(IndexError):
            experts[bad]  # type: ignore[index]
    scalar = gt.GGUFTensor(torch.zeros(4, dtype=torch.uint8), types.get("F32"), ())
    assert scalar[...].dequantize() == 0


def test_rows_are_gone_through_but_no_numbers(model: Path) -> None:
    w = gt.load(model, names=["q4_0"])["q4_0"]
    assert [row.shape for row in w] == [(128,)] * 6
    with pytest.raises(TypeError, match=r"dequantize\(\) first"):
        list(w[0])
    with pytest.raises(TypeError, match=r"dequantize\(\) first"):
        np.asarray(w)


def test_to_moves_and_renames_the_dtype(model: Path) -> None:
    w = gt.load(model, names=["ks"])["ks"]
    assert w.to("cpu") is w
    assert w.to(torch.bfloat16).dtype == torch.bfloat16
    assert w.to(dtype=torch.float16).packed.data_ptr() == w.packed.data_ptr()
    moved = w.to("meta")
    assert moved.device.type == "meta"
    assert (moved.shape, moved.type, moved.name) == (w.shape, w.type, w.name)


def test_bytes_that_do_not_fit_are_refused() -> None:
    codec = types.get("Q4_0")
    with pytest.raises(CodecError, match=r"Q4_0\[2, 32\] takes 36 bytes"):
        gt.GGUFTensor(torch.zeros(35, dtype=torch.uint8), codec, (2, 32))
    with pytest.raises(CodecError, match="either packed or in planes"):
        gt.GGUFTensor(None, codec, (2, 32))
    with pytest.raises(CodecError, match="the shape is unknown"):
        gt.GGUFTensor(torch.zeros(36, dtype=torch.uint8), None)
    planes = [torch.zeros(n, dtype=torch.uint8) for n in ((2, 128), (2, 1))]
    with pytest.raises(CodecError, match=r"planes \[\[2, 128\], \[2, 1\]\] do not make up"):
        gt.GGUFTensor(None, types.get("F8_E4M3_B128"), (3, 128), planes=planes)
    with pytest.raises(CodecError, match="Q4_0 has no planes"):
        gt.GGUFTensor(None, codec, (2, 128), planes=planes)
    assert gt.GGUFTensor(torch.zeros((2, 18), dtype=torch.uint8), codec).shape == (2, 32)


def test_planes_are_an_option_of_load(model: Path) -> None:
    plain = gt.load(model)
    tensors = gt.load(model, planes=True)
    w = tensors["f8"]
    assert w.planes is not None
    assert [plane.shape for plane in w.planes] == [(16, 512), (16, 4)]
    assert repr(w).endswith("cpu, planes>")
    assert w.nbytes == plain["f8"].nbytes
    assert torch.equal(w.packed, plain["f8"].packed)
    assert_same_bits(as_numpy(w.dequantize()), as_numpy(plain["f8"].dequantize()))
    assert_same_bits(as_numpy(w[3].dequantize()), as_numpy(plain["f8"][3].dequantize()))
    assert w.to("meta").planes is not None
    assert tensors["ks"].planes is None
    assert gt.load(model, planes=lambda name: name != "f8")["f8"].planes is None


# What it costs ----------------------------------------------------------------------------------------------------------


MEMORY = """
import resource, sys, threading
import torch, ggufx.torch
from ggufx.torch import loading
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with ggufx.torch.open(sys.argv[1], "meta", shard=(1, 2), dim=lambda name: 1 if name == "columns" else None) as f:
    f.load(["small"])
    before = peak()
    assert len(f.load()) == 303
print(peak() - before)
"""


def test_memory_on_the_way_is_bounded(tmp_path: Path) -> None:
    # A device without memory of its own: what is left is what the way there takes. Holes, so that no disk is needed.
    shapes: Shapes = {f"t{number}": ("Q8_0", (1024, 4096)) for number in range(300)}
    shapes |= {"small": ("F32", (4,)), "large": ("Q8_0", (4096, 65536)), "columns": ("MXFP4", (65536, 8192))}
    path = write_gguf(tmp_path / "many.gguf", shapes, real=False)
    assert path.stat().st_size > 1.8e9
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400, "MB beyond importing torch"


# Importing --------------------------------------------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_torch_is_imported_on_first_use() -> None:
    done = run("import sys, ggufx; assert 'torch' not in sys.modules; ggufx.torch.load; assert 'torch' in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("statement", ["import ggufx.torch", "import ggufx; ggufx.torch", "import ggufx.torch.modules"])
def test_without_torch_the_error_names_the_extra(statement: str) -> None:
    done = run(f"import sys; sys.modules['torch'] = None\n{statement}")
    assert done.stderr.splitlines()[-1] == (
        "ggufx.errors.MissingExtra: ggufx.torch needs torch, which is not installed: pip install 'ggufx[torch]'"
    )


# GPUs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_all_tensors_arrive_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PIECE_NBYTES", 100)
    tensors = gt.load(model, lambda name: "cuda" if name != "norm" else "cpu")
    with ggufx.open(model) as file:
        for name, tensor in tensors.items():
            assert tensor.device.type == ("cpu" if name == "norm" else "cuda")
            assert np.array_equal(tensor.packed.cpu().numpy(), file[name].packed)
