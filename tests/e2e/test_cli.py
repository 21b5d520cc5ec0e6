"""The command line as people and scripts meet it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ggufx

from .conftest import Run, assert_one_line, run_process
from .oracle import ROOT, TYPES, Gguf

Cli = Callable[..., Run]

COMMANDS = {
    "convert": [
        "--outfile", "--target", "--outtype", "--dense", "--mtp", "--model-name", "--chat-template-file",
        "--split-max-size", "--skip", "--stamp", "--threads", "--overwrite", "--resume", "--no-resume", "--dry-run",
        "--json",
    ],
    "inspect": ["--json", "--tensors", "--limit", "--dialect"],
    "verify": ["--against", "--json", "--threads"],
    "diff": ["--json"],
    "types": ["--json"],
    "retarget": [
        "--outfile", "--target", "--dense", "--plain", "--split-max-size", "--dialect", "--overwrite", "--resume",
        "--dry-run", "--json",
    ],
    "export": ["--outfile", "--overwrite", "--resume", "--dry-run", "--json"],
    "merge": [
        "--safetensor-path", "--safetensor_path", "--gguf-path", "--gguf_path", "--output-path", "--output_path", "--format",
        "--target", "--dense", "--overwrite", "--resume", "--dry-run", "--json",
    ],
    "split": ["--outfile", "--split-max-size", "--split-max-tensors", "--no-tensor-first-split", "--dry-run"],
    "merge-splits": ["--outfile", "--overwrite", "--dry-run"],
    "set": ["--remove", "--dry-run"],
}  # fmt: skip


def test_help_names_the_commands(cli: Cli) -> None:
    run = cli("--help")
    assert run.code == 0
    assert all(re.search(rf"^\W*{command}\b", run.out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = cli(command, "--help")
    assert (run.code, run.err) == (0, "")
    for flag in COMMANDS[command]:
        assert flag in run.out


def test_version(cli: Cli) -> None:
    assert cli("--version") == Run(0, f"ggufx {ggufx.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"], ["convert"], ["convert", ".", "--nope"], ["convert", ".", "--target", "ollama"],
        ["convert", ".", "--dense", "q2_k"], ["convert", ".", "--threads", "0"], ["convert", ".", "--threads", "many"],
        ["inspect"], ["inspect", "a", "b"], ["inspect", "a", "--limit", "-1"], ["inspect", "a", "--dialect", "x"],
        ["verify", "a"], ["diff", "a"], ["types", "a"],
    ],
)  # fmt: skip
def test_bad_usage_is_exit_code_2(arguments: list[str], cli: Cli) -> None:
    run = cli(*arguments)
    assert run.code == 2
    assert run.out == ""
    assert "Traceback" not in run.err
    assert "--help" in run.err


def test_without_arguments_there_is_help(cli: Cli) -> None:
    run = cli()
    assert run.code in (0, 2)
    assert "convert" in run.out + run.err


TROUBLE = {"inspect": 1, "diff": 2}
"""Exit code where a file cannot be read: diff's 1 says that files differ."""


