"""Move a GGUF between dialects: names, order, keys, and types only where the target cannot hold them.

A DeepSeek-V4 file is taken for the checkpoint that it was made from (see
:mod:`ggufx.architectures.deepseek_v4_file`), so the result has the names, the order and the keys of converting that
checkpoint for the target. Files of other models keep their names; there only ids and types matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from ggufx import chat_templates, dialects, execute, plan, types
from ggufx.architectures.deepseek_v3 import foreign_latent
from ggufx.architectures.deepseek_v4_file import DeepSeekV4File
from ggufx.container import DEFAULT_ALIGNMENT, Value, ValueType
from ggufx.convert import NISPARKS_GENERAL, fill_file_type
from ggufx.dialects import Dialect
from ggufx.errors import CodecError, PlanError
from ggufx.execute import Progress
from ggufx.factors import factor_lost
from ggufx.file import File, Tensor, open
from ggufx.plan import Matrix, Plan, PlannedTensor, Span, Transform
from ggufx.quantize import common_file_type, unreadable
from ggufx.version import __version__
from ggufx.vocabulary import is_named_template

__all__ = [
    "DENSE_TYPES",
    "PLAIN_TYPES",
    "TARGETS",
    "Move",
    "file_type",
    "is_bfloat16",
    "keys_for",
    "moves_for",
    "plan_retarget",
    "retarget",
    "short",
]

TARGETS: Final = tuple(dialects.TARGETS)
DENSE_TYPES: Final = ("bf16", "q8_0", "f32")
"""What tensors become that the target cannot hold; bf16 and f32 are exact for FP8."""
PLAIN_TYPES: Final = ("f32", "f16")
"""What ds4's hyper-connections, compressors and routers become. Its newest readers take both, older ones F16 only."""

_GENERAL_OWN: Final = ("general.architecture", "general.file_type", "general.quantization_version")

# What ds4's loader takes, by the checkpoint's name of a tensor (first match); the first type is what others become.
_DS4_QUANT: Final = ("Q8_0", "Q4_K", "Q4_0")
_DS4_FORMS: Final = tuple(
    (re.compile(pattern), accepted)
    for pattern, accepted in (
        (r"^embed\.weight$", ("F16",)),
        (r"^head\.weight$", _DS4_QUANT),
        (r"\.tid2eid$", ("I32",)),
        (r"\.experts\.", ("Q8_0", "MXFP4", "IQ2_XXS", "Q2_K", "Q4_K", "Q5_K", "Q6_K")),
        (r"\.indexer\.wq_b\.", ("F16", "Q8_0")),
        (r"\.indexer\.weights_proj\.", ("F16",)),
        (r"(hc_\w+_fn|\.ape|\.wgate\.weight|compressor\.wkv\.weight|\.gate\.weight)$", ("plain",)),
        (r"(norm\.weight|_sink|_base|_scale|\.bias)$", ("F32",)),
        (r"\.weight$", _DS4_QUANT),
    )
)


class Move(NamedTuple):
    """A tensor of the output and the one of the file that it is; ``source`` is its checkpoint name, if that is known."""

    name: str
    tensor: Tensor
    role: str = ""
    source: str = ""


def moves_for(file: File, target: str) -> tuple[list[Move], list[tuple[str, str]], DeepSeekV4File | None]:
    """Return what a target's file holds, in its order; what is left out; and the model where names and keys change.

    Raises
    ------
    PlanError
        The target has no form for the file.
    """
    architecture = file.architecture
    if not DeepSeekV4File.recognises(file):
        bound = architecture == "deepseek4" and target in ("nisparks", dialects.DS4.name)
        if bound or target == dialects.DS4.name:
            what = (
                "the file of an MTP block"
                if architecture == "deepseek4"
                else f"a model of architecture {architecture!r}"
            )
            raise PlanError(f"{file.path}: is {what}; {target} has no form for it")
        return [Move(tensor.name, tensor) for tensor in file.tensors], [], None
    model = DeepSeekV4File(file)
    form = "nisparks" if target == "nisparks" else "llama.cpp"
    if form == model.form and target != dialects.DS4.name and _complete(model):
        return [Move(tensor.name, tensor) for tensor in file.tensors], [], None
    outputs, skipped = model.outputs(form)
    moves = []
    for output in outputs:
        member = model.members[output.stack[0][0].tensor.name]
        moves.append(Move(output.name, member.tensor, output.role, member.source))
    return moves, [(model.members[name].tensor.name, reason) for name, reason in skipped], model


