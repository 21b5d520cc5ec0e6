"""The engine under every command that writes: fills a plan's tiles in parallel, resumably, and renames when all is right.

``OUT.partial`` is preallocated and filled by ``pwrite``, tile by tile in any order; ``OUT.journal`` holds the plan's
digest and, per finished tile, its number and a checksum of what was written. A killed run is gone on with by the same
command: journalled tiles are read back and compared (a power cut can lose bytes that a journal already counts), the rest
is done. The header is written last, then the file is synced, checked and renamed; an existing OUT is not touched before.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import xxhash

from ggufx import outputs, types
from ggufx.errors import (
    BadValueError,
    CheckpointError,
    CodecError,
    DiskError,
    GGUFError,
    PlanError,
    SourceCodesError,
)
from ggufx.factors import factor_of
from ggufx.plan import FLOAT_SCALES, Plan, PlannedFile, PlannedTensor, Span, Tile, Transform
from ggufx.stored import descriptor_limit, scratch
from ggufx.transforms import ColumnEnergy, Outcome, apply, decode_parts

__all__ = [
    "MAX_WORKERS",
    "Observer",
    "Progress",
    "TileDone",
    "check_output",
    "clean_up",
    "default_workers",
    "descriptor",
    "ended_early",
    "execute",
    "let_go",
    "memory_need",
    "open_files",
    "partial_path",
    "read_into",
    "read_spans",
    "read_strided",
    "scratch",
]

MAX_WORKERS: Final = 16
"""Default cap on threads: past it the disk is the limit and only memory grows."""

_RECORD = struct.Struct("<IQI")  # tile number, checksum of its bytes, checksum of the record
_JOURNAL_VERSION: Final = 1
_JOURNAL_MAGIC: Final = b'{"journal": '
_OUTPUT_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW
_BATCH_NBYTES: Final = 1 << 24
_BATCH_LEN: Final = 32
_MAX_REFUSED: Final = 10
"""Tensors with values that cannot be written, after which a run ends: one run is to name them all, but not a model's."""
_BATCH_FILES: Final = 4
"""Descriptors that a batch holds at most: all workers together have to live with those of a process, which may be 256."""
_PIECE_NBYTES: Final = 1 << 18
_PROCESS_NBYTES: Final = 250_000_000
"""Python, NumPy, Numba with LLVM, and a plan of a hundred thousand tiles."""

F32 = npt.NDArray[np.float32]

Progress = Callable[[int, int], None]
"""Called as ``progress(bytes done, bytes in all)`` from the thread that called :func:`execute`."""


class _Job(NamedTuple):
    """One tile with all it needs; picklable, so that any executor can run it."""

    number: int
    transform: Transform
    tile: Tile
    sources: tuple[str, ...]
    output: str
    inode: int
    """Of ``output`` as it was created: a file that took its name meanwhile is another's."""
    position: int
    expected: int | None
    """Checksum from the journal: verify instead of writing."""
    sync: bool
    """Bring the bytes to the disk at once: what another machine wrote, this one cannot."""
    per_expert: int
    """Rows of an expert, of stacked ones; 0 for others."""


class TileDone(NamedTuple):
    """What an observer of a run hears of a finished tile."""

    tensor: PlannedTensor
    tile: Tile
    outcome: Outcome
    resumed: bool
    """It was done by an earlier run, so its outcome is not known."""
    dead_blocks: int
    """Blocks of columns without any importance: they were encoded with the mean weight."""


Observer = Callable[[TileDone], None]
"""Called from the thread that called :func:`execute`, in no particular order."""


class _Done(NamedTuple):
    nbytes: int
    checksum: int
    outcome: Outcome
    resumed: bool
    problem: str = ""
    """What a codec said of values that do not fit."""
    dead_blocks: int = 0
    """Blocks of columns without any importance, which took the mean."""


