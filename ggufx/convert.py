"""Convert a Hugging Face checkpoint: plan the GGUF that keeps its native bits, in a dialect's names, types and keys."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Final, Literal, TypedDict, Unpack

from ggufx import architectures, companions, dialects, execute, model_card, plan, types, vocabulary
from ggufx.architectures import Architecture, Output, Part
from ggufx.architectures.base import FP8_TILE
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value
from ggufx.errors import CheckpointError, CodecError, OptionError, PlanError
from ggufx.execute import Progress
from ggufx.output_names import output_path
from ggufx.plan import QUANTIZATION_VERSION, Matrix, Plan, PlannedTensor, Span, Transform
from ggufx.types.f8_e4m3_b128 import exponents, widened
from ggufx.version import __version__

__all__ = [
    "DENSE_TYPES",
    "OUTTYPES",
    "TARGETS",
    "Conversion",
    "ConvertOptions",
    "convert",
    "operation",
    "plan_convert",
    "plan_output",
]

TARGETS: Final = tuple(dialects.DIALECTS)
OUTTYPES: Final = ("native", "moe-f8-e4m3-mxfp4")
"""Spellings of the only output type: every native code is kept."""
DENSE_TYPES: Final = ("q8_0", "bf16", "f32")
"""What FP8 tensors become where the target has no FP8 type; the default is the architecture's. Of codes under powers of
two all but q8_0 are exact; a product with another scale is rounded to float32 and then to the type."""

_FILE_TYPES: Final = {"MXFP4_MOE": 38, "Q8_0": 7, "BF16": 32, "F32": 0}
_NISPARKS_FILE_TYPE: Final = 41
NISPARKS_GENERAL: Final = (
    "general.type", "general.sampling.top_p", "general.sampling.temp", "general.name", "general.size_label",
    "general.license",
)  # fmt: skip
"""Keys of the nisparks form's head, in its order."""


class Conversion:
    """A checkpoint seen as the tensors and keys of a dialect: what :func:`plan_convert` and quantizing start from.

    Parameters
    ----------
    As of :func:`plan_convert`.

    Attributes
    ----------
    outputs
        The tensors, in the target's order.
    skipped
        (source tensor, reason) of everything that is left out.
    notes
        Sentences the user should read; grows as tensors and metadata are asked for.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        target: str,
        *,
        outtype: str = "native",
        dense: str | None = None,
        mtp: bool = False,
        model_name: str | None = None,
        chat_template: str | None = None,
        skip: Sequence[str] = (),
        allow_nan: bool = False,
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        self.dialect = dialects.get(target)
        if outtype.lower() not in OUTTYPES:
            raise OptionError("{outtype} {0} is not supported; supported: {1}", outtype, ", ".join(OUTTYPES))
        if dense is not None and dense.lower() not in DENSE_TYPES:
            raise OptionError("{dense} {0} is not supported; supported: {1}", dense, ", ".join(DENSE_TYPES))
        if mtp and target == "nisparks":
            raise OptionError("the nisparks dialect has no form for the MTP block; use {target} llama.cpp for {mtp}")
        self.architecture = architectures.find(self.checkpoint)
        idle = [pattern for pattern in skip if not any(map(_matcher([pattern]), self.checkpoint))]
        if skip and len(idle) == len(skip):
            raise OptionError("{skip} {0}: {1} has no tensor of such a name", " ".join(idle), self.checkpoint.path)
        self.outputs, self.skipped = self.architecture.outputs(target, mtp=mtp, skip=_matcher(skip))
        self.notes: list[str] = [
            f"no tensor has a name such as {pattern}: nothing is left out by it" for pattern in idle
        ]
        self._mtp, self._strict = mtp, not allow_nan
        self.choice = _Choice(self.architecture, self.dialect, dense)
        self._model_name, self._template = model_name, chat_template

    def stack(self, output: Output) -> tuple[tuple[Matrix, ...], ...]:
        """Return an output's sources: stacked (outer) and concatenated along the row (inner)."""
        return tuple(tuple(_matrix(part) for part in parts) for parts in output.stack)

    def tensor(self, output: Output) -> PlannedTensor:
        """Plan an output with its native bits, or in the ``dense`` type where the target has none for them."""
        return _tensor(output, self.choice, strict=self._strict, notes=self.notes)

    def packs(self, output: Output) -> bool:
        """Return whether F8_E4M3_B128 holds the very codes and scales of an FP8 tensor; reads float32 scales for it."""
        return self.choice.packs(output)

    def check_dense(self) -> None:
        """Raise OptionError for a ``dense`` type that none of the tensors planned so far has a use for."""
        if self.choice.requested is not None and not self.choice.taken:
            raise OptionError(
                "{dense} {0} has no effect: {1} keeps every tensor of {2} as it is; leave it out, or choose another {target}",
                self.choice.requested, self.dialect.name, self.checkpoint.path,
            )  # fmt: skip

    def all_notes(self) -> list[str]:
        """Return the notes and what there is to say of the FP8 tensors planned so far, each once."""
        told = self.architecture.target_notes(self.dialect.name)
        return list(dict.fromkeys([*self.notes, *told, *self.choice.notes()]))

    def metadata(self, tensors: Sequence[PlannedTensor], file_type: int | None) -> dict[str, Value]:
        """Return the keys of a file of these tensors, without ``general.file_type`` if that is ``None``."""
        keys = _metadata(
            self.architecture, tensors, target=self.dialect.name, mtp=self._mtp, file_type=file_type or 0,
            model_name=self._model_name, template=self._template, notes=self.notes,
        )  # fmt: skip
        if file_type is None:
            del keys["general.file_type"]
        return keys


