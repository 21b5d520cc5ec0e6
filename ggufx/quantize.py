"""Quantize a checkpoint or a GGUF by a recipe, in one pass: sources are decoded tile by tile, nothing is written in between.

:func:`prepare` decides every tensor's type and says what it found (the linter) before any work; the plan made of that runs in
the one engine: streaming, bounded, resumable, atomic.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

from ggufx import convert, dialects, execute, mixes, offload, plan, types
from ggufx import imatrix as imatrix_module
from ggufx import recipe as recipe_module
from ggufx.architectures.base import FP8_TILE
from ggufx.architectures.deepseek_v3 import foreign_latent
from ggufx.architectures.deepseek_v4 import LAYER
from ggufx.architectures.deepseek_v4_file import DeepSeekV4File
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value
from ggufx.dialects import Dialect
from ggufx.errors import FallbackError, PlanError, RecipeError, UnknownType
from ggufx.execute import Progress, TileDone
from ggufx.factors import factor_lost, is_applied
from ggufx.factors import name_of as factor_name
from ggufx.file import File, Tensor, open, open_parts
from ggufx.imatrix import ImportanceMatrix, Place
from ggufx.options import given, refuse
from ggufx.output_names import output_path
from ggufx.plan import (
    FLOAT_SCALES,
    FP8_KINDS,
    QUANTIZATION_VERSION,
    Matrix,
    Plan,
    PlannedTensor,
    Span,
    Transform,
    Weights,
)
from ggufx.recipe import NATIVE, Finding, Recipe, Rule

__all__ = [
    "ENERGY",
    "ONES",
    "Choice",
    "PrepareOptions",
    "Quantization",
    "QuantizeOptions",
    "Source",
    "Tally",
    "codec_name",
    "common_file_type",
    "mix_recipe",
    "plan_quantize",
    "prepare",
    "quantize",
    "target_dialect",
    "unreadable",
]

ENERGY: Final = "energy"
"""In place of an importance matrix: the mean squares of a matrix's own columns, for types that demand importance."""
ONES: Final = "ones"
"""In place of an importance matrix: all columns weigh the same, for types that demand importance."""

NATIVE_KINDS: Final = frozenset({*FP8_KINDS, "FP4", "F8_E4M3_B128", "MXFP4", "NVFP4", "F64", "F32", "F16", "BF16"})
"""What models are trained or published in: quantizing these is what quantizing is for."""
_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
_INTEGERS: Final = frozenset({"I8", "I16", "I32", "I64"})


# An imatrix is recorded under upstream's names.
_UPSTREAM_NAMES: Final = {family.nisparks: family.upstream for family in LAYER if family.nisparks != family.upstream}


@dataclass(frozen=True)
class Source:
    """A tensor that could be quantized.

    Attributes
    ----------
    name, shape
        As they will be in the output; numpy order.
    kind
        A key of :data:`ggufx.plan.SOURCE_BITS` or a codec's name; the name, or ``id N``, of a type without a codec.
    nbytes
        Bytes of codes and scales.
    stays
        It stays as it is unless a rule names it with ``!``.
    stack
        Its matrices; empty for a type that no dialect knows.
    keep
        Plans it as it is, or raises PlanError when the target cannot hold it.
    member
        Number of the split file it is in.
    scaled
        Its products are multiplied by a tensor of the file called ``.scale``, which stays beside it.
    unknown
        Of a type without a codec: why nothing can be made of it, as the end of a sentence.
    packs
        Whether F8_E4M3_B128 holds its own codes and scales; it may read the scales.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    stays: bool
    stack: tuple[tuple[Matrix, ...], ...]
    keep: Callable[[], PlannedTensor]
    member: int = 0
    unknown: str = ""
    scaled: bool = False
    packs: Callable[[], bool] = bool


@dataclass(frozen=True)
class Choice:
    """What a tensor becomes, and why.

    Attributes
    ----------
    type
        Type name in the output; for a kept tensor the one it has there.
    kept
        Its own bits; where the target has no type for them BF16, exactly but for products with float32 scales.
    rule
        The rule that decided, if one did.
    wanted
        The type that was asked for, where rows did not fit it.
    factor
        The values are divided by a factor, which a tensor of its own beside this one has (:mod:`ggufx.factors`).
    """

    source: Source
    type: str
    kept: bool
    rule: Rule | None = None
    wanted: str = ""
    weights: tuple[Weights | None, ...] = ()
    importance: Literal["", "matrix", "energy"] = ""
    factor: bool = False


@dataclass
class Quantization:
    """Every decision of a run, before any work: see :func:`prepare`."""

    path: Path
    dialect: Dialect
    choices: list[Choice]
    findings: list[Finding]
    effort: types.Effort
    objective: types.Objective
    measure: bool
    device: str
    source_files: list[str]
    source_states: list[tuple[int, int]] | None
    metadata: Callable[[Sequence[PlannedTensor], int | None], dict[str, Value]]
    facts: Callable[[], Mapping[str, Any]]
    skipped: Sequence[tuple[str, str]] = ()
    alignment: int = 32
    label: str = ""
    asked: str = ""
    keep_split: bool = False
    notes: Callable[[], Sequence[str]] = list

    @property
    def errors(self) -> list[Finding]:
        """Findings that nothing will be written with."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def exit_code(self) -> int:
        """0 without errors; 3 if they are all rows that a type does not fit; else 1."""
        if not self.errors:
            return 0
        return 3 if all(error.code == "fallback" for error in self.errors) else 1

    def check(self) -> None:
        """Raise RecipeError if there is an error among the findings."""
        if self.errors:
            kind = FallbackError if self.exit_code == 3 else RecipeError
            left = len(self.errors) - 1
            more = f" (and {left} more error{'s' if left > 1 else ''})" if left else ""
            raise kind(f"{self.errors[0].message}{more}")

    @cached_property
    def tensors(self) -> list[PlannedTensor]:
        """The output's tensors, in the source's order, each new factor behind its weight."""
        return [tensor for _, tensor in self._members]

    @cached_property
    def _members(self) -> list[tuple[int, PlannedTensor]]:
        """The tensors with the number of the source's file that each belongs to."""
        self.check()
        found = []
        for choice in self.choices:
            planned = self._planned(choice)
            found.append((choice.source.member, planned))
            if choice.factor:
                number = self.dialect.type_id(types.get("F32"))
                assert number is not None
                beside = plan.plan_factors(factor_name(planned.name), number, planned)
                found.append((choice.source.member, beside))
        return found

    def plan(
        self,
        outfile: str | Path,
        *,
        split_max_nbytes: int | None = None,
        overrides: Mapping[str, Value] | None = None,
    ) -> Plan:
        """Return the plan; raises RecipeError for findings that are errors, PlanError for an output that is a source."""
        number = common_file_type(self.tensors, self.dialect, self.asked)
        named = (self.dialect.file_type_name(number) if number is not None else None) or ""
        if split_max_nbytes is not None and self.keep_split:
            refuse("quantize", ["split_max_nbytes", "keep_split"])
        metadata = self.metadata(self.tensors, number)
        path = output_path(outfile, metadata, self.label or named or "mixed", named=self.path.stem)
        if any(path.exists() and path.samefile(source) for source in self.source_files):
            raise PlanError(f"{path}: is the source itself; choose another --outfile")
        if any(not choice.kept for choice in self.choices):
            metadata["general.quantization_version"] = Value.u32(QUANTIZATION_VERSION)
        metadata.update(overrides or {})
        members = [member for member, _ in self._members] if self.keep_split else None
        return plan.build(
            path,
            metadata,
            self.tensors,
            source_files=self.source_files,
            source_states=self.source_states,
            dialect=self.dialect.name,
            alignment=self.alignment,
            split_max_nbytes=split_max_nbytes,
            members=members,
            skipped=self.skipped,
            notes=list(dict.fromkeys([*self.notes(), *(f.message for f in self.findings if f.severity != "error")])),
            file_type=named,
        )

    def _effort(self, codec: types.Codec) -> types.Effort:
        return self.effort if self.effort != "reference" or codec.reproduces else "normal"

    def uses_device(self) -> bool:
        """Return whether a tensor becomes of a type that the device has an encoder for."""
        codecs = {choice.type: types.get(choice.type) for choice in self.choices if not choice.kept}
        return any(offload.encodes(codec, self._effort(codec)) for codec in codecs.values())

    def _planned(self, choice: Choice) -> PlannedTensor:
        if choice.kept:
            return choice.source.keep()
        source = choice.source
        codec = types.get(choice.type)
        type_id = self.dialect.type_id(codec)
        assert type_id is not None, choice
        first = source.stack[0][0]
        op = convert.operation(source.kind, choice.type, transposed=first.transposed)
        # FP8 that F8_E4M3_B128 holds as it is was kept; this is the rest.
        if source.kind in FP8_KINDS and op == "pack":
            op = "encode"
        effort = self._effort(codec)
        transform = Transform(
            op, source.kind, choice.type, tuple(part.rows if part.transposed else part.row_len for part in source.stack[0]),
            first.rows_per_scale, step=first.step, transposed=first.transposed,
            # BF16 and F32 have the mantissa of FP8 and FP4 and a wider exponent, and F32 holds what any type decodes to; that
            # every value survives is tested.
            exact=op == "encode" and (
                (choice.type == "F32" and source.kind not in ("F64", *FLOAT_SCALES))
                or (choice.type == "BF16" and source.kind in ("FP8", "FP4"))
            ),
            effort=effort if op == "encode" else "", objective=self.objective, importance=choice.importance,
            factor=choice.factor, measure=self.measure and op == "encode",
            device=self.device if op == "encode" and self.device and offload.encodes(codec, effort) else "",
        )  # fmt: skip
        return plan.plan_tensor(source.name, source.shape, codec.name, type_id, transform, source.stack, choice.weights)