def _complete(model: DeepSeekV4File) -> bool:
    """Return whether a file in a form has that form's names and keys: antirez' have upstream's names, not all of its keys."""
    if not model.plainly_named:
        return False
    if model.form == "nisparks":
        return True  # of two issues, one without rope.scaling; both are the form
    wanted = model.keys(model.form, file_type=0, chat_template="")
    own = model.file.metadata
    return all(key in own for key in wanted) and "deepseek4.nextn_predict_layers" not in own


def plan_retarget(
    file: File,
    outfile: str | Path,
    target: str,
    *,
    dense: str | None = None,
    plain: str | None = None,
    split_max_nbytes: int | None = None,
) -> Plan:
    """Plan the move of an open GGUF to another dialect.

    Parameters
    ----------
    file
        The source; all members of a split.
    outfile
        Where to write.
    target
        ``llama.cpp``, ``ik_llama.cpp``, ``nisparks`` or ``ds4``.
    dense
        Type of tensors that the target cannot hold. FP8 becomes ``bf16`` by default (exact; ``q8_0`` for ds4, which has no
        BF16); other types only when this is given.
    plain
        ds4: type of hyper-connections, compressors and routers that are neither F16 nor F32: ``f32`` keeps every bit,
        ``f16`` is what the published files have and older readers demand.
    split_max_nbytes
        Split the output.

    Raises
    ------
    PlanError
        The output is one of the sources, or the target has no form for the file.
    """
    if target not in dialects.TARGETS:
        raise PlanError(f"--target {target}: no such target; known: {', '.join(TARGETS)}")
    dialect = dialects.TARGETS[target]
    if (dense or DENSE_TYPES[0]) not in DENSE_TYPES or (plain or PLAIN_TYPES[0]) not in PLAIN_TYPES:
        raise PlanError(
            f"--dense {dense}, --plain {plain}: supported are {', '.join(DENSE_TYPES)}, and {', '.join(PLAIN_TYPES)}"
        )
    if target == dialects.DS4.name and dense not in (None, "q8_0"):
        raise PlanError(f"--dense {dense}: ds4 loads neither BF16 nor F32 projections; q8_0 is what it takes")
    if plain is not None and target != dialects.DS4.name:
        raise PlanError(f"--plain {plain}: is a choice that ds4's readers need; leave it out for --target {target}")
    paths = [str(p) for p in file.paths]
    moves, skipped, model = moves_for(file, target)
    with execute.open_files():
        tensors = [_tensor(file, move, dialect, dense, plain, paths) for move in moves]
    # Of other models, only what the file has is kept right.
    wanted = model is not None or "general.file_type" in file.metadata
    number = file_type(file, tensors, dialect) if wanted else None
    notes = [*file.notes, *_renamed(moves), *_retyped(tensors)]
    latent = foreign_latent({tensor.name: tensor.shape for tensor in file.tensors}, target)
    if latent:
        notes.append(f"{file.path}: {latent}")
    metadata = keys_for(file, model, target, number, notes)
    label = ("" if number is None else dialect.file_type_name(number)) or ""
    path = Path(fill_file_type(str(outfile), label or "mixed"))
    if path.exists() and any(path.samefile(p) for p in paths):
        raise PlanError(f"{path}: is the source itself; choose another --outfile")
    return plan.build(
        path,
        metadata,
        tensors,
        source_files=paths,
        dialect=target,
        alignment=file.alignment,
        split_max_nbytes=split_max_nbytes,
        skipped=skipped,
        notes=notes,
        file_type=label,
    )


def retarget(
    path: str | Path,
    outfile: str | Path,
    target: str,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    dialect: str | None = None,
    **options: Any,
) -> list[Path]:
    """Move a GGUF: :func:`plan_retarget` (which takes ``options``) and :func:`ggufx.execute.execute`."""
    with open(path, dialect=dialect) as file:
        return execute.execute(
            plan_retarget(file, outfile, target, **options),
            overwrite=overwrite,
            resume=resume,
            threads=threads,
            executor=executor,
            progress=progress,
        )


