"""A Hugging Face checkpoint as a lazy mapping: tensor name -> dtype, shape and the bytes' place in a shard.

Reads headers only. The ``safetensors`` library gives tensors as arrays, which NumPy cannot hold in FP8 or E8M0, and not
the byte ranges that a streaming copy needs; its format is a length, a JSON header and the data, so the header is parsed
here, and checked: nothing is taken on the file's word.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ggufx.errors import CheckpointError
from ggufx.typed import open_regular, parse_object, read_object, shown

__all__ = ["Checkpoint", "SourceTensor", "read_shard"]

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
"""Of a checkpoint that is not split."""
MAX_HEADER_NBYTES: Final = 100_000_000
"""The safetensors library's own limit."""
_POINTER: Final = b"version "
"""What git-lfs leaves in a file's place begins so; as a length it would be absurd."""
MAX_AXES: Final = 64
"""No tensor has more; the product of a hostile header's million axes would be a number of a million digits."""

DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16,
    "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of the dtypes of safetensors 0.8. A tensor of another is known by its name and bytes only."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name, dtype
        As in the shard's header (``F8_E4M3``, ``I8``, ``BF16`` ...); the dtype may be one that nobody here knows.
    shape
        Numpy order.
    shard
        Index into :attr:`Checkpoint.shards`.
    offset, nbytes
        Byte range within the shard's file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


class Checkpoint(Mapping[str, SourceTensor]):
    """A directory with config.json and safetensors shards.

    Attributes
    ----------
    path : Path
        The directory; of a repository's folder in Hugging Face's cache, its snapshot.
    config : dict
        config.json.
    shards : list of Path
        In order of their names.
    shard_states : list of (int, int)
        Size and modification time (ns) of each shard when its header was read.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or the index does not agree with the shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _snapshot(Path(path))
        if not self.path.is_dir():
            hint = "; pass the directory that holds config.json" if self.path.exists() else ": it does not exist"
            if _is_gguf(self.path):
                hint = ", but a GGUF: `ggufx quantize` gives it other types, `ggufx retarget` another dialect"
            raise CheckpointError(f"{self.path}: not a checkpoint directory{hint}")
        self.config: dict[str, Any] = read_object(self.path / "config.json", needed="a checkpoint directory has one")
        self.shards, weight_map = self._find_shards()
        self._tensors: dict[str, SourceTensor] = {}
        self.shard_states: list[tuple[int, int]] = []
        for number, shard in enumerate(self.shards):
            state, tensors = read_shard(shard, number)
            self.shard_states.append(state)
            for tensor in tensors:
                if tensor.name in self._tensors:
                    other = self.shards[self._tensors[tensor.name].shard].name
                    raise CheckpointError(f"{shard}: tensor {tensor.name!r} is in {other}, too")
                self._tensors[tensor.name] = tensor
        if weight_map is not None:
            self._check_index(weight_map)

    @classmethod
    def imagined(
        cls, path: Path, config: dict[str, Any], shards: Sequence[Path], tensors: Iterable[SourceTensor]
    ) -> Checkpoint:
        """Return a checkpoint of which no file exists: what a GGUF would be as one.

        The architecture's own checks and orders then apply to it. Nothing can be read from it.
        """
        made = cls.__new__(cls)
        made.path, made.config, made.shards = path, config, list(shards)
        made.shard_states = []
        made._tensors = {tensor.name: tensor for tensor in tensors}
        return made

    @property
    def cache_folder(self) -> Path | None:
        """The folder ``models--ORG--NAME`` of Hugging Face's cache that this is a snapshot of, or ``None``."""
        folder = self.path.absolute()
        root = folder.parent.parent
        return root if folder.parent.name == "snapshots" and root.name.startswith("models--") else None

    @property
    def name(self) -> str:
        """What the model is called by where it lies: the repository's name in Hugging Face's cache, else the directory's."""
        root = self.cache_folder
        return self.path.absolute().name if root is None else root.name.split("--")[-1]

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or an empty dict."""
        return read_object(self.path / "generation_config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, or an empty dict."""
        return read_object(self.path / "tokenizer_config.json")

    def _find_shards(self) -> tuple[list[Path], dict[str, str] | None]:
        index_path, single = self.path / INDEX_NAME, self.path / SINGLE_NAME
        index = read_object(index_path)
        if not index:
            shards = sorted(self.path.glob("*.safetensors"))
            if not shards:
                raise CheckpointError(f"{self.path}: no safetensors files and no {INDEX_NAME}")
            return shards, None
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{index_path}: weight_map is {shown(weight_map)}, expected file names by tensor names"
            )
        odd = next(((n, file) for n, file in weight_map.items() if not isinstance(file, str)), None)
        if odd is not None:
            raise CheckpointError(
                f"{index_path}: weight_map gives {shown(odd[1])} for {shown(odd[0])}, expected a file name"
            )
        names = sorted(set(weight_map.values()))
        escaping = [name for name in names if Path(name).name != name]
        if escaping:
            raise CheckpointError(f"{index_path}: shard name {shown(escaping[0])} is not a plain file name")
        missing = [name for name in names if not _exists(self.path / name)]
        if SINGLE_NAME not in names and _exists(single):
            # Transformers reads the one file whenever it is there: the index is left of a split one.
            if missing:
                return [single], None
            raise CheckpointError(
                f"{self.path}: holds {SINGLE_NAME} and {INDEX_NAME} with all of its {len(names)} shards: two sets of weights, "
                "of which transformers would read the single file; move the other away"
            )
        if missing:
            raise CheckpointError(
                f"{self.path}: Missing or incomplete model files: {shown(missing[:3])} ({len(missing)} of {len(names)} shards "
                "of the index are not there); download them"
            )
        return [self.path / name for name in names], weight_map

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        missing = [name for name in weight_map if name not in self._tensors]
        if missing:
            raise CheckpointError(
                f"{self.path / INDEX_NAME}: Missing tensors: {missing[:3]} ({len(missing)} of {len(weight_map)} are in no "
                "shard); the index and the shards are of different downloads"
            )
        moved = [n for n, t in self._tensors.items() if weight_map.get(n) != self.shards[t.shard].name]
        if moved:
            where = self.shards[self._tensors[moved[0]].shard].name
            raise CheckpointError(
                f"{self.path / INDEX_NAME}: Mismatch between weight map and model parts: {moved[0]!r} is in {where}, the "
                f"index says {weight_map.get(moved[0])} ({len(moved)} such tensors)"
            )

    def __getitem__(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, uint8 [nbytes]: for small tensors, checks and tests."""
        tensor = self[name]
        with self.shards[tensor.shard].open("rb") as file:
            file.seek(tensor.offset)
            data = np.fromfile(file, np.uint8, tensor.nbytes)
        if data.nbytes != tensor.nbytes:
            raise CheckpointError(f"{self.shards[tensor.shard]}: tensor {name!r} ends early")
        return data

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path.name}: {len(self)} tensors in {len(self.shards)} shards>"


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(4) == b"GGUF"
    except OSError:
        return False


def _snapshot(path: Path) -> Path:
    """Return the snapshot that a repository's folder in Hugging Face's cache holds; of other directories, themselves."""
    if not path.absolute().name.startswith("models--") or (path / "config.json").exists():
        return path
    snapshots = path / "snapshots"
    try:
        with open_regular(path / "refs" / "main") as file:
            found = [snapshots / file.read(100).decode("ascii", "replace").strip()]
    except FileNotFoundError:
        found = sorted(folder for folder in snapshots.glob("*") if folder.is_dir())
    if len(found) != 1 or found[0].parent != snapshots or not found[0].is_dir():
        raise CheckpointError(
            f"{path}: is a repository of Hugging Face's cache whose refs/main names no snapshot that is there; pass one of "
            f"{snapshots}"
        )
    return found[0]


def read_shard(path: Path, shard: int) -> tuple[tuple[int, int], list[SourceTensor]]:
    """Read a safetensors header: the file's (size, modification time in ns), and its tensors as of shard ``shard``.

    Raises
    ------
    CheckpointError
        The header is damaged, or the tensors do not fill the file exactly.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            file_nbytes = status.st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path}: {file_nbytes} bytes are too few for a safetensors file; download it again"
                )
            if prefix == _POINTER:
                raise CheckpointError(
                    f"{path}: is git-lfs' pointer to the file, not the file itself; fetch it with: git lfs pull"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_NBYTES, file_nbytes - 8):
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes, the file has {file_nbytes}: not a safetensors file, or "
                    "incomplete"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    # The format forbids a name twice; the library's own parser takes the last one.
    header = parse_object(text, f"{path}: the safetensors header", constants=False, unique=True)
    remarks = header.pop("__metadata__", None)
    if remarks is not None and not (isinstance(remarks, dict) and all(isinstance(v, str) for v in remarks.values())):
        raise CheckpointError(f"{path}: __metadata__ of the header is {shown(remarks)}, expected texts by their names")
    start = 8 + length
    tensors = [_entry(path, shard, start, name, line) for name, line in header.items()]
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.offset}, expected {end}: its data overlaps or "
                "leaves a hole"
            )
        end += tensor.nbytes
    if end != file_nbytes:
        raise CheckpointError(
            f"{path}: the tensors end at byte {end} but the file has {file_nbytes}: it is incomplete or damaged; download "
            "it again"
        )
    return (status.st_size, status.st_mtime_ns), tensors