def plan_convert(
    checkpoint: str | Path | Checkpoint,
    outfile: str | Path | None = None,
    *,
    target: str = "nisparks",
    outtype: str = "native",
    dense: str | None = None,
    mtp: bool = False,
    model_name: str | None = None,
    chat_template: str | None = None,
    split_max_nbytes: int | None = None,
    stamp: bool = False,
    skip: Sequence[str] = (),
    allow_nan: bool = False,
) -> Plan:
    """Plan the conversion of a checkpoint; reads headers, the tokenizer, and FP8 scales that may be powers of two.

    Parameters
    ----------
    checkpoint
        Directory of the checkpoint.
    outfile
        Output file; may hold ``{ftype}``. A directory (and the default, the checkpoint's own) gets a name by the GGUF
        naming convention.
    target
        Dialect to write: ``nisparks`` keeps FP8, ``llama.cpp`` and ``ik_llama.cpp`` have no FP8 type.
    outtype
        ``native``, or its alias ``moe-f8-e4m3-mxfp4``.
    dense
        Type of FP8 tensors for targets without FP8, one of :data:`DENSE_TYPES`; by default the architecture's. For
        DeepSeek-V3 and gpt-oss a type that is given is the unquantized matrices', too, as llama.cpp's ``--outtype`` is.
    mtp
        Write the multi-token-prediction block's own file.
    model_name
        ``general.name``; by default the model card's or the directory's.
    chat_template
        Overrides the checkpoint's.
    split_max_nbytes
        Split the output.
    stamp
        Add ``ggufx.version`` and ``ggufx.dialect``.
    skip
        Shell patterns of checkpoint tensors to leave out.
    allow_nan
        Copy E4M3 NaN codes and E8M0 255 into native types instead of refusing them.

    Raises
    ------
    CheckpointError, PlanError
        The checkpoint does not hold what its config says, or the target has no form for what was asked.
    """
    conversion = Conversion(
        checkpoint, target, outtype=outtype, dense=dense, mtp=mtp, model_name=model_name, chat_template=chat_template,
        skip=skip, allow_nan=allow_nan,
    )  # fmt: skip
    source, dialect = conversion.checkpoint, conversion.dialect
    tensors = [conversion.tensor(output) for output in conversion.outputs]
    conversion.check_dense()
    file_type = _file_type(tensors, conversion.architecture, target, conversion.choice.dense)
    metadata = conversion.metadata(tensors, file_type)
    if stamp:
        metadata["ggufx.version"] = Value.string(__version__)
        metadata["ggufx.dialect"] = Value.string(target)
    ftype_name = dialect.file_type_name(file_type) or ""
    built = plan.build(
        _output_path(outfile, source, metadata, ftype_name, mtp=mtp),
        metadata,
        tensors,
        source_files=source.shards,
        source_states=source.shard_states,
        dialect=target,
        split_max_nbytes=split_max_nbytes,
        skipped=conversion.skipped,
        notes=conversion.all_notes(),
        file_type=ftype_name,
    )
    try:
        _ = built.files[0].header
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; UTF-8, and so GGUF, cannot.
        raise CheckpointError(
            f"{source.path}: a text of the tokenizer, the chat template or the model card is not valid Unicode "
            f"({error.object[max(0, error.start - 20) : error.end]!r})"
        ) from None
    return built


