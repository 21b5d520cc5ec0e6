#!/usr/bin/env python3
"""Measure ggufx on this machine: decoding, opening, importing, converting and moving, each beside something that does the same.

    python tools/bench.py                              # everything, a few minutes
    python tools/bench.py decode --all-types           # one subject
    python tools/bench.py convert --work-dir /dev/shm --json convert.json --markdown

Absolute times of a shared machine wander, ratios much less: the contenders of a subject take turns in rounds, and a
ratio is the median of the ratios within the rounds. The best and the median time are given besides. Nothing here needs
privileges or a network; all files go into a directory of its own under --work-dir that is removed at the end.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

# Children report the peak memory of the process that started them if that was larger (Linux copies the mark over exec).
# So this module imports nothing large at the top, and whatever is large happens in children or at the very end.

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 10**6
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A child process that has ended."""

    seconds: float
    peak_rss_nbytes: int
    output: str


def run_child(arguments: Sequence[str | Path]) -> Run:
    """Run a command to its end and measure it as a whole; what it prints is kept. Raises if it fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    # As for a user: an environment that keeps Python from caching its bytecode would have every child compile the sources.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    with subprocess.Popen(
        list(map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(map(str, arguments)), output)
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output)


def run_python(code: str, *arguments: str | Path) -> Run:
    """Run Python code in a fresh interpreter that finds this ggufx."""
    return run_child([sys.executable, "-c", code, *arguments])


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """Turn work into a function that does it and returns the seconds it took."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def take_turns(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every contender once a round and return what they returned; a round before that warms up.

    Each round has an order of its own: what runs before leaves caches and memory in a state that favours some.
    """
    for contender in contenders.values():
        contender()
    results: dict[str, list[T]] = {name: [] for name in contenders}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(contenders), len(contenders)):
            results[name].append(contenders[name]())
    return results


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table: key in the rows, heading, format of the numbers."""

    key: str
    title: str
    form: str = ""