# Tensors --------------------------------------------------------------------------------------------------------


def _tensor(
    file: File, move: Move, dialect: Dialect, dense: str | None, plain: str | None, paths: Sequence[str]
) -> PlannedTensor:
    tensor = move.tensor
    span = Span(paths.index(str(tensor.path)), tensor.file_offset, tensor.nbytes)
    if tensor.codec is None:
        if tensor.named is None or dialect.meaning(tensor.type_id) is not tensor.named:
            raise PlanError(f"{file.path}: {unreadable(tensor, dialect)}")
        return plan.copy_tensor(move.name, tensor.shape, tensor.type, tensor.type_id, span)
    kind = tensor.type
    wanted = _wanted(file, move, dialect, dense, plain)
    if tensor.factor is not None:
        lost = factor_lost(tensor.name, wanted, dialect.name, file.metadata.get("general.architecture"))
        if lost:
            raise PlanError(f"{file.path}: {lost}")
    codec = types.get(wanted)
    type_id = dialect.type_id(codec)
    if type_id is None:
        raise PlanError(f"{file.path}: tensor {tensor.name!r}: {dialect.name} cannot hold {wanted}")
    row_len = tensor.shape[-1] if tensor.shape else 1
    rows = prod(tensor.shape[:-1])
    exact = False
    if wanted == kind:
        op: Any = "copy"
    elif wanted == "F32" and kind in ("BF16", "F16"):
        op = "cast"
    elif not tensor.codec.can_decode or not codec.can_encode:
        raise PlanError(f"{file.path}: tensor {tensor.name!r}: ggufx cannot turn {kind} into {wanted}")
    else:
        op = "encode"
        # A float32 holds what any type decodes to; BF16 holds FP8 and what was BF16 before.
        exact = wanted == "F32" or (wanted == "BF16" and kind in ("F8_E4M3_B128", "F32"))
    transform = Transform(op, kind, wanted, (row_len,), exact=exact)
    # A name of its own for the source: the plan tells where a tensor came from.
    matrix = Matrix(tensor.name, kind, rows, row_len, span)
    try:
        return plan.plan_tensor(move.name, tensor.shape, wanted, type_id, transform, [[matrix]])
    except CodecError as error:
        raise PlanError(f"{file.path}: tensor {tensor.name!r} {list(tensor.shape)} as {wanted}: {error}") from None


def _wanted(file: File, move: Move, dialect: Dialect, dense: str | None, plain: str | None) -> str:
    """Return the type of a tensor in the output."""
    tensor = move.tensor
    kind = tensor.type
    if dialect.name == dialects.DS4.name:
        return _ds4_type(file, move, dense, plain)
    if move.role == "router" and dialect.name == "nisparks" and kind in ("BF16", "F16"):
        return "F32"
    if move.role == "router" and dialect.name != "nisparks" and kind == "F32" and is_bfloat16(tensor):
        # The target's own form; every value was BF16 in the checkpoint.
        return "BF16"
    assert tensor.codec is not None
    if dialect.type_id(tensor.codec) is not None:
        return kind
    if kind == "F8_E4M3_B128":
        return (dense or DENSE_TYPES[0]).upper()
    if dense is None:
        raise PlanError(
            f"{file.path}: tensor {tensor.name!r} is {kind}, which {dialect.name} cannot hold; --dense f32 stores such tensors "
            "exactly, --dense q8_0 rounded; or quantize the original for this target"
        )
    return dense.upper()


def _ds4_type(file: File, move: Move, dense: str | None, plain: str | None) -> str:
    kind = move.tensor.type
    accepted = next(accepted for pattern, accepted in _DS4_FORMS if pattern.search(move.source))
    if accepted == ("plain",):
        return kind if plain is None and kind in ("F16", "F32") else (plain or PLAIN_TYPES[0]).upper()
    if plain == "f16" and accepted[0] == "F16":
        return "F16"  # the readers that want half floats there take nothing else
    if kind in accepted:
        return kind
    if kind not in ("F8_E4M3_B128", "BF16", "F16", "F32") and dense is None:
        raise PlanError(
            f"{file.path}: tensor {move.tensor.name!r} is {kind}; ds4 takes {', '.join(accepted)} there. --dense q8_0 rounds "
            "such tensors; better, quantize the original for this target"
        )
    return accepted[0]


