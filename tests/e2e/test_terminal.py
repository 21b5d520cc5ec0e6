"""What is printed: harmless, aligned, whole in a pipe, to streams in any state."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufx.container import Value, ValueType, encode_header
from ggufx.terminal import Lines, make_table, printable

from .conftest import ROOT, Run

Cli = Callable[..., Run]
EVIL = "x\x1b]0;owned\x07\x9b31m\u202e\u2066\u2028y"
SHOWN = r"x\x1b]0;owned\x07\x9b31m\u202e\u2066\u2028y"


def ggufx(*arguments: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ggufx", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if shell:
        return subprocess.run(["bash", "-c", f'"$@" {shell}', "-", *command], capture_output=True, env=env, check=False)
    return subprocess.run(command, capture_output=True, env=env, check=False)


def model(path: Path, tensor: str = EVIL, key: str = EVIL, text: str = EVIL) -> Path:
    keys = {
        "general.architecture": Value.string("llama"),
        key: Value.string(text),
        "list": Value.array(ValueType.STRING, [text]),
    }
    header = encode_header(keys, [(tensor, (4, 32), 0, 0), ("same", (2, 32), 0, 512)], 32)
    path.write_bytes(header + bytes(768))
    return path


def assert_harmless(data: str) -> None:
    assert not any(c in data for c in "\x1b\x07\x9b\u202e\u2066\u2028"), data


def test_codes_are_what_regular_expressions_read() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a\tb\nc", line=True) == r"a\tb\nc"
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable(b"\xff\xc3".decode("utf-8", "surrogateescape")) == r"\xff\xc3"
    assert printable("\ud800") == r"\ud800"
    assert printable("Größe 直 😀 ﷽") == "Größe 直 😀 ﷽"


def test_no_command_prints_a_files_words_raw(tmp_path: Path, cli: Cli) -> None:
    evil = model(tmp_path / "evil.gguf")
    plain = model(tmp_path / "plain.gguf", "t", "key", "text")
    odd = model(tmp_path / f"{EVIL}.gguf")
    for arguments in (
        ("inspect", evil),
        ("inspect", odd),
        ("inspect", evil, "--json"),
        ("diff", evil, plain),
        ("diff", plain, evil),
        ("verify", evil, "--against", plain),
        ("set", evil, "--remove", EVIL, "--dry-run"),
        ("set", evil, f"general.name=str:{EVIL}", "--dry-run"),
        ("set", evil, "--remove", f"no{EVIL}"),
        ("set", evil, f"{EVIL}=str:x"),
        ("recipe", "from-gguf", evil),
        ("recipe", "show", "iq2_xxs", "--for", evil),
        ("quantize", evil, "q8_0", "--dry-run"),
        ("rewrite", evil, "--outfile", tmp_path / f"out{EVIL}.gguf"),
        ("measure", evil, "--types", "q8_0"),
        ("inspect", tmp_path / f"no{EVIL}"),
    ):
        run = cli(*arguments)
        assert_harmless(run.out + run.err)
    assert SHOWN in cli("inspect", evil).out


def test_a_recipe_from_a_file_with_harmful_names_is_that_files(tmp_path: Path, cli: Cli) -> None:
    evil = model(tmp_path / "evil.gguf", tensor="a\x1bb.weight")
    text = cli("recipe", "from-gguf", evil).out
    (tmp_path / "r.recipe").write_text(text)
    assert r"\x1b" in text
    run = cli("quantize", evil, tmp_path / "o.gguf", "--recipe", tmp_path / "r.recipe")
    assert run.code == 0, run
    assert "matches no tensor" not in run.err


# Tables -----------------------------------------------------------------------------------------------------------


def test_numbers_end_at_the_right_and_lines_have_no_blanks_at_their_end(tmp_path: Path, cli: Cli) -> None:
    out = cli("types").out.splitlines()
    assert not any(line.endswith(" ") for line in out)
    heading, *lines = out
    end = heading.index("bytes") + len("bytes")
    assert {line[end - 1].isdigit() and line[end : end + 1] in (" ", "") for line in lines if line.strip()} == {True}


def test_nothing_is_wrapped_in_a_pipe_or_cut(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", tensor="t" * 300, key="k", text="v")
    lines = ggufx("inspect", path, COLUMNS="80").stdout.decode().splitlines()
    assert any(line.startswith("t" * 300) and line.rstrip() == line and "F32" in line for line in lines)


def test_a_table_for_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Lines()
    console.file = file
    table = make_table("name", "bytes")
    table.add_row("a", "1")
    table.add_row("bb\n", "10000")
    console.print(table)
    assert file.getvalue() == "name  bytes\na         1\nbb\\n  10000\n"


# Streams ----------------------------------------------------------------------------------------------------------


def test_streams_that_are_closed(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    before = path.read_bytes()
    for shell in (">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        out = tmp_path / "o.gguf"
        done = ggufx("rewrite", path, "--outfile", out, shell=shell)
        assert done.returncode == 0, done
        assert b"Traceback" not in done.stderr
        assert out.read_bytes() == before
        out.unlink()


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_stream_that_is_not_utf8(environment: dict[str, str], tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", text="｜直｜")
    done = ggufx("inspect", path, **environment)
    assert done.returncode == 0, done.stderr
    assert rb"\uff5c\u76f4" in done.stdout
    done = ggufx("inspect", tmp_path / "直", **environment)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    done = ggufx("inspect", path, shell="| head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == b""
    done = ggufx("types", "--json", shell="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == b""


def test_an_interrupt_while_modules_load_has_no_traceback() -> None:
    code = "import sys, ggufx, ggufx.__main__ as m; sys.argv = ['ggufx', 'types']; print('now', flush=True); m.start()"
    for delay in (0.0, 0.05, 0.1, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        time.sleep(0.01 + delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert b"Traceback" not in err
        assert process.returncode in (0, 130, -signal.SIGINT)
