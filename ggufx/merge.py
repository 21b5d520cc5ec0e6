"""Merge an FP8 checkpoint with the routed experts of a GGUF: KTransformers' hybrid, as a folder or as one GGUF.

Attention, shared experts and the rest keep the checkpoint's bytes; the routed experts keep the GGUF's, whatever quant type
they are of. As a folder of safetensors files this is what KTransformers loads: GGUF names everywhere, the experts of a layer
and a projection as one row of bytes with the ggml type's number beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple, TypedDict, Unpack

from ggufx import convert, dialects, execute, plan
from ggufx.architectures import DeepSeekV3, Output
from ggufx.checkpoint import INDEX_NAME, Checkpoint, SourceTensor
from ggufx.dialects import Dialect
from ggufx.errors import OptionError, PlanError
from ggufx.execute import Progress
from ggufx.file import File, Tensor, open
from ggufx.options import given, refuse
from ggufx.output_names import directory, output_path
from ggufx.plan import Plan, PlannedFile, PlannedShard, PlannedTensor, PlannedText, Span
from ggufx.quantize import common_file_type
from ggufx.typed import open_regular

__all__ = ["FORMATS", "MergeOptions", "RoutedExperts", "merge", "open_all", "plan_merge", "routed_experts", "unchanged"]

FORMATS: Final = ("safetensors", "gguf")

KNOWN_TO_KTRANSFORMERS: Final = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}
)
"""Types that its loader of such folders knows (a snapshot of August 2026)."""

# In this order: the first keeps FP8, the second is what most programs read.
_TARGETS: Final = ("nisparks", "llama.cpp", "ik_llama.cpp")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_COMPANIONS: Final = ("*.json", "*.jinja", "*.model", "*.py", "*.txt", "LICENSE*", "README*")
_COMPANION_NBYTES: Final = 64 << 20


class MergeOptions(TypedDict, total=False):
    """Keywords of :func:`plan_merge`."""

    form: str
    target: str | None
    dense: str | None
    model_name: str | None
    chat_template: str | None
    split_max_nbytes: int | None
    dialect: str | None


class RoutedExperts(NamedTuple):
    """Routed experts in a GGUF, and the number of the file that holds them among the plan's sources."""

    tensor: Tensor
    file: int