def is_bfloat16(tensor: Tensor) -> bool:
    """Return whether every value of an F32 tensor is a bfloat16; reads it."""
    step = 1 << 22
    for start in range(0, tensor.nbytes, step):
        count = min(step, tensor.nbytes - start)
        buffer = execute.scratch("bfloat16", count)
        execute.read_into(str(tensor.path), tensor.file_offset + start, buffer)
        if np.any(buffer.view("<u2")[0::2]):
            return False
    return True


# Metadata -------------------------------------------------------------------------------------------------------


def file_type(file: File, tensors: Sequence[PlannedTensor], dialect: Dialect) -> int | None:
    """Return ``general.file_type`` of a moved file: the source's own where it means the same and most weights keep their type.

    Parameters
    ----------
    file
        The source.
    tensors
        Of the moved file: their shapes and types, and in ``transform.kind`` the types that they have in the source.
    dialect
        Of the moved file.
    """
    number = file.facts.integer("general.file_type", None)
    weights: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        weights[tensor.transform.kind, tensor.type] += prod(tensor.shape)
    old, new = max(weights, key=weights.__getitem__, default=("", ""))
    if number is not None and old == new and file.file_type == dialect.file_type_name(number):
        return number
    held = {tensor.type for tensor in tensors}
    if dialect.name == "nisparks" and "F8_E4M3_B128" in held:
        return dialect.file_type_number("F8_E4M3_MXFP4")
    return dialect.file_type_number("MXFP4_MOE") if "MXFP4" in held else common_file_type(tensors, dialect)


def keys_for(
    file: File, model: DeepSeekV4File | None, target: str, file_type: int | None, notes: list[str]
) -> dict[str, Value]:
    """Return the output's metadata: the file's own values in the target's form and order, what is missing derived.

    Parameters
    ----------
    model
        As from :func:`moves_for`; ``None`` leaves keys as they are.
    notes
        Gets a sentence for every key that is derived, supposed or left out.
    """
    own = {key: value for key, value in file.metadata.typed().items() if not key.startswith("split.")}
    if file.alignment == DEFAULT_ALIGNMENT:
        own.pop("general.alignment", None)
    if "ggufx.dialect" in own:
        own["ggufx.dialect"] = Value.string("llama.cpp" if target == dialects.DS4.name else target)
        own["ggufx.version"] = Value.string(__version__)
    if model is None:
        if file_type is not None:
            own["general.file_type"] = Value.u32(file_type)
        return own
    return _deepseek_keys(model, target, own, 0 if file_type is None else file_type, notes)


def _deepseek_keys(
    model: DeepSeekV4File, target: str, own: Mapping[str, Value], file_type: int, notes: list[str]
) -> dict[str, Value]:
    form = "nisparks" if target == "nisparks" else "llama.cpp"
    template = model.file.facts.text("tokenizer.chat_template", None)
    if template is None:
        release = chat_templates.release_of(None, model.file.facts.text("general.name", "") or "")
        template = chat_templates.deepseek_v4(release)
        notes.append(
            f"key tokenizer.chat_template: the file has none; the built-in one of DeepSeek-V4's {release} release is written"
        )
    derived = model.keys(form, file_type=file_type, chat_template=template, notes=notes)
    if target == dialects.DS4.name:
        for key in ("deepseek4.embedding_length_out", "deepseek4.swiglu_clamp_shexp"):
            del derived[key]
        derived["deepseek4.vocab_size"] = Value.u32(model.config["vocab_size"])
        derived["deepseek4.nextn_predict_layers"] = Value.u32(model.config["num_nextn_predict_layers"])
    clamp = "deepseek4.swiglu_clamp_shexp"
    if clamp in derived:
        # One value for both in the config; a file may have one per layer.
        derived[clamp] = own.get(clamp, own["deepseek4.swiglu_clamp_exp"])
    for key in derived:
        if key in own and key != "general.file_type":
            derived[key] = own[key]
    general = {key: value for key, value in own.items() if key.startswith("general.") and key not in _GENERAL_OWN}
    keys = {"general.architecture": own["general.architecture"]}
    if form == "nisparks":
        keys |= {key: general[key] for key in NISPARKS_GENERAL if key in general}
    else:
        # Where upstream's converter writes them.
        keys |= {key: value for key, value in own.items() if is_named_template(key)}
        keys["tokenizer.chat_template"] = Value.string(template)
        general = _with_naming(model, general, notes)
    keys |= general | derived
    keys["general.quantization_version"] = own.get("general.quantization_version", Value.u32(2))
    others = [key for key in own if key.startswith("tokenizer.") and key not in keys]
    keys |= {key: own[key] for key in sorted(others, key=is_named_template)}
    for key, why in model.supposed:
        if key in keys:
            notes.append(f"key {key} = {short(keys[key])}: not in the file; {why}")
    keys |= _leftovers(model, form, own, keys, notes)
    return keys