def prepare(
    source: str | Path | Checkpoint | File,
    *,
    recipe: Recipe | str | Path | None = None,
    default: str | None = None,
    imatrix: ImportanceMatrix | str | Path | None = None,
    target: str | None = None,
    effort: types.Effort = "normal",
    objective: types.Objective = "reference",
    mix: bool = False,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    leave_output: bool = False,
    allow_requantize: bool = False,
    fallback: bool = True,
    keep_split: bool = False,
    only: Sequence[str] = (),
    measure: bool = False,
    device: str | None = None,
    dialect: str | None = None,
    mtp: bool = False,
    model_name: str | None = None,
    chat_template: str | None = None,
    skip: Sequence[str] = (),
    allow_nan: bool = False,
) -> Quantization:
    """Decide every tensor's type; reads headers, the tokenizer and the importance matrix, no tensor.

    Parameters
    ----------
    source
        A GGUF (any member of a split), or the directory of a checkpoint.
    recipe
        Rules, a recipe's file, or the name of a shipped one. A tensor that no rule matches becomes ``default``.
    default
        Type of what no rule decides, or a mix of :mod:`ggufx.mixes` (``Q4_K_M``) that gives each such tensor its type;
        without one they keep their own bits. A name that is both (``Q2_K``) is the type, unless ``mix`` is set.
    imatrix
        Importance of the columns: a file, or ``"ones"`` or ``"energy"`` (see :data:`ONES`, :data:`ENERGY`).
    target
        Dialect to write. By default the first that holds every type asked for: the source's own, llama.cpp, ik_llama.cpp,
        nisparks.
    effort, objective
        As in :meth:`ggufx.types.Codec.encode`; ``reference`` where a type promises the C library's bytes, else ``normal``.
    mix
        ``default`` is the mix that llama-quantize makes under that name.
    pure
        ``default`` for the embeddings and the head, too; of a mix, the type of most weights for all. Otherwise the head gets
        at least Q6_K and the embeddings at least Q4_K, as two low-bit ends of a model cost more than they save.
    output_type, embedding_type, leave_output
        Types of ``output.weight`` and of the embeddings where no rule decides (embeddings that are the head, too, take
        ``embedding_type`` where both are given); leave the head as it is.
    allow_requantize
        Let lossy types be quantized again. To F32, which holds their values, they may always go.
    fallback
        Take the next type of the field's tables where a row's length does not fit a block; otherwise that is an error.
    keep_split
        Split as the source is.
    only
        Shell patterns of the tensors to write; none: all. Members of a split that hold no such tensor need not be there.
    measure
        Sum up errors on the way (:class:`Tally` reports them).
    device
        torch's name of a GPU to search on (``cuda``, ``cuda:1``): the bytes are the CPU's. Types and efforts that it has no
        encoder for stay on the CPU.
    dialect
        Of a GGUF source, where ids leave it open.
    mtp, model_name, chat_template, skip, allow_nan
        Of a checkpoint, as in :func:`ggufx.convert.plan_convert`.

    Returns
    -------
    Quantization
        Choices and findings; its ``plan`` is what to execute.

    Raises
    ------
    RecipeError, PlanError, GGUFError
        The recipe, the source or the importance matrix cannot be read.
    """
    on_device = device is not None and device != "cpu"
    if on_device:
        offload.check(str(device))
    alone = {
        "default": default, "mix": mix, "pure": pure, "output_type": output_type, "leave_output": leave_output,
        "keep_split": keep_split, "only": only,
    }  # fmt: skip
    refuse("prepare", given(alone))
    rules = _loaded(recipe)
    mixed = None if default is None else _mix(default, asked=mix)
    kind = mixed.type if mixed is not None else None if default is None else codec_name(default, others=[*mixes.MIXES])
    wanted = [name for name in (kind, *map(_optional_name, (output_type, embedding_type))) if name is not None]
    opened = source if isinstance(source, File | Checkpoint) else _open(source, dialect, only)
    asked = {
        "dialect": dialect, "keep_split": keep_split, "mtp": mtp, "model_name": model_name, "chat_template": chat_template,
        "skip": skip, "allow_nan": allow_nan,
    }  # fmt: skip
    refuse("quantize", given(asked), kind_of(opened))
    if isinstance(source, File):
        refuse("quantize", given({"dialect": dialect}), "open")
    chosen = target_dialect(rules, wanted, opened, target)
    if isinstance(opened, File):
        sources, quantization = _gguf_sources(opened, chosen, asked=target is not None)
    else:
        sources, quantization = _checkpoint_sources(
            opened, chosen, mtp=mtp, model_name=model_name, template=chat_template, skip=skip, allow_nan=allow_nan
        )
    matrix = _matrix(imatrix)
    quantization.effort, quantization.objective, quantization.measure = effort, objective, measure
    quantization.keep_split, quantization.device = keep_split, str(device) if on_device else ""
    quantization.label = rules.name or (mixed.name if mixed is not None else (default or "").upper())
    quantization.asked = mixed.name if mixed is not None else "" if kind in (None, NATIVE) else str(kind)
    has_imatrix = isinstance(matrix, ImportanceMatrix)
    decide = _Decider(
        rules, kind, chosen, matrix, pure=pure,
        mixed=None if mixed is None else _assigned(mixed, sources, quantization, rules, has_imatrix=has_imatrix),
        output_type=_optional_name(output_type), embedding_type=_optional_name(embedding_type), leave_output=leave_output,
        allow_requantize=allow_requantize, fallback=fallback, tied=all(s.name != "output.weight" for s in sources),
        n_source_files=len(quantization.source_files),
    )  # fmt: skip
    taken = _among(sources, only, quantization.path) if only else sources
    quantization.choices, findings = _factors([decide(item) for item in taken], chosen, quantization.facts())
    quantization.findings += findings
    if not sources:
        quantization.findings.append(
            Finding(
                "warning", "no-tensors", f"{quantization.path}: has no tensors to quantize, so neither has the output"
            )
        )
    quantization.findings += recipe_module.lint(rules, {s.name: s.stays for s in sources}) + decide.findings()
    if isinstance(matrix, ImportanceMatrix):
        _add_matrix(quantization, matrix, decide)
    elif matrix is not None and not any(choice.importance for choice in quantization.choices):
        quantization.findings.append(
            Finding(
                "note", "no-effect", f"importance by {matrix!r} changes nothing: no type that is made here demands it"
            )
        )
    if on_device and not quantization.uses_device():
        quantization.findings.append(
            Finding("note", "no-effect", f"{device} is not used: it has no encoder of these types at effort {effort}")
        )
    for parameter, wish, what in (
        ("output_type", output_type, "output.weight"), ("embedding_type", embedding_type, "the embeddings")
    ):  # fmt: skip
        if wish is not None and parameter not in decide.taken:
            quantization.findings.append(
                Finding(
                    "warning",
                    "no-effect",
                    f"no tensor takes the type {wish} asked for {what}: a rule decides, or none is there",
                )
            )
    if leave_output and "leave_output" not in decide.taken:
        quantization.findings.append(
            Finding("warning", "no-effect", "no output.weight is left as it is: a rule decides, or none is there")
        )
    if default is not None and mixed is None and not pure:
        # The mix is what the name means to users of llama-quantize.
        other = mixes.find(default)
        there = {} if other is None else _assigned(other, sources, quantization, rules, has_imatrix=has_imatrix)
        differing = [name for name, its in there.items() if its != kind and name not in (*_EMBEDDINGS, "output.weight")]
        if differing:
            quantization.findings.append(
                Finding(
                    "note", "mix",
                    f"{kind} is the type of all weights but the embeddings' and the head's here; --mix takes llama-quantize's "
                    f"mix of that name, which has others for {len(differing)} tensors", tuple(differing),
                )
            )  # fmt: skip
    return quantization