@pytest.mark.parametrize("command", TROUBLE)
@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"GGUF\0\0\0\x04" + bytes(40), b"text"]
)
def test_files_that_are_no_gguf(command: str, content: bytes, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert_one_line(cli(command, path, *([path] if command == "diff" else [])), str(path), code=TROUBLE[command])


@pytest.mark.parametrize("command", TROUBLE)
def test_files_that_are_not_there(command: str, cli: Cli, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.gguf", tmp_path):
        assert_one_line(cli(command, path, *([path] if command == "diff" else [])), str(path), code=TROUBLE[command])


def test_errors_print_names_with_brackets_as_they_are(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "model[bold]x[/red].gguf"
    assert_one_line(cli("inspect", path), str(path))


def test_names_with_brackets_in_tables(cli: Cli, checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "m[/red].gguf"
    run = cli("convert", checkpoint_path("mini"), "--outfile", out, "--model-name", "[/bold] [red]x")
    assert run.code == 0, run.err
    assert str(out) in run.out
    run = cli("inspect", out)
    assert run.code == 0
    assert "[/bold] [red]x" in run.out


def test_types_lists_ids_and_sizes(cli: Cli) -> None:
    rows = {row["type"]: row for row in json.loads(cli("types", "--json").out)}
    for name, (number, block, nbytes) in TYPES.items():
        assert rows[name]["ids"]["nisparks"] == number
        assert (rows[name]["block"], rows[name]["bytes"]) == (block, nbytes)
    assert "llama.cpp" not in rows["F8_E4M3_B128"]["ids"]
    table = cli("types").out
    markdown = cli("types", "--markdown").out
    for name, row in rows.items():
        assert re.search(rf"^{name} ", table, re.MULTILINE)
        assert f"| {name} |" in markdown
        assert row["decode"] in (True, False)


def test_convert_tells_what_it_did(cli: Cli, checkpoint_path: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    run = cli("convert", checkpoint_path("mini"), "--outfile", out, "--verbose")
    file = Gguf(out)
    assert run.code == 0
    assert str(out) in run.out.splitlines()
    assert f"{len(file.tensors)} tensors, {len(file.raw)} bytes" in run.out
    assert all(name in run.out for name in file.tensors)
    notes = [line for line in run.err.splitlines() if line.startswith("note: ")]
    assert notes == run.err.splitlines()
    assert any("MTP block" in note for note in notes)


@pytest.mark.parametrize("target", ["nisparks", "llama.cpp"])
def test_dry_run_says_what_the_run_does(
    target: str, cli: Cli, checkpoint_path: Callable[[str], Path], converted: Callable[..., Gguf], tmp_path: Path
) -> None:
    file = converted("flash", target)
    run = cli(
        "convert", checkpoint_path("flash"), "--outfile", tmp_path / "o.gguf", "--dry-run", "--json", "--target", target
    )
    assert run.code == 0
    assert list(tmp_path.iterdir()) == []
    data = json.loads(run.out)
    assert data["file"]["nbytes"] == len(file.raw)
    assert data["file"]["data_offset"] == file.data_offset
    assert [(t["name"], t["offset"]) for t in data["tensors"]] == [
        (t.name, t.offset - file.data_offset) for t in file.tensors.values()
    ]
    # Float32 is written as the shortest number that is the same.
    found = {key: np.float32(v) if file.kv[key][0] == 6 else v for key, v in data["metadata"].items()}
    assert found == {key: value[1] if kind == 9 else value for key, (kind, value) in file.kv.items()}
    for flags in ([], ["--verbose"]):
        run = cli(
            "convert",
            checkpoint_path("flash"),
            "--outfile",
            tmp_path / "o.gguf",
            "--dry-run",
            "--target",
            target,
            *flags,
        )
        assert run.code == 0
        assert f"({len(file.raw)} bytes)" in run.out
        assert "rounded" in run.out if target == "llama.cpp" else "rounded" not in run.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "types", "convert --dry-run --json"])
def test_a_reader_that_goes_away(
    command: str, converted: Callable[..., Gguf], checkpoint_path: Callable[[str], Path]
) -> None:
    """``| head -1`` ends quietly; not with 0, since a verify whose report nobody read has proven nothing."""
    verb, *flags = command.split()
    path = {"inspect": [converted("flash").path], "convert": [checkpoint_path("flash")], "types": []}[verb]
    words = [sys.executable, "-m", "ggufx", verb, *map(str, path), *flags]
    read, write = os.pipe()
    os.close(read)  # the reader is gone before the first byte
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(write)
    assert process.stderr == ""
    assert process.returncode == -signal.SIGPIPE  # 141 for a shell, as of every other program


def test_output_is_complete_where_the_terminal_is_narrow(
    converted: Callable[..., Gguf], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    run = cli("inspect", converted("flash").path)
    for name in converted("flash").tensors:
        assert name in run.out


def test_python_m_and_the_entry_point_are_the_same() -> None:
    run = run_process("--version")
    assert run == Run(0, f"ggufx {ggufx.__version__}\n", "")
    text = (ROOT / "pyproject.toml").read_text()
    assert 'ggufx = "ggufx.__main__:start"' in text