def _leftovers(
    model: DeepSeekV4File, form: str, own: Mapping[str, Value], keys: Mapping[str, Value], notes: list[str]
) -> dict[str, Value]:
    """Return keys of the file that the target's form has no place for but that say something: they are kept."""
    managed: set[str] = set()
    for name in ("nisparks", "llama.cpp"):
        managed |= model.keys(name, file_type=0, chat_template="").keys()
    # What a reader of the output, which lacks these keys, would suppose.
    believed = model.keys_of(model.config_from(keys, []), "llama.cpp", file_type=0, chat_template="")
    kept = {}
    for key, value in own.items():
        if key in keys:
            continue
        if key in managed | {"deepseek4.nextn_predict_layers", "deepseek4.vocab_size"}:
            if form == "llama.cpp" or key not in believed or believed[key].same(value):
                notes.append(f"key {key}: left out; the target's form has it in others, or not at all")
                continue
            notes.append(
                f"key {key} = {short(value)}: kept, though not of the target's form: readers would suppose otherwise"
            )
        kept[key] = value
    return kept


def _with_naming(model: DeepSeekV4File, general: dict[str, Value], notes: list[str]) -> dict[str, Value]:
    """Add version, finetune and base name, which the nisparks form leaves out, as gguf's conversion finds them in the name."""
    import gguf

    parts = ("version", "finetune", "basename")
    name = general.get("general.name")
    if model.form != "nisparks" or any(f"general.{part}" in general for part in parts):
        return general
    if name is None or name.type is not ValueType.STRING:
        return general
    total = sum(tensor.size for tensor in model.file.tensors)
    _, _, basename, finetune, version, _ = gguf.Metadata.get_model_id_components(name.data.replace(" ", "-"), total)
    found = {"version": version, "finetune": finetune, "basename": basename}
    result: dict[str, Value] = {}
    for key, value in general.items():
        result[key] = value
        if key == "general.name":
            for part in parts:
                if found[part]:
                    result[f"general.{part}"] = Value.string(str(found[part]))
                    notes.append(f"key general.{part} = {found[part]!r}: read from general.name")
    return result


# Words ----------------------------------------------------------------------------------------------------------


def _family(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "blk.N.", name)


def _renamed(moves: Sequence[Move]) -> list[str]:
    pairs: dict[tuple[str, str], int] = {}
    for move in moves:
        if move.name != move.tensor.name:
            pair = (_family(move.tensor.name), _family(move.name))
            pairs[pair] = pairs.get(pair, 0) + 1
    return [f"name {old} -> {new} ({_tensors(count)})" for (old, new), count in pairs.items()]


def _retyped(tensors: Sequence[PlannedTensor]) -> list[str]:
    groups: dict[tuple[str, str, str, bool], int] = {}
    for tensor in tensors:
        if tensor.transform.op != "copy":
            key = (_family(tensor.name), tensor.transform.kind, tensor.type, tensor.lossless)
            groups[key] = groups.get(key, 0) + 1
    return [
        f"type of {name}: {old} -> {new}, {'exact' if lossless else 'rounded'} ({_tensors(count)})"
        for (name, old, new, lossless), count in groups.items()
    ]


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def short(value: Value) -> str:
    """Return a value in a few words."""
    text = str(value.to_json())
    return text if len(text) <= 40 else text[:37] + "..."
