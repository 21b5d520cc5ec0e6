"""The ``ggufx`` command: flags, tables and progress bars over the library's functions; no logic of its own."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_args

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

import ggufx
from ggufx import budget as budget_module
from ggufx import catalog, dialects, execute, kernels, mixes, stopping, testing, types
from ggufx import convert as convert_module
from ggufx import diff as diff_module
from ggufx import edit as edit_module
from ggufx import export as export_module
from ggufx import imatrix as imatrix_module
from ggufx import inspect as inspect_module
from ggufx import measure as measure_module
from ggufx import merge as merge_module
from ggufx import quantize as quantize_module
from ggufx import recipe as recipe_module
from ggufx import retarget as retarget_module
from ggufx import rewrite as rewrite_module
from ggufx import verify as verify_module
from ggufx import warmup as warmup_module
from ggufx.assignments import parse_assignments, parse_overrides
from ggufx.commands import App, Quiet, explain
from ggufx.errors import DiskError, FallbackError, GGUFError, PlanError
from ggufx.file import open as open_gguf
from ggufx.options import given, refuse
from ggufx.output_names import fill_file_type, is_directory
from ggufx.plan import Plan
from ggufx.stopping import Stopping
from ggufx.terminal import Lines, fail, hush, make_table, prepare_streams, printable
from ggufx.terminal import err as _err
from ggufx.terminal import out as _out
from ggufx.values import as_unicode

__all__ = ["app", "main"]

app = App(
    name="ggufx",
    help="Native FP8/FP4 checkpoints to GGUF without losing a bit; every fork's GGUF, readable.",
    pretty_exceptions_enable=False,
)

Per = StrEnum("Per", {name: name for name in get_args(budget_module.Per)})  # type: ignore[misc]
Target = StrEnum("Target", {name: name for name in dialects.DIALECTS})  # type: ignore[misc]
Reading = StrEnum("Reading", {name: name for name in (*dialects.DIALECTS, dialects.OPAQUE)})  # type: ignore[misc]
Dense = StrEnum("Dense", {name: name for name in convert_module.DENSE_TYPES})  # type: ignore[misc]
MergeForm = StrEnum("MergeForm", {name: name for name in merge_module.FORMATS})  # type: ignore[misc]
MoveTarget = StrEnum("MoveTarget", {name: name for name in retarget_module.TARGETS})  # type: ignore[misc]
MoveDense = StrEnum("MoveDense", {name: name for name in retarget_module.DENSE_TYPES})  # type: ignore[misc]
Plain = StrEnum("Plain", {name: name for name in retarget_module.PLAIN_TYPES})  # type: ignore[misc]

ObjectiveChoice = StrEnum("ObjectiveChoice", {name: name for name in get_args(types.Objective)})  # type: ignore[misc]
EffortChoice = StrEnum("EffortChoice", {name: name for name in get_args(types.Effort)})  # type: ignore[misc]

_FAMILY = Per("family")
_NORMAL = EffortChoice("normal")
_REFERENCE = ObjectiveChoice("reference")
_NISPARKS = Target("nisparks")
_FOLDER = MergeForm("safetensors")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Tiles at a time. Default: the CPU count, at most 16.")
]
DialectOption = Annotated[
    Reading | None, typer.Option("--dialect", help="Whose type ids the file has. Default: found from ids and sizes.")
]


# Not a Path, here and elsewhere: that drops the slash at the end, which says that a directory is meant.
OutFile = Annotated[
    str,
    typer.Option("--outfile", "-o", metavar="FILE", help="Output; may hold {ftype}. A directory gets a name in it."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, at the end.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a partial output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: print it as JSON.")]
SplitMaxSize = Annotated[str | None, typer.Option(help="Split into files of at most N(M|G|MiB|GiB) bytes of data.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")]

TargetSize = Annotated[
    str | None, typer.Option(metavar="N(M|G|MiB|GiB)", help="Choose types: files of at most so many bytes in all.")
]
TargetBpw = Annotated[
    float | None, typer.Option(min=0.0, help="Choose types: at most so many bits per weight over all tensors.")
]
Candidates = Annotated[
    str | None,
    typer.Option("--types", help="Types to choose from, and native: iq2_ks,q4_k,... Default: all that can be written."),
]
PerGroup = Annotated[Per, typer.Option(help="What is given a type: a run of layers of like tensors, or each tensor.")]
SampleLen = Annotated[int, typer.Option(min=1, help="Weights of each tensor to measure the types on.")]


def _parse_size(text: str, option: str) -> int:
    """Parse ``90G`` or ``7.5G`` (decimal, as llama.cpp's tools do), or ``12GiB``."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:([KMGT]?)|([KMGT])i)B?", text.strip(), re.IGNORECASE)
    nbytes = 0
    if match is not None:
        unit = _UNITS[(match[2] or "").upper()] if match[3] is None else 1024 ** " KMGT".index(match[3].upper())
        nbytes = int(Decimal(match[1]) * unit)
    if nbytes == 0:
        raise PlanError(f"{option} {text}: expected a size such as 50G, 7.5G or 12GiB")
    return nbytes


def _parse_nbytes(text: str | None) -> int | None:
    return None if text is None else _parse_size(text, "--split-max-size")


def _nbytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _json(data: Any) -> str:
    """Return JSON that every parser takes: numbers that are not finite become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, str):
            return as_unicode(value)  # a name in a file need not be UTF-8
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(clean(data), indent=1, allow_nan=False) + "\n"


def _print_json(data: Any) -> None:
    sys.stdout.write(_json(data))


def _text(name: str) -> str:
    """Return a name from a file as a part of a line, without markup."""
    return escape(printable(name, line=True))


class _Compiling:
    """Says when kernels are compiled, and is a clock that stands still meanwhile: what comes after is as quick as what was."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begun: float | None = None
        self._seconds = 0.0

    def clock(self) -> float:
        begun = self._begun
        return (time.monotonic() if begun is None else begun) - self._seconds

    def __call__(self, kind: str, begins: bool) -> None:
        if begins:
            self._begun = time.monotonic()
            self._say(f"compiling {kind or 'kernels'} (once)")
        elif self._begun is not None:
            self._seconds += time.monotonic() - self._begun
            self._begun = None
            self._say("")


@contextmanager
def _progress(verb: str, unit: str = "bytes", *, notes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes (or another unit) with rate and time left, on the terminal only.

    That a kernel is compiled, which may take longer than all else, the bar says; without a terminal ``notes`` do.
    """
    rate: tuple[ProgressColumn, ...] = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    if unit != "bytes":
        rate = (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *rate, TimeRemainingColumn())
    noted: set[str] = set()

    def say(what: str) -> None:
        progress.update(task, description=f"{verb}: {what}" if what else verb)
        if progress.disable and notes and what and what not in noted:
            noted.add(what)
            _err.print(f"note: {what}", markup=False)

    compiling = _Compiling(say)
    bar = Progress(
        *columns, console=_err, transient=True, disable=not _err.is_terminal or Lines.hushed, get_time=compiling.clock
    )
    with kernels.compiling_heard(compiling), bar as progress:
        task = progress.add_task(verb, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield report


def _version(show: bool) -> None:
    if show:
        _out.print(f"ggufx {ggufx.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    hush(quiet)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Directory with config.json, safetensors shards and tokenizer.")],
    outfile: Annotated[
        str | None,
        typer.Option(
            "--outfile",
            "-o",
            metavar="FILE",
            help="Output; may hold {ftype}. A directory gets a name by the GGUF convention. Default: CHECKPOINT.",
        ),
    ] = None,
    target: Annotated[Target, typer.Option(help="Dialect to write.")] = _NISPARKS,
    outtype: Annotated[
        str, typer.Option(help="native (alias moe-f8-e4m3-mxfp4): every native code is kept.")
    ] = "native",
    dense: Annotated[
        Dense | None,
        typer.Option(
            help="What FP8 becomes where the target has no FP8 type. Default: q8_0 for DeepSeek-V4 (bf16 and f32 are exact), "
            "bf16 for DeepSeek-V3."
        ),
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Write the multi-token-prediction block's own file.")] = False,
    model_name: Annotated[
        str | None, typer.Option(help="general.name. Default: the card's or the directory's.")
    ] = None,
    chat_template_file: Annotated[Path | None, typer.Option(help="Jinja chat template to write.")] = None,
    split_max_size: SplitMaxSize = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave tensors of this shell pattern out. Repeatable.")] = None,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Copy E4M3 NaN codes and E8M0 255 instead of refusing them.")
    ] = False,
    stamp: Annotated[bool, typer.Option("--stamp", help="Add the keys ggufx.version and ggufx.dialect.")] = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint to GGUF, keeping its native FP8 and FP4 bits."""
    template = None if chat_template_file is None else chat_template_file.read_text(encoding="utf-8")
    plan = convert_module.plan_convert(
        checkpoint,
        outfile,
        target=target.value,
        outtype=outtype,
        dense=None if dense is None else dense.value,
        mtp=mtp,
        model_name=model_name,
        chat_template=template,
        split_max_nbytes=_parse_nbytes(split_max_size),
        stamp=stamp,
        skip=skip or (),
        allow_nan=allow_nan,
    )
    _show_or_execute(
        plan, "convert", dry_run=dry_run, as_json=as_json, verbose=verbose, overwrite=overwrite, resume=resume,
        threads=threads,
    )  # fmt: skip


def _show_or_execute(
    plan: Plan, verb: str, *, dry_run: bool, as_json: bool, verbose: bool = False, overwrite: bool, resume: bool,
    threads: int | None,
) -> None:  # fmt: skip
    """Do what every command that writes a model does with its plan."""
    if dry_run:
        _print_json(plan.to_json()) if as_json else _print_plan(plan, threads, verbose=verbose)
        return
    _print_skipped(plan, _err, verbose=verbose)
    if verbose:
        _print_tensors(plan)
    _execute(plan, verb, overwrite=overwrite, resume=resume, threads=threads)


def _execute(
    plan: Plan,
    verb: str,
    *,
    overwrite: bool,
    resume: bool,
    threads: int | None,
    tally: quantize_module.Tally | None = None,
) -> None:
    start = time.monotonic()
    with _progress(verb) as progress:
        try:
            paths = execute.execute(
                plan, overwrite=overwrite, resume=resume, threads=threads, progress=progress, observer=tally
            )
        except (_Stopped, Stopping):
            raise _Stopped("what is done is kept, the same command goes on") from None
    seconds = time.monotonic() - start
    groups = inspect_module.summarise(plan.tensors, lambda t: t.type) if tally is None else tally.by_type()
    _print_groups(groups, "type")
    rate = f"{plan.nbytes / seconds / 1e9:.2f} GB/s" if seconds else ""
    for path in paths:
        _out.print(_text(str(path)))
    _out.print(f"{_count(len(plan.tensors), 'tensor')}, {plan.nbytes} bytes in {seconds:.1f} s ({rate})")


def _print_plan(plan: Plan, threads: int | None, *, verbose: bool) -> None:
    data = plan.to_json()["file"]
    _print_tensors(plan) if verbose else _print_families(plan)
    _print_groups(inspect_module.summarise(plan.tensors, lambda t: t.type), "type")
    _print_groups(inspect_module.summarise(plan.tensors, lambda t: inspect_module.role(t.name)), "role")
    _print_skipped(plan, _out, verbose=verbose)
    directory = plan.files[0].path.absolute().parent
    while not directory.exists():
        directory = directory.parent
    stat = os.statvfs(directory)
    for file in plan.files:
        _out.print(f"output: {_text(str(file.path))} ({file.nbytes} bytes)")
    _out.print(
        f"{_count(data['n_tensors'], 'tensor')}, {data['n_weights']} weights, {plan.data_nbytes} bytes of data, "
        f"{data['bits_per_weight']:.4f} bits per weight, {_count(len(plan.metadata), 'key')}, dialect {plan.dialect}, "
        f"file type {plan.file_type}"
    )
    _out.print(
        f"disk: {_nbytes(plan.nbytes)} needed, {_nbytes(stat.f_bavail * stat.f_frsize)} free; "
        f"memory: about {_nbytes(execute.memory_need(plan, threads))}"
    )


def _print_skipped(plan: Plan, console: Lines, *, verbose: bool) -> None:
    """Print what is left out and why (with ``verbose`` by name), and the plan's notes."""
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.skipped:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"note: left out: {_count(len(names), 'tensor')}: {reason}", markup=False)
        for name in names if verbose else ():
            console.print(f"note:   {_text(name)}")
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def _print_groups(groups: dict[str, dict[str, Any]], label: str) -> None:
    measured = any(group.get("relative_rms") is not None for group in groups.values())
    table = make_table(label, "tensors", "weights", "bytes", "bpw", *(("relative rms",) if measured else ()))
    for name, group in groups.items():
        numbers = [group["n_tensors"], group["n_weights"], group["nbytes"], f"{group['bits_per_weight']:.4f}"]
        if measured:
            error = group["relative_rms"]
            numbers.append("" if error is None else f"{error:.5f}")
        table.add_row(_text(name), *map(str, numbers))
    _out.print(table)


def _print_families(plan: Plan) -> None:
    """Print a line for the tensors that differ in their layer and expert only."""
    families: dict[tuple[str, tuple[int, ...], str], list[Any]] = {}
    for tensor in plan.tensors:
        name = re.sub(r"(^blk|^layers|\.experts)\.\d+\.", r"\1.N.", tensor.name)
        families.setdefault((name, tensor.shape, tensor.type), []).append(tensor)
    table = make_table("tensor", "count", "shape", "type", "bytes", "source")
    for (name, shape, kind), members in families.items():
        nbytes = sum(tensor.nbytes for tensor in members)
        table.add_row(_text(name), str(len(members)), _text(str(list(shape))), kind, str(nbytes), _how(members[0]))
    _out.print(table)


def _print_tensors(plan: Plan) -> None:
    table = make_table("tensor", "shape", "type", "bytes", "source")
    for tensor in plan.tensors:
        table.add_row(_text(tensor.name), _text(str(list(tensor.shape))), tensor.type, str(tensor.nbytes), _how(tensor))
    _out.print(table)


def _how(tensor: Any) -> str:
    words = {
        "copy": "copied", "pack": "packed, exact", "cast": "cast, exact", "encode": "rounded", "codes": "unpacked, exact",
        "scales": "scales, exact", "factor": "factor",
    }  # fmt: skip
    how = "decoded, exact" if tensor.transform.exact else words[tensor.transform.op]
    return f"{tensor.transform.kind} {how}"


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="A GGUF; any member of a split; the directory of a checkpoint or of a hybrid (ggufx merge)."
        ),
    ],
    tensors: Annotated[str | None, typer.Option(help="Shell pattern of the tensors to list.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="List at most N tensors and array elements.")] = None,
    dialect: DialectOption = None,
    header_only: Annotated[
        bool,
        typer.Option("--header-only", help="Exit with 0 though tensor data or members of a split are missing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a GGUF's dialect, metadata, tensors, and bytes by type and by role; or a checkpoint's.

    Of a file that is incomplete it shows what is there, says what is missing, and exits with 1 (with --header-only: 0).
    """
    name = None if dialect is None else dialect.value
    # A table shows a few elements of an array; JSON without a limit has them all.
    elements = limit if as_json or limit is not None else 8

    def look(*, header_only: bool) -> dict[str, Any]:
        return inspect_module.inspect(
            file, dialect=name, pattern=tensors, limit=limit, elements=elements, header_only=header_only
        )

    failure: GGUFError | None = None
    try:
        found = look(header_only=header_only)
    except GGUFError as error:
        try:
            found = look(header_only=True)
        except GGUFError:
            raise error from None
        if found["file"]["complete"]:
            raise
        failure = error
    _print_json(found) if as_json else _print_inspected(found)
    for note in found["file"]["notes"]:
        _err.print(f"note: {_text(note)}")
    if failure is not None:
        raise failure
    if tensors is not None and not found["n_matching"]:
        fail(f"{file}: {tensors!r} matches none of the {found['file']['n_tensors']} tensors")


_LONGEST = 1000
"""Characters of a value that are laid out for a terminal, which is narrower."""


def _print_inspected(found: dict[str, Any]) -> None:
    about = found["file"]
    for key in ("path", "format", "version", "dialect", "file_type", "alignment", "data_offset", "nbytes"):
        # A hybrid and a checkpoint have no header, so no version and no alignment.
        if about["format"] == "gguf" or about[key] is not None:
            _out.print(f"{key}: {about[key]}", markup=False)
    if len(about["equivalent_dialects"]) > 1:
        _out.print(f"(its ids mean the same in {', '.join(about['equivalent_dialects'])})", markup=False)
    for note in about["notes"]:
        _out.print(f"note: {note}", markup=False)
    table = make_table("key", "type", "value")
    for key, value in found["metadata"].items():
        text = json.dumps(value["value"], ensure_ascii=False)
        # A table cuts what does not fit the terminal; a pipe gets all of it.
        shown = text[:_LONGEST] if _out.is_terminal else text
        kind = value["type"] + (f" x {value['length']}" if "length" in value else "")
        table.add_row(_text(key), _text(kind), _text(shown))
    if table.row_count:
        _out.print(table)
    scaled = any(tensor.get("scales") for tensor in found["tensors"])
    table = make_table("tensor", "shape", "type", "bytes", "bpw", *(("scales",) if scaled else ()))
    for tensor in found["tensors"]:
        numbers = (str(tensor["nbytes"]), f"{tensor['bits_per_weight']:.4f}")
        scales = (_text(tensor["scales"] or ""),) if scaled else ()
        table.add_row(
            _text(tensor["name"]), _text(str(tensor["shape"])), _text(tensor["type_label"]), *numbers, *scales
        )
    _out.print(table)
    if len(found["tensors"]) < found["n_matching"]:
        _out.print(f"... {found['n_matching'] - len(found['tensors'])} more", markup=False)
    _print_groups(found["by_type"], "type")
    _print_groups(found["by_role"], "role")
    _out.print(
        f"{_count(about['n_tensors'], 'tensor')}, {about['n_weights']} weights, {about['data_nbytes']} bytes, "
        f"{about['bits_per_weight']:.4f} bits per weight"
    )


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The GGUF, or the directory of a hybrid (ggufx merge).")],
    against: Annotated[Path, typer.Option(help="The checkpoint directory, or the GGUF, it was made from.")],
    experts: Annotated[
        Path | None,
        typer.Option(help="Of a merge: the GGUF, or directory, of its routed experts. Default: compared by value."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Tensors of this shell pattern were left out. Repeatable.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Rounded tensors fail, too.")] = False,
    allow_key: Annotated[
        list[str] | None, typer.Option(help="Metadata keys of this shell pattern may differ. Repeatable.")
    ] = None,
    ignore_metadata: Annotated[bool, typer.Option("--ignore-metadata", help="Any metadata key may differ.")] = False,
    dialect: DialectOption = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")] = False,
) -> None:
    """Prove a conversion or a move: compare every tensor's codes, scales or values, and every key, with the source's.

    Rounded tensors must be as near to their source, block by block, as their types explain. Relative errors are relative to
    the source. Exit code 0: verified, or rounded within bounds; 1: not verified; 2: trouble, such as a missing or broken file,
    or one that is not of this source at all.
    """
    with _progress("verify") as progress:
        report = verify_module.verify(
            file,
            against,
            experts=experts,
            dialect=None if dialect is None else dialect.value,
            skip=skip or (),
            allow_keys=allow_key or (),
            ignore_metadata=ignore_metadata,
            threads=threads,
            progress=progress,
        )
    passed = report.exact if exact else report.ok
    if as_json:
        _print_json(report.to_json())
        raise typer.Exit(0 if passed else 1)
    shown = [t for t in report.tensors if verbose or not t.ok]
    if shown:
        table = make_table("tensor", "type", "status", "differing", "max error", "relative rms", "detail")
        for t in shown:
            numbers = (str(t.differing), f"{t.max_error:.3g}", f"{t.relative_rms:.3g}")
            table.add_row(_text(t.name), t.type, t.status, *numbers, _text(t.detail))
        _out.print(table)
    for line in report.metadata:
        _out.print(f"key {line}", markup=False)
    groups: dict[tuple[str, str], list[Any]] = {}
    for t in report.tensors:
        groups.setdefault((t.type, t.status), []).append(t)
    table = make_table("type", "status", "tensors", "max error", "relative rms")
    for (kind, status), members in groups.items():
        worst, rms = max(t.max_error for t in members), max(t.relative_rms for t in members)
        table.add_row(kind, status, str(len(members)), f"{worst:.3g}", f"{rms:.3g}")
    _out.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    for line in report.allowed:
        _out.print(f"allowed to differ: key {line}", markup=False)
    differing = len(report.metadata)
    keys = f"; {differing} key{' differs' if differing == 1 else 's differ'}" if differing else ""
    verdict = report.verdict if passed or not report.ok else f"NOT EXACT, {report.verdict}"
    _out.print(f"{verdict} ({report.target}): {counts}{keys}")
    raise typer.Exit(0 if passed else 1)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A GGUF, or the directory of a hybrid (ggufx merge).")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    dialect: DialectOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two GGUFs: keys, names, shapes, types, decoded values.

    Relative errors are relative to the first file. Exit code 0: the same; 1: different; 2: trouble, such as a missing or
    broken file.
    """
    with _progress("diff") as progress:
        found = diff_module.diff(first, second, dialect=None if dialect is None else dialect.value, progress=progress)
    if as_json:
        _print_json(found.to_json())
        raise typer.Exit(0 if found.same else 1)
    for line in found.keys:
        _out.print(f"key {line}", markup=False)
    for sign, names in (("-", found.only_first), ("+", found.only_second)):
        for name in names:
            _out.print(f"tensor {sign} {name}", markup=False)
    if found.reordered:
        _out.print("the common tensors are in another order")
    if found.tensors:
        table = make_table("tensor", "types", "shapes", "differing", "max error", "relative rms", "note")
        for t in found.tensors:
            kinds = t.types[0] if t.types[0] == t.types[1] else f"{t.types[0]} -> {t.types[1]}"
            shapes = (
                str(list(t.shapes[0])) if t.shapes[0] == t.shapes[1] else f"{list(t.shapes[0])} -> {list(t.shapes[1])}"
            )
            numbers = (str(t.differing), f"{t.max_error:.3g}", f"{t.relative_rms:.3g}")
            table.add_row(_text(t.name), kinds, _text(shapes), *numbers, t.note)
        _out.print(table)
    _out.print("the same" if found.same else "different")
    raise typer.Exit(0 if found.same else 1)


@app.command()
def rewrite(
    file: Annotated[Path, typer.Argument(help="A GGUF; any member of a split.")],
    outfile: OutFile,
    keep: Annotated[list[str] | None, typer.Option(help="Copy only tensors of this shell pattern. Repeatable.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Leave tensors of this shell pattern out. Repeatable.")] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Rename tensors; each * of NEW takes the text of one of OLD. Repeatable."),
    ] = None,
    split_max_size: SplitMaxSize = None,
    dialect: DialectOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Copy a GGUF with the same metadata and tensor bytes: all tensors or some, merged or split."""
    with open_gguf(file, dialect=None if dialect is None else dialect.value) as source:
        plan = rewrite_module.plan_rewrite(
            source,
            outfile,
            split_max_nbytes=_parse_nbytes(split_max_size),
            keep=keep or (),
            drop=drop or (),
            rename=_renames(rename or ()),
        )
        _show_or_execute(
            plan, "rewrite", dry_run=dry_run, as_json=as_json, verbose=verbose, overwrite=overwrite, resume=resume,
            threads=threads,
        )  # fmt: skip


def _renames(texts: Iterable[str]) -> dict[str, str]:
    parsed: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise PlanError(f"--rename {text}: expected OLD=NEW")
        if old in parsed:
            raise PlanError(f"--rename {text}: {old} has the new name {parsed[old]} already")
        parsed[old] = new
    return parsed


@app.command()
def retarget(
    file: Annotated[Path, typer.Argument(help="A GGUF; any member of a split.")],
    outfile: OutFile,
    target: Annotated[MoveTarget, typer.Option(help="Dialect to move to.")],
    dense: Annotated[
        MoveDense | None,
        typer.Option(
            help="What becomes of tensors that the target cannot hold. Default: bf16, exact for FP8; ds4: q8_0."
        ),
    ] = None,
    plain: Annotated[
        Plain | None,
        typer.Option(
            help="ds4: type of hyper-connections, compressors and routers; f16 for older readers. Default: f16 and f32 stay, "
            "others become f32."
        ),
    ] = None,
    split_max_size: SplitMaxSize = None,
    dialect: DialectOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Move a GGUF to another dialect: names, order, keys, and types only where the target cannot hold them."""
    with open_gguf(file, dialect=None if dialect is None else dialect.value) as source:
        plan = retarget_module.plan_retarget(
            source,
            outfile,
            target.value,
            dense=None if dense is None else dense.value,
            plain=None if plain is None else plain.value,
            split_max_nbytes=_parse_nbytes(split_max_size),
        )
        _show_or_execute(
            plan, "retarget", dry_run=dry_run, as_json=as_json, verbose=verbose, overwrite=overwrite, resume=resume,
            threads=threads,
        )  # fmt: skip


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A native DeepSeek-V4 GGUF; any member of a split.")],
    outfile: Annotated[str, typer.Option("--outfile", "-o", metavar="DIR", help="Directory of the checkpoint.")],
    dialect: DialectOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Take a native GGUF back to a Hugging Face checkpoint: official names, FP8 and FP4 codes and scales, config, tokenizer."""
    with open_gguf(file, dialect=None if dialect is None else dialect.value) as source:
        plan = export_module.plan_export(source, outfile)
        _show_or_execute(
            plan, "export", dry_run=dry_run, as_json=as_json, verbose=verbose, overwrite=overwrite, resume=resume,
            threads=threads,
        )  # fmt: skip


def _no_splits(words: list[str] | None) -> None:
    """Tell who means the merge of llama-gguf-split, which takes files without options, before options are missed."""
    if words:
        raise PlanError(
            f"{words[0]}: this command merges a checkpoint with a GGUF's experts, and takes options only; "
            f"`ggufx merge-splits {' '.join(words)}` merges the members of a split GGUF"
        )


@app.command()
def merge(
    safetensor_path: Annotated[
        Path, typer.Option("--safetensor-path", "--safetensor_path", help="Directory of the FP8 checkpoint.")
    ],
    gguf_path: Annotated[
        Path,
        typer.Option(
            "--gguf-path", "--gguf_path", help="GGUF with the routed experts; any member of a split, or a directory."
        ),
    ],
    output_path: Annotated[
        str,
        typer.Option(
            "--output-path",
            "--output_path",
            "--outfile",
            "-o",
            help="Directory to write; with --format gguf also a file.",
        ),
    ],
    form: Annotated[
        MergeForm, typer.Option("--format", help="safetensors: what KTransformers loads. gguf: one GGUF.")
    ] = _FOLDER,
    target: Annotated[
        Target | None,
        typer.Option(help="gguf: dialect. Default: nisparks, which has FP8, where it holds the experts' types."),
    ] = None,
    dense: Annotated[
        Dense | None, typer.Option(help="gguf: what FP8 becomes that cannot stay. Default: as ggufx convert.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="gguf: general.name. Default: the card's or the directory's.")
    ] = None,
    split_max_size: SplitMaxSize = None,
    dialect: DialectOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    others: Annotated[list[str] | None, typer.Argument(hidden=True, is_eager=True, callback=_no_splits)] = None,
) -> None:
    """Merge an FP8 checkpoint with a GGUF's routed experts: KTransformers' hybrid, or one GGUF. (Splits: merge-splits.)"""
    del others  # refused
    plan = merge_module.plan_merge(
        safetensor_path,
        gguf_path,
        output_path,
        form=form.value,
        target=None if target is None else target.value,
        dense=None if dense is None else dense.value,
        model_name=model_name,
        split_max_nbytes=_parse_nbytes(split_max_size),
        dialect=None if dialect is None else dialect.value,
    )
    _show_or_execute(
        plan, "merge", dry_run=dry_run, as_json=as_json, verbose=verbose, overwrite=overwrite, resume=resume,
        threads=threads,
    )  # fmt: skip


def _one_output(out: str | None, outfile: str | None) -> str | None:
    if out is not None and outfile is not None:
        raise PlanError(f"the output is given twice: {out} and --outfile {outfile}")
    return outfile if out is None else out


@app.command()
def split(
    file: Annotated[Path, typer.Argument(help="A GGUF.")],
    # llama-gguf-split's order.
    out: Annotated[str | None, typer.Argument(metavar="[PREFIX]", help="As --outfile.")] = None,
    outfile: Annotated[
        str | None,
        typer.Option(
            "--outfile", "-o", metavar="PREFIX", help="PREFIX-00001-of-0000N.gguf are written. Default: FILE."
        ),
    ] = None,
    split_max_size: SplitMaxSize = None,
    split_max_tensors: Annotated[
        int | None, typer.Option(min=1, help="Split into files of at most N tensors. Default: 128.")
    ] = None,
    no_tensor_first_split: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="The first file holds the metadata and no tensor.")
    ] = False,
    dialect: DialectOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Split a GGUF as llama-gguf-split does."""
    with open_gguf(file, dialect=None if dialect is None else dialect.value) as source:
        plan = rewrite_module.plan_split(
            source,
            _one_output(out, outfile),
            split_max_nbytes=_parse_nbytes(split_max_size),
            split_max_tensors=split_max_tensors,
            tensor_first=not no_tensor_first_split,
        )
        _show_or_execute(
            plan, "split", dry_run=dry_run, as_json=as_json, overwrite=overwrite, resume=resume, threads=threads
        )


@app.command()
def merge_splits(
    file: Annotated[Path, typer.Argument(help="Any member of a split GGUF.")],
    # llama-gguf-split's order.
    out: Annotated[str | None, typer.Argument(metavar="[OUT.gguf]", help="As --outfile.")] = None,
    outfile: Annotated[
        str | None, typer.Option("--outfile", "-o", metavar="FILE", help="Output. Default: the members' common name.")
    ] = None,
    dialect: DialectOption = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge the members of a split GGUF into one file."""
    with open_gguf(file, dialect=None if dialect is None else dialect.value) as source:
        plan = rewrite_module.plan_merge(source, _one_output(out, outfile))
        _show_or_execute(
            plan, "merge", dry_run=dry_run, as_json=as_json, overwrite=overwrite, resume=resume, threads=threads
        )


@app.command(name="set")
def set_command(
    file: Annotated[Path, typer.Argument(help="A GGUF; any member of a split.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=[TYPE:]VALUE",
            help="TYPE: u8..u64, i8..i64, f32, f64, bool, str, arr[T]; int, float; by default the one that KEY has. "
            "VALUE may be @FILE. KEY[3] is an element of an array.",
        ),
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Key to remove. Repeatable.")] = None,
    change_type: Annotated[bool, typer.Option("--change-type", help="A key may get another type than it has.")] = False,
    threads: Threads = None,
    resume: Resume = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes; write nothing.")] = False,
) -> None:
    """Set or remove metadata: in place where the header's padding allows it, else the file is written anew."""
    if not assignments and not remove:
        raise PlanError("nothing to do: give KEY=TYPE:VALUE or --remove KEY")
    known = edit_module.typed_metadata(file)
    values = parse_assignments(assignments or (), known, change_types=change_type)
    edit = edit_module.plan_edit(file, values, remove or ())
    for note in edit.notes:
        _err.print(f"note: {note}", markup=False)
    for line in edit.lines:
        _out.print(line, markup=False)
    if not edit.lines:
        _out.print("nothing changes")
        return
    how = "in place" if edit.plan is None else f"writing {edit.plan.nbytes} bytes anew"
    _out.print(f"{edit.path}: {_count(len(edit.lines), 'key')}, {how}{' (dry run)' if dry_run else ''}", markup=False)
    if not dry_run:
        with _progress("set") as progress:
            try:
                edit_module.set_keys(edit, resume=resume, threads=threads, progress=progress)
            except (_Stopped, Stopping):
                raise _Stopped("what is done is kept, the same command goes on") from None


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A GGUF (any member of a split), or a checkpoint's directory.")],
    # llama-quantize's order; any of the three may be left out.
    first: Annotated[str | None, typer.Argument(metavar="OUT.gguf", help="As --outfile.")] = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="TYPE",
            help="Type of what no rule decides, or the mix that has types for it, such as Q4_K_M. Default: it keeps its bits.",
        ),
    ] = None,
    third: Annotated[str | None, typer.Argument(metavar="NTHREADS", help="As --threads.")] = None,
    outfile: Annotated[
        str | None,
        typer.Option(
            "--outfile",
            "-o",
            metavar="FILE",
            help="Output; may hold {ftype}. A directory gets a name in it. Needed but with --dry-run.",
        ),
    ] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="TYPE is llama-quantize's mix where the name is a type's, too: Q2_K, IQ2_XXS.")
    ] = False,
    recipe: Annotated[str | None, typer.Option(help="Recipe file, or a shipped one (ggufx recipe list).")] = None,
    custom_q: Annotated[
        list[str] | None, typer.Option(help="Rules RE=TYPE,RE=TYPE before the recipe's; the first wins. Repeatable.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="Rule RE=TYPE before those; the last wins. Repeatable.")
    ] = None,
    tensor_type_file: Annotated[Path | None, typer.Option(help="File of such rules, before --tensor-type.")] = None,
    target_size: TargetSize = None,
    target_bpw: TargetBpw = None,
    candidates: Candidates = None,
    per: PerGroup = _FAMILY,
    sample_len: SampleLen = budget_module.SAMPLE_LEN,
    imatrix: Annotated[
        str | None,
        typer.Option(
            help="Importance matrix (.gguf or .dat); or ones, or energy (the weights' own), where a type demands one."
        ),
    ] = None,
    target: Annotated[
        Target | None, typer.Option(help="Dialect to write. Default: the first that holds all types.")
    ] = None,
    effort: Annotated[EffortChoice, typer.Option(help="How long the encoders search.")] = _NORMAL,
    objective: Annotated[
        ObjectiveChoice, typer.Option(help="Error to minimise: with the reference's weights, or plain (mse).")
    ] = _REFERENCE,
    pure: Annotated[
        bool, typer.Option("--pure", help="TYPE for the embeddings and the head, too; a mix's main type for all.")
    ] = False,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of output.weight.")] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(help="Type of token_embd.weight and per_layer_token_embd.weight.")
    ] = None,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Leave output.weight as it is.")
    ] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize tensors that are lossy already.")
    ] = False,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="A type that does not fit the rows is an error (exit code 3).")
    ] = False,
    split_max_size: SplitMaxSize = None,
    keep_split: Annotated[bool, typer.Option("--keep-split", help="Split as the source is.")] = False,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            help="Write only tensors of this shell pattern; members of a split that hold none may be missing. Repeatable."
        ),
    ] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Of a checkpoint: the multi-token-prediction block's file.")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="Of a checkpoint: general.name.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Of a checkpoint: leave these tensors out. Repeatable.")
    ] = None,
    override_kv: Annotated[
        list[str] | None, typer.Option(metavar="KEY=TYPE:VALUE", help="Add or replace a metadata key. Repeatable.")
    ] = None,
    dialect: DialectOption = None,
    device: Annotated[
        str | None, typer.Option(help="GPU to search on: cuda, or cuda:N. The bytes are the CPU's. Default: the CPU.")
    ] = None,
    measure_errors: Annotated[bool, typer.Option("--measure", help="Report the relative error by type.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write everything that was done to a JSON file.")] = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line per tensor.")] = False,
) -> None:
    """Quantize a GGUF or a checkpoint by a recipe, a mix such as Q4_K_M, or to a type, in one pass."""
    default, outfile, threads = _quantize_words([w for w in (first, second, third) if w is not None], outfile, threads)
    sized = target_size is not None or target_bpw is not None
    refuse("quantize", given({"default": default, "target_size": target_size, "target_bpw": target_bpw}))
    if outfile is None and not dry_run:
        raise PlanError("--outfile is missing; --dry-run does without")
    rules = _recipe(recipe, custom_q, tensor_type, tensor_type_file)
    prepare: Callable[..., quantize_module.Quantization] = quantize_module.prepare
    overrides = parse_overrides(override_kv or ())
    if sized:
        known = outfile is not None and "{" not in outfile and not is_directory(outfile)
        if outfile is not None and known and not (dry_run or split_max_size or keep_split):
            execute.check_output(Path(outfile), overwrite=overwrite)
        prepare = partial(
            _fitted, asked=_Asked(target_size, target_bpw, candidates, per.value, sample_len), threads=threads,
            split_max_nbytes=_parse_nbytes(split_max_size), overrides=overrides, dry_run=dry_run, as_json=as_json,
        )  # fmt: skip
    elif not rules.rules and default is None and output_tensor_type is None and token_embedding_type is None:
        raise PlanError("nothing to do: give a TYPE, a --recipe, --custom-q or --tensor-type")
    prepared = prepare(
        source,
        recipe=rules,
        default=default,
        mix=mix,
        imatrix=imatrix,
        target=None if target is None else target.value,
        effort=effort.value,
        objective=objective.value,
        pure=pure,
        output_type=output_tensor_type,
        embedding_type=token_embedding_type,
        leave_output=leave_output_tensor,
        allow_requantize=allow_requantize,
        fallback=not no_fallback,
        keep_split=keep_split,
        only=tensors or (),
        measure=measure_errors,
        device=device,
        dialect=None if dialect is None else dialect.value,
        mtp=mtp,
        model_name=model_name,
        skip=skip or (),
    )
    if prepared.errors:
        _refuse(prepared, as_json=as_json)
    if not as_json:
        _print_findings(prepared.findings, _out if dry_run else _err)
    plan = prepared.plan(
        outfile or _beside(source), split_max_nbytes=_parse_nbytes(split_max_size), overrides=overrides
    )
    # Of the plan's notes those that are findings have been told.
    told = {finding.message for finding in prepared.findings}
    shown = replace(plan, notes=tuple(note for note in plan.notes if note not in told))
    if dry_run:
        if as_json:
            _print_json(plan.to_json() | {"findings": [asdict(finding) for finding in prepared.findings]})
        else:
            _print_plan(shown, threads, verbose=verbose)
        return
    _print_skipped(shown, _err, verbose=verbose)
    if report is not None:
        _check_report(report, plan)
    tally = quantize_module.Tally(prepared, plan, on_tensor=_print_line if verbose else None)
    _execute(plan, "quantize", overwrite=overwrite, resume=resume, threads=threads, tally=tally)
    for name, count in tally.dead_blocks.items():
        _err.print(f"note: {_text(name)}: no importance at all in {count} blocks of columns; the mean was taken")
    if report is not None:
        try:
            report.write_text(_json(tally.report()), encoding="utf-8")
        except OSError as error:
            raise DiskError(f"--report {report}: {error.strerror}; the model itself is finished") from None