class ConvertOptions(TypedDict, total=False):
    """Keywords of :func:`plan_convert`."""

    target: str
    outtype: str
    dense: str | None
    mtp: bool
    model_name: str | None
    chat_template: str | None
    split_max_nbytes: int | None
    stamp: bool
    skip: Sequence[str]
    allow_nan: bool


def convert(
    checkpoint: str | Path | Checkpoint,
    outfile: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **options: Unpack[ConvertOptions],
) -> list[Path]:
    """Convert a checkpoint: :func:`plan_convert` (which takes ``options``) and :func:`ggufx.execute.execute`.

    Returns
    -------
    list of Path
        The finished files.
    """
    return execute.execute(
        plan_convert(checkpoint, outfile, **options),
        overwrite=overwrite,
        resume=resume,
        threads=threads,
        executor=executor,
        progress=progress,
    )


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    expressions = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    return lambda name: any(expression.match(name) for expression in expressions)


# Tensors --------------------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    """How a conversion chooses types: by the target, the architecture, and what FP8 scales turn out to be."""

    architecture: Architecture
    dialect: dialects.Dialect
    requested: str | None
    scales: dict[str, bool] = field(default_factory=dict)
    """By name, of those that were looked at: whether all are powers of two."""
    rounded: dict[str, dict[str, None]] = field(default_factory=dict)
    turned: dict[str, dict[str, None]] = field(default_factory=dict)
    """By family, tensors that are no F8_E4M3_B128: as their scales are no powers of two, and as no tile ends with a head."""
    unread: dict[str, str] = field(default_factory=dict)
    """By output, the types that products with float32 scales are rounded to which nobody had to look at."""
    taken: bool = False
    """Whether a tensor has become of the type asked for, or would have if that divided its rows."""

    @property
    def dense(self) -> str:
        """What FP8 becomes where it cannot stay, in upper case."""
        return (self.requested or self.architecture.dense).upper()

    def take_dense(self) -> str:
        """Return :attr:`dense` for a tensor that will have this type."""
        self.taken = True
        return self.dense

    @property
    def holds_fp8(self) -> bool:
        """Whether the target has the FP8 type."""
        return self.dialect.type_id(types.get("F8_E4M3_B128")) is not None

    def powers_of_two(self, output: Output) -> bool:
        """Return whether all FP8 scales of a tensor are powers of two; reads them, once, where it makes a difference."""
        names = dict.fromkeys(part.scale.name for part in output.parts if part.scale is not None)
        if all(part.kind == "FP8" for part in output.parts):
            self.scales |= dict.fromkeys(names, True)
            return True
        quantization = self.architecture.quantization
        announced = quantization is not None and quantization.text("scale_fmt", None) == "ue8m0"
        # The first that is none decides: a checkpoint of other scales costs one small read a tensor.
        return (self.holds_fp8 or announced) and all(map(self._power_of_two, names))

    def _power_of_two(self, name: str) -> bool:
        if name not in self.scales:
            checkpoint = self.architecture.checkpoint
            self.scales[name] = exponents(widened(checkpoint.read(name), checkpoint[name].dtype))[1] == 0
        return self.scales[name]

    def packs(self, output: Output) -> bool:
        """Return whether F8_E4M3_B128 holds the very codes and scales of an FP8 tensor; reads scales as above."""
        first = output.stack[0][0]
        return (
            first.kind in plan.FP8_KINDS
            and output.shape[-1] % FP8_TILE == 0
            and not (first.transposed and not _squarely(output))
            and self.powers_of_two(output)
        )

    def notes(self) -> list[str]:
        """Say which FP8 tensors lost something, or are not FP8 in the file, a line for each family."""
        then = f"stored as {self.dense}, not as F8_E4M3_B128" if self.holds_fp8 else f"rounded to {self.dense}"
        found = []
        if self.rounded and not any(self.scales.values()):
            count = sum(map(len, self.rounded.values()))
            found.append(f"none of the {count} FP8 tensors has scales that are all powers of two; {then}")
        else:
            found += [
                f"{_these(family, names)}: not all FP8 scales are powers of two; {then}"
                for family, names in self.rounded.items()
            ]
        found += [
            f"{_these(family, names)}: tiles of 128x128 scales do not end with heads - using BF16, which is exact"
            for family, names in self.turned.items()
        ]
        if self.unread:
            kinds = " or ".join(dict.fromkeys(self.unread.values()))
            found.append(
                f"{len(self.unread)} FP8 tensors (first {next(iter(self.unread))}) have scales that need not be powers of two; "
                f"their products are rounded to {kinds}"
            )
        return found