@dataclass
class Section:
    """One table: rows of plain data, and how to show them."""

    title: str
    columns: Sequence[Column]
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def cells(self) -> Iterable[list[str]]:
        """Return the text of every row; what was not measured is "n/a"."""
        for row in self.rows:
            values = ((row.get(column.key), column.form) for column in self.columns)
            yield ["n/a" if value is None else format(value, form) for value, form in values]

    def markdown(self) -> str:
        """Return the section as Markdown."""
        if not self.columns:
            return self.note
        align = ["---:" if column.form else "---" for column in self.columns]
        lines = [[column.title for column in self.columns], align, *self.cells()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(filter(None, (f"### {self.title}", table, self.note)))

    def show(self) -> None:
        """Print the section."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for column in self.columns:
            table.add_column(column.title, justify="right" if column.form else "left")
        for cells in self.cells():
            table.add_row(*cells)
        # A file or a pipe has no width of its own; the usual guess of 80 would cut the numbers off.
        Console(width=None if sys.stdout.isatty() else 160).print(table)


def sections_of(report: Mapping[str, Any]) -> list[Section]:
    """Return the tables of what ``--json`` wrote, after one that names the machine."""
    about = report["machine"]
    facts = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    sections = [
        Section(
            "", (), f"Measured with `python tools/bench.py` on {about['cores']} cores of {about['processor']}; {facts}."
        )
    ]
    for subject, tables in report.items():
        if subject != "machine":
            sections += [
                Section(t["title"], [Column(*column) for column in t["columns"]], t["note"], t["rows"]) for t in tables
            ]
    return sections


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, cores and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        processor = match[1]
    versions = {"python": platform.python_version()}
    for package in ("numpy", "numba", "gguf", "libgguf"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"processor": processor, "cores": os.cpu_count(), "versions": versions}


# ---------------------------------------------------------------------------------------------------------------------
# decode
# ---------------------------------------------------------------------------------------------------------------------

DECODE_SHAPE = (4096, 4096)  # 64 MiB of float32: well past the caches
MAIN_TYPES = ("MXFP4", "F8_E4M3_B128", "Q8_0", "Q4_0")


def decode(options: argparse.Namespace) -> list[Section]:
    """Decode on one core, to float32 beside filling the same memory and the packages that know the type, and narrower."""
    # One core for all: libgguf takes threads of its own and cannot be told to use one.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from ggufx import types

    columns = [
        Column("type", "type"),
        Column("fill_gbps", "fill GB/s", ".1f"),
        Column("gbps", "ggufx GB/s", ".1f"),
        Column("median_gbps", "median", ".1f"),
        Column("of_fill", "of fill", ".2f"),
        Column("libgguf_gbps", "libgguf GB/s", ".1f"),
        Column("times_libgguf", "x libgguf", ".2f"),
        Column("gguf_gbps", "gguf GB/s", ".2f"),
        Column("times_gguf", "x gguf", ".1f"),
        Column("float16_times", "float16 x", ".2f"),
        Column("bfloat16_times", "bfloat16 x", ".2f"),
        Column("equal", "bits equal to"),
    ]
    note = (
        "GB/s of float32 written, 64 MiB, one core, best of the rounds; ggufx and libgguf write into the same buffer, "
        "gguf can only return a new one. float16 x and bfloat16 x: weights per second to these, over those to float32. "
        "Ratios are medians over the rounds, each against its neighbours in time."
    )
    sections = [Section("Decode", columns, note, [_decode_row(types.get(name), options.rounds) for name in MAIN_TYPES])]
    if options.all_types:
        others = [codec for codec in types.all_codecs() if codec.can_decode and codec.value_dtype == "float32"]
        rows = [_decode_row(codec, max(3, options.rounds // 4)) for codec in others if codec.name not in MAIN_TYPES]
        sections.append(Section("Decode, other types", columns, note, rows))
    return sections


def _decode_row(codec: Any, rounds: int) -> dict[str, Any]:
    import ml_dtypes
    import numpy as np

    rows, out = _packed(codec), np.zeros(DECODE_SHAPE, np.float32)
    narrow = {"float16": np.zeros(DECODE_SHAPE, np.float16), "bfloat16": np.zeros(DECODE_SHAPE, ml_dtypes.bfloat16)}
    contenders = {
        "fill": timed(lambda: out.fill(1.0)),
        "ggufx": timed(lambda: codec.decode(rows, out=out, threads=1)),
    }
    for name, half in narrow.items():
        contenders[name] = timed(partial(codec.decode, rows, out=half, threads=1))
    expected = dict(_references(codec, rows))
    peers = _peers(codec, rows, out)
    if "libgguf" in peers:
        contenders["libgguf"] = timed(peers["libgguf"])
    times = take_turns(contenders, rounds)
    if "gguf" in peers:
        # Hundreds of times slower: a few rounds beside ggufx are enough.
        pair = {"ggufx": contenders["ggufx"], "gguf": timed(peers["gguf"])}
        slow = take_turns(pair, min(3, rounds))
    else:
        slow = {}
    codec.decode(rows, out=out, threads=1)
    checks = [f"{name}: {_same_bits(out, array)}" for name, array in expected.items()]
    gbps = {name: out.nbytes / 1e9 / min(found) for name, found in (slow | times).items() if name not in narrow}
    return {
        "type": codec.name,
        "fill_gbps": gbps["fill"],
        "gbps": gbps["ggufx"],
        "median_gbps": out.nbytes / 1e9 / statistics.median(times["ggufx"]),
        "of_fill": ratio(times["fill"], times["ggufx"]),
        "of_fill_best": gbps["ggufx"] / gbps["fill"],
        "libgguf_gbps": gbps.get("libgguf"),
        "times_libgguf": ratio(times["libgguf"], times["ggufx"]) if "libgguf" in times else None,
        "gguf_gbps": gbps.get("gguf"),
        "times_gguf": ratio(slow["gguf"], slow["ggufx"]) if slow else None,
        **{f"{name}_times": ratio(times["ggufx"], times[name]) for name in narrow},
        **{f"{name}_gweights": out.size / 1e9 / min(times[name]) for name in narrow},
        "equal": ", ".join(checks) or None,
        "seconds": times,
    }


def _packed(codec: Any) -> Any:
    """Return random rows of a type whose scales are of the size that weights have: uint8 [rows, row_nbytes]."""
    import numpy as np

    rng = np.random.default_rng(1)
    n_rows, row_len = DECODE_SHAPE
    rows = rng.integers(0, 256, (n_rows, codec.layout.row_nbytes(row_len)), np.uint8)
    headers, blocks = codec.layout.split(rows)
    for part in (headers, blocks):
        for name in () if part is None else part.dtype.names or ():
            view = part[name]
            if view.dtype.kind == "f":
                view[...] = rng.uniform(0.001, 0.1, view.shape)
            elif name == "e":
                view[...] = rng.integers(117, 125, view.shape)
    if codec.name == "F8_E4M3_B128":  # no NaN, as in checkpoints
        codes = blocks[blocks.dtype.names[1]]
        codes[codes & 0x7F == 0x7F] ^= 1
    if codec.name == "BF16":
        rows.view("<u2")[...] = (rng.standard_normal(DECODE_SHAPE, np.float32).view("<u4") >> 16).astype("<u2")
    return rows


def _peers(codec: Any, rows: Any, out: Any) -> dict[str, Callable[[], Any]]:
    """Return what other packages offer for a type, called in the way that suits them best."""
    import gguf
    import numpy as np

    if codec.name not in gguf.GGMLQuantizationType.__members__:
        return {}
    number = gguf.GGMLQuantizationType[codec.name]
    peers: dict[str, Callable[[], Any]] = {}
    try:
        gguf.quants.dequantize(rows[:1], number)
        peers["gguf"] = lambda: gguf.quants.dequantize(rows, number)
    except NotImplementedError:
        pass
    try:
        import libgguf

        row_len = out.shape[1]
        libgguf.dequantize_rows_into_raw(number, rows[:1], np.empty((1, row_len), np.float32), 1, row_len)
        peers["libgguf"] = lambda: libgguf.dequantize_rows_into_raw(number, rows, out, out.shape[0], row_len)
    except (ImportError, ValueError):
        pass
    return peers


def _references(codec: Any, rows: Any) -> Iterable[tuple[str, Any]]:
    """Yield independent decodings of the same rows: (name, float32)."""
    import gguf
    import ml_dtypes
    import numpy as np

    if codec.name == "F8_E4M3_B128":
        blocks = rows.reshape(rows.shape[0], -1, 129)
        scales = blocks[:, :, :1].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        codes = np.ascontiguousarray(blocks[:, :, 1:]).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        yield "ml_dtypes", (codes * scales).reshape(rows.shape[0], -1)
    if codec.name in gguf.GGMLQuantizationType.__members__:
        try:
            yield "gguf", gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[codec.name])
        except NotImplementedError:
            return


def _same_bits(a: Any, b: Any) -> str:
    import numpy as np

    different = int(np.count_nonzero(a.view(np.uint32) != np.ascontiguousarray(b, np.float32).view(np.uint32)))
    return f"no, {different} differ" if different else "yes"


# ---------------------------------------------------------------------------------------------------------------------
# open
# ---------------------------------------------------------------------------------------------------------------------

N_TOKENS = 256_000

_MAKE_VOCABULARY = """
import sys
import gguf
import numpy as np

path, count = sys.argv[1], int(sys.argv[2])
tokens = [f"token{number:07d}" for number in range(count)]
writer = gguf.GGUFWriter(path, "llama")
writer.add_token_list(tokens)
writer.add_token_scores([float(-number) for number in range(count)])
writer.add_token_types([1] * count)
writer.add_token_merges([f"{a} {b}" for a, b in zip(tokens, reversed(tokens))])
writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""

_OPEN = """
import sys, time
{imports}
start = time.perf_counter()
opened = {open}
middle = time.perf_counter()
tokens = {tokens}
end = time.perf_counter()
assert len(tokens) == int(sys.argv[2]) and tokens[5] == "token0000005", tokens[5]
print(middle - start, end - start)
"""

_READERS = {
    "ggufx": ("import ggufx", "ggufx.open(sys.argv[1])", "opened.metadata['tokenizer.ggml.tokens']"),
    "libgguf": (
        "import libgguf\nlibgguf.open_gguf",  # the attribute imports the reader
        "libgguf.open_gguf(sys.argv[1])",
        "opened.metadata['tokenizer.ggml.tokens'].value",
    ),
    "gguf": ("import gguf", "gguf.GGUFReader(sys.argv[1])", "opened.fields['tokenizer.ggml.tokens'].contents()"),
}


def open_file(options: argparse.Namespace) -> list[Section]:
    """Open a GGUF with a large vocabulary, and get its tokens as strings, in fresh processes."""
    path = options.directory / "vocabulary.gguf"
    run_python(_MAKE_VOCABULARY, path, str(N_TOKENS))
    columns = [
        Column("reader", "reader"),
        Column("open_s", "open s", ".3f"),
        Column("tokens_s", "open and tokens s", ".3f"),
        Column("peak_rss_mb", "peak RSS MB", ".0f"),
        Column("times", "x ggufx", ".1f"),
    ]
    note = (
        f"{path.stat().st_size / MEGABYTE:.0f} MB: {N_TOKENS} tokens, scores, types and merges. Median of fresh "
        "processes; import time is not counted, memory is that of the whole process."
    )
    section = Section("Open a large vocabulary", columns, note)
    found: dict[str, list[Run]] = {}
    for name, (imports, opening, tokens) in _READERS.items():
        code = _OPEN.format(imports=imports, open=opening, tokens=tokens)
        try:
            found |= take_turns(
                {name: lambda code=code: run_python(code, path, str(N_TOKENS))}, 1 if name == "gguf" else 5
            )
        except subprocess.CalledProcessError:
            section.rows.append({"reader": name})
            continue
        opened, complete = zip(*(map(float, run.output.splitlines()[-1].split()) for run in found[name]), strict=True)
        row = {
            "reader": name,
            "open_s": statistics.median(opened),
            "tokens_s": statistics.median(complete),
            "peak_rss_mb": max(run.peak_rss_nbytes for run in found[name]) / MEGABYTE,
        }
        section.rows.append(row)
        row["times"] = row["open_s"] / section.rows[0]["open_s"]
    return [section]


# ---------------------------------------------------------------------------------------------------------------------
# import
# ---------------------------------------------------------------------------------------------------------------------

_IMPORTS = {"python": "pass", "numpy": "import numpy", "ggufx": "import ggufx", "gguf": "import gguf"}
_HEAVY = ("numba", "llvmlite", "torch", "gguf", "typer", "rich")
_COUNT_MODULES = f"import sys; print(len(sys.modules), *(m for m in {_HEAVY!r} if m in sys.modules))"


def import_package(options: argparse.Namespace) -> list[Section]:
    """Start an interpreter that imports and ends."""
    columns = [
        Column("imported", "import"),
        Column("median_ms", "median ms", ".0f"),
        Column("best_ms", "best ms", ".0f"),
        Column("peak_rss_mb", "peak RSS MB", ".0f"),
        Column("n_modules", "modules", "d"),
        Column("heavy", "of which heavy"),
    ]
    section = Section("Import", columns, "Whole process, from start to end.")
    contenders = {name: lambda code=code: run_python(code) for name, code in _IMPORTS.items()}
    for name, runs in take_turns(contenders, max(10, options.rounds // 2)).items():
        count, *heavy = run_python(f"{_IMPORTS[name]}\n{_COUNT_MODULES}").output.splitlines()[-1].split()
        seconds = [run.seconds for run in runs]
        section.rows.append(
            {
                "imported": name,
                "median_ms": statistics.median(seconds) * 1e3,
                "best_ms": min(seconds) * 1e3,
                "peak_rss_mb": max(run.peak_rss_nbytes for run in runs) / MEGABYTE,
                "n_modules": int(count),
                "heavy": " ".join(heavy) or "none",
            }
        )
    return [section]


# ---------------------------------------------------------------------------------------------------------------------
# convert
# ---------------------------------------------------------------------------------------------------------------------

# Experts of 4 MB and no block that the native target leaves out, so that output and input are about as long.
_REALISTIC = ("--hidden", "4096", "--moe", "2048", "--mtp-layers", "0")


def _columns(verb: str) -> list[Column]:
    return [
        Column("target", "target"),
        Column("output_gb", "output GB", ".2f"),
        Column("run_s", f"{verb} s", ".2f"),
        Column("gbps", "GB/s", ".2f"),
        Column("cp_s", "cp s", ".2f"),
        Column("cp_sync_s", "cp+fsync s", ".2f"),
        Column("of_cp", "of cp", ".2f"),
        Column("of_cp_sync", "of cp+fsync", ".2f"),
        Column("peak_rss_mb", "peak RSS MB", ".0f"),
        Column("cp_rss_mb", "cp RSS MB", ".0f"),
    ]


def _cp_note(verb: str) -> str:
    return (
        f"Medians of whole processes, inputs in the page cache; {verb} syncs its output before it renames it. "
        f'"of cp" is the time of cp over the time of {verb}, the median over rounds of one each.'
    )


def convert(options: argparse.Namespace) -> list[Section]:
    """Convert checkpoints of several lengths as whole processes, beside copying the finished file."""
    section = Section("Convert", _columns("convert"), _cp_note("convert"))
    for gigabytes in options.gigabytes:
        checkpoint = _checkpoint(gigabytes, options)
        for target in ("nisparks", "llama.cpp"):
            command = ["convert", checkpoint, "--target", target]
            section.rows.append({"target": target} | _beside_cp(command, checkpoint, options))
        shutil.rmtree(checkpoint)
    return [section]


def retarget(options: argparse.Namespace) -> list[Section]:
    """Retarget a native file, split it and merge it as whole processes, beside copying the finished files."""
    section = Section("Retarget and merge", _columns("run"), _cp_note("the run"))
    for gigabytes in options.gigabytes:
        checkpoint = _checkpoint(gigabytes, options)
        native = options.directory / "native" / "model.gguf"
        split = options.directory / "split" / "model.gguf"
        ggufx = [sys.executable, "-m", "ggufx"]
        run_child([*ggufx, "convert", checkpoint, "--outfile", native])
        shutil.rmtree(checkpoint)
        for target in ("llama.cpp", "ds4"):
            command = ["retarget", native, "--target", target]
            section.rows.append({"target": target} | _beside_cp(command, native.parent, options))
        run_child([*ggufx, "split", native, "--outfile", split, "--split-max-size", "1G"])
        shutil.rmtree(native.parent)
        command = ["merge-splits", min(split.parent.iterdir())]
        section.rows.append({"target": "merge of splits"} | _beside_cp(command, split.parent, options))
        shutil.rmtree(split.parent)
    return [section]


def merge(options: argparse.Namespace) -> list[Section]:
    """Merge an FP8 checkpoint with its own Q8_0 experts as whole processes, beside copying what comes of it."""
    section = Section("Merge FP8 and GGML", _columns("merge"), _cp_note("merge"))
    for gigabytes in options.gigabytes:
        checkpoint = _checkpoint(gigabytes, options, "make_tiny_v3.py")
        model = options.directory / "gguf" / "model.gguf"
        quantize_it = ["quantize", checkpoint, "q8_0", "--target", "llama.cpp", "--outfile", model]
        run_child([sys.executable, "-m", "ggufx", *quantize_it])
        for form in ("safetensors", "gguf"):
            command = ["merge", "--safetensor-path", checkpoint, "--gguf-path", model, "--format", form]
            section.rows.append({"target": form} | _beside_cp(command, model.parent, options, flag="--output-path"))
        shutil.rmtree(checkpoint)
        shutil.rmtree(model.parent)
    return [section]


def _checkpoint(gigabytes: float, options: argparse.Namespace, maker: str = "make_tiny_v4.py") -> Path:
    checkpoint: Path = options.directory / "checkpoint"
    run_child([sys.executable, ROOT / "tools" / maker, checkpoint, "--gigabytes", str(gigabytes), *_REALISTIC])
    return checkpoint


def _beside_cp(
    command: Sequence[str | Path], sources: Path, options: argparse.Namespace, *, flag: str = "--outfile"
) -> dict[str, Any]:
    """Race a command of ggufx that reads a directory's files against copies of what it writes, a file or a directory."""
    suffix = "" if "safetensors" in command else ".gguf"
    finished, copy, synced, output = (
        options.directory / f"{name}{suffix}" for name in ("finished", "copy", "synced", "output")
    )

    def prepared(target_file: Path, arguments: Sequence[str | Path]) -> Callable[[], Run]:
        # All dirty pages are written and the pages of the last output are freed: every contender starts alike.
        def run() -> Run:
            _read_through(sources)
            os.sync()
            _remove(target_file)
            return run_child(arguments)

        return run

    whole = [sys.executable, "-m", "ggufx", *command, flag, output, "--overwrite"]
    prepared(output, whole)()
    output.rename(finished)
    written = [path for path in (finished, *finished.rglob("*")) if path.is_file()]
    runs = take_turns(
        {
            "run": prepared(output, whole),
            "cp": prepared(copy, ["cp", "-r", finished, copy]),
            "cp_sync": prepared(
                synced, ["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', finished, synced]
            ),
        },
        options.convert_rounds,
    )
    nbytes = sum(path.stat().st_size for path in written)
    for path in (finished, copy, synced, output):
        _remove(path)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    peak = {name: max(run.peak_rss_nbytes for run in found) / MEGABYTE for name, found in runs.items()}
    return {
        "output_gb": nbytes / 1e9,
        "run_s": statistics.median(seconds["run"]),
        "gbps": nbytes / 1e9 / statistics.median(seconds["run"]),
        "cp_s": statistics.median(seconds["cp"]),
        "cp_sync_s": statistics.median(seconds["cp_sync"]),
        "of_cp": ratio(seconds["cp"], seconds["run"]),
        "of_cp_sync": ratio(seconds["cp_sync"], seconds["run"]),
        "peak_rss_mb": peak["run"],
        "cp_rss_mb": peak["cp"],
        "seconds": seconds,
    }


_EXPERTS = {"ffn_gate_exps": "IQ2_XXS", "ffn_up_exps": "IQ4_KS", "ffn_down_exps": "IQ2_KS"}


def quantize(options: argparse.Namespace) -> list[Section]:
    """Quantize a checkpoint's FP4 experts as a whole process, beside what encoding alone takes on one thread, halved."""
    columns = [
        Column("effort", "effort"),
        Column("weights", "million weights", ".0f"),
        Column("seconds", "s", ".1f"),
        *(Column(kind, f"{kind}, 1 thread", ".1f") for kind in _EXPERTS.values()),
        Column("of_encode", "of 2 threads' encoding", ".2f"),
        Column("peak_rss_mb", "peak RSS MB", ".0f"),
    ]
    note = (
        "A checkpoint to IQ2_XXS (gate), IQ4_KS (up) and IQ2_KS (down) by `ggufx quantize --threads 2 --imatrix ones`, the "
        "whole process; the middle columns are million weights a second of `codec.encode` on one thread, on decoded tensors of "
        "that checkpoint, before and after. The last ratio is half of what encoding takes by these over what the run took."
    )
    section = Section("Quantize", columns, note)
    checkpoint, output = options.directory / "checkpoint", options.directory / "output.gguf"
    maker = [
        sys.executable,
        ROOT / "tools" / "make_tiny_v4.py",
        checkpoint,
        "--gigabytes",
        str(options.quantize_gigabytes),
    ]
    run_child([*maker, *_REALISTIC])
    rules = ",".join(f"{name}={kind.lower()}" for name, kind in _EXPERTS.items())
    for effort in ("normal", "fast"):
        speeds = [_encode_speeds(checkpoint, effort)]
        _read_through(checkpoint)
        command = [
            "quantize",
            checkpoint,
            "--custom-q",
            rules,
            "--imatrix",
            "ones",
            "--threads",
            "2",
            "--effort",
            effort,
        ]
        run = run_child(
            [sys.executable, "-m", "ggufx", *command, "--outfile", output, "--overwrite", "--target", "ik_llama.cpp"]
        )
        speeds.append(_encode_speeds(checkpoint, effort))
        speed = {kind: (speeds[0][kind] + speeds[1][kind]) / 2 for kind in speeds[0]}
        weights = _weights_by_type(output)
        alone = sum(count / (speed[kind] * 1e6) for kind, count in weights.items() if kind in speed)
        section.rows.append(
            {
                "effort": effort,
                "weights": sum(count for kind, count in weights.items() if kind in speed) / 1e6,
                "seconds": run.seconds,
                **speed,
                "of_encode": alone / 2 / run.seconds,
                "peak_rss_mb": run.peak_rss_nbytes / MEGABYTE,
            }
        )
        output.unlink()
    shutil.rmtree(checkpoint)
    return [section]


def _weights_by_type(path: Path) -> dict[str, int]:
    import ggufx

    found: dict[str, int] = {}
    with ggufx.open(path) as file:
        for tensor in file.tensors:
            found[tensor.type] = found.get(tensor.type, 0) + tensor.size
    return found


def _encode_speeds(checkpoint: Path, effort: str) -> dict[str, float]:
    """Million weights a second of encoding one expert of the checkpoint on one thread, the best of some tries."""
    code = """
import sys, time, numpy as np
from ggufx import checkpoint, types
from ggufx.transforms import decode_source
source = checkpoint.Checkpoint(sys.argv[1])
found = {}
for kind, part in (("IQ2_XXS", "w1"), ("IQ4_KS", "w3"), ("IQ2_KS", "w2")):
    name = f"layers.0.ffn.experts.0.{part}."
    rows, half = source[name + "weight"].shape
    inputs = [source.read(name + part) for part in ("weight", "scale")]
    values, _, _ = decode_source("FP4", rows, 2 * half, inputs, 1)
    codec = types.get(kind)
    weights = np.ones(2 * half, np.float32) if codec.needs_importance else None
    out = codec.encode(values, weights, effort=sys.argv[2], threads=1)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        codec.encode(values, weights, effort=sys.argv[2], threads=1, out=out)
        best = min(best, time.perf_counter() - start)
    found[kind] = values.size / best / 1e6
print(repr(found))
"""
    found: dict[str, float] = ast.literal_eval(run_python(code, checkpoint, effort).output.splitlines()[-1])
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _read_through(directory: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

# "decode" is last: it makes this process large.
SUBJECTS: Mapping[str, Callable[[argparse.Namespace], list[Section]]] = {
    "import": import_package,
    "open": open_file,
    "convert": convert,
    "retarget": retarget,
    "merge": merge,
    "quantize": quantize,
    "decode": decode,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", nargs="?", choices=(*SUBJECTS, "all"), default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--work-dir", type=Path, default=Path(".bench"), help="where files are made (default: .bench)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of decode and import (default: 20)")
    parser.add_argument("--all-types", action="store_true", help="decode: every type, not only the main ones")
    parser.add_argument(
        "--quantize-gigabytes", type=float, default=2, help="length of the checkpoint that is quantized (default: 2)"
    )
    parser.add_argument("--convert-rounds", type=int, default=5, help="rounds of convert (default: 5)")
    parser.add_argument(
        "--gigabytes",
        type=float,
        nargs="+",
        default=[3, 6],
        help="convert, retarget, merge: lengths of the checkpoints (default: 3 6)",
    )
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine()}
    created = not options.work_dir.exists()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="ggufx-bench-", dir=options.work_dir) as directory:
            options.directory = Path(directory)
            for subject in SUBJECTS if options.subject == "all" else (options.subject,):
                sections = SUBJECTS[subject](options)
                report[subject] = [asdict(section) for section in sections]
                for section in sections:
                    if options.markdown:
                        print(section.markdown(), end="\n\n")
                    else:
                        section.show()
    finally:
        if created:
            options.work_dir.rmdir()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