def _quantize_words(
    words: list[str], outfile: str | None, threads: int | None
) -> tuple[str | None, str | None, int | None]:
    """Read ``[OUT.gguf] [TYPE] [NTHREADS]``; return (type, output, threads), which options may have given, too."""
    left = list(words)
    if left and left[-1].isdecimal():
        count = int(left.pop())
        if threads is not None:
            raise PlanError(f"the number of threads is given twice: {count} and --threads {threads}")
        if count < 1:
            raise PlanError(f"NTHREADS {count}: expected at least 1")
        threads = count
    out: str | None = None
    if len(left) == 2 and all(_is_type_or_mix(word) for word in left):
        raise PlanError(f"{left[0]} and {left[1]} are two types; the output is named before the type, or by --outfile")
    if len(left) == 2 or (left and _is_file_name(left[0])):
        out = left.pop(0)
    if len(left) > 1 or (left and _is_file_name(left[0])):
        raise PlanError(f"{' '.join(words)}: expected [OUT.gguf] [TYPE] [NTHREADS] after the source, in this order")
    if out is not None:
        outfile = _one_output(out, outfile)
    return (left[0] if left else None), outfile, threads


def _is_file_name(word: str) -> bool:
    return word.lower().endswith(".gguf") or "/" in word or os.sep in word