def _family(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "", name)


def _these(family: str, names: Collection[str]) -> str:
    first = next(iter(names))
    return f"{family}{f' of {len(names)} layers' if first != family else ''} (first {first})"


def _tensor(output: Output, choice: _Choice, *, strict: bool, notes: list[str]) -> PlannedTensor:
    first = output.stack[0][0]
    exact_scales = first.kind in plan.FP8_KINDS and choice.powers_of_two(output)
    target = _target_type(output, first, choice, notes, exact_scales=exact_scales)
    limit = choice.architecture.n_experts if output.role == "table" else None
    planned = plan_output(output, target, choice.dialect, exact_scales=exact_scales, strict=strict, limit=limit)
    if first.kind in plan.FLOAT_SCALES and not planned.lossless and not exact_scales:
        scales = (part.scale.name for part in output.parts if part.scale is not None)
        if any(name in choice.scales for name in scales):
            choice.rounded.setdefault(_family(output.name), {})[output.name] = None
        else:
            choice.unread[output.name] = target
    return planned


def plan_output(
    output: Output,
    target: str,
    dialect: dialects.Dialect,
    *,
    exact_scales: bool = False,
    strict: bool = True,
    limit: int | None = None,
) -> PlannedTensor:
    """Plan a tensor of a given type, by the way that loses least.

    Parameters
    ----------
    output
        What it is made of.
    target, dialect
        Its type, which the dialect must hold.
    exact_scales
        Its FP8 scales are known to be powers of two: BF16 holds the products, which is then tested. F8_E4M3_B128 may be
        asked for only then, and of transposed parts only where tiles of scales end with them.
    strict, limit
        As in :class:`ggufx.plan.Transform`.

    Raises
    ------
    PlanError
        The dialect has no such type, or the type does not divide the tensor's rows.
    """
    stack = [[_matrix(part) for part in parts] for parts in output.stack]
    first = output.stack[0][0]
    codec = types.get(target)
    type_id = dialect.type_id(codec)
    if type_id is None:
        raise PlanError(f"tensor {output.name!r}: {dialect.name} cannot hold {target}")
    op = operation(first.kind, target, transposed=first.transposed)
    # BF16 and F32 have FP8's mantissa and a wider exponent; that every value survives is tested, not assumed.
    exact = op == "encode" and (target == "F32" or (target == "BF16" and (exact_scales or first.kind == "BF16")))
    parts = tuple(matrix.rows if matrix.transposed else matrix.row_len for matrix in stack[0])
    transform = Transform(
        op, first.kind, target, parts, first.rows_per_scale, exact, strict, limit, first.step, first.transposed
    )
    try:
        return plan.plan_tensor(output.name, output.shape, target, type_id, transform, stack)
    except CodecError as error:
        raise PlanError(f"tensor {output.name!r} {list(output.shape)} as {target}: {error}") from None