@dataclass
class _Files:
    """Open descriptors of this process, by path and mode, for as long as some run uses them.

    No more of them than a process may have: the least recently used ones that nobody holds are closed for others.
    """

    descriptors: dict[tuple[str, int], tuple[int, tuple[int, int]]]
    retired: list[int]
    lock: threading.Lock
    users: int = 0
    holders: Counter[int] = field(default_factory=Counter)

    def get(self, path: str, flags: int) -> int:
        """Return a descriptor of the file that is at ``path`` now; it stays open until :meth:`let_go`.

        A worker process lives longer than a run: what it opened as OUT.partial is OUT after the rename, and the next run
        must not write there.
        """
        with self.lock:
            key = (path, flags)
            held = self.descriptors.get(key)
            if held is not None:
                status = Path(path).stat()
                if held[1] == (status.st_dev, status.st_ino):
                    self.descriptors[key] = self.descriptors.pop(key)  # the last one is the most recent
                    self.holders[held[0]] += 1
                    return held[0]
                # Another thread may be reading through the old one, and its number must not become another file's.
                self.retired.append(self.descriptors.pop(key)[0])
            self._make_room()
            descriptor = os.open(path, flags | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            self.descriptors[key] = descriptor, (status.st_dev, status.st_ino)
            self.holders[descriptor] += 1
            return descriptor

    def let_go(self, descriptor: int) -> None:
        """Say that one who got a descriptor no longer uses it."""
        with self.lock:
            self.holders[descriptor] -= 1

    @contextmanager
    def using(self, path: str, flags: int) -> Iterator[int]:
        """Return a context with a descriptor of the file that is at ``path`` now."""
        descriptor = self.get(path, flags)
        try:
            yield descriptor
        finally:
            self.let_go(descriptor)

    def _make_room(self) -> None:
        excess = len(self.descriptors) + 1 - descriptor_limit()
        if excess <= 0:
            return
        idle = [key for key, (descriptor, _) in self.descriptors.items() if not self.holders[descriptor]]
        for key in idle[:excess]:
            os.close(self.descriptors.pop(key)[0])

    def __enter__(self) -> Self:
        with self.lock:
            self.users += 1
        return self

    def __exit__(self, *_: object) -> None:
        # Another thread's run may still be reading: the last one closes.
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for descriptor in (*(held[0] for held in self.descriptors.values()), *self.retired):
                    os.close(descriptor)
                self.descriptors.clear()
                self.retired.clear()
                self.holders.clear()


_files = _Files({}, [], threading.Lock())


def read_into(path: str, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
    """Fill ``buffer`` from byte ``offset`` of a file; raises CheckpointError when the file ends early.

    Reads with ``pread`` into memory that is used again: mapped pages of a large model would count as resident memory.
    """
    with _files.using(path, os.O_RDONLY) as descriptor:
        _fill_buffer(path, descriptor, offset, buffer)


def read_strided(
    path: str, offset: int, stride: int, spans: Sequence[tuple[int, int]], buffer: npt.NDArray[np.uint8]
) -> None:
    """Fill ``buffer`` with the ``spans`` (offset, bytes) of as many runs of ``stride`` bytes as it holds, nothing between read.

    Otherwise as :func:`read_into`; a descriptor and a view for all of them, as thousands of short spans are mostly overhead.
    """
    view, at = memoryview(buffer), 0  # type: ignore[arg-type] # ndarrays are buffers
    with _files.using(path, os.O_RDONLY) as descriptor:
        while at < len(view):
            for start, nbytes in spans:
                part = view[at : at + nbytes]
                if os.preadv(descriptor, [part], offset + start) != nbytes:
                    _fill_buffer(path, descriptor, offset + start, buffer[at : at + nbytes])
                at += nbytes
            offset += stride


def read_spans(sources: Sequence[str], tile: Tile) -> list[npt.NDArray[np.uint8]]:
    """Return the bytes of a tile's spans, in this thread's scratch memory: valid until the thread's next call."""
    inputs = []
    for slot, span in enumerate(tile.spans):
        buffer = scratch(f"in{slot}", span.nbytes)
        read_into(sources[span.file], span.offset, buffer)
        inputs.append(buffer)
    return inputs


def open_files() -> AbstractContextManager[object]:
    """Return a context in which :func:`read_into` may be used; the last one to end closes the descriptors."""
    return _files


def descriptor(path: str) -> int:
    """Return a descriptor for reading, good within :func:`open_files` until :func:`let_go`, for who reads without Python."""
    return _files.get(path, os.O_RDONLY)


def let_go(descriptor: int) -> None:
    """Say that what :func:`descriptor` gave is no longer used."""
    _files.let_go(descriptor)


def ended_early(path: str, offset: int, nbytes: int, got: int) -> CheckpointError:
    """Return the error of a file that had only ``got`` of ``nbytes`` at ``offset``."""
    return CheckpointError(
        f"{path}: ends at byte {offset + got}, expected {nbytes} bytes at {offset}: the file changed or is incomplete; "
        "download it again"
    )


def _fill_buffer(path: str, descriptor: int, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
    view, done = memoryview(buffer), 0  # type: ignore[arg-type] # ndarrays are buffers
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            error.filename = path
            raise
        if count == 0:
            raise ended_early(path, offset, len(view), done)
        done += count


def _run(jobs: Sequence[_Job]) -> list[_Done]:
    """Do some tiles. Runs on any thread or process."""
    opened: dict[tuple[str, int], int] = {}
    try:
        return _run_tiles(jobs, opened)
    finally:
        for descriptor in opened.values():
            _files.let_go(descriptor)


def _run_tiles(jobs: Sequence[_Job], opened: dict[tuple[str, int], int]) -> list[_Done]:
    done = [_run_tile(job, opened) for job in jobs]
    for output in {job.output for job in jobs}:
        # The tiles of a batch follow each other in the file.
        ranges = [(job.position, job.position + job.tile.nbytes) for job in jobs if job.output == output]
        start, end = ranges[0][0], ranges[-1][1]
        with _files.using(output, _OUTPUT_FLAGS) as descriptor:
            if jobs[0].sync:
                os.fsync(descriptor)
            else:
                outputs.start_writeback(descriptor, start, end - start)
    return done


def _open_output(path: str, inode: int, get: Callable[[str, int], int]) -> int:
    """Return a descriptor of a partial output; raises PlanError unless it is the file that the run created."""
    try:
        descriptor = get(path, _OUTPUT_FLAGS)
    except FileNotFoundError:
        raise _replaced(path) from None
    except OSError as error:
        raise _replaced(path) if error.errno == errno.ELOOP else error from None
    if os.fstat(descriptor).st_ino != inode:
        raise _replaced(path)
    return descriptor


@contextmanager
def _opened_output(path: str, inode: int) -> Iterator[int]:
    """Return a context with a descriptor of a partial output; raises as :func:`_open_output`."""
    descriptor = _open_output(path, inode, _files.get)
    try:
        yield descriptor
    finally:
        _files.let_go(descriptor)


def _replaced(path: object) -> PlanError:
    return PlanError(
        f"{path}: was moved or replaced by something else while it was written; nothing was given its final name: start again"
    )


def _run_tile(job: _Job, opened: dict[tuple[str, int], int]) -> _Done:
    """Read a tile's spans, transform, write."""

    def descriptor_of(path: str, flags: int) -> int:
        # Once a batch: looking whether a path is still the same file takes longer than reading a small tile.
        key = (path, flags)
        if key not in opened:
            if len(opened) == _BATCH_FILES:
                # The output stays: it is written to after this.
                _files.let_go(opened.pop(next(held for held in opened if held[0] != job.output)))
            opened[key] = _files.get(path, flags)
        return opened[key]

    tile = job.tile
    known = opened.get((job.output, _OUTPUT_FLAGS))
    descriptor = _open_output(job.output, job.inode, descriptor_of) if known is None else known
    if job.transform.op == "copy" and job.expected is None:
        (span,) = tile.spans
        path = job.sources[span.file]
        checksum = _copy(path, descriptor_of(path, os.O_RDONLY), span.offset, descriptor, job.position, tile.nbytes)
        return _Done(tile.nbytes, checksum, Outcome(), resumed=False)
    out = scratch("out", tile.nbytes)
    if job.expected is not None:
        _fill_buffer(job.output, descriptor, job.position, out)
        if xxhash.xxh3_64_intdigest(out.data) == job.expected:
            return _Done(tile.nbytes, job.expected, Outcome(), resumed=True)
    inputs = []
    for slot, span in enumerate(tile.spans):
        path = job.sources[span.file]
        buffer = scratch(f"in{slot}", span.nbytes)
        _fill_buffer(path, descriptor_of(path, os.O_RDONLY), span.offset, buffer)
        inputs.append(buffer)

    def read(span: Span, buffer: npt.NDArray[np.uint8]) -> None:
        path = job.sources[span.file]
        _fill_buffer(path, descriptor_of(path, os.O_RDONLY), span.offset, buffer)

    try:
        weights, dead_blocks = _importance(job, read)
        factor = _factor(job, read) if job.transform.factor else None
        if job.transform.op == "factor":
            out.view("<f4")[0] = factor
            outcome = Outcome()
        else:
            outcome = apply(job.transform, tile.rows, inputs, out, weights, tile.phase, factor)
    except BadValueError as error:
        row_nbytes = tile.nbytes // tile.rows
        return _Done(
            0, 0, Outcome(), resumed=False, problem=str(error.moved(tile.offset // row_nbytes, job.per_expert))
        )
    except CodecError as error:
        return _Done(0, 0, Outcome(), resumed=False, problem=str(error))
    if _refused(job.transform, outcome):
        return _Done(0, 0, outcome, resumed=False)
    outputs.write_at(descriptor, job.position, out)
    return _Done(tile.nbytes, xxhash.xxh3_64_intdigest(out.data), outcome, resumed=False, dead_blocks=dead_blocks)


def _importance(job: _Job, read: Callable[[Span, npt.NDArray[np.uint8]], None]) -> tuple[F32 | None, int]:
    """Return what weighs the columns of a tile, float32 [row_len], and how many blocks of it were all zero."""
    transform, tile = job.transform, job.tile
    if not transform.importance:
        return None, 0
    row_len = sum(transform.parts)
    codec = types.get(transform.target)
    if transform.importance == "energy":
        return codec.usable_importance(
            _energies.get(_matrix_key(job), lambda: _column_energy(transform, tile.matrix, tile.phase, read))
        )
    if tile.weights is None:
        return np.ones(row_len, np.float32), 0
    found = np.empty(row_len, np.float32)
    read(tile.weights.span, found.view(np.uint8))
    found /= np.float32(tile.weights.divisor)
    return codec.usable_importance(found)


def _factor(job: _Job, read: Callable[[Span, npt.NDArray[np.uint8]], None]) -> np.float32:
    """Return the factor of a tile's matrix (:mod:`ggufx.factors`)."""
    largest = _peaks.get(_matrix_key(job), lambda: _peak(job.transform, job.tile, read))
    return factor_of(float(largest[0]))


def _matrix_key(job: _Job) -> object:
    """Return what the whole matrix of a tile is known by."""
    # With the files' states: a process may outlive a source, and another then lie at its path.
    files = dict.fromkeys(job.sources[span.file] for _, spans in job.tile.matrix for span in spans)
    return (job.transform.kind, job.tile.matrix, *((path, _state(path)) for path in files))


def _state(path: str) -> tuple[int, int, int]:
    status = Path(path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


class _OfMatrices:
    """What whole matrices decide, computed once for all of a matrix's tiles, which follow each other."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._held: dict[object, Future[F32]] = {}

    def get(self, key: object, compute: Callable[[], F32]) -> F32:
        with self._lock:
            held = self._held.get(key)
            mine = held is None
            if held is None:
                held = self._held[key] = Future()
                while len(self._held) > self._size:
                    del self._held[next(iter(self._held))]
        if mine:
            try:
                held.set_result(compute())
            except BaseException as error:
                held.set_exception(error)
                with self._lock:
                    self._held.pop(key, None)
        return held.result()


_energies = _OfMatrices(4 * MAX_WORKERS)
"""Mean squares of the columns of matrices."""
_peaks = _OfMatrices(1 << 12)
"""Largest magnitudes of matrices, float32 [1]; more than a tensor has experts, whose factors come after all of them."""


def _decoded(
    transform: Transform,
    matrix: Iterable[tuple[int, Sequence[Span]]],
    phase: int,
    read: Callable[[Span, npt.NDArray[np.uint8]], None],
) -> Iterator[F32]:
    """Decode a whole matrix, some rows at a time."""
    for rows, spans in matrix:
        inputs = []
        for slot, span in enumerate(spans):
            buffer = scratch(f"whole{slot}", span.nbytes)
            read(span, buffer)
            inputs.append(buffer)
        yield decode_parts(transform, rows, inputs, phase)[0]


def _peak(transform: Transform, tile: Tile, read: Callable[[Span, npt.NDArray[np.uint8]], None]) -> F32:
    """Return the largest magnitude of a tile's whole matrix, float32 [1]; 0 where it is not finite."""
    pieces = _decoded(transform, tile.matrix, tile.phase, read)
    peak = max(
        (np.float32(max(values.max(), -values.min())) for values in pieces if values.size), default=np.float32(0)
    )
    # NaN is refused, and named, when its own tile is encoded: what the factor is does not matter then.
    return np.full(1, peak if np.isfinite(peak) else 0, np.float32)


def _column_energy(
    transform: Transform,
    matrix: Iterable[tuple[int, Sequence[Span]]],
    phase: int,
    read: Callable[[Span, npt.NDArray[np.uint8]], None],
) -> F32:
    """Decode a whole matrix, some rows at a time, for the mean squares of its columns."""
    energy = ColumnEnergy()
    for values in _decoded(transform, matrix, phase, read):
        try:
            energy.add(values)
        except CodecError:
            # NaN is refused, and named, when its own tile is encoded: what the columns weigh does not matter then.
            return np.ones(sum(transform.parts), np.float32)
    return energy.result()


def _copy(path: str, source: int, start: int, target: int, position: int, nbytes: int) -> int:
    """Copy bytes from one file to another and return their checksum.

    In pieces that stay in the processor's cache between reading and writing: whole tiles take twice the time.
    """
    buffer = scratch("copy", min(nbytes, _PIECE_NBYTES))
    state = xxhash.xxh3_64()
    for done in range(0, nbytes, _PIECE_NBYTES):
        piece = buffer[: min(_PIECE_NBYTES, nbytes - done)]
        _fill_buffer(path, source, start + done, piece)
        state.update(piece.data)
        outputs.write_at(target, position + done, piece)
    return state.intdigest()


def _refused(transform: Transform, outcome: Outcome) -> bool:
    special = bool(outcome.bad_codes or outcome.bad_scales)
    return outcome.lost > 0 or (special and (transform.strict or transform.op == "encode"))


def default_workers() -> int:
    """Return the number of threads used by default."""
    return min(MAX_WORKERS, os.cpu_count() or 1)


def memory_need(plan: Plan, threads: int | None = None) -> int:
    """Return about how many bytes of memory a run takes: a process with its kernels, and scratch for every thread."""
    per_thread = 0
    for tensor in plan.tensors:
        largest = max((tile.nbytes + sum(span.nbytes for span in tile.spans) for tile in tensor.tiles), default=0)
        if tensor.transform.op == "encode":
            # Float32 values and their decoded and packed forms.
            row_len = tensor.shape[-1] if tensor.shape else 1
            largest += max((tile.rows * row_len * 12 for tile in tensor.tiles), default=0)
        per_thread = max(per_thread, largest)
    return _PROCESS_NBYTES + per_thread * (threads or default_workers())


def execute(
    plan: Plan,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    replace_source: bool = False,
    mode: int | None = None,
    observer: Observer | None = None,
) -> list[Path]:
    """Write a plan's files.

    Parameters
    ----------
    plan
        What to write.
    overwrite
        Replace existing outputs, at the very end; and the partial output of another plan, with a warning.
    resume
        Go on with a partial output of the same plan; ``False`` starts over.
    threads
        Tiles at a time; default: the CPU count, at most :data:`MAX_WORKERS`. Memory is about 50 MB a thread.
    executor
        Runs the tiles instead of a local thread pool (for several machines on a shared file system). Every tile is then
        brought to the disk by the machine that wrote it.
    progress
        Told about the bytes done.
    replace_source
        An output may be one of the sources: it takes that name at the very end, when no source is needed any more.
    mode
        Permissions of the outputs, from their beginning; ``None`` for what the umask leaves.
    observer
        Told about every tile done.

    Returns
    -------
    list of Path
        The finished files.

    Raises
    ------
    OutputExists, PlanError
        The output exists or is one of the sources; a partial output is of another plan, of nobody we know, or in use by
        another process.
    DiskError
        The disk is full or fails. What is done stays; the same command goes on.
    SourceCodesError, CheckpointError
        A source holds refused codes, ended early, or changed since it was planned with.
    """
    first = plan.files[0].path
    if not replace_source:
        _refuse_sources(plan)
    made = _make_folder(first)
    workers = threads or default_workers()
    try:
        with _Journal(first, plan, resume=resume, overwrite=overwrite) as journal, _files:
            try:
                pending = _prepare(plan, journal, overwrite=overwrite, mode=mode)
                _check_sources(plan)
                if executor is not None:
                    _fill(plan, pending, journal, executor, workers, progress, observer, sync=True)
                else:
                    with ThreadPoolExecutor(workers, thread_name_prefix="ggufx") as pool:
                        _fill(plan, pending, journal, pool, workers, progress, observer, sync=False)
                _check_sources(plan)
                _finish(plan, pending, journal, overwrite=overwrite)
            except OSError as error:
                journal.discard(plan)
                raise _disk_error(first, error) from error
            except (MemoryError, RuntimeError) as error:
                journal.discard(plan)
                raise _resource_error(first, error, workers) from error
            except BaseException:
                journal.discard(plan)
                raise
            journal.remove()
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it holds what the next run goes on with
                folder.rmdir()
        raise
    return [file.path for file in plan.files]


def _make_folder(path: Path) -> list[Path]:
    """Make the folder of an output, and return what was made, the innermost first."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise PlanError(f"{path}: {path.parent} is no directory; choose another --outfile") from None
    except OSError as error:
        raise DiskError(f"{path.parent}: cannot be made ({error.strerror}); choose another --outfile") from None
    return missing


def _resource_error(path: Path, error: MemoryError | RuntimeError, workers: int) -> Exception:
    """Return our error for what the system refused; another RuntimeError is a fault of ours and stays as it is."""
    if isinstance(error, RuntimeError) and "thread" not in str(error):
        return error
    what = "memory ran out" if isinstance(error, MemoryError) else f"the system starts no more threads ({error})"
    return DiskError(
        f"{path}: {what} with {workers} threads; what is done so far is kept: run the same command with fewer --threads, or "
        "raise the limit (ulimit, or the container's)"
    )


def _refuse_sources(plan: Plan) -> None:
    for file in plan.files:
        for source in plan.source_files:
            if file.path.exists() and file.path.samefile(source):
                raise PlanError(f"{file.path}: is one of the sources; choose another --outfile")


def _check_sources(plan: Plan) -> None:
    changed = plan.sources_changed()
    if changed:
        raise CheckpointError(
            f"{changed[0]}: changed since it was planned with ({len(changed)} of {len(plan.source_files)} files; a download "
            "that goes on?); when the files are complete, start over with --no-resume"
        )


def partial_path(path: Path) -> Path:
    """Return where an output grows until it is complete."""
    return path.with_name(path.name + ".partial")


def journal_path(path: Path) -> Path:
    """Return the journal beside an output."""
    return path.with_name(path.name + ".journal")


class _Journal:
    """The finished tiles of a plan: a JSON line with the digest, then fixed records. Locked while in use."""

    def __init__(self, path: Path, plan: Plan, *, resume: bool, overwrite: bool) -> None:
        self.path = journal_path(path)
        self.done: dict[int, int] = {}
        self.resumed = False
        self._used = False
        self.created: dict[Path, int] = {}
        """Partial outputs that this run made, and their inodes."""
        self._lock = threading.Lock()
        self._descriptor = self._open(path)
        self._inode = os.fstat(self._descriptor).st_ino
        try:
            self._load(plan, resume=resume, overwrite=overwrite)
        except OSError as error:
            self._abandon()
            raise DiskError(
                f"{self.path}: the journal cannot be written ({os.strerror(error.errno or 0)}); free some space, or choose "
                "another --outfile"
            ) from error
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Leave nothing of a journal that was made in vain: a large plan's digest takes long enough to be stopped in."""
        if self._created:
            with suppress(OSError):
                self.remove()
        os.close(self._descriptor)

    def _open(self, path: Path) -> int:
        while True:
            try:
                try:
                    descriptor, self._created = outputs.create(self.path), True
                except FileExistsError:
                    found = outputs.open_plain(self.path)
                    if found is None:
                        continue  # the run that had it has just ended
                    descriptor, self._created = found, False
            except OSError as error:
                raise DiskError(f"{self.path}: cannot be written ({os.strerror(error.errno or 0)})") from error
            try:
                outputs.lock(
                    descriptor, path, f"{path}: another process is writing this output; wait for it or choose another"
                )
                # The run that held the lock may have removed the file meanwhile: a lock on that says nothing.
                if outputs.same_file(self.path, os.fstat(descriptor).st_ino):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _load(self, plan: Plan, *, resume: bool, overwrite: bool) -> None:
        self._header = json.dumps({"journal": _JOURNAL_VERSION, "digest": plan.digest}).encode() + b"\n"
        found = self._read()
        if not _is_journal(found):
            raise PlanError(
                f"{self.path}: is not ggufx's, and the journal of this output would have its name; move it away, or choose "
                "another output"
            )
        self.resumed = resume and found.startswith(self._header)
        partials = [partial_path(file.path) for file in plan.files if _is_there(partial_path(file.path))]
        if partials and self._created:
            raise PlanError(
                f"{partials[0]}: exists, but the journal of a run that wrote it does not: it may be somebody else's; move it "
                "away, or choose another output"
            )
        # A journal whose first line is torn was never worth anything: the line is written before the first tile.
        if resume and partials and not self.resumed and b"\n" in found:
            if not overwrite:
                raise PlanError(
                    f"{partials[0]}: belongs to another plan (other options, sources or version of ggufx); go on with the "
                    "same command, or start over with --no-resume or --overwrite"
                )
            warnings.warn(
                f"{partials[0]}: is what another plan left unfinished; it is started over",
                outputs.OutputWarning,
                stacklevel=4,
            )
        if not self.resumed:
            # Before the other plan's journal is lost, without which nobody knows whose its partial output is.
            for file in plan.files:
                outputs.refuse_existing(file.path, overwrite=overwrite)
        end = len(self._header)
        if self.resumed:
            for position in range(end, len(found) - _RECORD.size + 1, _RECORD.size):
                number, checksum, check = _RECORD.unpack_from(found, position)
                if check != _check(number, checksum) or number >= plan.n_tiles + len(plan.files):
                    break  # the tail of a torn write
                self.done[number] = checksum
                end = position + _RECORD.size
            os.ftruncate(self._descriptor, end)
            self._end = end
        else:
            try:
                self.forget()
            except OSError:
                self.remove()
                raise

    def _read(self) -> bytes:
        pieces, at = [], 0
        while piece := os.pread(self._descriptor, 1 << 20, at):
            pieces.append(piece)
            at += len(piece)
            if at == len(piece) and not _is_journal(piece):
                break  # a stranger's file may be of any length
        return b"".join(pieces)

    def forget(self) -> None:
        """Drop every record."""
        self.done.clear()
        os.ftruncate(self._descriptor, 0)
        outputs.write_at(self._descriptor, 0, self._header)
        self._end = len(self._header)

    def add(self, number: int, checksum: int) -> None:
        """Record a finished tile, or, past the tiles' numbers, a file that is about to get its name (and its inode)."""
        with self._lock:
            self._used = True
            outputs.write_at(self._descriptor, self._end, _RECORD.pack(number, checksum, _check(number, checksum)))
            self._end += _RECORD.size

    def remove(self) -> None:
        """Forget the run."""
        # The name may have been given to another run's journal meanwhile.
        if outputs.same_file(self.path, self._inode):
            self.path.unlink()

    def discard(self, plan: Plan) -> None:
        """Remove what a run that did nothing yet has made; what another can go on with stays."""
        if self.resumed or self._used:
            return
        for path, inode in self.created.items():
            if outputs.same_file(path, inode):
                with suppress(OSError):
                    path.unlink()
        if not any(_is_there(partial_path(file.path)) for file in plan.files):
            with suppress(OSError):
                self.remove()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _check(number: int, checksum: int) -> int:
    return xxhash.xxh32_intdigest(struct.pack("<IQ", number, checksum))


def clean_up(path: Path) -> None:
    """Remove a journal of an output that is finished: a kill between the last rename and its removal leaves one."""
    journal = journal_path(path)
    if not _is_there(journal) or _is_there(partial_path(path)):
        return
    try:
        descriptor = outputs.open_plain(journal)
    except (PlanError, OSError):
        return  # not ours, or not to be opened
    if descriptor is None:
        return
    try:
        outputs.lock(descriptor, journal, "")
        # Another process may have removed it before the lock was this one's, and a run have begun since.
        mine = outputs.same_file(journal, os.fstat(descriptor).st_ino)
        if mine and os.pread(descriptor, len(_JOURNAL_MAGIC), 0) == _JOURNAL_MAGIC:
            journal.unlink()
    except PlanError:
        pass  # a run that is about to begin
    finally:
        os.close(descriptor)


def _is_journal(found: bytes) -> bool:
    """Return whether a file begins as journals do; a power cut may leave less of the line, or nothing but its length."""
    return found[: len(_JOURNAL_MAGIC)] in (_JOURNAL_MAGIC, _JOURNAL_MAGIC[: len(found)]) or not found.strip(b"\0")


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise OutputExists for an output that :func:`execute` would refuse; for whoever has long work before the plan."""
    if path.is_dir() or not journal_path(path).exists():  # else a killed run may have finished this very file
        outputs.refuse_existing(path, overwrite=overwrite)


class _Pending(NamedTuple):
    """A file that is not under its final name yet, and the inode of its partial output."""

    file: PlannedFile
    inode: int


def _prepare(plan: Plan, journal: _Journal, *, overwrite: bool, mode: int | None) -> list[_Pending]:
    """Check names and space, preallocate; returns the files that are not under their final name yet."""
    pending = []
    for number, file in enumerate(plan.files):
        inode = journal.done.get(plan.n_tiles + number)
        if inode is not None and file.path.exists() and file.path.stat().st_ino == inode:
            partial_path(file.path).unlink(missing_ok=True)
            continue  # killed after this file got its name: it is the very one that was finished
        outputs.refuse_existing(file.path, overwrite=overwrite)
        pending.append(file)
    if not pending:
        return []
    try:
        missing = sum(max(0, f.nbytes - _allocated(partial_path(f.path))) for f in pending)
        stat = os.statvfs(pending[0].path.parent)
        free = stat.f_bavail * stat.f_frsize
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing} bytes are needed and {free} are free")
        return [_Pending(file, _allocate(file, journal, mode)) for file in pending]
    except OSError as error:
        raise _disk_error(pending[0].path, error) from error


def _allocated(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _allocate(file: PlannedFile, journal: _Journal, mode: int | None) -> int:
    """Make a partial output of its full size, or take the one that a killed run left; returns its inode."""
    path = partial_path(file.path)
    descriptor = outputs.open_plain(path)
    if descriptor is not None and (not journal.resumed or os.fstat(descriptor).st_nlink > 1):
        # Never emptied: under a second name it may be an output, finished just before a kill.
        os.close(descriptor)
        path.unlink()
        descriptor = None
    if descriptor is None:
        descriptor = outputs.create(path, mode)
        journal.created[path] = os.fstat(descriptor).st_ino
    try:
        os.ftruncate(descriptor, file.nbytes)
        outputs.reserve(descriptor, file.nbytes)
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def _jobs(
    plan: Plan, pending: list[_Pending], journal: _Journal, *, sync: bool
) -> Iterator[tuple[PlannedTensor, _Job]]:
    inodes = {file.path: inode for file, inode in pending}
    for number, (file_number, tensor, tile) in enumerate(plan.jobs()):
        file = plan.files[file_number]
        inode = inodes.get(file.path)
        if inode is not None:
            position = len(file.header) + tensor.offset + tile.offset
            output = str(partial_path(file.path))
            expected = journal.done.get(number)
            yield (
                tensor,
                _Job(
                    number,
                    tensor.transform,
                    tile,
                    plan.source_files,
                    output,
                    inode,
                    position,
                    expected,
                    sync,
                    tensor.shape[-2] if len(tensor.shape) == 3 else 0,
                ),
            )


def _fill(
    plan: Plan,
    pending: list[_Pending],
    journal: _Journal,
    pool: Executor,
    workers: int,
    progress: Progress | None,
    observer: Observer | None,
    *,
    sync: bool,
) -> None:
    total = sum(tensor.nbytes for file, _ in pending for tensor in file.tensors)
    done = 0
    batches = _batches(_jobs(plan, pending, journal, sync=sync))
    # A bounded window of tasks: neither a hundred thousand futures nor an idle worker.
    waiting: dict[Future[list[_Done]], list[tuple[PlannedTensor, _Job]]] = {}
    refused: dict[str, tuple[PlannedTensor, _Job, _Done]] = {}
    if progress is not None:
        progress(0, total)
    try:
        while True:
            for batch in islice(batches, 2 * workers - len(waiting)):
                waiting[pool.submit(_run, [job for _, job in batch])] = batch
            if not waiting:
                break
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                batch = waiting.pop(future)
                for (tensor, job), result in zip(batch, future.result(), strict=False):
                    if result.problem or _refused(job.transform, result.outcome):
                        held = refused.get(tensor.name)
                        if held is None or job.number < held[1].number:
                            refused[tensor.name] = tensor, job, result
                        if len(refused) == _MAX_REFUSED:
                            raise _refusal(plan, refused.values())
                        continue
                    if not result.resumed:
                        journal.add(job.number, result.checksum)
                    done += result.nbytes
                    if observer is not None:
                        observer(TileDone(tensor, job.tile, result.outcome, result.resumed, result.dead_blocks))
            if progress is not None:
                progress(done, total)
        if refused:
            raise _refusal(plan, refused.values())
    finally:
        for future in waiting:
            future.cancel()
        # Whatever is still running must end before the descriptors are closed.
        wait([future for future in waiting if not future.cancelled()])


def _batches(jobs: Iterable[tuple[PlannedTensor, _Job]]) -> Iterator[list[tuple[PlannedTensor, _Job]]]:
    """Group tiles, some milliseconds of work each: handing a task to a thread costs a tenth of one."""
    batch: list[tuple[PlannedTensor, _Job]] = []
    nbytes = 0
    for tensor, job in jobs:
        batch.append((tensor, job))
        # A search takes a tenth of a second a tile and more: it shares with no other.
        nbytes += _BATCH_NBYTES if job.transform.effort else job.tile.nbytes
        if nbytes >= _BATCH_NBYTES or len(batch) == _BATCH_LEN:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _refusal(plan: Plan, refused: Iterable[tuple[PlannedTensor, _Job, _Done]]) -> GGUFError:
    """Return one error for tensors with values that cannot be written: what and where in the first one, the others' names."""
    (tensor, job, result), *others = sorted(refused, key=lambda held: held[1].number)
    if result.problem:
        source = tensor.items[job.tile.item][0]
        span = (job.tile.spans or job.tile.matrix[0][1])[0]
        becomes = "" if source == tensor.name else f" -> {tensor.name!r}"
        error: GGUFError = CheckpointError(
            f"{plan.source_files[span.file]}: tensor {source!r}{becomes}: {result.problem}"
        )
    else:
        error = _codes_error(plan, tensor, job, result.outcome)
    if not others:
        return error
    least = "at least " if len(others) + 1 == _MAX_REFUSED else ""
    names = ", ".join(repr(held[0].name) for held in others)
    return type(error)(f"{error} ({least}{len(others)} more tensors have such values: {names})")


def _codes_error(plan: Plan, tensor: PlannedTensor, job: _Job, outcome: Outcome) -> GGUFError:
    """Count over the whole source tensor, so that the message says how bad it is."""
    names = tensor.items[job.tile.item]
    path = plan.source_files[job.tile.spans[0].file]
    if outcome.lost:
        return CheckpointError(
            f"{path}: tensor {names[0]!r} has {outcome.lost} values that {tensor.type} cannot hold exactly in the first "
            f"tile that was tried; choose a wider type for {tensor.name!r}"
        )
    bad_codes = bad_scales = 0
    for tile in tensor.tiles:
        if tile.item == job.tile.item:
            inputs = read_spans(plan.source_files, tile)
            if tensor.transform.op == "encode":
                _, codes, scales = decode_parts(tensor.transform, tile.rows, inputs, tile.phase)
            else:
                out = scratch("out", tile.nbytes)
                codes, scales, *_ = apply(tensor.transform, tile.rows, inputs, out, phase=tile.phase)
            bad_codes += codes
            bad_scales += scales
    found_codes = f"{bad_codes} E4M3 NaN codes (0x7F, 0xFF) in tensor {names[0]!r}" if bad_codes else ""
    scales_dtype = {"F32": "float32"}.get(dtype := FLOAT_SCALES.get(tensor.transform.kind, ""), dtype)
    what = f"{scales_dtype} scales that are not finite" if scales_dtype else "E8M0 scales 255 (NaN)"
    found_scales = f"{bad_scales} {what} in tensor {names[-1]!r}" if bad_scales else ""
    return SourceCodesError(
        f"{path}: found {' and '.join(filter(None, (found_codes, found_scales)))}: runtimes disagree on what they mean, so "
        "they are not written; the checkpoint is damaged, download it again"
    )


def _finish(plan: Plan, pending: list[_Pending], journal: _Journal, *, overwrite: bool) -> None:
    for file, inode in pending:
        partial = partial_path(file.path)
        with _opened_output(str(partial), inode) as descriptor:
            outputs.write_at(descriptor, 0, file.header)
            if journal.resumed:
                # What was new is zero between the tensors; what was there before may be anything.
                for offset, nbytes in file.gaps():
                    outputs.write_at(descriptor, offset, bytes(nbytes))
            try:
                os.fsync(descriptor)
            except OSError:
                # Linux forgets which pages failed and would read them back as good: nothing in the journal holds any more.
                journal.forget()
                raise
        _check_file(partial, file)
    inodes = {file.path: inode for file, inode in pending}
    for number, file in enumerate(plan.files):
        if file.path in inodes:
            partial, inode = partial_path(file.path), inodes[file.path]
            if not outputs.same_file(partial, inode):
                raise _replaced(partial)
            journal.add(plan.n_tiles + number, inode)
            outputs.give_name(partial, file.path, overwrite=overwrite)
            if file.path.stat().st_ino != inode:
                raise _replaced(file.path)
    if pending:
        directory = os.open(pending[0].file.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _check_file(partial: Path, file: PlannedFile) -> None:
    """Read the finished file's header back and compare it with the plan."""
    if not file.reads_back(partial):
        raise PlanError(f"{partial}: the written header does not read back as planned; this is a bug in ggufx")


def _disk_error(path: Path, error: OSError) -> DiskError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"{error.filename or path.parent}: the disk is full ({error.strerror}); free some space and run the same "
            "command again, it goes on where it stopped"
        )
    return DiskError(
        f"{error.filename or path}: {error.strerror or error}; what is done so far is kept, the same command goes on"
    )