def _is_type_or_mix(word: str) -> bool:
    return mixes.find(word) is not None or word.upper() in {codec.name.upper() for codec in types.all_codecs()}


class _Asked(NamedTuple):
    """The options of a choice of types."""

    size: str | None
    bits_per_weight: float | None
    types: str | None
    per: str
    sample_len: int

    def budget(self, source: Path, **options: Any) -> tuple[budget_module.Budget, int]:
        """Return what can be chosen, and the bytes that it may take; refuses a size that cannot be reached."""
        if (self.size is None) == (self.bits_per_weight is None):
            raise PlanError("give one of --target-size and --target-bpw")
        if self.bits_per_weight is not None and not math.isfinite(self.bits_per_weight):
            raise PlanError(f"--target-bpw {self.bits_per_weight}: expected a number such as 4.5")
        limit = 0 if self.size is None else _parse_size(self.size, "--target-size")
        names = None if self.types is None else [name for name in self.types.split(",") if name.strip()]
        budget = budget_module.Budget(
            source, type_names=names, per=self.per, sample_len=self.sample_len, **options  # type: ignore[arg-type]
        )  # fmt: skip
        if self.bits_per_weight is not None:
            limit = budget.nbytes_at(self.bits_per_weight)
        budget.check(limit)
        return budget, limit