def _factors(
    choices: Sequence[Choice], target: Dialect, facts: Mapping[str, Any]
) -> tuple[list[Choice], list[Finding]]:
    """Give tensors that become NVFP4 a factor where programs apply it, and say what becomes of factors that there are.

    Those stay as they are, so the values are quantized without them.
    """
    found, findings, bare = [], [], []
    architecture = facts.get("general.architecture")
    for choice in choices:
        source = choice.source
        lost = source.scaled and factor_lost(source.name, choice.type, target.name, architecture)
        if lost:
            findings.append(Finding("error", "factor", lost, (source.name,)))
        new = not choice.kept and choice.type == "NVFP4" and not source.scaled
        applied = new and is_applied(source.name, choice.type, target.name, architecture)
        if new and not applied:
            bare.append(source.name)
        found.append(replace(choice, factor=True) if applied else choice)
    if bare:
        more = f" and {len(bare) - 1} more tensors become" if len(bare) > 1 else " becomes"
        findings.append(
            Finding(
                "warning", "factor",
                f"{bare[0]}{more} NVFP4 without a factor in a tensor called .scale, as no program for {target.name} is known "
                f"to multiply by it there (architecture {architecture!r}): NVFP4's own scales go from 2^-9 to 448, so weights "
                "of less than about 0.005 lose precision and of less than 0.0005 become zeros", tuple(bare),
            )
        )  # fmt: skip
    return found, findings


