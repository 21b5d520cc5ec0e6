"""Convert a Hugging Face checkpoint: plan the GGUF that keeps its native bits, in a dialect's names, types and keys."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

from ggufx import architectures, dialects, execute, plan, types, vocabulary
from ggufx.architectures.deepseek_v4 import DeepSeekV4, Output, Part
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, ValueType
from ggufx.errors import CheckpointError, CodecError, PlanError
from ggufx.execute import Progress
from ggufx.plan import Matrix, Plan, PlannedTensor, Span, Transform
from ggufx.version import __version__

__all__ = ["DENSE_TYPES", "OUTTYPES", "TARGETS", "Conversion", "convert", "fill_file_type", "operation", "plan_convert"]

TARGETS: Final = tuple(dialects.DIALECTS)
OUTTYPES: Final = ("native", "moe-f8-e4m3-mxfp4")
"""Spellings of the only output type: every native code is kept."""
DENSE_TYPES: Final = ("q8_0", "bf16", "f32")
"""What FP8 tensors become where the target has no FP8 type; all but q8_0 are exact."""

QUANTIZATION_VERSION: Final = 2  # ggml.h's GGML_QNT_VERSION
_FILE_TYPES: Final = {"MXFP4_MOE": 38, "Q8_0": 7, "BF16": 32, "F32": 0}
_NISPARKS_FILE_TYPE: Final = 41
_NISPARKS_GENERAL: Final = (
    "general.type", "general.sampling.top_p", "general.sampling.temp", "general.name", "general.size_label",
    "general.license",
)  # fmt: skip


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
        dense: str = "q8_0",
        mtp: bool = False,
        model_name: str | None = None,
        chat_template: str | None = None,
        skip: Sequence[str] = (),
        allow_nan: bool = False,
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        self.dialect = dialects.get(target)
        if outtype.lower() not in OUTTYPES:
            raise PlanError(f"--outtype {outtype} is not supported; supported: {', '.join(OUTTYPES)}")
        if dense.lower() not in DENSE_TYPES:
            raise PlanError(f"--dense {dense} is not supported; supported: {', '.join(DENSE_TYPES)}")
        if mtp and target == "nisparks":
            raise PlanError("the nisparks dialect has no form for the MTP block; use --target llama.cpp for --mtp")
        self.architecture = architectures.find(self.checkpoint)
        self.outputs, self.skipped = self.architecture.outputs(target, mtp=mtp, skip=_matcher(skip))
        self.notes: list[str] = []
        self._dense, self._mtp, self._strict = dense, mtp, not allow_nan
        self._model_name, self._template = model_name, chat_template

    def stack(self, output: Output) -> tuple[tuple[Matrix, ...], ...]:
        """Return an output's sources: stacked (outer) and concatenated along the row (inner)."""
        return tuple(tuple(_matrix(part) for part in parts) for parts in output.stack)

    def tensor(self, output: Output) -> PlannedTensor:
        """Plan an output with its native bits, or in the ``dense`` type where the target has none for them."""
        limit = self.architecture.integer("n_routed_experts")
        return _tensor(
            output, self.stack(output), self.dialect, self._dense, strict=self._strict, limit=limit, notes=self.notes
        )

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
    dense: str = "q8_0",
    mtp: bool = False,
    model_name: str | None = None,
    chat_template: str | None = None,
    split_max_nbytes: int | None = None,
    stamp: bool = False,
    skip: Sequence[str] = (),
    allow_nan: bool = False,
) -> Plan:
    """Plan the conversion of a checkpoint; reads headers and the tokenizer, no tensor.

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
        Type of FP8 tensors for targets without FP8: ``q8_0`` (rounded), ``bf16`` or ``f32`` (exact).
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
    file_type = _file_type(tensors, target, dense)
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
        notes=list(dict.fromkeys(conversion.notes)),
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


def convert(
    checkpoint: str | Path | Checkpoint,
    outfile: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **options: Any,
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


def _tensor(
    output: Output,
    stack: Sequence[Sequence[Matrix]],
    dialect: dialects.Dialect,
    dense: str,
    *,
    strict: bool,
    limit: int,
    notes: list[str],
) -> PlannedTensor:
    shape = output.shape
    first = output.stack[0][0]
    target = _target_type(output, first.kind, dialect, dense, notes)
    codec = types.get(target)
    type_id = dialect.type_id(codec)
    if type_id is None:
        raise PlanError(f"tensor {output.name!r}: {dialect.name} cannot hold {target}")
    op = operation(first.kind, target)
    # BF16 and F32 have FP8's mantissa and a wider exponent; that every value survives is tested, not assumed.
    exact = op == "encode" and target in ("BF16", "F32")
    transform = Transform(
        op, first.kind, target, tuple(part.shape[-1] for part in output.stack[0]), first.rows_per_scale, exact, strict,
        limit if output.role == "table" else None,
    )  # fmt: skip
    try:
        return plan.plan_tensor(output.name, shape, target, type_id, transform, stack)
    except CodecError as error:
        raise PlanError(f"tensor {output.name!r} {list(shape)} as {target}: {error}") from None


def _matrix(part: Part) -> Matrix:
    tensor = part.tensor
    rows = prod(part.shape[:-1])
    codes = Span(tensor.shard, tensor.offset, tensor.nbytes)
    if part.scale is None:
        return Matrix(tensor.name, part.kind, rows, part.shape[-1], codes)
    scales = Span(part.scale.shard, part.scale.offset, part.scale.nbytes)
    return Matrix(
        tensor.name, part.kind, rows, part.shape[-1], codes, part.scale.name, scales, part.rows_per_scale,
        part.len_per_scale,
    )  # fmt: skip


def _target_type(output: Output, kind: str, dialect: dialects.Dialect, dense: str, notes: list[str]) -> str:
    row_len = output.shape[-1]
    if kind == "FP4":
        return "MXFP4"
    if kind == "FP8":
        wanted = "F8_E4M3_B128" if dialect.name == "nisparks" else dense.upper()
        block_len = types.get(wanted).layout.block_len
        if row_len % block_len:
            notes.append(
                f"{output.name} {list(output.shape)}: rows of {row_len} are not divisible by {block_len}, required for "
                f"{wanted} - using BF16, which is exact"
            )
            return "BF16"
        return wanted
    if output.role == "table":
        return "I32"
    if output.role == "vector" or (output.role == "router" and dialect.name == "nisparks"):
        return "F32"
    return kind


def operation(kind: str, target: str) -> Literal["copy", "pack", "cast", "encode"]:
    """Return what makes ``target`` of a source of ``kind`` (see :class:`ggufx.plan.Transform`)."""
    if (kind, target) in (("FP8", "F8_E4M3_B128"), ("FP4", "MXFP4")):
        return "pack"
    if kind == target and target != "I32":
        return "copy"
    if target in ("F32", "I32") and kind in ("BF16", "F16", "I64", "I32"):
        return "cast"
    return "encode"


# Metadata -------------------------------------------------------------------------------------------------------


def _file_type(tensors: Sequence[PlannedTensor], target: str, dense: str) -> int:
    if target == "nisparks":
        return _NISPARKS_FILE_TYPE
    if any(tensor.type == "MXFP4" for tensor in tensors):
        return _FILE_TYPES["MXFP4_MOE"]
    return _FILE_TYPES[dense.upper()]


def _metadata(
    architecture: DeepSeekV4,
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
    if template is None:
        template = vocabulary.chat_template(checkpoint)
    if template is None:
        template = architecture.chat_template
        notes.append("the checkpoint has no chat template; a built-in one of the family is written")
    keys = {"general.architecture": Value.string(architecture.name)}
    if target == "nisparks":
        for name in _NISPARKS_GENERAL:
            if name in general:
                keys[name] = general[name]
            else:
                notes.append(f"{name} is not written: the checkpoint does not say it")
    else:
        keys["tokenizer.chat_template"] = Value.string(template)
        keys.update(general)
    keys.update(architecture.keys(target, mtp=mtp, file_type=file_type, chat_template=template))
    keys["general.quantization_version"] = Value.u32(QUANTIZATION_VERSION)
    keys.update(vocabulary.tokenizer_keys(checkpoint, architecture.tokenizer_pre, architecture.integer("vocab_size")))
    return keys


def _general_keys(checkpoint: Checkpoint, tensors: Sequence[PlannedTensor], model_name: str | None) -> dict[str, Value]:
    """Return the ``general.*`` keys that the gguf package finds in the model card, the configs and the name."""
    import gguf

    for name in ("gguf.metadata", "gguf.gguf_writer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    total = sum(prod(t.shape) for t in tensors)
    stacked = [t for t in tensors if "_exps." in t.name and len(t.shape) == 3]
    per_expert = sum(prod(t.shape[1:]) for t in stacked)
    shared = total - sum(prod(t.shape) for t in stacked)
    count = sum(t.shape[0] for t in stacked) // len(stacked) if stacked else 0
    _ = checkpoint.generation_config  # gguf passes over a damaged one without a word; this raises
    try:
        found = gguf.Metadata.load(None, checkpoint.path.absolute(), model_name, total)
    except Exception as error:  # a YAML parser over text that people write by hand: it has errors of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.path / 'README.md'}: the model card cannot be read ({reason}); mend or remove it"
        ) from None
    if found.name is None:
        found.name = checkpoint.path.absolute().name
    if found.size_label is None and total:
        found.size_label = gguf.size_label(total, shared, per_expert, count)
    writer = gguf.GGUFWriter(None, "none")
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    return {
        key: _from_gguf(value)
        for keys in writer.kv_data
        for key, value in keys.items()
        if key != "general.architecture"
    }


def _from_gguf(value: Any) -> Value:
    kind = ValueType(int(value.type))
    if kind is ValueType.ARRAY:
        items = list(value.value)
        element = ValueType.STRING if not items or isinstance(items[0], str) else ValueType.INT32
        return Value.array(element, items)
    return Value.f32(value.value) if kind is ValueType.FLOAT32 else Value(kind, value.value)


def fill_file_type(outfile: str, file_type: str) -> str:
    """Return a path with ``{ftype}`` of its last part replaced; raises PlanError for another placeholder."""
    import gguf

    path = Path(outfile)
    try:
        return str(path.with_name(gguf.fill_templated_filename(path.name, file_type)))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise PlanError(f"--outfile {outfile}: {error!r} is no placeholder; {{ftype}} is") from None


def _output_path(
    outfile: str | Path | None, checkpoint: Checkpoint, metadata: dict[str, Value], file_type: str, *, mtp: bool
) -> Path:
    import gguf

    text = str(checkpoint.path if outfile is None else outfile)
    if outfile is not None and not Path(text).is_dir() and not text.endswith("/"):
        return Path(fill_file_type(text, file_type))
    label = {key: metadata[f"general.{key}"].data for key in ("basename", "finetune", "version", "size_label") if
             f"general.{key}" in metadata}  # fmt: skip
    name = gguf.naming_convention(
        metadata["general.name"].data,
        label.get("basename"),
        label.get("finetune"),
        label.get("version"),
        None if mtp else label.get("size_label"),
        file_type,
    )
    return Path(text) / f"{'mtp-' if mtp else ''}{name}.gguf"
