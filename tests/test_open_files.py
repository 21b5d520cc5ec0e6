"""Open files: more of them than descriptors, files that change under their reader, and files that travel in a pickle."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command import Run
from double import install
from safetensors.numpy import save_file
from test_hostile_files import ARRAY, STRING, U16, build, kv, line, string, u32, u64

import ggufx
import ggufx.torch
from ggufx.errors import CheckpointError, ContainerError, GGUFError, NonFiniteError
from ggufx.measure import measure
from ggufx.stored import descriptor_limit

Cli = Callable[..., Run]

COUNT = 110
LIMIT = 96
"""Descriptors that the process may have, those of the tests' own included: fewer than there are files."""


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


def f32_file(path: Path, *tensors: np.ndarray) -> Path:
    """A GGUF of float32 tensors t0, t1 ... whose bytes are multiples of 32."""
    lines, offset = [], 0
    for number, values in enumerate(tensors):
        lines.append(line(f"t{number}", values.shape[::-1], 0, offset))
        offset += values.nbytes
    path.write_bytes(
        build((kv("general.architecture", STRING, string("llama")),), tuple(lines), b"".join(map(bytes, tensors)))
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return f32_file(tmp_path_factory.mktemp("whole") / "m.gguf", *(numbers(number, 2, 32) for number in range(COUNT)))


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# More files than descriptors ------------------------------------------------------------------------------------------


def test_a_split_of_more_files_than_descriptors(whole: Path, tmp_path: Path, cli: Cli, few_descriptors: None) -> None:
    run = cli("split", whole, "--outfile", tmp_path / "s", "--split-max-tensors", 1)
    assert run.code == 0, run.err
    first = tmp_path / f"s-00001-of-{COUNT:05d}.gguf"
    assert len(list(tmp_path.glob("*.gguf"))) == COUNT
    assert cli("inspect", first).code == 0
    assert cli("diff", first, whole).code == 0
    assert cli("verify", first, "--against", whole).code == 0
    assert len(measure(first, ["Q8_0"])) == COUNT
    with ggufx.open(first) as f:
        assert len(f) == COUNT
        for number in (0, COUNT - 1, 3, 0):  # round and round
            assert f[f"t{number}"].numpy().tolist() == numbers(number, 2, 32).tolist()
        # Views of all at once: mapped, and without a descriptor each.
        views = [tensor.packed for tensor in f.tensors]
        assert all(view.tobytes() == numbers(n, 2, 32).tobytes() for n, view in enumerate(views))
        loaded = ggufx.torch.load(first)
        assert all(loaded[f"t{n}"].dequantize().numpy().tobytes() == bytes(numbers(n, 2, 32)) for n in range(COUNT))
        assert not any(view.flags.owndata or view.flags.writeable for view in views)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)  # as to a GPU, whose readers do not know of Python
        loaded = ggufx.torch.load(first)
        assert all(loaded[f"t{n}"].dequantize().numpy().tobytes() == bytes(numbers(n, 2, 32)) for n in range(COUNT))
    run = cli("merge-splits", first, "--outfile", tmp_path / "merged.gguf")
    assert run.code == 0, run.err
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    run = cli("quantize", first, tmp_path / "q.gguf", "q8_0")
    assert run.code == 0, run.err


def test_a_hybrid_of_more_files_than_descriptors(tmp_path: Path, few_descriptors: None) -> None:
    for number in range(COUNT):
        tensors = {f"t{number}.weight": numbers(number, 2, 32)}
        if number == 0:
            tensors["blk.0.ffn_gate_exps.ggml_type"] = np.array([0], np.int64)
        save_file(tensors, tmp_path / f"m-{number:05d}.safetensors")
    from ggufx.hybrid import open as open_hybrid

    with open_hybrid(tmp_path) as f:
        for number in range(COUNT):
            assert f[f"t{number}.weight"].numpy().tobytes() == bytes(numbers(number, 2, 32))


def test_threads_that_read_more_files_than_descriptors(tmp_path: Path, few_descriptors: None) -> None:
    paths = [f32_file(tmp_path / f"{number}.gguf", numbers(number, 4, 32)) for number in range(60)]
    assert descriptor_limit() == LIMIT // 4
    files = [ggufx.open(path) for path in paths]

    def read(turn: int) -> bool:
        number = turn * 7 % 60
        # Rows that do not follow each other are read, whole tensors are viewed.
        rows = files[number]["t0"][[3, 1]]
        return bool(
            (rows == numbers(number, 4, 32)[[3, 1]]).all()
            and (files[number]["t0"].numpy() == numbers(number, 4, 32)).all()
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(600)))