def mix_recipe(
    source: str | Path | Checkpoint | File,
    name: str,
    *,
    imatrix: ImportanceMatrix | str | Path | None = None,
    target: str | None = None,
    dialect: str | None = None,
) -> Recipe:
    """Write a mix out as a recipe for a model: rules that give each of its tensors the mix's type.

    Parameters
    ----------
    source
        A GGUF (any member of a split), or the directory of a checkpoint.
    name
        A mix of :mod:`ggufx.mixes`.
    imatrix
        As for :func:`prepare`: some mixes have other types where there is a matrix.
    target
        Dialect to write; a checkpoint's tensors are not the same in every one.
    dialect
        Of a GGUF source, where ids leave it open.

    Raises
    ------
    RecipeError, GGUFError
        There is no mix of the name, or the source cannot be read.
    """
    mixed = _mix(name, asked=True)
    assert mixed is not None
    opened = source if isinstance(source, File | Checkpoint) else _open(source, dialect)
    refuse("recipe show", given({"dialect": dialect}), "open" if isinstance(source, File) else kind_of(opened))
    chosen = target_dialect(Recipe(), [mixed.type], opened, target)
    if isinstance(opened, File):
        sources, quantization = _gguf_sources(opened, chosen, asked=target is not None)
    else:
        sources, quantization = _checkpoint_sources(
            opened, chosen, mtp=False, model_name=None, template=None, skip=(), allow_nan=True
        )
    has_imatrix = isinstance(_matrix(imatrix), ImportanceMatrix)
    taken = _assigned(mixed, sources, quantization, Recipe(), has_imatrix=has_imatrix)
    return recipe_module.from_tensors((s.name, s.shape, taken[s.name]) for s in sources if s.name in taken)


class PrepareOptions(TypedDict, total=False):
    """Keywords of :func:`prepare`."""

    recipe: Recipe | str | Path | None
    default: str | None
    imatrix: ImportanceMatrix | str | Path | None
    target: str | None
    effort: types.Effort
    objective: types.Objective
    mix: bool
    pure: bool
    output_type: str | None
    embedding_type: str | None
    leave_output: bool
    allow_requantize: bool
    fallback: bool
    keep_split: bool
    only: Sequence[str]
    measure: bool
    device: str | None
    dialect: str | None
    mtp: bool
    model_name: str | None
    chat_template: str | None
    skip: Sequence[str]
    allow_nan: bool


class QuantizeOptions(PrepareOptions, total=False):
    """Keywords of :func:`plan_quantize`."""

    split_max_nbytes: int | None
    overrides: Mapping[str, Value] | None


def plan_quantize(
    source: str | Path | Checkpoint | File,
    outfile: str | Path,
    *,
    split_max_nbytes: int | None = None,
    overrides: Mapping[str, Value] | None = None,
    **options: Unpack[PrepareOptions],
) -> Plan:
    """Plan a quantization: :func:`prepare` (which takes ``options``), refusing its errors, and its plan.

    Parameters
    ----------
    outfile
        Output; ``{ftype}`` becomes the recipe's name, else the default type, else the file type. In a directory it gets a
        name by the GGUF naming convention.
    split_max_nbytes
        Bytes of tensor data per file.
    overrides
        Metadata keys to add or replace.
    """
    prepared = prepare(source, **options)
    return prepared.plan(outfile, split_max_nbytes=split_max_nbytes, overrides=overrides)


def quantize(
    source: str | Path | Checkpoint | File,
    outfile: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    observer: execute.Observer | None = None,
    **options: Unpack[QuantizeOptions],
) -> list[Path]:
    """Quantize: :func:`plan_quantize` (which takes ``options``) and :func:`ggufx.execute.execute`.

    Returns
    -------
    list of Path
        The finished files.
    """
    return execute.execute(
        plan_quantize(source, outfile, **options),
        overwrite=overwrite,
        resume=resume,
        threads=threads,
        executor=executor,
        progress=progress,
        observer=observer,
    )


# Sources --------------------------------------------------------------------------------------------------------


def _loaded(rules: Recipe | str | Path | None) -> Recipe:
    if rules is None:
        return Recipe()
    return rules if isinstance(rules, Recipe) else recipe_module.load(rules)


def codec_name(name: str, origin: str = "TYPE", others: Sequence[str] = ()) -> str:
    """Return upstream's spelling of a type, or ``native``; raises RecipeError, which says where the name was given.

    ``others`` are names that could stand there, too.
    """
    if set(name) & set("=,|"):
        raise RecipeError(f"{origin}: {name!r} is no type; rules go to --custom-q, --tensor-type or --recipe")
    return recipe_module.type_named(name, origin, others=others)


def _optional_name(name: str | None) -> str | None:
    return None if name is None else codec_name(name)


def _mix(name: str, *, asked: bool) -> mixes.Mix | None:
    """Return the mix of a name: one that is asked for, or a name that is no type's; raises RecipeError for none asked for."""
    found = mixes.find(name)
    if found is None and asked:
        raise RecipeError(f"{name!r} is no mix of llama-quantize's; these are: {', '.join(mixes.MIXES)}")
    if found is None or asked:
        return found
    try:
        types.get(name.strip())
    except UnknownType:
        return found
    return None


def _assigned(
    mix: mixes.Mix, sources: Sequence[Source], quantization: Quantization, rules: Recipe, *, has_imatrix: bool
) -> dict[str, str]:
    """Return the types that a mix has for what no rule decides and what does not stay as it is."""
    names = {source.name: _upstream_name(source.name) for source in sources}
    decided = {names[s.name] for s in sources if s.stays or rules.find(s.name, stays=s.stays) is not None}
    shapes = {names[source.name]: source.shape for source in sources}
    model = mixes.Model.from_keys(quantization.facts(), shapes, quantization.path)
    found = mixes.assign(mix, model, shapes, has_imatrix=has_imatrix, decided=decided)
    return {name: found[theirs] for name, theirs in names.items() if theirs in found}


def _open(source: str | Path, dialect: str | None, only: Sequence[str] = ()) -> File | Checkpoint:
    path = Path(source)
    if path.is_dir():
        return Checkpoint(path)
    return open_parts(path, only, dialect=dialect) if only else open(path, dialect=dialect)


def _among(sources: Sequence[Source], patterns: Sequence[str], path: Path) -> list[Source]:
    """Return the sources of some shell patterns; raises PlanError for a pattern that matches none."""
    found = [source for source in sources if any(fnmatch.fnmatchcase(source.name, p) for p in patterns)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(source.name, pattern) for source in found):
            raise PlanError(
                f"{path}: {pattern!r} matches none of the {len(sources)} tensors; --dry-run --verbose lists them"
            )
    return found