def _fitted(
    source: Path,
    *,
    recipe: recipe_module.Recipe,
    default: str | None,
    mix: bool,
    pure: bool,
    asked: _Asked,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> quantize_module.Quantization:
    """Do what :func:`ggufx.quantize.prepare` does, with types chosen for a size; a dry run tells what choosing takes."""
    del default, mix, pure  # excluded by a size
    budget, limit = asked.budget(source, rules=recipe, **options)
    if dry_run:
        _print_budget(budget, limit, threads, as_json=as_json)
        raise typer.Exit
    fit = _measured(budget, limit, threads)
    _print_fit(fit, _out)
    return fit.quantization


def _measured(budget: budget_module.Budget, limit: int, threads: int | None) -> budget_module.Fit:
    for name, count in budget.left_out.items():
        _err.print(f"note: {name} demands importance and is no choice for {count} tensors; --imatrix gives it")
    with _progress("measure", "tensors") as progress:
        budget.measure(threads=threads, progress=progress)
    return budget.fit(limit)


def _print_budget(budget: budget_module.Budget, limit: int, threads: int | None, *, as_json: bool) -> None:
    estimate = budget.estimate(threads)
    if as_json:
        told = {"estimated_seconds": estimate.seconds, "not_compiled": list(estimate.not_compiled)}
        _print_json(budget.to_json() | {"limit": limit} | told)
        return
    _out.print(
        f"to be chosen: types of {budget.n_tensors} tensors, at most {limit} bytes, dialect {budget.dialect.name}"
    )
    _out.print(f"candidates: {', '.join(name.lower() for name in budget.candidates)}")
    for name, count in budget.left_out.items():
        _out.print(f"note: {name} demands importance and is no choice for {count} tensors; --imatrix gives it")
    _out.print(f"reachable: {budget.smallest_nbytes} to {budget.largest_nbytes} bytes")
    time_needed = (
        "how long that takes is not known before a candidate is compiled"
        if estimate.seconds is None
        else f"about {estimate.seconds:.0f} s (candidates tried for this estimate: {len(estimate.tried)})"
    )
    _out.print(f"measuring: {budget.n_sampled} weights in all, {time_needed}; `ggufx recipe fit` does it")
    if estimate.not_compiled:
        names = ", ".join(name.lower() for name in estimate.not_compiled)
        _out.print(
            f"note: not compiled yet: {names}; measuring compiles them first, some seconds each, unless `ggufx warmup` has"
        )


def _print_fit(fit: budget_module.Fit, console: Lines) -> None:
    table = make_table("family", "tensors", "weights", "bytes", "bpw", "relative rms", "types")
    for record in fit.families():
        table.add_row(
            _text(record["family"]), str(record["n_tensors"]), str(record["n_weights"]), str(record["nbytes"]),
            f"{record['bits_per_weight']:.4f}", f"{record['relative_rms']:.5f}",
            ", ".join(f"{kind.lower()} x{count}" for kind, count in record["types"].items()),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{fit.nbytes} bytes ({fit.nbytes / fit.limit:.2%} of {fit.limit}), {fit.bits_per_weight:.4f} bits per weight, "
        f"dialect {fit.quantization.dialect.name}"
    )


def _refuse(prepared: quantize_module.Quantization, *, as_json: bool) -> NoReturn:
    """Tell everything that was found, and end: with 3 if it is only types that do not fit the rows."""
    if as_json:
        _print_json({"findings": [asdict(finding) for finding in prepared.findings]})
    else:
        _print_findings(prepared.findings, _err)
    _err.print(f"nothing is written: {_count(len(prepared.errors), 'error')}", style="red")
    raise SystemExit(prepared.exit_code)


def _check_report(report: Path, plan: Plan) -> None:
    """Make the folder of a report, as that of the output is made; refuse a place where none can be written, before the work."""
    if report.resolve() in {path.resolve() for path in (*map(Path, plan.source_files), *(f.path for f in plan.files))}:
        raise PlanError(f"--report {report}: is a file of the model")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        is_new = not report.exists()
        with report.open("a"):
            pass
    except OSError as error:
        raise PlanError(f"--report {report}: cannot be written ({error.strerror})") from None
    if is_new:
        report.unlink()


def _print_line(line: str) -> None:
    _out.print(_text(line))


def _beside(source: Path) -> Path:
    """Return where the output of a dry run would go that was given no name."""
    return (source if source.is_dir() else source.parent) / "ggufx-dry-run.gguf"


def _recipe(
    recipe: str | None, custom_q: list[str] | None, tensor_type: list[str] | None, tensor_type_file: Path | None
) -> recipe_module.Recipe:
    """Put the sources of rules in order: --tensor-type, --tensor-type-file, --custom-q, the recipe."""
    rules = recipe_module.Recipe.from_tensor_types(tensor_type or ())
    if tensor_type_file is not None:
        words = recipe_module.read_text(tensor_type_file).split()
        rules += recipe_module.Recipe.from_tensor_types(words, str(tensor_type_file))
    for text in custom_q or ():
        rules += recipe_module.Recipe.from_custom_q(text)
    return rules if recipe is None else rules + recipe_module.load(recipe)


def _print_findings(findings: list[recipe_module.Finding], console: Lines) -> None:
    for finding in findings:
        style = {"error": "red", "warning": "yellow"}.get(finding.severity)
        console.print(f"{finding.severity}: {_text(finding.message)}", style=style)


recipe_app = App(help="Recipes: list, show, check, convert, or read one off a file.")
app.add_typer(recipe_app, name="recipe")


@recipe_app.command("list")
def recipe_list() -> None:
    """List the recipes that come with ggufx."""
    for name, text in recipe_module.shipped().items():
        _out.print(f"{name}: {text.splitlines()[0].lstrip('# ')}", markup=False)


Form = StrEnum("Form", {"recipe": "recipe", "custom-q": "custom-q", "tensor-type": "tensor-type"})
_RECIPE_FORM = Form("recipe")


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file or script, a shipped recipe's name, or with --for a mix: Q4_K_M.")
    ],
    model: Annotated[
        Path | None, typer.Option("--for", help="GGUF or checkpoint to write a mix of llama-quantize's out for.")
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(help="With --for: importance matrix that will be used; some mixes hang on there being one."),
    ] = None,
    form: Annotated[Form, typer.Option("--as", help="Spelling to print.")] = _RECIPE_FORM,
    target: Annotated[Target | None, typer.Option(help="Take the first alternative that this dialect holds.")] = None,
    dialect: DialectOption = None,
) -> None:
    """Print a recipe's rules, or a mix's for a model: as a recipe, ik_llama.cpp's --custom-q, or --tensor-type arguments."""
    if model is not None:
        rules = quantize_module.mix_recipe(
            model,
            recipe,
            imatrix=imatrix,
            target=None if target is None else target.value,
            dialect=None if dialect is None else dialect.value,
        )
    elif mixes.find(recipe) is not None and not Path(recipe).is_file():
        raise PlanError(f"{recipe} is a mix: which types it has hangs on the model, so name one with --for MODEL")
    else:
        rules = recipe_module.load(recipe)
    if target is not None:
        rules = rules.narrowed({c.name: dialects.get(target.value).type_id(c) is not None for c in types.all_codecs()})
    if form.value == "recipe":
        sys.stdout.write(printable(rules.text()))
    elif form.value == "custom-q":
        sys.stdout.write(printable(rules.custom_q() + "\n"))
    else:
        sys.stdout.write(printable("".join(f"{line}\n" for line in rules.tensor_types())))


