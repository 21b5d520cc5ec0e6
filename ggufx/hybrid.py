"""Read a KTransformers hybrid, a folder of safetensors files in which routed experts are GGML blocks, like a GGUF.

Such a folder (see :mod:`ggufx.merge`) names tensors as GGUFs do. Experts are one row of bytes with the number of their type
beside them, so their shape is not in the folder: it follows from the router's, [experts, hidden], and the bytes of a row.
FP8 weights have their scales beside them, and both are one tensor here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ggufx import dialects, types
from ggufx import file as gguf_file
from ggufx.checkpoint import SourceTensor, read_shard
from ggufx.container import Container, Entry, KeyValues
from ggufx.errors import AmbiguousDialect, CodecError, ContainerError
from ggufx.file import File, Index, Tensor
from ggufx.stored import StoredFile, scratch
from ggufx.typed import Facts, read_object
from ggufx.types import Codec
from ggufx.types.f8_e4m3_b128 import BLOCK_LEN, E8M0, decode_scaled, widened

__all__ = ["HybridFile", "ScaledTensor", "open"]

_TYPE, _SCALES, _WEIGHT = ".ggml_type", "_scale_inv", ".weight"
_PLAIN: Final = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
"""safetensors' dtypes that are ggml's types, under the same names."""
_FP8: Final = "F8_E4M3"
_CHUNK_LEN: Final = 1 << 20


class ScaledTensor(Tensor):
    """FP8 codes with a scale for each 128x128 of them.

    Attributes
    ----------
    type : str
        ``F8_E4M3``; no dialect has a number for it, so :attr:`type_id` is -1 and :attr:`codec` is ``None``.
    nbytes : int
        Of codes and scales.
    packed : uint8 [rows, row_len]
        The codes, a view.
    """

    def __init__(self, container: Container, entry: Entry, scale_container: Container, scale_entry: Entry, dtype: str):
        super().__init__(container, entry, None)
        self.type = _FP8
        self.nbytes = entry.span + scale_entry.span
        self._scales = (scale_container, scale_entry, dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32."""
        return np.dtype(np.float32)

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The codes as they lie in the file, a read-only view: uint8 [rows, row_len]."""
        return self._container.bytes_of(self._entry).reshape(self.shape)

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """The scales, a copy: float32 [ceil(rows / 128), ceil(row_len / 128)]."""
        container, entry, dtype = self._scales
        raw = container.stored.read(container.data_offset + entry.offset, entry.span)
        # A copy is aligned and writeable, as the kernel's one overload wants it.
        return np.array(E8M0[raw] if dtype in ("F8_E8M0", "U8") else widened(raw, dtype)).reshape(entry.shape)

    def numpy(
        self,
        dtype: npt.DTypeLike | None = None,
        *,
        out: npt.NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> npt.NDArray[Any]:
        """Decode the whole tensor: each value is the product of code and scale, rounded to float32 once (see :class:`Tensor`).

        Raises
        ------
        CodecError
            ``out`` is of another shape or dtype, or not C-contiguous.
        """
        wanted = np.dtype(dtype) if dtype is not None else np.dtype(np.float32) if out is None else out.dtype
        if out is None:
            out = np.empty(self.shape, wanted)
        elif out.shape != self.shape or out.dtype != wanted or not out.flags.c_contiguous or not out.flags.writeable:
            raise CodecError(
                f"out is {out.dtype}{list(out.shape)}, it must be a writeable C-contiguous {wanted}{list(self.shape)}"
            )
        scales, filled = self.scales, out
        # Whole rows of scales, so that no chunk begins within one.
        step = max(1, _CHUNK_LEN // max(1, self.shape[-1]) // BLOCK_LEN) * BLOCK_LEN

        def decode(start: int) -> None:
            stop = min(start + step, self.shape[0])
            rows = scratch("packed", (stop - start) * self.shape[-1]).reshape(stop - start, -1)
            self._read_rows(start, rows)
            first = start // BLOCK_LEN
            part = scales[first : first + -(-rows.shape[0] // BLOCK_LEN)]
            with np.errstate(over="ignore"):  # float16 has no room for all of them
                filled[start:stop] = decode_scaled(rows, part, BLOCK_LEN)[0]

        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            list(pool.map(decode, range(0, self.shape[0], step)))
        return out

    def decode_rows(self, codes: npt.NDArray[np.uint8], start: int) -> npt.NDArray[np.float32]:
        """Decode rows that begin with row ``start``, from codes that the caller has read: float32 [n, row_len]."""
        first, phase = divmod(start, BLOCK_LEN)
        scales = self.scales[first : first + -(-(phase + codes.shape[0]) // BLOCK_LEN)]
        return decode_scaled(np.ascontiguousarray(codes), scales, BLOCK_LEN, phase)[0]

    def __getitem__(self, index: Index | tuple[Index, ...]) -> npt.NDArray[Any]:
        """Decode a slice: only the rows that are asked for."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is None or isinstance(part, bool | np.bool_) for part in parts):
            raise IndexError("only integers, slices, ... and integer arrays index a tensor")
        if parts and parts[0] is not Ellipsis and (len(parts) == 1 or isinstance(parts[1], slice)):
            rows = np.arange(self.shape[0])[parts[0]]
            values = self.rows_at(rows.reshape(-1))
            return values.reshape(*rows.shape, self.shape[-1])[(..., *parts[1:])]
        return self.numpy()[index]

    def rows_at(self, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Decode rows by their numbers: float32 [n, row_len]."""
        wanted = np.asarray(numbers, np.int64)
        return decode_scaled(self._packed_rows(wanted, self.shape[-1]), self.scales[wanted // BLOCK_LEN], 1)[0]


class HybridFile(File):
    """An open hybrid: tensor name -> :class:`ggufx.file.Tensor`, in file order; it has no metadata.

    Attributes
    ----------
    dialect, equivalent
        Of the experts' type numbers.
    config : Facts
        config.json, empty if the folder has none.
    """

    def __init__(self, path: Path, dialect: str | None) -> None:
        self._path = path
        self._chosen = dialect
        self.notes, self.complete = (), True
        self.metadata = KeyValues({})
        self._containers: list[Container] = []
        self._dialects = (
            [] if dialect == dialects.OPAQUE else [dialects.get(dialect)] if dialect else [*dialects.DIALECTS.values()]
        )
        sources: dict[str, tuple[SourceTensor, Container]] = {}
        for number, shard in enumerate(sorted(path.glob("*.safetensors"))):
            _, tensors = read_shard(shard, number)
            container = _opened(shard, tensors)
            self._containers.append(container)
            for tensor in sorted(tensors, key=lambda t: t.offset):
                if tensor.name in sources:
                    other = sources[tensor.name][1].path.name
                    raise ContainerError(
                        shard, "duplicate-tensor", f"tensor {tensor.name!r} is in {other}, too: files of two models"
                    )
                sources[tensor.name] = tensor, container
        if not any(name.endswith(_TYPE) for name in sources):
            kind = "a checkpoint; ggufx convert makes a GGUF of it" if sources else "no model"
            raise ContainerError(
                path, "hybrid", f"a directory without routed experts of GGML types (*{_TYPE}) is {kind}"
            )
        self._sources = sources
        # KTransformers' own script writes none.
        self.config = Facts(path / "config.json", read_object(path / "config.json"))
        self.notes = ()
        self._tensors = {}
        codecs: set[tuple[int, Codec]] = set()
        for name, (tensor, container) in sources.items():
            found = self._tensor(name, tensor, container)
            if found is not None:
                self._tensors[name] = found
                if found.codec is not None and found.type_id >= 0 and tensor.dtype == "U8":
                    codecs.add((found.type_id, found.codec))
        agreeing = [d.name for d in self._dialects if all(d.codec(number) is codec for number, codec in codecs)]
        self.equivalent = tuple(agreeing)
        self.dialect = agreeing[0] if agreeing else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (
            self._path.absolute(),
            self._chosen,
            tuple(container.stored for container in self._containers),
        )

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    @property
    def stored(self) -> dict[str, tuple[Path, SourceTensor]]:
        """Every tensor of the files, scales and type numbers too, as it lies there: name -> file, place."""
        return {name: (container.path, tensor) for name, (tensor, container) in self._sources.items()}

    def _tensor(self, name: str, tensor: SourceTensor, container: Container) -> Tensor | None:
        """Return a tensor as a reader sees it; ``None`` for what belongs to another one."""
        base = name.removesuffix(_WEIGHT)
        if name.endswith(_TYPE) and name.removesuffix(_TYPE) + _WEIGHT in self._sources:
            return None
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) in self._sources:
            return None
        if tensor.dtype == _FP8:
            return self._scaled(name, tensor, container)
        if tensor.dtype == "U8" and name.endswith(_WEIGHT) and (base + _TYPE in self._sources or "_exps" in base):
            return self._packed(name, tensor, container)
        codec = types.get(tensor.dtype) if tensor.dtype in _PLAIN else None
        number = -1 if codec is None else codec.ids["llama.cpp"]
        found = Tensor(container, _entry(tensor, tensor.shape, number), codec)
        if codec is None:
            found.type = tensor.dtype
        return found

    def _scaled(self, name: str, tensor: SourceTensor, container: Container) -> Tensor:
        scale, scale_container = self._sources.get(name + _SCALES, (None, container))
        wanted = tuple(-(-length // BLOCK_LEN) for length in tensor.shape)
        if scale is None:
            raise ContainerError(
                container.path, "scales", f"tensor {name!r} is {_FP8} but {name + _SCALES!r} is missing"
            )
        if scale.shape != wanted or scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0", "U8") or len(wanted) != 2:
            raise ContainerError(
                scale_container.path,
                "scales",
                f"scales {scale.name!r} are {scale.dtype}{list(scale.shape)}, expected F32{list(wanted)}: one for each "
                f"{BLOCK_LEN}x{BLOCK_LEN} of {list(tensor.shape)}",
            )
        codes = _entry(tensor, tensor.shape, -1)
        return ScaledTensor(container, codes, scale_container, _entry(scale, scale.shape, -1), scale.dtype)

    # Packed experts ---------------------------------------------------------------------------------------------

    def _type_id(self, name: str) -> int:
        """Return the number of a packed tensor's type: what stands beside it, or 0 (F32), which some writers leave out."""
        found = self._sources.get(name.removesuffix(_WEIGHT) + _TYPE)
        if found is None:
            return 0
        tensor, container = found
        if tensor.dtype not in ("I64", "I32", "U8") or tensor.shape not in ((), (1,)):
            raise ContainerError(
                container.path, "type", f"{tensor.name!r} is {tensor.dtype}{list(tensor.shape)}, expected one I64"
            )
        raw = container.stored.read(tensor.offset, tensor.nbytes)
        return int.from_bytes(raw.tobytes(), "little", signed=tensor.dtype != "U8")

    def _packed(self, name: str, tensor: SourceTensor, container: Container) -> Tensor:
        number = self._type_id(name)
        codecs = list(dict.fromkeys(c for d in self._dialects if (c := d.codec(number)) is not None))
        shapes = {codec: shape for codec in codecs if (shape := self._shape(name, codec)) is not None}
        if len(shapes) > 1:
            raise AmbiguousDialect(
                f"{container.path}: type id {number} of tensor {name!r} fits several types: "
                f"{', '.join(codec.name for codec in shapes)}; say which dialect's with open(..., dialect=...)"
            )
        if codecs and not shapes and self._router(name) is not None:
            rows = " or ".join(codec.name for codec in codecs)
            raise ContainerError(
                container.path,
                "expert-shape",
                f"tensor {name!r} has {tensor.nbytes} bytes, which are no whole rows of {rows} for the layer's router "
                f"{list(self._router(name) or ())}: the folder is damaged, or of two models",
            )
        for codec, shape in shapes.items():
            return Tensor(container, _entry(tensor, shape, number), codec)
        # Nobody knows the type, or nothing in the folder says the shape: bytes to list and copy.
        return Tensor(container, _entry(tensor, (tensor.nbytes,), number), None)

    def _router(self, name: str) -> tuple[int, int] | None:
        """Return (experts, hidden) of the layer of a tensor."""
        found = self._sources.get(name.split(".ffn_", maxsplit=1)[0] + ".ffn_gate_inp.weight")
        shape = () if found is None else found[0].shape
        return (shape[0], shape[1]) if len(shape) == 2 and all(shape) else None

    def _shape(self, name: str, codec: Codec) -> tuple[int, ...] | None:
        """Return the shape of experts that are of a type, numpy order; ``None`` where their bytes do not come to one."""
        router = self._router(name)
        if router is None:
            return None
        experts, hidden = router
        nbytes = self._sources[name][0].nbytes
        try:
            if ".ffn_down_exps" not in name:
                inter, rest = divmod(nbytes, experts * codec.layout.row_nbytes(hidden))
                wanted = self.config.integer("moe_intermediate_size", inter)
                return (experts, inter, hidden) if inter == wanted and inter and not rest else None
            for other in ("gate", "up"):
                beside = name.replace("ffn_down", f"ffn_{other}")
                known = self._known_inter(beside)
                if known and experts * hidden * codec.layout.row_nbytes(known) == nbytes:
                    return experts, hidden, known
        except CodecError:
            pass
        return None

    def _known_inter(self, name: str) -> int | None:
        """Return the width of an expert by its gate or up projection."""
        if name not in self._sources:
            return None
        number = self._type_id(name)
        codecs = dict.fromkeys(c for d in self._dialects if (c := d.codec(number)) is not None)
        return next((shape[1] for codec in codecs if (shape := self._shape(name, codec)) is not None), None)


def _entry(tensor: SourceTensor, shape: Sequence[int], number: int) -> Entry:
    return Entry(tensor.name, tuple(shape), number, tensor.offset, tensor.nbytes, last=False, alignment=1)


def _opened(path: Path, tensors: Iterable[SourceTensor]) -> Container:
    """Open a shard; offsets count from the file's start."""
    entries = tuple(_entry(tensor, tensor.shape, -1) for tensor in tensors)
    return Container(StoredFile(path), 0, 1, KeyValues({}), entries, 0)


def _reopened(path: Path, dialect: str | None, stored: tuple[StoredFile, ...]) -> HybridFile:
    """Open the folder of a pickle; that its files are the same ones was seen when ``stored`` came out of it."""
    file = HybridFile(path, dialect)
    if [container.stored.state for container in file.containers] != [one.state for one in stored]:
        raise ContainerError(path, "changed", "the folder is not what it was when it was first opened; open it again")
    return file


def open(path: str | Path, *, dialect: str | None = None, splits: bool = True, header_only: bool = False) -> File:
    """Open a GGUF file of any dialect, or a KTransformers hybrid, for reading.

    Parameters
    ----------
    path
        The file; any member opens a whole split file. A directory is a hybrid: its safetensors files.
    dialect, splits, header_only
        As in :func:`ggufx.file.open`; of a hybrid, whose numbers the experts' types are.

    Raises
    ------
    ContainerError
        The file breaks a rule of the container, or the directory is no hybrid or its parts contradict each other.
    CheckpointError
        A safetensors file is damaged.
    UnknownDialect, AmbiguousDialect
        No dialect, or several that disagree, explain the ids. An id that no dialect knows is no error.
    """
    if Path(path).is_dir():
        return HybridFile(Path(path), dialect)
    return gguf_file.open(path, dialect=dialect, splits=splits, header_only=header_only)
