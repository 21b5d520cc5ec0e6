"""From a file to devices: cuts, a background reader, pinned buffers. Every byte that is asked for is read once.

On the way to a GPU a piece is read into one of a few pinned buffers by a thread, and copied from there while the next ones are
read: by compiled threads where CUDA's driver is there (:mod:`ggufx.torch.uploading`). To the CPU it is read to where it stays.
Memory on the way is the buffers', whatever the size of the file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from math import prod
from os import cpu_count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from ggufx import execute, file
from ggufx.errors import GGUFError
from ggufx.stored import descriptor_limit
from ggufx.torch import uploading
from ggufx.torch.tensor import GGUFTensor

__all__ = ["ShardError", "TorchFile", "load", "open"]

Device: TypeAlias = str | int | torch.device
Devices: TypeAlias = Device | Mapping[str, Device] | Callable[[str], Device]
Dims = int | Mapping[str, int | None] | Callable[[str], int | None]
Names = Iterable[str] | Callable[[str], bool]
Progress = Callable[[int, int], None]

_PIECE_NBYTES: Final = 8 << 20
"""Bytes of a piece and of a pinned buffer."""
_BUFFERS: Final = 16
"""Pinned buffers: as many as readers at most, and two that are being copied; 128 MB, and as much scratch for cut rows."""
_THROUGH_NBYTES: Final = 4096
"""Gaps up to a page between the wanted parts of rows are read through: the disk reads whole pages anyway."""


class ShardError(GGUFError):
    """A tensor does not divide into the shards asked for."""


# What to read -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """The part of a tensor that is wanted: of ``units`` runs of ``stride`` bytes each, the ``spans`` (offset, bytes)."""

    shape: tuple[int, ...]
    offset: int
    units: int
    stride: int
    spans: tuple[tuple[int, int], ...]

    @property
    def unit_nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.spans)

    @property
    def nbytes(self) -> int:
        return self.units * self.unit_nbytes


def _whole(tensor: file.Tensor) -> _Cut:
    return _Cut(tensor.shape, tensor.file_offset, 1, tensor.nbytes, ((0, tensor.nbytes),))


def _cut(tensor: file.Tensor, rank: int, world: int, dim: int) -> _Cut:
    """Return shard ``rank`` of ``world`` equal parts along axis ``dim``; raises ShardError when there are none."""
    if tensor.codec is None:
        raise ShardError(
            f"tensor {tensor.name!r} cannot be cut: it {tensor.why_unknown()}. Load the others by names=, or let dim give None "
            "for it to keep it whole"
        )
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ShardError(
            f"tensor {tensor.name!r} {list(tensor.shape)} has no axis {dim} to cut; let dim give None for it to keep it whole"
        )
    layout, axis, shape = tensor.codec.layout, dim % tensor.ndim, list(tensor.shape)
    last = axis == tensor.ndim - 1
    count = shape[axis] // layout.block_len if last else shape[axis]
    if count % world:
        what = f"{count} blocks of {layout.block_len} elements" if last and layout.block_len > 1 else f"{count}"
        raise ShardError(
            f"tensor {tensor.name!r} {tensor.type}{shape}: axis {axis} ({what}) does not divide into {world} shards"
        )
    part = count // world
    if last:
        units, stride = prod(shape[:-1]), layout.row_nbytes(shape[-1])
        nbytes = layout.block.itemsize
        spans = [(layout.header_nbytes + rank * part * nbytes, part * nbytes)]
        # Every shard of a row keeps the row's header: its scale belongs to all of them.
        if layout.header_nbytes:
            first = [(0, layout.header_nbytes + spans[0][1])] if rank == 0 else [(0, layout.header_nbytes), spans[0]]
            spans = first
        shape[axis] = part * layout.block_len
    else:
        units = prod(shape[:axis])
        nbytes = layout.nbytes((*shape[axis + 1 :],))
        stride, spans = shape[axis] * nbytes, [(rank * part * nbytes, part * nbytes)]
        shape[axis] = part
    return _Cut(tuple(shape), tensor.file_offset, units, stride, tuple(spans))


class _Piece(NamedTuple):
    """What one reader fetches: ``nbytes`` for ``at`` and on of target number ``target``."""

    target: int
    at: int
    nbytes: int
    path: str
    offset: int
    units: int
    stride: int
    spans: tuple[tuple[int, int], ...]


def _pieces(target: int, path: str, cut: _Cut, limit: int) -> Iterator[_Piece]:
    """Split a cut into pieces of at most ``limit`` bytes."""
    if cut.nbytes == 0:
        return
    if cut.unit_nbytes > limit or cut.units == 1:
        at = 0
        for unit in range(cut.units):
            for offset, nbytes in cut.spans:
                for start in range(0, nbytes, limit):
                    count = min(limit, nbytes - start)
                    first = cut.offset + unit * cut.stride + offset + start
                    yield _Piece(target, at, count, path, first, 1, count, ((0, count),))
                    at += count
        return
    # Reading through the gaps must stay within a buffer, too.
    step = max(1, limit // (cut.stride if _reads_through(cut.stride, cut.spans) else cut.unit_nbytes))
    for unit in range(0, cut.units, step):
        count = min(step, cut.units - unit)
        first = cut.offset + unit * cut.stride
        yield _Piece(target, unit * cut.unit_nbytes, count * cut.unit_nbytes, path, first, count, cut.stride, cut.spans)


def _reads_through(stride: int, spans: Sequence[tuple[int, int]]) -> bool:
    ends = [offset + nbytes for offset, nbytes in spans]
    starts = [*(offset for offset, _ in spans[1:]), stride + spans[0][0]]
    return all(start - end <= _THROUGH_NBYTES for start, end in zip(starts, ends, strict=True))


def _read(piece: _Piece, out: npt.NDArray[np.uint8]) -> None:
    """Fill ``out``, uint8 [piece.nbytes]."""
    if piece.units == 1 and len(piece.spans) == 1:
        execute.read_into(piece.path, piece.offset + piece.spans[0][0], out)
        return
    parts = out.reshape(piece.units, -1)
    if _reads_through(piece.stride, piece.spans):
        # From the first wanted byte to the last one; the rest of the last row may lie beyond the file.
        first, end = piece.spans[0][0], sum(piece.spans[-1])
        buffer = execute.scratch("rows", piece.units * piece.stride)
        execute.read_into(piece.path, piece.offset + first, buffer[first : (piece.units - 1) * piece.stride + end])
        rows, column = buffer.reshape(piece.units, piece.stride), 0
        for offset, nbytes in piece.spans:
            parts[:, column : column + nbytes] = rows[:, offset : offset + nbytes]
            column += nbytes
        return
    execute.read_strided(piece.path, piece.offset, piece.stride, piece.spans, out)


# Where to ---------------------------------------------------------------------------------------------------------------


class _Way(Enum):
    IN_PLACE = "in place"
    STAGED = "staged"
    UPLOADED = "uploaded"


def _fill_in_place(
    pieces: Iterable[_Piece], targets: Sequence[torch.Tensor], pool: ThreadPoolExecutor, told: Callable[[int], None]
) -> None:
    """Read to where the bytes stay: tensors of the CPU."""
    waiting: deque[tuple[int, Future[None]]] = deque()
    for piece in pieces:
        part = targets[piece.target][piece.at : piece.at + piece.nbytes].numpy()
        waiting.append((piece.nbytes, pool.submit(_read, piece, part)))
        if len(waiting) > 4 * _BUFFERS:
            nbytes, done = waiting.popleft()
            done.result()
            told(nbytes)
    for nbytes, done in waiting:
        done.result()
        told(nbytes)


def _fill_staged(
    pieces: Iterable[_Piece],
    targets: Sequence[torch.Tensor],
    pool: ThreadPoolExecutor,
    told: Callable[[int], None],
    limit: int,
) -> None:
    """Read into a few buffers, and copy from there while others are read: tensors of any device."""
    cuda = {target.device for target in targets if target.device.type == "cuda"}
    streams = {device: torch.cuda.Stream(device) for device in cuda}
    for device, stream in streams.items():
        # The memory of the targets may be in use by what was launched before they were allocated.
        stream.wait_stream(torch.cuda.current_stream(device))
    free: deque[torch.Tensor] = deque()
    made = 0
    reading: deque[tuple[_Piece, torch.Tensor, Future[None]]] = deque()
    copying: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def copy_oldest() -> None:
        piece, buffer, done = reading.popleft()
        done.result()
        part = targets[piece.target][piece.at : piece.at + piece.nbytes]
        event = None
        if part.device in streams:
            with torch.cuda.stream(streams[part.device]):
                part.copy_(buffer[: piece.nbytes], non_blocking=True)
                event = streams[part.device].record_event()
        else:
            part.copy_(buffer[: piece.nbytes])
        copying.append((buffer, event))
        told(piece.nbytes)

    def free_oldest() -> None:
        buffer, event = copying.popleft()
        if event is not None:
            event.synchronize()
        free.append(buffer)

    try:
        for piece in pieces:
            if not free and made < _BUFFERS:
                # Pinning takes time: a small tensor alone gets a small buffer or two, not all.
                free.append(torch.empty(limit, dtype=torch.uint8, pin_memory=bool(cuda)))
                made += 1
            elif not free:
                # Two buffers are on their way to the device, the others are being read into.
                while len(copying) < 2:
                    copy_oldest()
                free_oldest()
            buffer = free.popleft()
            reading.append((piece, buffer, pool.submit(_read, piece, buffer[: piece.nbytes].numpy())))
        while reading:
            copy_oldest()
    finally:
        # After an error, too: a buffer must not go while a reader writes to it or a copy reads from it.
        for _, _, done in reading:
            if not done.cancel():
                done.exception()
        while copying:
            free_oldest()
        for device, stream in streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)


def _fill_uploaded(
    sources: Iterable[tuple[int, str, _Cut]],
    targets: Sequence[torch.Tensor],
    driver: uploading.Driver,
    threads: int,
    told: Callable[[int], None],
    limit: int,
) -> None:
    """Read and copy by threads that do not know of Python: tensors of CUDA devices."""
    runs = [
        run
        for number, path, cut in sources
        for run in _runs(path, cut, limit, targets[number].data_ptr(), targets[number].device)
    ]
    # A process may have fewer descriptors than a model has files.
    limit = descriptor_limit()
    while runs:
        paths: dict[str, None] = {}
        count = 0
        for run in runs:
            if run.path not in paths and len(paths) == limit:
                break
            paths[run.path] = None
            count += 1
        uploading.upload(driver, runs[:count], threads, told)
        runs = runs[count:]


def _runs(path: str, cut: _Cut, limit: int, address: int, device: torch.device) -> Iterator[uploading.Run]:
    """Describe a cut whose bytes go to ``address`` and on in pieces of at most ``limit`` bytes; as :func:`_pieces` does."""
    if cut.nbytes == 0:
        return
    if cut.unit_nbytes > limit or cut.units == 1:
        for unit in range(cut.units):
            for start, nbytes in cut.spans:
                offset = cut.offset + unit * cut.stride + start
                yield uploading.Run(path, offset, address, device, nbytes, 1, ((0, 1),), limit, through=True)
                address += nbytes
        return
    through = _reads_through(cut.stride, cut.spans)
    step = max(1, limit // (cut.stride if through else cut.unit_nbytes))
    yield uploading.Run(path, cut.offset, address, device, cut.units, cut.stride, cut.spans, step, through)


def _way(device: torch.device) -> _Way:
    """Return how the bytes of tensors on a device get there."""
    return {"cpu": _Way.IN_PLACE, "cuda": _Way.UPLOADED}.get(device.type, _Way.STAGED)


def _check_options(shard: Any, dtype: Any) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is a torch.dtype or None, got {dtype!r}")
    if shard is None:
        return
    if not isinstance(shard, Sequence) or len(shard) != 2 or not all(isinstance(n, (int, np.integer)) for n in shard):
        raise ShardError(f"shard is (rank, world), two integers, got {shard!r}")
    if not 0 <= shard[0] < shard[1]:
        raise ShardError(f"shard is (rank, world) with 0 <= rank < world, got {shard}")


def _device(choice: Any, name: str) -> torch.device:
    device = _of(choice, name, "devices")
    if not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"tensor {name!r}: {device!r} is not a device")
    return torch.device(device)


def _of(choice: Any, name: str, what: str) -> Any:
    if callable(choice):
        return choice(name)
    if isinstance(choice, Mapping):
        if name not in choice:
            raise KeyError(f"the mapping of {what} has nothing for tensor {name!r}")
        return choice[name]
    return choice


# The mapping ------------------------------------------------------------------------------------------------------------


class TorchFile(Mapping[str, GGUFTensor]):
    """An open GGUF whose tensors come packed to a device when they are asked for: see :func:`open`.

    A tensor that is still alive is not read again. :attr:`file` tells names, shapes and metadata without reading.

    Attributes
    ----------
    file : ggufx.File
    """

    def __init__(
        self,
        opened: file.File,
        device: Devices = "cpu",
        dtype: torch.dtype | None = None,
        *,
        shard: tuple[int, int] | None = None,
        dim: Dims = 0,
        planes: bool | Callable[[str], bool] = False,
        threads: int | None = None,
    ) -> None:
        _check_options(shard, dtype)
        self.file = opened
        self._device, self._dtype, self._dim, self._planes = device, dtype, dim, planes
        self._shard = shard
        self._threads = threads
        self._alive: WeakValueDictionary[str, GGUFTensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> GGUFTensor:
        held = self._alive.get(name)
        return self.load([name])[name] if held is None else held

    # A mapping's own ways to say these two would read tensors.
    def __contains__(self, name: object) -> bool:
        return name in self.file

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)

    def load(self, names: Names | None = None, *, progress: bool | Progress | None = None) -> dict[str, GGUFTensor]:
        """Bring many tensors to their devices at once; by default all.

        Parameters
        ----------
        names
            Names, or a function of a name that says whether it is wanted.
        progress
            Called as ``progress(bytes done, bytes in all)`` from this thread; ``True`` draws a bar.

        Returns
        -------
        dict of name -> GGUFTensor, in file order

        Raises
        ------
        KeyError
            The file, or a mapping of devices or axes, does not have a name.
        ShardError
            A tensor does not divide into the shards.
        CheckpointError
            The file ends early.
        """
        if any(container.closed for container in self.file.containers):
            raise ValueError(f"{self.file.path} is closed")
        if names is None:
            wanted = set(self.file)
        elif callable(names):
            wanted = {name for name in self.file if names(name)}
        else:
            wanted = {self.file[name].name for name in ([names] if isinstance(names, str) else names)}
        held = {name: tensor for name in wanted if (tensor := self._alive.get(name)) is not None}
        # Checked for all before the first byte is read or memory taken.
        cuts = {name: self._cut(tensor) for name, tensor in self.file.items() if name in wanted and name not in held}
        devices = {name: _device(self._device, name) for name in cuts}
        if progress is True:
            with _bar() as bar:
                fresh = self._read(cuts, devices, bar)
        else:
            fresh = self._read(cuts, devices, progress or None)
        self._alive.update(fresh)
        return {name: fresh[name] if name in fresh else held[name] for name in self.file if name in wanted}

    def _cut(self, tensor: file.Tensor) -> _Cut:
        dim = None if self._shard is None else _of(self._dim, tensor.name, "axes")
        if self._shard is None or dim is None:
            return _whole(tensor)
        return _cut(tensor, *self._shard, dim)

    def _scale(self, tensor: file.Tensor, device: torch.device) -> torch.Tensor | None:
        """Return the factor of a tensor, or of its shard, in a shape that broadcasts to the tensor's."""
        factor = tensor.scale
        if factor is None:
            return None
        dim = None if self._shard is None else _of(self._dim, tensor.name, "axes")
        if self._shard is not None and dim is not None and dim % tensor.ndim == 0 and factor.size > 1:
            rank, world = self._shard
            factor = factor.reshape(world, -1)[rank]
        return torch.tensor(factor, device=device).view(-1, *[1] * (tensor.ndim - 1))

    def _read(
        self, cuts: Mapping[str, _Cut], devices: Mapping[str, torch.device], progress: Progress | None
    ) -> dict[str, GGUFTensor]:
        # In the order of the disk: splits are many files, and the directory need not be in order.
        order = sorted(cuts, key=lambda name: (str(self.file[name].path), cuts[name].offset))
        targets = [torch.empty(cuts[name].nbytes, dtype=torch.uint8, device=devices[name]) for name in order]
        total, done = sum(cut.nbytes for cut in cuts.values()), 0

        def told(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        if progress is not None:
            progress(0, total)
        ways = [_way(target.device) for target in targets]
        driver = uploading.cuda() if _Way.UPLOADED in ways else None
        uploaded = sum(target.numel() for target, way in zip(targets, ways, strict=True) if way is _Way.UPLOADED)
        if driver is None or not uploading.ready(uploaded):
            ways = [_Way.STAGED if way is _Way.UPLOADED else way for way in ways]
        with execute.open_files():
            for way in _Way:
                chosen = [number for number, other in enumerate(ways) if other is way]
                sources = [(number, str(self.file[order[number]].path), cuts[order[number]]) for number in chosen]
                if not chosen:
                    continue
                if way is _Way.UPLOADED and driver is not None:
                    threads = self._threads or min(16, cpu_count() or 1)
                    _fill_uploaded(sources, targets, driver, threads, told, min(_PIECE_NBYTES, uploading.SLOT_NBYTES))
                    continue
                threads = self._threads or min(_BUFFERS - 2 if way is _Way.STAGED else 4, cpu_count() or 1)
                pieces = (piece for source in sources for piece in _pieces(*source, _PIECE_NBYTES))
                with ThreadPoolExecutor(threads, thread_name_prefix="ggufx-read") as pool:
                    if way is _Way.STAGED:
                        limit = min(_PIECE_NBYTES, max(1, *(targets[number].numel() for number in chosen)))
                        _fill_staged(pieces, targets, pool, told, limit)
                    else:
                        _fill_in_place(pieces, targets, pool, told)
        fresh = {}
        for number, name in enumerate(order):
            # Planes take the place of packed bytes one tensor at a time: a device need not hold both of all.
            packed, targets[number] = targets[number], torch.empty(0)
            tensor = self.file[name]
            shape = cuts[name].shape
            scale = self._scale(tensor, packed.device)
            loaded = GGUFTensor(
                packed, tensor.codec, shape, dtype=self._dtype, name=name, type=tensor.type, scale=scale
            )
            fresh[name] = loaded.with_planes() if _of(self._planes, name, "planes") else loaded
            del packed, loaded
        return fresh

    def close(self) -> None:
        """Release the file; tensors that were brought to a device stay."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TorchFile {self.file.path.name}: {len(self)} tensors, {self.file.data_nbytes} bytes>"


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("load", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("load", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def open(
    path: str | Path,
    device: Devices = "cpu",
    dtype: torch.dtype | None = None,
    *,
    shard: tuple[int, int] | None = None,
    dim: Dims = 0,
    planes: bool | Callable[[str], bool] = False,
    dialect: str | None = None,
    threads: int | None = None,
) -> TorchFile:
    """Open a GGUF, split or not, as a lazy mapping of tensor name -> :class:`GGUFTensor`: nothing is read until asked for.

    Parameters
    ----------
    path
        The file; any member opens a whole split file.
    device
        Where tensors go: one device, or a mapping or function of the tensor's name.
    dtype
        What they decode to by default.
    shard
        ``(rank, world)``: only the part of that rank, of ``world`` equal ones, is read.
    dim
        The axis that is cut, numpy order: 0 the rows of a matrix (its outputs), 1 or -1 within the rows (its inputs), on block
        boundaries. One for all tensors, or a mapping or function of the name; ``None`` for a tensor leaves it whole.
    planes
        Take codes and scales of F8_E4M3_B128 matrices apart on the device, for products that read them faster so; or a function
        of the name.
    dialect
        As in :func:`ggufx.open`.
    threads
        Readers at a time.

    Raises
    ------
    GGUFError
        As :func:`ggufx.open`; ShardError for a bad ``shard``.
    """
    _check_options(shard, dtype)
    # Read later, when this process may be in another folder.
    opened = file.open(Path(path).absolute(), dialect=dialect)
    return TorchFile(opened, device, dtype, shard=shard, dim=dim, planes=planes, threads=threads)


def load(
    path: str | Path,
    device: Devices = "cpu",
    dtype: torch.dtype | None = None,
    *,
    names: Names | None = None,
    shard: tuple[int, int] | None = None,
    dim: Dims = 0,
    planes: bool | Callable[[str], bool] = False,
    progress: bool | Progress | None = None,
    dialect: str | None = None,
    threads: int | None = None,
) -> dict[str, GGUFTensor]:
    """Bring a GGUF's tensors to one or more devices, packed as they lie in the file: name -> :class:`GGUFTensor`.

    ``names`` and ``progress`` are those of :meth:`TorchFile.load`, the others those of :func:`open`.

    Memory on the host stays below 512 MB on the way to a GPU, whatever the size of the file; nothing is read twice.
    """
    opened = open(path, device, dtype, shard=shard, dim=dim, planes=planes, dialect=dialect, threads=threads)
    with opened:
        return opened.load(names, progress=progress)