@recipe_app.command("lint")
def recipe_lint(
    recipe: Annotated[str, typer.Argument(help="Recipe file or script, or a shipped recipe's name.")],
    source: Annotated[Path, typer.Argument(help="A GGUF, or a checkpoint's directory.")],
    target: Annotated[
        Target | None, typer.Option(help="Dialect to write. Default: the first that holds all types.")
    ] = None,
    imatrix: Annotated[str | None, typer.Option(help="Importance matrix; or ones, or energy.")] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize tensors that are lossy already.")
    ] = False,
    no_fallback: Annotated[bool, typer.Option("--no-fallback", help="A fallback is an error (exit code 3).")] = False,
    dialect: DialectOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a recipe against a model: rules without effect, types that do not fit. Exit 0 without errors."""
    prepared = quantize_module.prepare(
        source,
        recipe=recipe,
        imatrix=imatrix,
        target=None if target is None else target.value,
        allow_requantize=allow_requantize,
        fallback=not no_fallback,
        dialect=None if dialect is None else dialect.value,
    )
    counts = {s: sum(f.severity == s for f in prepared.findings) for s in ("error", "warning", "note")}
    if as_json:
        _print_json({"target": prepared.dialect.name, **counts, "findings": [asdict(f) for f in prepared.findings]})
    else:
        _print_findings(prepared.findings, _out)
        kept = sum(choice.kept for choice in prepared.choices)
        _out.print(
            f"target {prepared.dialect.name}: {len(prepared.choices) - kept} tensors change, {kept} stay; "
            + ", ".join(_count(count, severity) for severity, count in counts.items())
        )
    if prepared.errors:
        raise typer.Exit(prepared.exit_code)


@recipe_app.command("fit")
def recipe_fit(
    source: Annotated[Path, typer.Argument(help="A GGUF, or a checkpoint's directory.")],
    target_size: TargetSize = None,
    target_bpw: TargetBpw = None,
    candidates: Candidates = None,
    per: PerGroup = _FAMILY,
    sample_len: SampleLen = budget_module.SAMPLE_LEN,
    recipe: Annotated[str | None, typer.Option(help="Rules that stay: a recipe file, or a shipped one.")] = None,
    custom_q: Annotated[list[str] | None, typer.Option(help="Rules that stay, RE=TYPE,RE=TYPE. Repeatable.")] = None,
    tensor_type: Annotated[list[str] | None, typer.Option(help="Rule that stays, RE=TYPE. Repeatable.")] = None,
    imatrix: Annotated[str | None, typer.Option(help="Importance matrix; or ones, or energy.")] = None,
    target: Annotated[
        Target | None, typer.Option(help="Dialect to write. Default: the first that holds the types named.")
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize tensors that are lossy already.")
    ] = False,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Of a checkpoint: the multi-token-prediction block's file.")
    ] = False,
    dialect: DialectOption = None,
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what can be reached and what measuring takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Choose the types for a size and print the recipe: measures every candidate on a sample of every tensor's rows."""
    budget, limit = _Asked(target_size, target_bpw, candidates, per.value, sample_len).budget(
        source,
        rules=_recipe(recipe, custom_q, tensor_type, None),
        imatrix=imatrix,
        target=None if target is None else target.value,
        allow_requantize=allow_requantize,
        mtp=mtp,
        dialect=None if dialect is None else dialect.value,
    )
    if dry_run:
        _print_budget(budget, limit, threads, as_json=as_json)
        return
    fit = _measured(budget, limit, threads)
    _print_fit(fit, _err)
    sys.stdout.write(printable(fit.text()))