def kind_of(source: File | Checkpoint) -> str:
    """Return what kind of source it is, as :mod:`ggufx.options` calls it."""
    return "gguf" if isinstance(source, File) else "checkpoint"


def _matrix(source: ImportanceMatrix | str | Path | None) -> ImportanceMatrix | Literal["energy", "ones"] | None:
    if source is None or isinstance(source, ImportanceMatrix):
        return source
    if str(source) in (ENERGY, ONES):
        return "energy" if str(source) == ENERGY else "ones"
    return imatrix_module.load(source)


def target_dialect(rules: Recipe, wanted: Sequence[str], source: File | Checkpoint, target: str | None) -> Dialect:
    """Return the dialect asked for, or the first that holds every type that the rules name."""
    if target is not None:
        return dialects.get(target)
    names = [*wanted, *(rule.types[0] for rule in rules.rules)]
    codecs = [types.get(name) for name in dict.fromkeys(names) if name != NATIVE]
    own = list(source.equivalent) if isinstance(source, File) else []
    order = [dialects.get(name) for name in dict.fromkeys([*own, *dialects.DIALECTS])]
    # A file's own types are held by its own dialect; another one only has to be looked at where that lacks a type.
    return next((d for d in order if all(d.type_id(codec) is not None for codec in codecs)), order[0])


def _gguf_sources(file: File, target: Dialect, *, asked: bool) -> tuple[list[Source], Quantization]:
    paths = [str(path) for path in file.paths]
    members = {path: number for number, path in enumerate(paths)}
    sources = []
    for tensor in file.tensors:
        member = members[str(tensor.path)]
        span = Span(member, tensor.file_offset, tensor.nbytes)
        stack: tuple[tuple[Matrix, ...], ...] = ()
        if tensor.codec is not None and tensor.size:
            count = tensor.shape[0] if tensor.ndim == 3 else _heads(file, tensor)
            stack = tuple((matrix,) for matrix in _matrices(tensor.name, tensor.shape, tensor.codec, span, count))
        keep: Callable[[], PlannedTensor]
        if tensor.codec is None:
            keep = partial(_keep_unknown, file, tensor, span, target, asked=asked)
        else:
            keep = _keeper(tensor.name, tensor.shape, tensor.type, tensor.codec, span, stack, target, file)
        stays = recipe_module.stays(tensor.name, tensor.shape)
        unknown = tensor.why_unknown() if tensor.codec is None else ""
        sources.append(
            Source(
                tensor.name,
                tensor.shape,
                tensor.type,
                tensor.nbytes,
                stays,
                stack,
                keep,
                member,
                unknown,
                tensor.factor is not None,
            )
        )

    def metadata(tensors: Sequence[PlannedTensor], file_type: int | None) -> dict[str, Value]:
        # A single file that kept its split keys would be refused by loaders as an invalid split.
        keys = {key: value for key, value in file.metadata.typed().items() if not key.startswith("split.")}
        if file_type is None:
            keys.pop("general.file_type", None)  # better none than that of another mix
        elif "general.file_type" in keys or any(t.transform.op == "encode" for t in tensors):
            keys["general.file_type"] = Value.u32(file_type)
        if "ggufx.dialect" in keys:
            keys["ggufx.dialect"] = Value.string(target.name)
        return keys

    found = Quantization(
        file.path, target, [], _foreign_names(file, target), "normal", "reference", False, "", paths, None, metadata,
        lambda: file.metadata, alignment=file.alignment, notes=lambda: file.notes,
    )  # fmt: skip
    return sources, found


def _foreign_names(file: File, target: Dialect) -> list[Finding]:
    """Warn of names that the target's programs do not look for: quantizing changes types, retarget names and keys."""
    latent = foreign_latent({tensor.name: tensor.shape for tensor in file.tensors}, target.name)
    if latent:
        return [Finding("warning", "names", f"{file.path}: {latent}")]
    if not DeepSeekV4File.recognises(file):
        return []
    form = DeepSeekV4File.form_of(file)
    if (form == "nisparks") == (target.name == "nisparks"):
        return []
    return [
        Finding(
            "warning", "names",
            f"{file.path}: has DeepSeek-V4's names and keys as {form} has them, which programs for {target.name} do not load; "
            f"they stay as they are: afterwards, run `ggufx retarget --target {target.name}` on the result",
        )
    ]  # fmt: skip


def _heads(file: File, tensor: Tensor) -> int:
    """Return how many heads lie below each other in a matrix: 1 but for ik_llama.cpp's latent projections."""
    if tensor.ndim != 2 or imatrix_module.LATENT.fullmatch(tensor.name) is None:
        return 1
    heads = file.facts.integer(f"{file.architecture or ''}.attention.head_count", 1, least=1)
    return heads if tensor.shape[0] % heads == 0 else 1