def _matrix(part: Part) -> Matrix:
    tensor = part.tensor
    rows, row_len = prod(part.shape[:-1]), part.shape[-1]
    if part.elements:
        rows, row_len = rows * row_len, 1
    if part.transposed:
        rows, row_len = row_len, rows
    matrix = Matrix(tensor.name, part.kind, rows, row_len, Span(tensor.shard, tensor.offset, tensor.nbytes))
    if part.scale is not None:
        scales = Span(part.scale.shard, part.scale.offset, part.scale.nbytes)
        matrix = matrix._replace(
            scale_name=part.scale.name, scales=scales, rows_per_scale=part.rows_per_scale,
            len_per_scale=part.len_per_scale,
        )  # fmt: skip
    return matrix.take(part.start, rows, part.step, transposed=part.transposed)


def _target_type(output: Output, first: Part, choice: _Choice, notes: list[str], *, exact_scales: bool) -> str:
    row_len = output.shape[-1]
    architecture, kind = choice.architecture, first.kind
    if kind == "FP4":
        return "MXFP4"
    if kind in plan.FP8_KINDS:
        wanted = "F8_E4M3_B128" if choice.holds_fp8 and exact_scales else choice.take_dense()
        if wanted == "F8_E4M3_B128" and first.transposed and not _squarely(output):
            choice.turned.setdefault(_family(output.name), {})[output.name] = None
            return "BF16"
    elif output.role == "table":
        return "I32"
    elif output.role == "vector" or (
        output.role == "router" and (choice.dialect.name == "nisparks" or architecture.router_in_float32)
    ):
        return "F32"
    elif choice.requested is not None and architecture.dense_is_outtype:
        wanted = choice.take_dense()
    else:
        return kind
    block_len = types.get(wanted).layout.block_len
    if row_len % block_len:
        exactness = "which is exact" if exact_scales or kind == "BF16" else "which keeps more than any quant type"
        notes.append(
            f"{output.name} {list(output.shape)}: rows of {row_len} are not divisible by {block_len}, required for "
            f"{wanted} - using BF16, {exactness}"
        )
        return "BF16"
    return wanted


def _squarely(output: Output) -> bool:
    """Return whether every transposed part begins and ends with a tile of scales: it can be turned as codes only then."""
    return all(
        part.start % part.rows_per_scale == 0 and part.shape[-1] % part.rows_per_scale == 0 for part in output.parts
    )


def operation(kind: str, target: str, *, transposed: bool = False) -> Literal["copy", "pack", "cast", "encode"]:
    """Return what makes ``target`` of a source of ``kind`` (see :class:`ggufx.plan.Transform`).

    Of FP8 under float32 scales F8_E4M3_B128 is packed only when these are powers of two: to be known beforehand.
    """
    if (kind in plan.FP8_KINDS and target == "F8_E4M3_B128") or (kind, target) == ("FP4", "MXFP4"):
        return "pack"
    if transposed:
        return "encode"
    if kind == target and target != "I32":
        return "copy"
    if target in ("F32", "I32") and kind in ("BF16", "F16", "I64", "I32"):
        return "cast"
    return "encode"


# Metadata -------------------------------------------------------------------------------------------------------


