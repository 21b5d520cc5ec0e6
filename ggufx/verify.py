"""Prove a conversion: every tensor of a GGUF or a hybrid against the checkpoint, or the GGUF, or both, it was made from.

Native tensors are unpacked into codes and scales and compared with the checkpoint's own bytes, which goes backwards from
the file and shares no step with the packing that made it. Others are compared by value, decoded from both sides. Where
two GGUFs have a tensor in the same type, its bytes are compared.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ggufx import dialects, execute, merge, retarget, rounding, types
from ggufx import plan as plan_module
from ggufx.architectures.base import FLOATS
from ggufx.checkpoint import Checkpoint, SourceTensor
from ggufx.container import Value, ValueType
from ggufx.convert import Conversion, plan_convert
from ggufx.errors import GGUFError, OptionError, PlanError
from ggufx.execute import Progress
from ggufx.file import DIALECT_KEY, File, Tensor
from ggufx.hybrid import HybridFile, open
from ggufx.options import given, refuse
from ggufx.plan import FLOAT_SCALES, FP8_KINDS, QUANTIZATION_VERSION, Matrix, Plan, PlannedTensor, Span, Tile, Transform
from ggufx.transforms import decode_parts, native_codes
from ggufx.values import as_unicode

__all__ = ["Report", "TensorReport", "verify"]

Status = Literal["exact", "rounded", "different", "missing", "extra", "undecided"]

_STAMPS: Final[Mapping[str, Callable[[object], bool]]] = {
    DIALECT_KEY: lambda name: isinstance(name, str) and name in dialects.TARGETS,
    "ggufx.version": lambda text: isinstance(text, str) and re.fullmatch(r"\d+(\.\d+)*[\w.+-]*", text) is not None,
}
"""Keys that say who wrote a file, and whether a value is one."""

FAR: Final = 0.5
"""Relative RMS error that no quantization explains: noise of the source's own size has 1.4."""

_NATIVE: Final = {*((kind, "F8_E4M3_B128") for kind in FP8_KINDS), ("FP4", "MXFP4")}


@dataclass
class TensorReport:
    """What was found for one tensor.

    Attributes
    ----------
    status
        ``exact``: codes, scales or values equal the source's, bit for bit. ``rounded``: stored in a lossy type, as its
        encoder rounds. ``different``: something is wrong. ``missing`` from the file, ``extra`` in it. ``undecided``: the
        type cannot be decoded here.
    differing
        Number of codes, scales or values that differ.
    max_error, rms_error, relative_rms
        Of decoded values against the source's; 0 when exact. The relative one is the root of the sum of squared errors over
        the sum of the source's squared values, as of :func:`ggufx.diff.diff` with the source as its first file.
    """

    name: str
    type: str
    status: Status
    native: bool = False
    differing: int = 0
    first: str = ""
    max_error: float = 0.0
    rms_error: float = 0.0
    relative_rms: float = 0.0
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is exact, or rounded where rounding is what a conversion does."""
        return self.status == "exact" or (self.status == "rounded" and not self.native)


@dataclass
class Report:
    """Result of :func:`verify`.

    Attributes
    ----------
    tensors
        One entry per tensor of the plan and of the file.
    metadata
        Keys whose value is not what a conversion or a move writes now: a model name given by hand is one, say. They are
        judged; ``allow_keys`` and ``ignore_metadata`` of :func:`verify` say which may differ.
    allowed
        Such keys that were allowed to differ.
    """

    path: str
    checkpoint: str
    target: str
    tensors: list[TensorReport] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    skipped: int = 0

    def __repr__(self) -> str:
        """Return the verdict and the counts, which are all that fits a line."""
        return (
            f"<Report {self.path!r}: {self.verdict} ({self.target}), {self.counts()}, {len(self.metadata)} keys differ>"
        )

    @property
    def ok(self) -> bool:
        """Whether every native tensor is exact, nothing is different, missing or extra, and no key differs."""
        return all(tensor.ok for tensor in self.tensors) and not self.metadata

    @property
    def exact(self) -> bool:
        """Whether all that :attr:`ok` asks for is so, and no tensor is rounded."""
        return self.ok and all(tensor.status == "exact" for tensor in self.tensors)

    @property
    def verdict(self) -> str:
        """What was found, in a word or a few: ``verified`` says that nothing was lost."""
        if not self.ok:
            return "NOT VERIFIED"
        return "verified" if self.exact else "rounded within the bounds of its types"

    def counts(self) -> dict[str, int]:
        """Return the number of tensors by status."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            found[tensor.status] = found.get(tensor.status, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {"ok": self.ok, "exact": self.exact, "verdict": self.verdict, "counts": self.counts(), **asdict(self)}