def _matrices(name: str, shape: tuple[int, ...], codec: types.Codec, span: Span, count: int) -> list[Matrix]:
    """Cut a tensor into the ``count`` matrices stacked in it, so that each expert is weighed by its own importance."""
    row_len = shape[-1] if shape else 1
    rows = prod(shape[:-1])
    nbytes = span.nbytes // count
    return [
        Matrix(name, codec.name, rows // count, row_len, Span(span.file, span.offset + number * nbytes, nbytes))
        for number in range(count)
    ]


def unreadable(tensor: Tensor, target: Dialect) -> str:
    """Return what is wrong with a tensor without a codec in a file for ``target``."""
    if tensor.named is None:
        owner = "is of a type that no known dialect defines"
    else:
        owner = f"({tensor.named.what}) is a type of {tensor.named.program}"
    return (
        f"tensor {tensor.name!r} has type {tensor.type_label}, which {owner}: {target.name} would not load the file, and ggufx "
        "cannot turn such a tensor into another type; start from the file that it was made of"
    )


def _keep_unknown(file: File, tensor: Tensor, span: Span, target: Dialect, *, asked: bool) -> PlannedTensor:
    """Plan a tensor without a codec as it is; raises PlanError where the target does not have its type.

    Without a ``--target`` the file stays what it was: whoever reads the source reads the output.
    """
    owned = tensor.named is not None and target.meaning(tensor.type_id) is tensor.named
    moved = asked or (file.dialect is not None and file.dialect != target.name)
    if not owned and moved:
        raise PlanError(f"{file.path}: {unreadable(tensor, target)}")
    return plan.copy_tensor(tensor.name, tensor.shape, tensor.type, tensor.type_id, span)


def _keeper(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    codec: types.Codec,
    span: Span,
    stack: Sequence[Sequence[Matrix]],
    target: Dialect,
    file: File,
) -> Callable[[], PlannedTensor]:
    def keep() -> PlannedTensor:
        number = target.type_id(codec)
        if number is not None:
            return plan.copy_tensor(name, shape, kind, number, span)
        if kind == "F8_E4M3_B128" and stack:
            brain = types.get("BF16")
            transform = Transform("encode", kind, brain.name, (shape[-1],), exact=True)
            wide = target.type_id(brain)
            assert wide is not None
            return plan.plan_tensor(name, shape, brain.name, wide, transform, stack)
        raise PlanError(
            f"{file.path}: tensor {name!r} is {kind}, which {target.name} cannot hold; name another type for it, or another "
            "--target"
        )

    return keep


def _checkpoint_sources(
    checkpoint: Checkpoint,
    target: Dialect,
    *,
    mtp: bool,
    model_name: str | None,
    template: str | None,
    skip: Sequence[str],
    allow_nan: bool,
) -> tuple[list[Source], Quantization]:
    conversion = convert.Conversion(
        checkpoint, target.name, dense="bf16", mtp=mtp, model_name=model_name, chat_template=template, skip=skip,
        allow_nan=allow_nan,
    )  # fmt: skip
    sources = []
    for output in conversion.outputs:
        stack = conversion.stack(output)
        kind = stack[0][0].kind
        nbytes = sum(
            m.codes.nbytes + (m.scales.nbytes if m.scales is not None else 0) for parts in stack for m in parts
        )
        stays = output.role in ("vector", "router", "table") or recipe_module.stays(output.name, output.shape)
        sources.append(
            Source(
                output.name, output.shape, kind, nbytes, stays, stack, partial(conversion.tensor, output),
                packs=partial(conversion.packs, output),
            )
        )  # fmt: skip

    def metadata(tensors: Sequence[PlannedTensor], file_type: int | None) -> dict[str, Value]:
        return conversion.metadata(tensors, file_type)

    def facts() -> dict[str, Any]:
        keys = conversion.architecture.keys(target.name, mtp=mtp, file_type=0, chat_template="")
        name = conversion.architecture.name
        return {"general.architecture": name} | {key: value.data for key, value in keys.items()}

    found = Quantization(
        checkpoint.path, target, [], [], "normal", "reference", False, "", [str(path) for path in checkpoint.shards],
        list(checkpoint.shard_states), metadata, facts, skipped=conversion.skipped, notes=conversion.all_notes,
    )  # fmt: skip
    return sources, found


# Decisions ------------------------------------------------------------------------------------------------------


class _Decider:
    """Chooses a type for one tensor after the other, and remembers what there is to say of it."""

    def __init__(
        self,
        rules: Recipe,
        default: str | None,
        target: Dialect,
        matrix: ImportanceMatrix | Literal["energy", "ones"] | None,
        *,
        pure: bool,
        mixed: Mapping[str, str] | None,
        output_type: str | None,
        embedding_type: str | None,
        leave_output: bool,
        allow_requantize: bool,
        fallback: bool,
        tied: bool,
        n_source_files: int,
    ) -> None:
        self.rules, self.default, self.target, self.matrix = rules, default, target, matrix
        self.pure, self.mixed, self.leave_output, self.tied = pure, mixed, leave_output, tied
        self.output_type, self.embedding_type = output_type, embedding_type
        self.allow_requantize, self.fallback, self.n_source_files = allow_requantize, fallback, n_source_files
        self.matrix_files: dict[str, int] = {}
        self.used: set[str] = set()
        self.taken: set[str] = set()
        self.missing: dict[str, int] = {}
        self._said: dict[tuple[str, str, str], list[str]] = {}

    def say(self, severity: Literal["error", "warning", "note"], code: str, message: str, name: str) -> None:
        """Remember a finding; those that differ in their tensor only (``{}`` in the message) are told as one."""
        self._said.setdefault((severity, code, message), []).append(name)

    def findings(self) -> list[Finding]:
        """Return what was said, worst first."""
        found = []
        for (severity, code, message), names in self._said.items():
            text = message.replace("{}", names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""))
            found.append(Finding(severity, code, text, tuple(names)))  # type: ignore[arg-type]
        return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.severity))

    def __call__(self, source: Source) -> Choice:
        rule = self.rules.find(source.name, stays=source.stays)
        wanted = self._wanted(source, rule)
        native = wanted == "F8_E4M3_B128" and source.kind in FP8_KINDS and self._packs(source)
        if wanted in (None, NATIVE, source.kind) or 0 in source.shape or native:
            kept = self._kept(source, rule)
            # Some of what a checkpoint has in BF16 is kept as F32 (norms, routers): a rule that says BF16 means it.
            if wanted != "BF16" or kept.type == wanted or 0 in source.shape:
                return kept
        assert wanted is not None
        if source.kind in _INTEGERS or wanted in _INTEGERS or not source.stack:
            if rule is not None or wanted in _INTEGERS:
                by = f" ({rule.label})" if rule is not None else ""
                self.say("error", "not-numbers", f"{{}} is {source.kind} and cannot become {wanted}{by}", source.name)
            elif source.unknown:
                self.say("warning", "unknown", f"{{}} {source.unknown}: it stays", source.name)
            return self._kept(source, rule)
        if self.target.type_id(types.get(wanted)) is None:
            others = " or ".join(d.name for d in dialects.DIALECTS.values() if d.type_id(types.get(wanted)) is not None)
            what = rule.label if rule is not None else f"type {wanted}"
            self.say(
                "error", "target",
                f"{what}: {self.target.name} cannot hold {wanted} ({{}}); choose --target {others or '(none holds it)'}, or "
                "name an alternative with '|'", source.name,
            )  # fmt: skip
            return self._kept(source, rule)
        fitting = self._fitting(source, wanted)
        if fitting == source.kind != wanted:
            return self._kept(source, rule)
        if not types.get(fitting).can_encode:
            self.say(
                "error",
                "no-encoder",
                f"{{}}: ggufx cannot encode {fitting} yet; `ggufx types` lists what it can",
                source.name,
            )
            return self._kept(source, rule)
        if source.kind not in NATIVE_KINDS and fitting == "F32":
            pass  # what a type decodes to are float32 values: nothing is lost again
        elif source.kind not in NATIVE_KINDS and not self.allow_requantize:
            instead = (
                "F32 holds its decoded values exactly"
                if fitting in ("BF16", "F16")
                else "start from the original weights"
            )
            self.say(
                "error", "requantize",
                f"{{}}: requantizing from type {source.kind} is disabled, it would lose twice; {instead}, or pass "
                "--allow-requantize", source.name,
            )  # fmt: skip
        elif source.kind not in NATIVE_KINDS:
            self.say(
                "warning", "requantize", f"{{}}: requantizing from {source.kind}, which is lossy already", source.name
            )
        weights, importance = self._importance(source, fitting)
        return Choice(source, fitting, False, rule, wanted if wanted != fitting else "", weights, importance)

    def _wanted(self, source: Source, rule: Rule | None) -> str | None:
        if rule is not None:
            codecs = [(name, None if name == NATIVE else types.get(name)) for name in rule.types]
            held = (name for name, codec in codecs if codec is None or self.target.type_id(codec) is not None)
            return next(held, rule.types[0])
        if source.stays:
            return None
        head = source.name == "output.weight" or (self.tied and source.name == "token_embd.weight")
        if head and self.leave_output:
            self.taken.add("leave_output")
            return None
        if source.name in _EMBEDDINGS and self.embedding_type is not None:
            self.taken.add("embedding_type")
            return self.embedding_type
        if (head or (self.tied and source.name in _EMBEDDINGS)) and self.output_type is not None:
            self.taken.add("output_type")
            return self.output_type
        if self.mixed is not None:
            its = self.mixed.get(source.name)
            return self.default if its is not None and self.pure else its
        if self.default is None or self.default == NATIVE or self.pure:
            return self.default
        if source.name not in ("output.weight", "token_embd.weight"):
            return self.default
        least = "Q6_K" if head else "Q4_K"
        bits = types.get(self.default).layout.bits_per_weight()
        return self.default if bits >= types.get(least).layout.bits_per_weight() else least

    def _packs(self, source: Source) -> bool:
        if self.target.type_id(types.get("F8_E4M3_B128")) is None or source.shape[-1] % FP8_TILE:
            return False  # told as of any other type
        if source.packs():
            return True
        self.say(
            "note", "rounded",
            "{}: its FP8 scales are not one power of two for each block of 128, so its codes are rounded anew", source.name,
        )  # fmt: skip
        return False

    def _kept(self, source: Source, rule: Rule | None) -> Choice:
        try:
            planned = source.keep()
        except PlanError as error:
            self.say("error", "target", str(error), source.name)
            return Choice(source, source.kind, True, rule)
        return Choice(source, planned.type, True, rule)

    def _fitting(self, source: Source, wanted: str) -> str:
        """Return ``wanted``, or the first of its fallbacks that the rows fit."""
        row_len = source.shape[-1] if source.shape else 1
        # F16 cannot hold every value of BF16, FP8 or FP4; upstream's last resort is F16 whatever the source.
        wide = "F16" if source.kind in ("F16", "F32", "F64") else "BF16"
        fitting = wanted
        while row_len % types.get(fitting).layout.block_len:
            following = self.target.fallback(types.get(fitting))
            held = following is not None and self.target.type_id(following) is not None
            fitting = following.name if following is not None and held else wide
        if fitting != wanted:
            block_len = types.get(wanted).layout.block_len
            self.say(
                "note" if self.fallback else "error", "fallback",
                f"{{}}: tensor cols {row_len} are not divisible by {block_len}, required for {wanted.lower()} - "
                + (f"using fallback quantization {fitting.lower()}" if self.fallback else "and --no-fallback was given"),
                source.name,
            )  # fmt: skip
        return fitting

    def _importance(
        self, source: Source, target: str
    ) -> tuple[tuple[Weights | None, ...], Literal["", "matrix", "energy"]]:
        codec = types.get(target)
        if codec.layout.block_len == 1:
            return (), ""  # numbers are rounded one by one: no column is paid for with another
        if self.matrix == "energy":
            return (), "energy" if codec.needs_importance else ""
        if self.matrix == "ones":
            return (), "matrix" if codec.needs_importance else ""
        name = source.name
        if self.matrix is not None:
            found = self.matrix.places(_upstream_name(name), source.shape) or self.matrix.places(name, source.shape)
            if found is not None and len(found) not in (1, len(source.stack)):
                self.say(
                    "error", "importance",
                    f"{self.matrix.path} has weights of {len(found)} heads for {{}}, whose file does not say how many it has "
                    "(attention.head_count)", name,
                )  # fmt: skip
                return (), ""
            if found is not None:
                self.used.add(name)
                if None in found:
                    self.missing[name] = found.count(None)
                per_matrix = found if len(found) == len(source.stack) else found * len(source.stack)
                return tuple(place and self._weights(place, source.shape[-1]) for place in per_matrix), "matrix"
        if codec.needs_importance:
            what = (
                "no importance matrix was given" if self.matrix is None else f"{self.matrix.path} has no entry for it"
            )
            self.say(
                "error", "importance",
                f"Missing importance matrix for tensor {{}} in a very low-bit quantization ({target}): {what}; pass --imatrix "
                f"FILE, or make do with --imatrix {ONES} (all columns alike) or {ENERGY} (the weights' own)", name,
            )  # fmt: skip
        elif self.matrix is not None and codec.lossy:
            self.say(
                "note", "importance", f"{self.matrix.path} has no entry for {{}}: quantized without importance", name
            )
        return (), ""

    def _weights(self, place: Place, row_len: int) -> Weights:
        file = self.matrix_files.setdefault(str(place.path), self.n_source_files + len(self.matrix_files))
        return Weights(Span(file, place.offset, row_len * 4), place.divisor)