def test_files_that_are_dropped_give_their_descriptors_back(tmp_path: Path) -> None:
    path = f32_file(tmp_path / "m.gguf", numbers(0, 2, 32))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names only)
    for _ in range(20):
        ggufx.open(path)["t0"].numpy()
    with ggufx.open(path) as f:
        view = f["t0"].packed
    assert view.tobytes() == bytes(numbers(0, 2, 32))
    del view, f
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_rows_by_their_numbers(tmp_path: Path) -> None:
    values = numbers(0, 3, 40, 32)
    with ggufx.open(f32_file(tmp_path / "m.gguf", values)) as f:
        chosen = np.array([119, 0, 7, 7, 8])
        assert f["t0"].rows_at(chosen).tolist() == values.reshape(120, 32)[chosen].tolist()
        assert f["t0"].rows_at(chosen[:0]).shape == (0, 32)
        for bad in (120, -1):
            with pytest.raises(IndexError, match=f"rows {min(0, bad)} to {max(0, bad)} of 't0', which has 120"):
                f["t0"].rows_at(np.array([0, bad]))


# Files that change ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_shortened_while_it_is_open(tmp_path: Path) -> None:
    path = f32_file(tmp_path / "m.gguf", numbers(0, 2, 32), numbers(1, 512, 1024))
    with ggufx.open(path) as f:
        f["t1"].numpy()  # it is mapped already
        os.truncate(path, 8192)
        assert f["t0"].numpy().tolist() == numbers(0, 2, 32).tolist()
        for read in (
            f["t1"].numpy,
            lambda: f["t1"][500],
            lambda: f["t1"][::2],
            lambda: f["t1"][[1, 400]],
            lambda: f["t1"].packed,
            lambda: f["t1"].rows_at(np.array([511])),
            lambda: np.asarray(f["t1"]),
        ):
            with pytest.raises(ContainerError, match=r"m\.gguf: the file ends at byte 8192, expected") as caught:
                read()
            assert caught.value.rule == "truncated"
        with pytest.raises(CheckpointError, match="ends at byte 8192"):
            ggufx.torch.TorchFile(f).load()