@dataclass
class _Sum:
    """Errors of a tensor, added up over its tiles."""

    differing: int = 0
    first: str = ""
    max_error: float = 0.0
    squares: float = 0.0
    energy: float = 0.0
    unlike_encoder: int = 0
    far: int = 0
    first_far: str = ""


def verify(
    path: str | Path,
    against: str | Path,
    *,
    experts: str | Path | None = None,
    dialect: str | None = None,
    skip: Sequence[str] = (),
    allow_keys: Sequence[str] = (),
    ignore_metadata: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare every tensor and key of a GGUF, or a hybrid, with the checkpoint, or the GGUF, it was made from.

    Parameters
    ----------
    path
        The GGUF (any member, if split), or a hybrid's directory.
    against
        The checkpoint's directory, or a GGUF: of the same dialect or another.
    experts
        Of what :mod:`ggufx.merge` made: the GGUF, or the directory of GGUFs, that the routed experts were taken from, whose
        bytes they must have. Without, they are compared with the checkpoint's by value.
    dialect
        As in :func:`ggufx.open`.
    skip
        Shell patterns of checkpoint tensors that were left out.
    allow_keys
        Shell patterns of metadata keys that may differ, such as those that were set by hand.
    ignore_metadata
        Any key may differ.
    threads
        Tiles compared at a time.
    progress
        Told about the bytes of the file done.

    Raises
    ------
    GGUFError
        A file cannot be read, or the GGUF's names are not those of this checkpoint at all.
    """
    refuse("verify", given({"allow_keys": allow_keys, "ignore_metadata": ignore_metadata}))
    if Path(against).is_file():
        if Path(path).is_dir():
            raise OptionError(
                "{0}: is a file; what ggufx merge made is compared with a checkpoint's directory, and its experts with the "
                "GGUF of {experts}", against,
            )  # fmt: skip
        refuse("verify", given({"experts": experts, "skip": skip}), "gguf")
        return _verify_moved(
            path, against, dialect=dialect, allow_keys=allow_keys, ignore_metadata=ignore_metadata, threads=threads,
            progress=progress,
        )  # fmt: skip
    checkpoint = Checkpoint(against)
    with open(path, dialect=dialect) as file, _opened_experts(experts) as packed:
        lacking = [name for name in file if packed and name.endswith("_exps.weight") and name not in packed]
        if lacking:
            raise PlanError(f"{experts}: has no {lacking[0]} ({len(lacking)} such tensors); it is not what was merged")
        if packed and not any(name in packed for name in file):
            raise OptionError(
                "{experts} {0}: {1} has no routed experts to compare with them; it is no merge", experts, file.path
            )
        if isinstance(file, HybridFile):
            refuse("verify", given({"allow_keys": allow_keys, "ignore_metadata": ignore_metadata}), "hybrid")
            return _verify_hybrid(file, checkpoint, packed, skip=skip, threads=threads, progress=progress)
        plan, target = _matching_plan(file, checkpoint, skip)
        report = Report(str(path), str(against), target, skipped=len(plan.skipped))
        _judge_keys(
            report, plan.metadata, file, allow_keys, ignore_metadata=ignore_metadata,
            quantized=any(file[t.name].type != t.type for t in plan.tensors if t.name in file),
        )  # fmt: skip
        planned = {tensor.name: tensor for tensor in plan.tensors}
        total = sum(file[name].nbytes for name in planned if name in file)
        done = 0
        workers = threads or execute.default_workers()
        if progress is not None:
            progress(0, total)
        with execute.open_files(), ThreadPoolExecutor(workers, thread_name_prefix="ggufx") as pool:
            for tensor in plan.tensors:
                if tensor.name not in file:
                    report.tensors.append(TensorReport(tensor.name, tensor.type, "missing", native=_native(tensor)))
                    continue
                if tensor.name in packed:
                    report.tensors.append(_compare_taken(pool, packed[tensor.name], file[tensor.name]))
                else:
                    report.tensors.append(_compare(pool, plan.source_files, tensor, file[tensor.name]))
                done += file[tensor.name].nbytes
                if progress is not None:
                    progress(done, total)
        report.tensors += _extra(file, planned)
    return report


def _extra(file: File, expected: Container[str]) -> list[TensorReport]:
    """Return tensors that nobody expected; factors count with the weights that they are of."""
    factors = {t.factor.name for t in file.tensors if t.factor is not None and t.name in expected}
    return [
        TensorReport(t.name, t.type, "extra") for t in file.tensors if t.name not in expected and t.name not in factors
    ]


def _judge_keys(
    report: Report,
    expected: Mapping[str, Value],
    file: File,
    allow_keys: Sequence[str],
    *,
    ignore_metadata: bool,
    quantized: bool,
) -> None:
    """Put a line for every key that is not as expected into the report: among those that are judged, or allowed to differ."""
    for key, what in _differing_keys(expected, file, quantized=quantized).items():
        allowed = ignore_metadata or any(fnmatch.fnmatchcase(key, pattern) for pattern in allow_keys)
        (report.allowed if allowed else report.metadata).append(f"{as_unicode(key)}: {what}")


def _as_stored(file: File, moves: Sequence[retarget.Move]) -> list[PlannedTensor]:
    """Return moved tensors with the types that they have in the file, and had in the source."""
    stored = []
    for move in moves:
        source, tensor = move.tensor, file.get(move.name)
        if tensor is not None:
            span = Span(0, source.file_offset, source.nbytes)
            planned = plan_module.copy_tensor(tensor.name, tensor.shape, source.type, source.type_id, span)
            stored.append(replace(planned, type=tensor.type, type_id=tensor.type_id))
    return stored


def _is_quantized(file: File, moves: Sequence[retarget.Move]) -> bool:
    """Return whether a tensor has another quant type than its source: some other command than a move has written the file."""
    stored = ((file[move.name].type, move.tensor.type) for move in moves if move.name in file)
    return any(new != old and new not in FLOATS for new, old in stored)


@contextmanager
def _opened_experts(path: str | Path | None) -> Iterator[dict[str, Tensor]]:
    """Open the GGUF that routed experts were taken from: its experts by their names."""
    with ExitStack() as opened:
        if path is None:
            yield {}
            return
        files = [opened.enter_context(file) for file in merge.open_all(Path(path), None)]
        found = {name: expert.tensor for name, expert in merge.routed_experts(Path(path), files).items()}
        if not found:
            raise PlanError(f"{path}: holds no routed experts (blk.N.ffn_*_exps.weight)")
        yield found


def _verify_hybrid(
    file: HybridFile,
    checkpoint: Checkpoint,
    packed: Mapping[str, Tensor],
    *,
    skip: Sequence[str],
    threads: int | None,
    progress: Progress | None,
) -> Report:
    """Compare a hybrid's tensors with the checkpoint's bytes, and its experts with those of a GGUF, or by value."""
    # Its names are those of ik_llama.cpp's files, which have kv_b whole.
    conversion = Conversion(checkpoint, "ik_llama.cpp", skip=skip)
    copies = {o.name: merge.unchanged(o) for o in conversion.outputs if o.role != "expert"}
    expected = [o for o in conversion.outputs if o.role == "expert" or copies[o.name]]
    if not {o.name for o in expected} & set(file):
        raise PlanError(f"{file.path}: none of its {len(file)} tensors belongs to the checkpoint {checkpoint.path}")
    report = Report(str(file.path), str(checkpoint.path), "hybrid", skipped=len(conversion.skipped))
    sources, stored = [str(shard) for shard in checkpoint.shards], file.stored
    total, done = file.data_nbytes, 0
    workers = threads or execute.default_workers()
    with execute.open_files(), ThreadPoolExecutor(workers, thread_name_prefix="ggufx") as pool:
        for output in expected:
            found = file.get(output.name)
            if found is None:
                kind = output.stack[0][0].tensor.dtype
                report.tensors.append(TensorReport(output.name, kind, "missing"))
            elif output.role != "expert":
                report.tensors.append(_compare_copies(pool, sources, found, copies[output.name], stored))
            elif output.name in packed:
                report.tensors.append(_compare_taken(pool, packed[output.name], found))
            else:
                # Whoever quantized them may have started from BF16, or with another encoder.
                planned = conversion.tensor(output)
                report.tensors.append(_compare(pool, sources, planned, found, own_encoder=False))
            done += 0 if found is None else found.nbytes
            if progress is not None:
                progress(done, total)
    names = {output.name for output in expected}
    report.tensors += _extra(file, names)
    return report


def _compare_taken(pool: ThreadPoolExecutor, source: Tensor, tensor: Tensor) -> TensorReport:
    """Compare experts with those that a merge took, as they are: another quant type is another model's, however near."""
    if source.type != tensor.type and not {source.type, tensor.type} <= set(FLOATS):
        detail = f"is {tensor.type}, the experts' GGUF has {source.type}: it is not the one that was merged"
        return TensorReport(tensor.name, tensor.type, "different", detail=detail)
    return _compare_moved(pool, source, tensor)


def _compare_copies(
    pool: ThreadPoolExecutor,
    sources: Sequence[str],
    tensor: Tensor,
    copies: Sequence[PlannedTensor],
    stored: Mapping[str, tuple[Path, SourceTensor]],
) -> TensorReport:
    """Compare a tensor, and its scales, with the bytes that the checkpoint has."""
    result = TensorReport(tensor.name, tensor.type, "exact", native=True)
    for copy in copies:
        path, own = stored.get(copy.name, (None, None))
        if path is None or own is None:
            result.status, result.detail = "different", f"{copy.name} is missing"
            return result
        if (own.dtype, own.shape) != (copy.type, copy.shape):
            result.status = "different"
            result.detail = (
                f"{own.name} is {own.dtype}{list(own.shape)}, the checkpoint's {copy.type}{list(copy.shape)}"
            )
            return result
        work = [pool.submit(_unlike_bytes, sources, path, own.offset, tile) for tile in copy.tiles]
        for tile, future in zip(copy.tiles, work, strict=True):
            count, first = future.result()
            if count and not result.first:
                result.first = f"byte {tile.offset + first} of {own.name}"
            result.differing += count
    if result.differing:
        result.status = "different"
        result.detail = f"{result.differing} bytes differ from the checkpoint's, the first at {result.first}"
    return result


def _unlike_bytes(sources: Sequence[str], path: Path, offset: int, tile: Tile) -> tuple[int, int]:
    """Return how many bytes of a copied tile differ, and the place of the first."""
    held = execute.scratch("file", tile.nbytes)
    execute.read_into(str(path), offset + tile.offset, held)
    (source,) = execute.read_spans(sources, tile)
    if np.array_equal(held, source):
        return 0, 0
    unlike = held != source
    return int(np.count_nonzero(unlike)), int(np.argmax(unlike))


def _verify_moved(
    path: str | Path,
    against: str | Path,
    *,
    dialect: str | None,
    allow_keys: Sequence[str],
    ignore_metadata: bool,
    threads: int | None,
    progress: Progress | None,
) -> Report:
    """Compare a GGUF with the one that it was retargeted, split, merged or edited from."""
    with open(path, dialect=dialect) as file, open(against) as source:
        target, moves, metadata = _matching_moves(file, source)
        report = Report(str(path), str(against), target)
        _judge_keys(
            report, metadata, file, allow_keys, ignore_metadata=ignore_metadata, quantized=_is_quantized(file, moves)
        )
        planned = {move.name: move for move in moves}
        total = sum(file[name].nbytes for name in planned if name in file)
        done = 0
        if progress is not None:
            progress(0, total)
        workers = threads or execute.default_workers()
        with execute.open_files(), ThreadPoolExecutor(workers, thread_name_prefix="ggufx") as pool:
            for move in moves:
                if move.name not in file:
                    report.tensors.append(TensorReport(move.name, move.tensor.type, "missing"))
                    continue
                report.tensors.append(_compare_moved(pool, move.tensor, file[move.name]))
                done += file[move.name].nbytes
                if progress is not None:
                    progress(done, total)
        report.tensors += _extra(file, planned)
    return report


def _matching_moves(file: File, source: File) -> tuple[str, list[retarget.Move], Mapping[str, Value]]:
    """Return the target whose names the file has, or most of them, the tensors, and the keys a move writes."""
    same = [retarget.Move(tensor.name, tensor) for tensor in source.tensors]
    found: list[tuple[str, list[retarget.Move], Mapping[str, Value]]] = [("a copy", same, source.metadata.typed())]
    refusal: GGUFError | None = None
    for target in ("nisparks", "llama.cpp", "ds4"):
        try:
            moves, _, model = retarget.moves_for(source, target)
            number = retarget.file_type(source, _as_stored(file, moves), dialects.TARGETS[target])
            found.append((target, moves, retarget.keys_for(source, model, target, number, [])))
        except GGUFError as error:
            refusal = refusal or error
    likeness = [
        (
            len({move.name for move in moves} & set(file)),
            -len(_differing_keys(metadata, file, quantized=_is_quantized(file, moves))),
        )
        for _, moves, metadata in found
    ]
    best = max(likeness)
    if best[0] == 0:
        raise refusal or PlanError(f"{file.path}: none of its {len(file)} tensors is one of {source.path}'s")
    return found[likeness.index(best)]


def _compare_moved(pool: ThreadPoolExecutor, source: Tensor, tensor: Tensor) -> TensorReport:
    span = Span(0, source.file_offset, source.nbytes)
    alike = source.type_id == tensor.type_id and source.shape == tensor.shape and source.nbytes == tensor.nbytes
    # A factor that only the one has changes every value; one that both have is compared as the tensor that it is.
    if alike and (source.factor is None) == (tensor.factor is None):
        whole = plan_module.copy_tensor(tensor.name, source.shape, source.type, source.type_id, span)
        work = [pool.submit(_same_bytes, source, tensor, tile) for tile in whole.tiles]
        if all(future.result() for future in work):
            return TensorReport(tensor.name, tensor.type, "exact")
    if source.codec is None or not source.codec.can_decode:
        same = source.type_id == tensor.type_id
        status: Status = "different" if same else "undecided"
        detail = "the bytes differ" if same else f"{source.type} cannot be decoded here"
        return TensorReport(tensor.name, tensor.type, status, detail=detail)
    row_len = source.shape[-1] if source.shape else 1
    transform = Transform("copy", source.type, source.type, (row_len,))
    matrix = Matrix(source.name, source.type, source.size // max(1, row_len), row_len, span)
    planned = plan_module.plan_tensor(tensor.name, source.shape, source.type, source.type_id, transform, [[matrix]])
    result = _compare(pool, (str(source.path),), planned, tensor, scaled_source=source.factor is not None)
    if result.status == "exact" and source.type_id == tensor.type_id:
        # Two codes of one value, a minus zero of MXFP4 say: whoever copied would not have changed it.
        result.status, result.detail = "different", "the bytes differ, the values do not"
    return result


def _same_bytes(source: Tensor, tensor: Tensor, tile: Tile) -> bool:
    held = execute.scratch("source", tile.nbytes), execute.scratch("file", tile.nbytes)
    for one, buffer in zip((source, tensor), held, strict=True):
        execute.read_into(str(one.path), one.file_offset + tile.offset, buffer)
    return np.array_equal(*held)


def _native(tensor: PlannedTensor) -> bool:
    """Return whether a conversion for this target keeps the tensor's codes, so that the file must have them."""
    return (tensor.transform.kind, tensor.type) in _NATIVE


def _matching_plan(file: File, checkpoint: Checkpoint, skip: Sequence[str]) -> tuple[Plan, str]:
    """Return the plan whose tensor names the file has, or most of them."""
    best: tuple[int, Plan, str] | None = None
    refusal: GGUFError | None = None
    names = set(file) - {tensor.factor.name for tensor in file.tensors if tensor.factor is not None}
    # Where two targets share their names, the file's dialect says which it was made for; ik_llama.cpp's names differ for
    # some architectures only.
    targets = [(name, False) for name in ("llama.cpp", "ik_llama.cpp", "nisparks")]
    targets.sort(key=lambda pair: pair[0] != file.dialect)
    for target, mtp in (*targets, ("llama.cpp", True)):
        try:
            plan = plan_convert(checkpoint, file.path, target=target, mtp=mtp, skip=skip)
        except GGUFError as error:
            # Not every target has a form for everything; the checkpoint's own faults show in every attempt.
            refusal = refusal or error
            continue
        planned = {tensor.name for tensor in plan.tensors}
        label = f"{target} --mtp" if mtp else target
        if planned == names:
            return plan, label
        common = len(planned & names) - len(names - planned)
        if names & planned and (best is None or common > best[0]):
            best = (common, plan, label)
    if best is not None:
        return best[1], best[2]
    raise refusal or PlanError(
        f"{file.path}: none of its {len(file)} tensors belongs to the checkpoint {checkpoint.path}"
    )


def _differing_keys(expected: Mapping[str, Value], file: File, *, quantized: bool) -> dict[str, str]:
    """Return what is wrong with every key whose value is not the expected one.

    The keys of a split are judged when it is opened. ``ggufx.dialect`` and ``ggufx.version`` may be any that there are: other
    programs write none, and other versions have written files. Who quantizes (``quantized``) also writes a file type of their
    own, which must be one of the dialect's, the version of quantization, and where the importance is from.
    """
    found = file.metadata.typed()
    wrong: dict[str, str] = {}
    for key in dict.fromkeys([*expected, *found]):
        if key.startswith("split."):
            continue
        if key in _STAMPS:
            if key in found and not _STAMPS[key](found[key].data):
                wrong[key] = f"{_short(found[key])}, which is none"
        elif quantized and key == "general.file_type":
            if key in found and file.file_type is None:
                wrong[key] = f"{_short(found[key])}, which names no file type of {file.dialect or 'any dialect'}"
        elif quantized and key.startswith("quantize.imatrix."):
            continue
        elif key not in found:
            wrong[key] = "missing"
        elif key not in expected:
            if not (quantized and key == "general.quantization_version" and found[key].data == QUANTIZATION_VERSION):
                wrong[key] = "not expected"
        elif not expected[key].same(found[key]):
            wrong[key] = f"{_short(found[key])}, expected {_short(expected[key])}"
    return wrong


def _short(value: Value) -> str:
    text = f"array of {len(value.data)}" if value.type is ValueType.ARRAY else repr(value.data)
    return text if len(text) <= 60 else text[:57] + "..."


def _compare(
    pool: ThreadPoolExecutor,
    sources: Sequence[str],
    planned: PlannedTensor,
    tensor: Tensor,
    *,
    own_encoder: bool = True,
    scaled_source: bool = False,
) -> TensorReport:
    """Compare a tensor with what was planned; its factor counts unless the source has one, which is a tensor of its own."""
    transform = planned.transform
    scaled = tensor.factor is not None and not scaled_source
    coded = (transform.kind, tensor.type) in _NATIVE and (
        transform.op == "pack" or not (transform.kind in FLOAT_SCALES or transform.transposed)
    )
    result = TensorReport(tensor.name, tensor.type, "exact", native=_native(planned))
    if tensor.shape != planned.shape:
        result.status = "different"
        result.detail = f"shape {list(tensor.shape)}, expected {list(planned.shape)}"
        return result
    if tensor.codec is None or not tensor.codec.can_decode:
        result.status = "undecided"
        result.detail = f"{tensor.type} cannot be decoded here"
        return result
    first_rows = np.cumsum([0, *(tile.rows for tile in planned.tiles)])
    work = [
        pool.submit(_compare_tile, sources, planned, tensor, tile, int(row), coded, own_encoder, scaled)
        for tile, row in zip(planned.tiles, first_rows, strict=False)
    ]
    sums = [future.result() for future in work]
    result.differing = sum(s.differing for s in sums)
    result.first = next((s.first for s in sums if s.first), "")
    result.max_error = max((s.max_error for s in sums), default=0.0)
    if result.differing:
        # The error is relative to the whole source, whose tiles without a difference nobody has decoded yet.
        clean = [tile for tile, found in zip(planned.tiles, sums, strict=True) if not found.differing]
        sums += [_Sum(energy=energy) for energy in pool.map(lambda tile: _energy(sources, planned, tile), clean)]
    count, energy = prod(tensor.shape), sum(s.energy for s in sums)
    squares = sum(s.squares for s in sums)
    result.rms_error = float(np.sqrt(squares / count)) if count else 0.0
    result.relative_rms = float(np.sqrt(squares / energy)) if energy else 0.0
    if result.differing:
        unlike = sum(s.unlike_encoder for s in sums)
        lossless = coded or tensor.type in ("F32", "F64", "I32", "I64") or tensor.type == planned.transform.kind
        if lossless:
            result.status = "different"
            result.detail = (
                f"{result.differing} codes, scales or values differ from the source, the first at {result.first}"
            )
        elif far := sum(s.far for s in sums):
            result.status = "different"
            result.detail = (
                f"{far} block{' is' if far == 1 else 's are'} farther from the source than encoding to {tensor.type} explains, "
                f"the first at {next(s.first_far for s in sums if s.far)}"
            )
        elif not result.relative_rms <= FAR:  # NaN is far, too
            result.status = "different"
            result.detail = f"the values are far from the source (relative RMS {result.relative_rms:.3g})"
        elif unlike:
            result.status = "different"
            result.detail = f"{unlike} bytes are not what encoding the source to {tensor.type} gives"
        else:
            result.status = "rounded"
            if result.native:
                result.detail = (
                    f"{planned.transform.kind} codes are kept exactly by {planned.type}; here they are rounded"
                )
                if "_exps." in tensor.name:
                    result.detail += " (of a merge, --experts names the GGUF that they are of)"
    return result


def _compare_tile(
    sources: Sequence[str],
    planned: PlannedTensor,
    tensor: Tensor,
    tile: Tile,
    first_row: int,
    coded: bool,
    own_encoder: bool,
    scaled: bool,
) -> _Sum:
    codec = tensor.codec
    assert codec is not None
    row_len = sum(planned.transform.parts)  # as the plan sees rows
    row_nbytes = codec.layout.row_nbytes(row_len)
    packed = execute.scratch("file", tile.rows * row_nbytes)
    execute.read_into(str(tensor.path), tensor.file_offset + first_row * row_nbytes, packed)
    rows = packed.reshape(tile.rows, row_nbytes)
    inputs = execute.read_spans(sources, tile)
    result = _Sum()
    if coded:
        _compare_codes(codec, rows, planned, tile, inputs, first_row, result)
        if not result.differing:
            return result
    kind = planned.transform.kind
    if kind in ("I32", "I64"):
        source = inputs[0].view("<i4" if kind == "I32" else "<i8").reshape(tile.rows, row_len)
        _note(result, codec.decode(rows) != source, first_row)
        return result
    values = codec.decode(rows, threads=1, dtype=np.float32)
    source = decode_parts(planned.transform, tile.rows, inputs, tile.phase)[0]
    factors = tensor.row_factors(np.arange(first_row, first_row + tile.rows)) if scaled else None
    encoded, plain = source, values
    if factors is not None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            encoded, values = source / factors, values * factors
    unequal = values.view(np.uint32) != source.view(np.uint32)
    if not coded:
        _note(result, unequal, first_row)
    if result.differing:
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(values.astype(np.float64) - source)
        result.max_error = float(np.nan_to_num(error, nan=np.inf).max())
        result.squares = float(np.square(error).sum())
        result.energy = float(np.square(source.astype(np.float64)).sum())
        if factors is not None and not np.isfinite(encoded).all():
            row = int(np.argmax(~np.isfinite(encoded).all(axis=1)))
            result.far = 1
            result.first_far = f"{_place(tensor, first_row + row, 0)} (its factor is {factors[row, 0]})"
        elif not coded and rounding.judges(codec):
            far = rounding.far_blocks(codec, plain, encoded)
            if far:
                result.far = len(far)
                result.first_far = _place(tensor, first_row + far[0].row, far[0].block) + (
                    f" (squared error {far[0].relative:.3g} of the block's energy; our encoder leaves {far[0].expected:.3g})"
                )
        # A conversion has one result; who quantized to a type of their own choice also chose an effort and weights.
        fixed = codec.reproduces and factors is None and (tensor.type == planned.type or not codec.searches)
        if own_encoder and fixed:
            wanted = codec.encode(source, effort="reference", threads=1)
            result.unlike_encoder = int(np.count_nonzero(wanted != rows))
    return result


def _energy(sources: Sequence[str], planned: PlannedTensor, tile: Tile) -> float:
    """Return the sum of a tile's squared values in the source; 0 of integers."""
    if planned.transform.kind in ("I32", "I64"):
        return 0.0
    source = decode_parts(planned.transform, tile.rows, execute.read_spans(sources, tile), tile.phase)[0]
    return float(np.square(source.astype(np.float64)).sum())


def _place(tensor: Tensor, row: int, block: int) -> str:
    if tensor.ndim == 3:
        return f"expert {row // tensor.shape[1]}, row {row % tensor.shape[1]}, block {block}"
    return f"row {row}, block {block}"


def _compare_codes(
    codec: types.Codec,
    rows: npt.NDArray[np.uint8],
    planned: PlannedTensor,
    tile: Tile,
    inputs: list[npt.NDArray[np.uint8]],
    first_row: int,
    result: _Sum,
) -> None:
    codes, scales = codec.unpack(rows)
    wanted_codes, wanted_scales, rows_per_scale, lost = native_codes(planned.transform, tile.rows, inputs, tile.phase)
    if lost:
        _note(result, np.ones((1, lost), bool), first_row, "scale ")
        return
    if not np.array_equal(codes, wanted_codes):
        _note(result, codes != wanted_codes, first_row)
    repeated = np.repeat(wanted_scales, rows_per_scale, axis=0)[: rows.shape[0]]
    if not np.array_equal(scales, repeated):
        _note(result, scales != repeated, first_row, "scale ")


def _note(result: _Sum, unequal: npt.NDArray[np.bool_], first_row: int, what: str = "") -> None:
    count = int(np.count_nonzero(unequal))
    if count and not result.first:
        row, column = (int(n) for n in np.argwhere(unequal)[0])
        result.first = f"{what}row {first_row + row}, column {column}"
    result.differing += count