def _upstream_name(name: str) -> str:
    match = re.match(r"^(blk\.\d+\.)(.+)$", name)
    return name if match is None else match[1] + _UPSTREAM_NAMES.get(match[2], match[2])


def _add_matrix(quantization: Quantization, matrix: ImportanceMatrix, decide: _Decider) -> None:
    """Make the importance matrix a source of the plan, and write down that it was used."""
    for path in decide.matrix_files:
        quantization.source_files.append(path)
        if quantization.source_states is not None:
            status = Path(path).stat()
            quantization.source_states.append((status.st_size, status.st_mtime_ns))
    if decide.missing:
        count = sum(decide.missing.values())
        quantization.findings.append(
            Finding(
                "note", "missing-experts",
                f"{matrix.path}: no data for {count} experts of {len(decide.missing)} tensors; their columns all weigh 1",
                tuple(decide.missing),
            )
        )  # fmt: skip
    if not decide.used:
        quantization.findings.append(
            Finding(
                "warning", "imatrix",
                f"{matrix.path}: none of its {len(matrix)} entries ({next(iter(matrix))}, ...) is of a tensor "
                "that is quantized",
            )
        )  # fmt: skip
    base = quantization.metadata

    def metadata(tensors: Sequence[PlannedTensor], file_type: int | None) -> dict[str, Value]:
        return base(tensors, file_type) | imatrix_module.metadata(matrix)

    if decide.used:
        quantization.metadata = metadata