@recipe_app.command("from-gguf")
def recipe_from_gguf(
    file: Annotated[Path, typer.Argument(help="A GGUF; any member of a split.")],
    dialect: DialectOption = None,
) -> None:
    """Print the recipe of an existing file: rules that give each of its tensors the type it has."""
    with open_gguf(file, dialect=None if dialect is None else dialect.value) as opened:
        rules = recipe_module.from_tensors(
            (t.name, t.shape, t.type if t.codec else t.type_label) for t in opened.tensors
        )
        bits = opened.data_nbytes * 8 / max(1, sum(t.size for t in opened.tensors))
        header = f"# {file.name}: {len(opened)} tensors, {opened.data_nbytes} bytes, {bits:.4f} bits per weight\n"
    sys.stdout.write(printable(header + rules.text()))


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="A GGUF, or a hybrid's directory, to take tensors from.")],
    type_names: Annotated[str, typer.Option("--types", help="Types to compare, comma-separated: iq2_ks,q4_k,...")],
    tensors: Annotated[str | None, typer.Option(help="Shell pattern of the tensors. Default: every matrix.")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix, .gguf or legacy .dat.")] = None,
    effort: Annotated[EffortChoice, typer.Option(help="How long the encoders search.")] = _NORMAL,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows per tensor, evenly spread.")] = 4096,
    plot: Annotated[Path | None, typer.Option(help="Draw error against bits per weight (png, svg, pdf).")] = None,
    dialect: DialectOption = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON record per tensor and type.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print them as CSV.")] = False,
) -> None:
    """Compare quant types on real tensors: encode, decode, and show the errors.

    Tensors with values that are NaN or infinite are left out and named, and the exit code is 1.
    """
    importance = None if imatrix is None else imatrix_module.load(imatrix)
    names = [name.strip() for name in type_names.split(",") if name.strip()]
    if plot is not None:
        measure_module.check_plot(plot)
    with _progress("measure") as progress:
        found = measure_module.measure(
            file,
            names,
            pattern=tensors,
            imatrix=importance,
            effort=effort.value,  # type: ignore[arg-type]
            max_rows=max_rows,
            dialect=None if dialect is None else dialect.value,
            threads=threads,
            progress=progress,
        )
    records = [item.to_json() for item in found]
    if as_json:
        _print_json({"summary": measure_module.summary(found), "tensors": records})
    elif as_csv:
        columns = list(dict.fromkeys(key for record in records for key in record))
        writer = csv.DictWriter(sys.stdout, columns, restval="")
        writer.writeheader()
        writer.writerows(records)
    else:
        table = make_table("type", "tensors", "left out", "bpw", "relative rms", "max error", "SQNR dB")
        for line in measure_module.summary(found):
            if not line["tensors"]:
                table.add_row(line["type"], "0", str(line["left_out"]), "", "", "", "")
                continue
            numbers = (f"{line[key]:.{digits}f}" for key, digits in (("bits_per_weight", 4), ("relative_rmse", 5)))
            table.add_row(
                line["type"], str(line["tensors"]), str(line["left_out"]), *numbers, f"{line['max_error']:.4g}",
                f"{line['mean_sqnr']:.2f}",
            )  # fmt: skip
        _out.print(table)
        for reason in dict.fromkeys(f"{item.type}: {item.note}" for item in found if item.note and not item.damaged):
            _out.print(f"left out: {reason}", markup=False)
        for reason in dict.fromkeys(item.note for item in found if item.damaged):
            _out.print(f"left out: {_text(reason)}", markup=False)
    if plot is not None:
        measure_module.plot(found, plot)
    damaged = list(dict.fromkeys(item.tensor for item in found if item.damaged))
    if damaged:
        fail(
            f"{file}: {len(damaged)} of {len({item.tensor for item in found})} tensors hold values that are NaN or infinite, "
            f"{damaged[0]!r} first"
        )


