"""Take a native GGUF back to a Hugging Face checkpoint: the official names, codes, scales and files.

FP8 rows give their codes and, where the scales form 128x128 tiles, one scale byte for each; FP4 blocks give pairs of codes
and a scale for 32. No value is computed. The shards, and the small files beside them, go through the engine like a GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from ggufx import chat_templates, companions, execute, output_names, plan
from ggufx.architectures.deepseek_v4_file import DeepSeekV4File, Member
from ggufx.checkpoint import INDEX_NAME, SourceTensor
from ggufx.container import Value, ValueType
from ggufx.errors import OptionError, PlanError
from ggufx.execute import Progress
from ggufx.file import File, open
from ggufx.plan import Matrix, Plan, PlannedFile, PlannedShard, PlannedTensor, PlannedText, Span, Transform
from ggufx.retarget import is_bfloat16, short
from ggufx.values import as_unicode

__all__ = ["export", "plan_export"]

_FP8, _FP4 = "F8_E4M3_B128", "MXFP4"
FP8_TILE: Final = 128
"""Rows and columns that share a scale in the official checkpoints."""


def plan_export(file: File, outfile: str | Path) -> Plan:
    """Plan the export of an open GGUF.

    Parameters
    ----------
    file
        A DeepSeek-V4 main model of any dialect whose tensors are native (FP8, FP4) or plain floats.
    outfile
        The checkpoint's directory; may exist.

    Raises
    ------
    PlanError
        The model is of another architecture, a tensor has a type that the checkpoint format lacks, or the metadata
        contradicts the tensors.
    """
    directory = output_names.directory(outfile)
    if directory.exists() and not directory.is_dir():
        raise OptionError("{0}: is a file; {outfile} names the checkpoint's directory", directory)
    if not DeepSeekV4File.recognises(file):
        architecture = file.architecture
        raise PlanError(
            f"{file.path}: holds a model of architecture {architecture!r} or an MTP block; export knows the main model of "
            "DeepSeek-V4 (deepseek4)"
        )
    model = DeepSeekV4File(file)
    unsaid = _said_by_config(model)
    paths = [str(path) for path in file.paths]
    names = [Path("model.safetensors")] if model.single_shard else model.shard_names()
    _no_other_shards(directory, [path.name for path in names] + [INDEX_NAME] * (len(names) > 1))
    shards: list[list[PlannedTensor]] = [[] for _ in names]
    with execute.open_files():
        for member in model.members.values():
            number = 0 if model.single_shard else model.shard_of(member)
            shards[number] += _tensors(file, member, paths, model.config["n_routed_experts"])
    files: list[PlannedFile] = []
    described: list[SourceTensor] = []
    for number, (name, tensors) in enumerate(zip(names, shards, strict=True)):
        placed = plan.placed_in_shard(tensors)
        files.append(PlannedShard(directory / name, tensors=placed))
        described += [SourceTensor(t.name, t.type, t.shape, number, t.offset, t.nbytes) for t in placed]
    # The architecture's own check of what it will be given when this is converted again.
    model.arranged("nisparks", names, described)
    tokenizer, notes = companions.tokenizer_files(
        file.facts, chat_templates.deepseek_v4(chat_templates.release_of(None, directory.absolute().name))
    )
    small = {
        "config.json": _config(model, described),
        "generation_config.json": companions.generation_config(file.facts),
        **tokenizer,
    }
    if len(names) > 1:
        small[INDEX_NAME] = {
            "metadata": {"total_size": sum(t.nbytes for t in described)},
            "weight_map": {t.name: names[t.shard].name for t in sorted(described, key=lambda t: t.name)},
        }
    files += [PlannedText(directory / name, content=_json(content)) for name, content in small.items()]
    files.append(
        PlannedText(directory / "README.md", content=_utf8(companions.model_card(file.facts), "the model card"))
    )
    notes += [*file.notes, *(f"config.json: {key} is supposed: {why}" for key, why in model.supposed)]
    notes += [f"key {key} is left out: config.json has no place for it" for key in unsaid]
    if model.config["num_nextn_predict_layers"]:
        notes.append("config.json: num_nextn_predict_layers is 0: the MTP block is not in this file")
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in file.paths]
    sources = tuple(str(Path(path).resolve()) for path in paths)
    return Plan(tuple(files), sources, tuple(states), "safetensors", notes=tuple(notes), file_type="safetensors")


def export(
    path: str | Path,
    outfile: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    dialect: str | None = None,
) -> list[Path]:
    """Export a GGUF: :func:`plan_export` and :func:`ggufx.execute.execute`; returns the files written."""
    with open(path, dialect=dialect) as file:
        return execute.execute(
            plan_export(file, outfile),
            overwrite=overwrite,
            resume=resume,
            threads=threads,
            executor=executor,
            progress=progress,
        )


def _said_by_config(model: DeepSeekV4File) -> list[str]:
    """Return the architecture's keys that config.json says nothing of.

    Raises
    ------
    PlanError
        A key has a value that config.json has no place for: a clamp per layer, say.
    """
    said: dict[str, Value] = {}
    for form in ("nisparks", "llama.cpp"):
        said |= model.keys(form, file_type=0, chat_template="")
    own = {key: value for key, value in model.file.metadata.typed().items() if key.startswith("deepseek4.")}
    for key, value in own.items():
        if key in said and _values(value) != _values(said[key]):
            raise PlanError(
                f"{model.file.path}: key {key} is {short(value)}, which config.json has no place for beside the other keys: "
                f"a conversion of it would write {short(said[key])}"
            )
    return [key for key in own if key not in said and key != "deepseek4.nextn_predict_layers"]


def _values(value: Value) -> set[Any]:
    """Return the different values of a key: writers differ in its type, and in whether an array counts the MTP block."""
    items = value.to_json() if value.type is ValueType.ARRAY else [value.data]
    with np.errstate(over="ignore"):  # of a float64 that is no float32: infinity is another value, too
        return {float(np.float32(item)) if isinstance(item, float) else item for item in items}


def _no_other_shards(directory: Path, ours: Sequence[str]) -> None:
    """Raise PlanError where the directory has shards that are not ours, or an index of others: they would be taken for it."""
    found = [*directory.glob("*.safetensors"), *directory.glob(INDEX_NAME)]
    others = sorted(path.name for path in found if path.name not in ours)
    if others:
        raise PlanError(
            f"{directory}: holds {len(others)} files of another checkpoint, {others[0]} first; choose another --outfile, or "
            "remove them"
        )


def _tensors(file: File, member: Member, paths: list[str], experts: int) -> list[PlannedTensor]:
    """Return the checkpoint's tensors of one of the file's: two for native types, as many times as there are experts."""
    tensor, role = member.tensor, member.family.role
    kind = tensor.type
    shape = tensor.shape[1:] if role == "expert" else tensor.shape
    count = tensor.shape[0] if role == "expert" else 1
    rows, row_len = prod(shape[:-1]), shape[-1]
    source, nbytes = paths.index(str(tensor.path)), tensor.nbytes // count
    fp8 = kind == _FP8
    native = (fp8 and role in ("dense", "expert")) or (kind == _FP4 and role == "expert")
    step = FP8_TILE if native and fp8 else 1
    codes = Transform("codes", kind, "F8_E4M3" if fp8 else "I8", (row_len,))
    scales = Transform("scales", kind, "F8_E8M0", (row_len,), step)
    plain = None if native else _plain(file, member, row_len, experts)
    found = []
    for expert in range(count):
        name = member.of_expert(expert)
        # The source by its name in the file, so that an error says which tensor it is.
        span = Span(source, tensor.file_offset + expert * nbytes, nbytes)
        matrix = Matrix(tensor.name, kind, rows, row_len, span, rows_per_scale=step)
        if plain is not None:
            found.append(plan.plan_tensor(name, shape, plain.target, -1, plain, [[matrix]]))
            continue
        found.append(plan.plan_unpacked(name, codes.target, codes, matrix, row_len if fp8 else row_len // 2))
        scale = name.removesuffix(".weight") + ".scale"
        width = row_len // (FP8_TILE if fp8 else 32)
        found.append(plan.plan_unpacked(scale, scales.target, scales, matrix, width))
    return found


def _plain(file: File, member: Member, row_len: int, experts: int) -> Transform:
    """Return what becomes of a tensor that is not native: the same number type, or the one that it came from."""
    tensor, role = member.tensor, member.family.role
    kind = tensor.type
    if role == "table":
        # The limit is what a conversion will demand: these are experts' numbers.
        return Transform("copy" if kind == "I64" else "cast", kind, "I64", (row_len,), limit=experts)
    if kind not in ("F32", "BF16", "F16"):
        raise PlanError(
            f"{file.path}: tensor {tensor.name!r} is {kind}, which the official checkpoint has no form for; export a file "
            "whose tensors are native (F8_E4M3_B128, MXFP4) or BF16"
        )
    # Norms and matrices are BF16 in the checkpoint, and F32 in files only because runtimes compute so.
    half = role != "vector" or member.source.endswith("norm.weight")
    if kind == "F32" and half and is_bfloat16(tensor):
        return Transform("encode", kind, "BF16", (row_len,), exact=True)
    return Transform("copy", kind, kind, (row_len,))


def _config(model: DeepSeekV4File, tensors: Iterable[SourceTensor]) -> dict[str, Any]:
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    config = {**model.config, "num_nextn_predict_layers": 0, **companions.special_ids(model.file.facts)}
    experts = {dtype for name, dtype in dtypes.items() if ".ffn.experts." in name and name.endswith(".weight")}
    known = {"I8": "fp4", "F8_E4M3": "fp8"}
    if len(experts) == 1 and (dtype := experts.pop()) in known:
        config["expert_dtype"] = known[dtype]
    if "F8_E4M3" in dtypes.values():
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_TILE, FP8_TILE],
        }
    return dict(sorted(config.items()))


def _json(content: Mapping[str, Any]) -> bytes:
    return _utf8(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "a token or another text")


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = as_unicode(text[max(0, error.start - 20) : error.end + 20])
        raise PlanError(
            f"{what} holds bytes that are not UTF-8, which a checkpoint's files cannot: {around!r}; ggufx set repairs a key"
        ) from None