def common_file_type(tensors: Sequence[PlannedTensor], target: Dialect, asked: str = "") -> int | None:
    """Return the ``general.file_type`` of the TYPE asked for, or else of the type that most weights have.

    ``None`` where the target has no number for it.
    """
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += prod(tensor.shape)
    if not weights:
        return None
    held = set(weights)
    if not asked and {"F8_E4M3_B128", "MXFP4"} <= held and weights.most_common(1)[0][0] in ("F8_E4M3_B128", "MXFP4"):
        return target.file_type_number("F8_E4M3_MXFP4") or target.file_type_number("MXFP4_MOE")
    name = asked or weights.most_common(1)[0][0]
    # llama.cpp numbers mixes, not types: the middle one stands for them.
    spellings = {"MXFP4": ("MXFP4_MOE",), "Q3_K": ("Q3_K_M",), "Q4_K": ("Q4_K_M",), "Q5_K": ("Q5_K_M",)}.get(
        name, (name,)
    )
    return next((number for s in spellings if (number := target.file_type_number(s)) is not None), None)


# The log --------------------------------------------------------------------------------------------------------


class Tally:
    """What a run did, tensor by tensor: an observer of :func:`ggufx.execute.execute`.

    Parameters
    ----------
    quantization, plan
        What runs.
    on_tensor
        Called with the field's line for every tensor that is finished.
    """

    def __init__(self, quantization: Quantization, plan: Plan, on_tensor: Callable[[str], None] | None = None) -> None:
        self._choices = {choice.source.name: choice for choice in quantization.choices}
        self._left = {tensor.name: len(tensor.tiles) for tensor in plan.tensors}
        self._sums: dict[str, list[float]] = {tensor.name: [0.0, 0.0, 0.0] for tensor in plan.tensors}
        self._plan = plan
        self._on_tensor = on_tensor
        self._done = 0
        self.dead_blocks: Counter[str] = Counter()

    def __call__(self, done: TileDone) -> None:
        """Count a finished tile."""
        name = done.tensor.name
        self._left[name] -= 1
        if done.dead_blocks:
            self.dead_blocks[name] = max(self.dead_blocks[name], done.dead_blocks)
        sums = self._sums[name]
        if not done.resumed:
            sums[0] += done.outcome.square_sum
            sums[1] += done.outcome.error_sum
            sums[2] += done.tile.rows * sum(done.tensor.transform.parts)
        if self._left[name] == 0:
            self._done += 1
            if self._on_tensor is not None:
                self._on_tensor(self._line(done.tensor))

    def _line(self, tensor: PlannedTensor) -> str:
        dims = [*reversed(tensor.shape), *[1] * (4 - len(tensor.shape))]
        choice = self._choices[tensor.name]
        head = (
            f"[{self._done:4d}/{len(self._left):4d}] {tensor.name:36s} - [{', '.join(f'{n:5d}' for n in dims)}], "
            f"type = {choice.source.kind.lower():>6s}, "
        )
        after = tensor.nbytes / 2**20
        if choice.kept and choice.type == choice.source.kind:
            return f"{head}size = {after:8.3f} MiB"
        before = choice.source.nbytes / 2**20
        return f"{head}converting to {tensor.type.lower()} .. size = {before:8.2f} MiB -> {after:8.2f} MiB"

    def relative_error(self, name: str) -> float | None:
        """Return the relative RMS error of a tensor over what was measured of it; ``None`` if nothing was."""
        square, error, _ = self._sums[name]
        return (error / square) ** 0.5 if square else None

    def by_type(self) -> dict[str, dict[str, Any]]:
        """Return tensors, weights, bytes, bits per weight and, where measured, relative RMS error by type."""
        groups: dict[str, dict[str, Any]] = {}
        sums: dict[str, list[float]] = {}
        for tensor in self._plan.tensors:
            group = groups.setdefault(tensor.type, {"n_tensors": 0, "n_weights": 0, "nbytes": 0})
            group["n_tensors"] += 1
            group["n_weights"] += prod(tensor.shape)
            group["nbytes"] += tensor.nbytes
            total = sums.setdefault(tensor.type, [0.0, 0.0])
            total[0] += self._sums[tensor.name][0]
            total[1] += self._sums[tensor.name][1]
        for kind, group in groups.items():
            group["bits_per_weight"] = group["nbytes"] * 8 / group["n_weights"] if group["n_weights"] else 0.0
            square, error = sums[kind]
            group["relative_rms"] = (error / square) ** 0.5 if square else None
        return dict(sorted(groups.items(), key=lambda item: -item[1]["nbytes"]))

    def report(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        tensors = []
        for tensor in self._plan.tensors:
            choice = self._choices[tensor.name]
            tensors.append(
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "source_type": choice.source.kind,
                    "type": tensor.type,
                    "kept": choice.kept,
                    "rule": None if choice.rule is None else choice.rule.label,
                    "wanted": choice.wanted or tensor.type,
                    "importance": choice.importance or None,
                    "source_nbytes": choice.source.nbytes,
                    "nbytes": tensor.nbytes,
                    "relative_rms": self.relative_error(tensor.name),
                    "measured_weights": int(self._sums[tensor.name][2]) if self._sums[tensor.name][0] else 0,
                }
            )
        return {
            "file": self._plan.to_json()["file"],
            "by_type": self.by_type(),
            "tensors": tensors,
            "notes": list(self._plan.notes),
            "blocks_without_importance": dict(self.dead_blocks),
        }