imatrix_app = App(name="imatrix", help="Look into importance matrices and convert them.")
app.add_typer(imatrix_app)

MatrixFile = Annotated[Path, typer.Argument(help="Importance matrix, .gguf or legacy .dat; the content decides.")]
MatrixFormat = StrEnum("MatrixFormat", {name: name for name in get_args(imatrix_module.Format)})  # type: ignore[misc]


@imatrix_app.command(name="info")
def imatrix_info(
    file: MatrixFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an importance matrix: where it comes from, its entries, and experts without data."""
    found = imatrix_module.summary(imatrix_module.load(file))
    if as_json:
        _print_json(found)
        return
    table = make_table("entry", "values", "rows", "count", "min", "mean", "max", "without data")
    for line in found["entries"]:
        low, high = line["min_count"], line["max_count"]
        numbers = ("" if line[key] is None else f"{line[key]:.4g}" for key in ("min", "mean", "max"))
        empty = line["without_data"]
        listed = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        table.add_row(
            _text(line["name"]), str(line["length"]), str(line["rows"]), str(low) if low == high else f"{low}..{high}",
            *numbers, f"{len(empty)}: {listed}" if empty else "0",
        )  # fmt: skip
    _out.print(table)
    for dataset in found["datasets"]:
        _out.print(f"data set: {_text(dataset)}")
    tokens = f" of {found['chunk_size']} tokens" if found["chunk_size"] else ""
    kind = {"gguf": "GGUF", "dat": "legacy (.dat)"}[found["format"]]
    _out.print(
        f"{kind}: {found['n_entries']} entries, {found['n_values']} values, {found['chunk_count']} chunks{tokens}, "
        f"{found['n_without_data']} rows without data"
    )
    if found["format"] == "dat":
        _out.print("a legacy file does not say where experts begin or which of them saw no token")


@imatrix_app.command(name="convert")
def imatrix_convert(
    file: MatrixFile,
    outfile: Annotated[
        str,
        typer.Option("--outfile", "-o", metavar="FILE", help="Output. In a directory it gets FILE's name."),
    ],
    format: Annotated[
        MatrixFormat | None, typer.Option("--format", help="Default: dat if OUTFILE ends in .dat, else gguf.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert an importance matrix between GGUF and the legacy format; says what the format cannot hold."""
    chosen = format.value if format is not None else "dat" if outfile.endswith(".dat") else "gguf"
    path = Path(outfile) / f"{file.stem}.{chosen}" if is_directory(outfile) else fill_file_type(outfile, chosen)
    matrix = imatrix_module.load(file)
    for note in imatrix_module.save(matrix, path, chosen, overwrite=overwrite):  # type: ignore[arg-type]
        _err.print(f"note: {note}", markup=False)
    _out.print(f"{path}: {len(matrix)} entries read, written as {chosen}", markup=False)


@app.command(name="types")
def types_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
) -> None:
    """List the quant types: ids per dialect, block, header, bits per weight, and what ggufx does with them."""
    if markdown:
        sys.stdout.write(catalog.markdown())
        return
    rows = catalog.type_rows()
    if as_json:
        _print_json(rows)
        return
    table = make_table(*rows[0])
    for row in rows:
        table.add_row(*(_text(catalog.cell(value)) for value in row.values()))
    _out.print(table)