def test_a_file_that_shrinks_while_it_is_decoded_does_not_kill_the_process(tmp_path: Path) -> None:
    # Three pieces of 4 MB and rows from two of them; the file is cut while the first piece is decoded.
    path = f32_file(tmp_path / "m.gguf", np.ones((3, 1 << 20), "<f4"))
    size = path.stat().st_size
    code = (
        "import os, sys, ggufx\n"
        "from ggufx.types.scalars import F32\n"
        "decode = F32.decode_rows\n"
        "def cut(self, rows, out):\n"
        "    decode(self, rows, out)\n"
        "    os.truncate(sys.argv[1], 8192)\n"
        "F32.decode_rows = cut\n"
        "f = ggufx.open(sys.argv[1])\n"
        "for read in (lambda: f['t0'].numpy(threads=1), lambda: f['t0'][[2, 0]]):\n"
        "    try:\n"
        "        read()\n"
        "    except ggufx.errors.ContainerError as error:\n"
        "        print(error.rule)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(ggufx.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "truncated\ntruncated\n", "")
    assert path.stat().st_size == 8192 < size


def test_measure_reads_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f32_file(tmp_path / "m.gguf", numbers(1, 512, 1024))
    rows_at = ggufx.Tensor.rows_at

    def cut(self: ggufx.Tensor, chosen: np.ndarray) -> np.ndarray:
        os.truncate(path, 8192)
        return rows_at(self, chosen)

    monkeypatch.setattr(ggufx.Tensor, "rows_at", cut)
    with pytest.raises(ContainerError, match="ends at byte 8192"):
        measure(path, ["Q8_0"], max_rows=100)


def test_another_file_in_its_place_is_never_read(tmp_path: Path, few_descriptors: None) -> None:
    path = f32_file(tmp_path / "m.gguf", numbers(0, 2, 32))
    f = ggufx.open(path)
    f32_file(tmp_path / "new.gguf", numbers(9, 2, 32)).replace(path)
    # With its descriptor it is the file that was opened ...
    assert f["t0"].numpy().tolist() == numbers(0, 2, 32).tolist()
    others = [ggufx.open(f32_file(tmp_path / f"{number}.gguf", numbers(number, 1, 32))) for number in range(40)]
    # ... and without it cannot be had again.
    with pytest.raises(ContainerError, match="another file has taken the place") as caught:
        f["t0"].numpy()
    assert caught.value.rule == "changed"
    assert len(others) == 40
    (tmp_path / "0.gguf").unlink()
    with pytest.raises(ContainerError, match="removed after it was opened"):
        others[0]["t0"].numpy()


def test_a_removed_file_stays_readable_as_long_as_it_is_held(tmp_path: Path) -> None:
    path = f32_file(tmp_path / "m.gguf", numbers(0, 2, 32))
    with ggufx.open(path) as f:
        path.unlink()
        assert f["t0"].numpy().tolist() == numbers(0, 2, 32).tolist()
        assert f["t0"][[1]].tolist() == numbers(0, 2, 32)[[1]].tolist()


def test_a_closed_file_is_not_read(tmp_path: Path) -> None:
    f = ggufx.open(f32_file(tmp_path / "m.gguf", numbers(0, 2, 32)))
    f.close()
    for read in (f["t0"].numpy, lambda: f["t0"].packed, lambda: f["t0"][[1]], lambda: pickle.dumps(f)):
        with pytest.raises(ValueError, match=r"m\.gguf is closed"):
            read()


# Pickles --------------------------------------------------------------------------------------------------------------


def total(tensor: ggufx.Tensor) -> float:
    return float(tensor.numpy().sum(dtype=np.float64))


def test_files_and_tensors_can_be_pickled_and_copied(whole: Path) -> None:
    with ggufx.open(whole) as f:
        for again in (pickle.loads(pickle.dumps(f)), copy.deepcopy(f), copy.copy(f)):
            assert (again.path, again.dialect, list(again)) == (f.path, f.dialect, list(f))
            assert again["t7"].numpy().tolist() == numbers(7, 2, 32).tolist()
            assert again.metadata["general.architecture"] == "llama"
        packed = pickle.dumps(f["t7"])
        assert len(packed) < 2000  # a place in a file, not its bytes or its directory
        for tensor in (pickle.loads(packed), copy.deepcopy(f["t7"])):
            assert (tensor.name, tensor.shape, tensor.type, tensor.codec) == ("t7", (2, 32), "F32", f["t7"].codec)
            assert tensor.numpy().tolist() == numbers(7, 2, 32).tolist()


def test_errors_come_back_from_other_processes() -> None:
    for error in (ContainerError("m.gguf", "rule", "what"), NonFiniteError(1, 2, float("inf"), "Q8_0")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
    assert (again.moved(3).args[0]).startswith("found inf at row 4, column 2")


def test_tensors_go_to_other_processes(whole: Path) -> None:
    with ggufx.open(whole) as f, multiprocessing.get_context("fork").Pool(2) as pool:
        chosen = f.tensors[:8]
        assert pool.map(total, chosen) == [float(numbers(n, 2, 32).sum(dtype=np.float64)) for n in range(8)]


def test_a_pickle_of_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = f32_file(tmp_path / "m.gguf", numbers(0, 2, 32))
    with ggufx.open(path) as f:
        packed = [pickle.dumps(f), pickle.dumps(f["t0"])]
    f32_file(path, numbers(0, 2, 32), numbers(1, 2, 32))
    for data in packed:
        with pytest.raises(ContainerError, match="not what it was") as caught:
            pickle.loads(data)
        assert caught.value.rule == "changed"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(packed[0])


def test_splits_and_parts_come_out_of_a_pickle_as_they_went_in(tmp_path: Path) -> None:
    members = [
        build(
            (kv("split.no", U16, bytes([number, 0])), kv("split.count", U16, b"\2\0")),
            (line(f"t{number}", (32, 2)),),
            bytes(numbers(number, 2, 32)),
        )
        for number in (0, 1)
    ]
    paths = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for path, data in zip(paths, members, strict=True):
        path.write_bytes(data)
    assert list(pickle.loads(pickle.dumps(ggufx.open(paths[1])))) == ["t0", "t1"]
    assert list(pickle.loads(pickle.dumps(ggufx.open(paths[1], splits=False)))) == ["t1"]
    paths[0].unlink()
    again = pickle.loads(pickle.dumps(ggufx.open(paths[1], header_only=True)))
    assert (list(again), again.complete) == (["t1"], False)


def test_metadata_as_json(tmp_path: Path) -> None:
    tokens = kv("tokens", ARRAY, u32(STRING) + u64(2) + string("a") + string("é"))
    scores = kv("scores", ARRAY, u32(U16) + u64(2) + b"\1\0\2\0")
    path = tmp_path / "m.gguf"
    path.write_bytes(build((tokens, scores)))
    with ggufx.open(path) as f:
        assert json.loads(json.dumps(f.metadata.to_json())) == {"tokens": ["a", "é"], "scores": [1, 2]}
        again = pickle.loads(pickle.dumps(f.metadata))
    assert list(again["tokens"]) == ["a", "é"]
    assert again["scores"].tolist() == [1, 2]


def test_what_the_limits_of_the_system_mean() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = {}
    try:
        for soft in (16, 256, 1024, min(4096, before[1])):
            with contextlib.suppress(ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
                found[soft] = descriptor_limit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found.items() >= {16: 8, 256: 64, 1024: 256}.items()
    assert issubclass(ContainerError, GGUFError)