def _entry(path: Path, shard: int, start: int, name: str, line: Any) -> SourceTensor:
    try:
        dtype = line["dtype"]
        shape = tuple(line["shape"])
        begin, end = line["data_offsets"]
        numbers = [*shape, begin, end]
        # safetensors' numbers are 64 bits; longer ones could not even be printed.
        sound = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers) and begin <= end
        sound = sound and isinstance(dtype, str) and len(shape) <= MAX_AXES
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header's entry of tensor {shown(name)} is malformed: {shown(line)}")
    if dtype not in DTYPE_BITS:
        # Listed and left out it may be; whoever needs its values refuses its dtype.
        return SourceTensor(name, dtype, shape, shard, start + begin, end - begin)
    nbytes, rest = divmod(prod(shape) * DTYPE_BITS[dtype], 8)
    if rest or end - begin != nbytes:
        takes = f"{nbytes} bytes and {rest} bits: it must end with a byte" if rest else f"{nbytes} bytes"
        raise CheckpointError(
            f"{path}: tensor {shown(name)} {dtype}{list(shape)} takes {takes}; its data_offsets give {end - begin} bytes"
        )
    return SourceTensor(name, dtype, shape, shard, start + begin, nbytes)


def _exists(path: Path) -> bool:
    """Return whether there is such a file; a name that no file can have, of 300 letters say, is none."""
    try:
        return path.is_file()
    except OSError:
        return False