def _file_type(tensors: Sequence[PlannedTensor], architecture: Architecture, target: str, dense: str) -> int:
    found = {tensor.type for tensor in tensors}
    if target == "nisparks" and (architecture.nisparks_form or "F8_E4M3_B128" in found):
        return _NISPARKS_FILE_TYPE
    # As upstream, which calls a file with quantized dense tensors after these, whatever its experts are.
    if "MXFP4" in found and not (architecture.dense_is_outtype and dense == "Q8_0"):
        return _FILE_TYPES["MXFP4_MOE"]
    return _FILE_TYPES[dense]


def _metadata(
    architecture: Architecture,
    tensors: Sequence[PlannedTensor],
    *,
    target: str,
    mtp: bool,
    file_type: int,
    model_name: str | None,
    template: str | None,
    notes: list[str],
) -> dict[str, Value]:
    checkpoint = architecture.checkpoint
    general = _general_keys(checkpoint, tensors, model_name)
    templates = vocabulary.chat_templates(checkpoint) if template is None else {vocabulary.DEFAULT_TEMPLATE: template}
    if vocabulary.DEFAULT_TEMPLATE not in templates:
        template, which = architecture.builtin_template()
        notes.append(f"the checkpoint has no {'default ' * bool(templates)}chat template; {which}")
        if template is not None:
            templates[vocabulary.DEFAULT_TEMPLATE] = template
    template = templates.get(vocabulary.DEFAULT_TEMPLATE)
    keys = {"general.architecture": Value.string(architecture.name)}
    if target == "nisparks" and architecture.nisparks_form:
        for name in NISPARKS_GENERAL:
            if name in general:
                keys[name] = general[name]
            else:
                notes.append(f"{name} is not written: the checkpoint does not say it")
    else:
        if architecture.template_first:
            keys.update(vocabulary.template_keys(templates))
        keys.update(general)
    keys.update(architecture.keys(target, mtp=mtp, file_type=file_type, chat_template=template))
    notes += architecture.notes
    keys["general.quantization_version"] = Value.u32(QUANTIZATION_VERSION)
    keys.update(vocabulary.tokenizer_keys(checkpoint, architecture.tokenizer_pre, architecture.integer("vocab_size")))
    for key, value in vocabulary.template_keys(templates).items():
        keys.setdefault(key, value)
    pre = architecture.tokenizer_pre
    if companions.PRE_TOKENIZERS.get(pre, ()) not in ((), vocabulary.split_expressions(checkpoint)):
        # A model of this architecture may have a tokenizer of its own, which nothing else here would tell.
        notes.append(
            f"tokenizer.json does not split text as {pre} does, which is written as tokenizer.ggml.pre: programs may find "
            "other tokens; if they have a name for its way, set that with: ggufx set FILE tokenizer.ggml.pre=str:NAME"
        )
    return keys


def _general_keys(checkpoint: Checkpoint, tensors: Sequence[PlannedTensor], model_name: str | None) -> dict[str, Value]:
    """Return the ``general.*`` keys of a model of these tensors; its size label tells experts apart."""
    import gguf

    total = sum(prod(t.shape) for t in tensors)
    stacked = [t for t in tensors if "_exps." in t.name and len(t.shape) == 3]
    per_expert = sum(prod(t.shape[1:]) for t in stacked)
    shared = total - sum(prod(t.shape) for t in stacked)
    count = sum(t.shape[0] for t in stacked) // len(stacked) if stacked else 0
    label = gguf.size_label(total, shared, per_expert, count) if total else None
    return model_card.general_keys(checkpoint, total, label, model_name)


def _output_path(
    outfile: str | Path | None, checkpoint: Checkpoint, metadata: Mapping[str, Value], file_type: str, *, mtp: bool
) -> Path:
    if outfile is None:
        # Hugging Face's cache is not ours to write to.
        outfile = f"{checkpoint.path if checkpoint.cache_folder is None else Path()}/"
    prefix = "mtp-" if mtp else ""
    return output_path(outfile, metadata, file_type, named=checkpoint.path.name, prefix=prefix, with_size=not mtp)