Names = Annotated[list[str] | None, typer.Argument(metavar="[TYPE]...", help="Types, in any case. Default: all.")]


@app.command()
def selftest(
    names: Names = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold quant types, third-party ones too, to the laws of a codec (ggufx.testing). Exit 0 if none is broken."""
    codecs = [types.get(name) for name in names] if names else list(types.all_codecs())
    found: dict[str, list[testing.Verdict]] = {}
    with _progress("selftest", unit="types", notes=False) as progress:
        for number, codec in enumerate(codecs):
            progress(number, len(codecs))
            found[codec.name] = list(testing.verdicts(codec, seed=seed))
    broken = [verdict for verdicts in found.values() for verdict in verdicts if verdict.status == "broken"]
    if as_json:
        data = {name: [asdict(verdict) for verdict in verdicts] for name, verdicts in found.items()}
        _print_json({"broken": len(broken), "types": data})
        raise typer.Exit(1 if broken else 0)
    _print_verdicts(found)
    for verdict in broken:
        _out.print(f"{verdict.codec} breaks {verdict.law}: {verdict.detail}", markup=False)
    seconds = sum(verdict.seconds for verdicts in found.values() for verdict in verdicts)
    _out.print(f"{len(found)} types, {len(broken)} laws broken, {seconds:.1f} s")
    raise typer.Exit(1 if broken else 0)


_MARKS = {"kept": "ok", "broken": "BROKEN", "inapplicable": "-", "undecided": "?"}


def _print_verdicts(found: dict[str, list[testing.Verdict]]) -> None:
    """Print laws in lines and few types in columns, or many types in lines and numbered laws in columns."""
    if len(found) <= 4:
        table = make_table("law", *found, "it says")
        for line in zip(*found.values(), strict=True):
            cells = [_MARKS[v.status] + (f" {v.seconds * 1000:.0f} ms" if v.seconds else "") for v in line]
            table.add_row(line[0].law, *cells, testing.LAWS[line[0].law].description)
        _out.print(table)
        return
    table = make_table("type", *(str(number) for number in range(1, len(testing.LAWS) + 1)), "seconds")
    for name, verdicts in found.items():
        table.add_row(name, *(_MARKS[v.status] for v in verdicts), f"{sum(v.seconds for v in verdicts):.2f}")
    _out.print(table)
    for number, law in enumerate(testing.LAWS.values(), 1):
        _out.print(f"{number:2} {law.name}: {law.description}", markup=False)


@app.command()
def warmup(names: Names = None) -> None:
    """Compile the kernels of quant types now, into the cache on disk, so that no later call waits for it.

    Exit 1 if they cannot be kept.
    """
    with _progress("warmup", unit="kernels", notes=False) as progress:
        warmed = list(warmup_module.warm_up(names or None, progress=progress))
    table = make_table("type", "kernel", "seconds", "")
    for kernel in warmed:
        how = "compiled" if kernel.compiled else "from the cache"
        table.add_row(
            kernel.type, kernel.verb, f"{kernel.seconds:.2f}", how if kernel.kept else "compiled, but not kept"
        )
    _out.print(table)
    _out.print(f"{len(warmed)} kernels, {sum(kernel.seconds for kernel in warmed):.1f} s")
    lost = sum(not kernel.kept for kernel in warmed)
    if lost:
        fail(f"{lost} kernels were compiled, but not kept: set NUMBA_CACHE_DIR to a folder that can be written")


class _Stopped(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt: typer ends the process on that one without a word to the user."""


class _Stopper:
    """What SIGINT and SIGTERM do: the first ends the work in an orderly way, one a second later the process at once.

    Signals in a row are one wish. Leaving at once is safe at any moment, as a power cut is: the next run goes on. Handlers run
    when the main thread is back in Python, which may be in a compiler for seconds; so another thread hears the signals first.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at = 0.0
        self._heard = threading.Event()
        self._handled = False

    def __enter__(self) -> _Stopper:
        descriptor, self._descriptor = os.pipe()
        os.set_blocking(self._descriptor, False)
        threading.Thread(target=self._listen, args=(descriptor,), name="ggufx-signals", daemon=True).start()
        self._woken = signal.set_wakeup_fd(self._descriptor, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is what another language has set
        signal.set_wakeup_fd(self._woken)
        os.close(self._descriptor)

    def _listen(self, descriptor: int) -> None:
        while numbers := os.read(descriptor, 1):
            number = numbers[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self.number:
                if time.monotonic() - self._at > 1:
                    os._exit(128 + number)
                continue
            self.number, self._at = number, time.monotonic()
            stopping.begin()
            with suppress(OSError):
                # Not through sys.stderr, which may be in the middle of a write.
                os.write(2, b"stopping after what is being done right now; once more ends it at once\n")
            self._heard.set()
        os.close(descriptor)

    def __call__(self, number: int, frame: object) -> None:
        if self._handled:
            return
        self._handled = True
        self._heard.wait(1)
        raise _Stopped


def _note(message: Warning | str, *_: object, **__: object) -> None:
    _err.print(f"note: {message}", markup=False)


def main() -> None:
    """Run the command line: one clear line and exit code 1 for every error that input can cause."""
    prepare_streams()
    hush(False)
    with stopping.possible(), _Stopper() as stop:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _note
                app(prog_name="ggufx")
        except (_Stopped, Stopping) as reason:
            fail(f"stopped; {reason}" if str(reason) else "stopped", 128 + stop.number)
        except (GGUFError, OSError, UnicodeDecodeError) as error:
            fail(explain(error), 3 if isinstance(error, FallbackError) else 1)


def run() -> NoReturn:
    """Run :func:`main` and leave at once: taking apart Numba and a large plan at exit takes a tenth of a second."""
    code: int | str | None = 0
    if hasattr(signal, "SIGPIPE"):
        # A reader that goes away (| head) ends the process as it ends others: silently, and not with 0.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main()
    except SystemExit as leave:
        code = leave.code
    try:
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads our output any more
        code = code or 1
    os._exit(code if isinstance(code, int) else int(code is not None))