def plan_merge(
    safetensor_path: str | Path | Checkpoint,
    gguf_path: str | Path,
    output_path: str | Path,
    *,
    form: str = "safetensors",
    target: str | None = None,
    dense: str | None = None,
    model_name: str | None = None,
    chat_template: str | None = None,
    split_max_nbytes: int | None = None,
    dialect: str | None = None,
) -> Plan:
    """Plan a hybrid; reads headers, small files, and for ``gguf`` FP8 scales that may be powers of two.

    Parameters
    ----------
    safetensor_path
        Directory of the checkpoint; its MTP block (``num_nextn_predict_layers`` of its config) is left out.
    gguf_path
        A GGUF, any member of a split one, or a directory of them that together hold the routed experts.
    output_path
        ``safetensors``: a directory; ``gguf``: a file, or a directory in which it is named by the GGUF convention.
    form
        ``safetensors``, KTransformers' folder, or ``gguf``.
    target
        ``gguf``: the dialect; by default nisparks, which has an FP8 type, if it holds the experts' types, else the first
        that does.
    dense
        ``gguf``: type of FP8 tensors that cannot stay, as in :func:`ggufx.convert.plan_convert`; by default bf16.
    model_name, chat_template, split_max_nbytes
        ``gguf``: as in :func:`ggufx.convert.plan_convert`.
    dialect
        Whose type ids the GGUF has; by default found.

    Raises
    ------
    CheckpointError, ContainerError
        A source is damaged.
    PlanError
        The GGUF's experts are not those that config.json describes (a layer is missing; their number, shape or type), no
        dialect holds all types, or the output is a source.
    """
    if form not in FORMATS:
        raise OptionError("{form} {0} is not supported; supported: {1}", form, ", ".join(FORMATS))
    asked = {
        "target": target, "dense": dense, "split_max_nbytes": split_max_nbytes, "model_name": model_name,
        "chat_template": chat_template,
    }  # fmt: skip
    refuse("merge", given(asked), form)
    checkpoint = safetensor_path if isinstance(safetensor_path, Checkpoint) else Checkpoint(safetensor_path)
    with ExitStack() as opened:
        files = [opened.enter_context(file) for file in open_all(Path(gguf_path), dialect)]
        paths = [path for file in files for path in file.paths]
        experts = routed_experts(Path(gguf_path), files, len(checkpoint.shards))
        sources = [*checkpoint.shards, *paths]
        states = [*checkpoint.shard_states, *((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)]
        if form == "gguf":
            chosen = _dialect(Path(gguf_path), experts, target)
            conversion = convert.Conversion(
                checkpoint, chosen.name, dense=dense, model_name=model_name, chat_template=chat_template
            )
            skipped = _checked(conversion, Path(gguf_path), files, experts)
            return _as_gguf(conversion, experts, output_path, sources, states, skipped, split_max_nbytes)
        # The names of ik_llama.cpp's files have kv_b as the checkpoint has it, whole.
        conversion = convert.Conversion(checkpoint, "ik_llama.cpp")
        if not isinstance(conversion.architecture, DeepSeekV3):
            raise PlanError(
                f"{checkpoint.path}: holds a model of architecture {conversion.architecture.name}; KTransformers' layout is "
                f"that of {DeepSeekV3.name} (DeepSeek V3, R1, V3.1); --format gguf takes others"
            )
        skipped = _checked(conversion, Path(gguf_path), files, experts)
        return _as_safetensors(
            conversion, experts, directory(output_path, parameter="output_path"), sources, states, skipped
        )


def merge(
    safetensor_path: str | Path | Checkpoint,
    gguf_path: str | Path,
    output_path: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **options: Unpack[MergeOptions],
) -> list[Path]:
    """Merge: :func:`plan_merge` (which takes ``options``) and :func:`ggufx.execute.execute`; returns the files written."""
    return execute.execute(
        plan_merge(safetensor_path, gguf_path, output_path, **options),
        overwrite=overwrite,
        resume=resume,
        threads=threads,
        executor=executor,
        progress=progress,
    )


# The GGUF's side ------------------------------------------------------------------------------------------------


def open_all(path: Path, dialect: str | None) -> Iterator[File]:
    """Open a GGUF, or all of a directory, members of a split together."""
    if not path.is_dir():
        yield open(path, dialect=dialect)
        return
    found = sorted(path.glob("*.gguf"))
    if not found:
        below = sorted({file.parent for file in path.glob("*/*.gguf")})
        hint = f"; these below it do: {', '.join(str(folder) for folder in below[:5])}" if below else ""
        raise PlanError(f"{path}: holds no *.gguf file{hint}")
    done: set[Path] = set()
    for file in found:
        if file not in done:
            opened = open(file, dialect=dialect)
            done.update(opened.paths)
            yield opened


def routed_experts(path: Path, files: Sequence[File], first: int = 0) -> dict[str, RoutedExperts]:
    """Return the routed experts of all files by name; the files' numbers among the sources begin with ``first``."""
    found: dict[str, RoutedExperts] = {}
    for file in files:
        numbers = {member: number for number, member in enumerate(file.paths, first)}
        first += len(numbers)
        for tensor in file.tensors:
            if not _EXPERTS.fullmatch(tensor.name):
                continue
            other = found.get(tensor.name)
            if other is not None:
                raise PlanError(
                    f"{path}: tensor {tensor.name!r} is in {other.tensor.path.name} and in {tensor.path.name}; pass one of the "
                    "files, or a directory that holds one model"
                )
            if tensor.codec is None:
                raise PlanError(
                    f"{tensor.path}: tensor {tensor.name!r} has type {tensor.type_label}, which ggufx has no codec for, so "
                    "its length cannot be checked; register a codec for it, or quantize to another type (interleaved _R4 types "
                    "to the plain ones)"
                )
            found[tensor.name] = RoutedExperts(tensor, numbers[tensor.path])
    return found


def _checked(
    conversion: convert.Conversion, path: Path, files: Sequence[File], experts: Mapping[str, RoutedExperts]
) -> list[tuple[str, str]]:
    """Hold the GGUF's experts against the checkpoint's, and return what is left out of both, with the reasons."""
    architecture = conversion.architecture
    wanted = {output.name: output for output in conversion.outputs if output.role == "expert"}
    if not wanted:
        raise PlanError(f"{architecture.checkpoint.path}: the model has no routed experts; there is nothing to merge")
    for file in files:
        name = file.architecture
        if name not in (None, architecture.name) and any(_EXPERTS.fullmatch(tensor) for tensor in file):
            raise PlanError(
                f"{file.path}: holds a model of architecture {name!r}, the checkpoint one of {architecture.name!r}"
            )
    missing = [name for name in wanted if name not in experts]
    if missing:
        raise PlanError(
            f"{path}: the routed experts {missing[0]} are missing ({len(missing)} of {len(wanted)} such tensors that "
            "config.json implies); pass the directory with all files of the model"
        )
    for name, output in wanted.items():
        shape, tensor = output.shape, experts[name].tensor
        if tensor.shape == shape:
            continue
        what = f"shape {list(tensor.shape)}, config.json says {list(shape)}"
        if len(tensor.shape) == 3 and tensor.shape[1:] == shape[1:]:
            what = f"{tensor.shape[0]} experts, config.json says {shape[0]}"
        raise PlanError(
            f"{tensor.path}: tensor {name!r} has {what}: the GGUF and the checkpoint {architecture.checkpoint.path} are of "
            "different models"
        )
    skipped = list(conversion.skipped)
    for output in wanted.values():
        for part in output.parts:
            names = (part.tensor.name, None if part.scale is None else part.scale.name)
            skipped += [(source, "the routed experts are the GGUF's") for source in names if source is not None]
    skipped += [
        (name, "the GGUF's experts of a layer that has none by config.json") for name in experts if name not in wanted
    ]
    return skipped


def _expert_tensor(name: str, expert: RoutedExperts, type_id: int) -> PlannedTensor:
    tensor = expert.tensor
    span = Span(expert.file, tensor.file_offset, tensor.nbytes)
    return plan.copy_tensor(name, tensor.shape, tensor.type, type_id, span)


# One GGUF -------------------------------------------------------------------------------------------------------


def _dialect(path: Path, experts: Mapping[str, RoutedExperts], target: str | None) -> Dialect:
    """Return the dialect to write: the one asked for, or the first that holds all of the experts' types."""
    codecs = {codec.name: codec for expert in experts.values() if (codec := expert.tensor.codec) is not None}
    candidates = [dialects.get(name) for name in ((target,) if target else _TARGETS)]
    held = [[name for name, codec in codecs.items() if d.type_id(codec) is not None] for d in candidates]
    chosen = next((d for d, names in zip(candidates, held, strict=True) if len(names) == len(codecs)), None)
    if chosen is None:
        lacking = [name for name in codecs if name not in held[0]]
        raise PlanError(
            f"{path}: the experts are {', '.join(codecs)}; {candidates[0].name} cannot hold {', '.join(lacking)}"
            + ("; choose another --target" if target else ", and no other dialect holds all of them")
        )
    return chosen


def _as_gguf(
    conversion: convert.Conversion,
    experts: Mapping[str, RoutedExperts],
    outfile: str | Path,
    sources: Sequence[Path],
    states: Sequence[tuple[int, int]],
    skipped: Sequence[tuple[str, str]],
    split_max_nbytes: int | None,
) -> Plan:
    dialect = conversion.dialect
    tensors = []
    for output in conversion.outputs:
        if output.role != "expert":
            tensors.append(conversion.tensor(output))
            continue
        expert = experts[output.name]
        assert expert.tensor.codec is not None
        type_id = dialect.type_id(expert.tensor.codec)
        assert type_id is not None
        tensors.append(_expert_tensor(output.name, expert, type_id))
    conversion.check_dense()
    # A file is called by its experts: they are most of a model, if not of a small one.
    file_type = common_file_type([tensor for tensor in tensors if tensor.name in experts], dialect)
    metadata = conversion.metadata(tensors, file_type)
    label = "" if file_type is None else dialect.file_type_name(file_type) or ""
    text = str(outfile)
    if not text.endswith((".gguf", "/")) and text != "-":
        text += "/"  # KTransformers' flag names a directory
    return plan.build(
        output_path(text, metadata, label, named=conversion.checkpoint.path.name, parameter="output_path"),
        metadata,
        tensors,
        source_files=sources,
        source_states=states,
        dialect=dialect.name,
        split_max_nbytes=split_max_nbytes,
        skipped=skipped,
        notes=conversion.all_notes(),
        file_type=label,
    )


# A folder of safetensors files ----------------------------------------------------------------------------------


def _as_safetensors(
    conversion: convert.Conversion,
    experts: Mapping[str, RoutedExperts],
    directory: Path,
    sources: Sequence[Path],
    states: Sequence[tuple[int, int]],
    skipped: Sequence[tuple[str, str]],
) -> Plan:
    checkpoint = conversion.checkpoint
    if directory.exists() and not directory.is_dir():
        raise PlanError(f"{directory}: is a file; --output-path names a directory")
    for source in {checkpoint.path, *(path.parent for path in sources)}:
        if directory.exists() and directory.samefile(source):
            raise PlanError(f"{directory}: holds the sources; choose another --output-path")
    # What stands outside the layers comes first, as layer -1.
    layers: dict[int, list[PlannedTensor]] = {-1: []}
    constants: dict[int, dict[str, int]] = {}
    for output in conversion.outputs:
        match = _LAYER.match(output.name)
        number = int(match[1]) if match else -1
        here = layers.setdefault(number, [])
        if output.role == "expert":
            tensor = experts[output.name].tensor
            planned = _expert_tensor(output.name, experts[output.name], tensor.type_id)
            here.append(replace(planned, stored=("U8", (tensor.nbytes,))))
            constants.setdefault(number, {})[output.name.removesuffix(".weight") + ".ggml_type"] = tensor.type_id
        else:
            here += unchanged(output)
    files: list[PlannedFile] = []
    weight_map: dict[str, str] = {}
    for position, number in enumerate(sorted(layers)):
        name = f"model-{position:05d}-of-{len(layers) - 1:05d}.safetensors"
        shard = PlannedShard(
            directory / name, tensors=plan.placed_in_shard(layers[number]), constants=constants.get(number, {})
        )
        files.append(shard)
        weight_map |= dict.fromkeys(shard.entries, name)
    _no_strangers(directory, files)
    index = {
        "metadata": {"total_size": sum(end - begin for f in files if isinstance(f, PlannedShard) for *_, begin, end in
                                       f.entries.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }  # fmt: skip
    files.append(PlannedText(directory / INDEX_NAME, content=(json.dumps(index, indent=2) + "\n").encode()))
    notes = list(_notes(experts, layers))
    files += [PlannedText(directory / name, content=content) for name, content in _companions(checkpoint, notes)]
    return Plan(
        tuple(files),
        tuple(str(source.resolve()) for source in sources),
        tuple(states),
        "safetensors",
        tuple(skipped),
        tuple(notes),
        "hybrid",
    )


def unchanged(output: Output) -> list[PlannedTensor]:
    """Return a tensor of the checkpoint under a hybrid's name, and its scales; nothing for parts of one (k_b, v_b)."""
    first = output.stack[0][0]
    if len(output.stack) > 1 or first.transposed or first.shape != first.tensor.shape:
        return []
    found = [_copied(output.name, first.tensor)]
    if first.scale is not None:
        suffix = first.scale.name.removeprefix(first.tensor.name)
        found.append(_copied(output.name + suffix, first.scale))
    return found


def _copied(name: str, tensor: SourceTensor) -> PlannedTensor:
    span = Span(tensor.shard, tensor.offset, tensor.nbytes)
    # An error names the source, not what becomes of it.
    return replace(plan.copy_tensor(name, tensor.shape, tensor.dtype, -1, span), items=((tensor.name,),))


def _no_strangers(directory: Path, files: Sequence[PlannedFile]) -> None:
    """Refuse a directory that holds safetensors files of something else: the loader walks it and would read them, too."""
    own = {file.path.name for file in files}
    strange = sorted(path.name for path in directory.rglob("*.safetensors") if path.name not in own)
    if strange:
        raise PlanError(
            f"{directory}: holds {strange[0]} ({len(strange)} such files), which is not of this merge; KTransformers would "
            "load it, too: move it away, or choose another --output-path"
        )


def _companions(checkpoint: Checkpoint, notes: list[str]) -> Iterator[tuple[str, bytes]]:
    """Return the small files beside the weights: config, tokenizer, templates, code, card and license.

    A link to a file that is not the checkpoint's is left out, with a note: what it leads to, a private key perhaps, must not
    get into a folder that is made to be shared.
    """
    paths = {path for pattern in _COMPANIONS for path in checkpoint.path.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        # An index of the source's shards, whatever it is called, would be wrong here.
        if path.name.endswith(".index.json") or path.stat().st_size > _COMPANION_NBYTES:
            continue
        real = path.resolve()
        if not _is_the_checkpoints(real, checkpoint):
            notes.append(f"{path.name} is a link to a file outside of the checkpoint, {real}; it is not copied")
            continue
        with open_regular(real) as file:
            yield path.name, file.read(_COMPANION_NBYTES)


def _is_the_checkpoints(path: Path, checkpoint: Checkpoint) -> bool:
    """Return whether a file is the checkpoint's own: in its directory, or a blob of Hugging Face's cache, which links to it."""
    in_cache = path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")
    return in_cache or path.is_relative_to(checkpoint.path.resolve())


def _notes(experts: Mapping[str, RoutedExperts], layers: Mapping[int, Sequence[PlannedTensor]]) -> Iterator[str]:
    strange = sorted({expert.tensor.type for expert in experts.values()} - KNOWN_TO_KTRANSFORMERS)
    if strange:
        yield (
            f"KTransformers' loader does not know the experts' type {', '.join(strange)}; it knows "
            f"{', '.join(sorted(KNOWN_TO_KTRANSFORMERS))}"
        )
    if not any(tensor.type == "F8_E4M3" for tensors in layers.values() for tensor in tensors):
        yield "the checkpoint has no FP8 weights; all but the routed experts stay as they are there"
