"""The table of types: what it says, and that the documentation's is it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from command import Run

from ggufx import catalog, kernels, types
from ggufx.types import Codec

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_documented_table_is_that_of_the_command() -> None:
    page = (ROOT / "docs" / "types.md").read_text(encoding="utf-8")
    table = page.partition("<!-- types -->\n")[2].partition("<!-- /types -->")[0]
    assert table == run("-m", "ggufx", "types", "--markdown").stdout, "run python tools/tables.py"


def test_the_documented_command_line_is_that_of_the_program() -> None:
    done = run("tools/tables.py", "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_table_has_every_type_and_says_what_it_can(cli: Callable[..., Run]) -> None:
    rows = {row["type"]: row for row in json.loads(cli("types", "--json").out)}
    assert set(rows) == {codec.name for codec in types.all_codecs()}
    q8_0 = {
        "type": "Q8_0", "ids": {"llama.cpp": 8, "ik_llama.cpp": 8, "nisparks": 8}, "block": 32, "bytes": 34, "header": 0,
        "bpw": 8.5, "decode": True, "encode": True, "native pack": False, "kernel": True, "torch": True,
        "byte-compatible": True,
    }  # fmt: skip
    assert rows["Q8_0"].items() >= q8_0.items()
    assert rows["F8_E4M3_B128"]["ids"] == {"nisparks": 42}
    assert not rows["F8_E4M3_B128"]["byte-compatible"]
    assert rows["IQ1_KT"]["header"] == 4
    assert not rows["IQ1_KT"]["decode"]
    table = cli("types").out
    assert "42 nisparks" in table
    assert all(column in table.splitlines()[0] for column in rows["Q8_0"])


def test_a_kernel_counts_only_for_a_type_that_decodes() -> None:
    for codec in types.all_codecs():
        assert codec.has_kernel == (codec.can_decode and kernels.exists(codec.name))
        assert codec.has_cuda == (codec.can_decode and kernels.exists(codec.name, cuda=True))
        assert codec.has_torch == codec.can_decode


def test_the_table_says_who_decodes_for_torch() -> None:
    class NumpyOnly(Codec):
        layout: ClassVar = types.get("Q8_0").layout
        ids: ClassVar = {"llama.cpp": 4001}

        def decode_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
            out.fill(0)

    rows = {row["type"]: row for row in catalog.type_rows()}
    assert all(row["torch"] is row["decode"] for row in rows.values())  # plain torch, for every type of ours
    assert catalog.type_row(NumpyOnly())["torch"] == "CPU"
    assert catalog.type_row(types.get("IQ1_KT"))["torch"] is False


def test_markdown_of_nothing_is_nothing() -> None:
    assert catalog.markdown_table([]) == ""


def test_the_tool_for_tables_rewrites_its_parts_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import tables as tool

    def rewrite(*arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), *map(str, arguments)])
        try:
            tool.main()
        except SystemExit as left:
            return left.code
        return 0

    page, benchmarks, measured = tmp_path / "types.md", tmp_path / "benchmarks.md", tmp_path / "bench.json"
    (tmp_path / "cli.md").write_text("<!-- cli -->\n<!-- /cli -->\n")
    page.write_text("# A\n<!-- types -->\nold\n<!-- /types -->\nB\n")
    benchmarks.write_text("B\n<!-- bench -->\nkept\n<!-- /bench -->\nC\n")
    assert "types.md is not up to date" in str(rewrite("--check"))
    assert "old" in page.read_text()
    assert rewrite() == 0
    assert page.read_text() == f"# A\n<!-- types -->\n{catalog.markdown()}<!-- /types -->\nB\n"
    assert benchmarks.read_text() == "B\n<!-- bench -->\nkept\n<!-- /bench -->\nC\n"
    assert rewrite("--check") == 0
    machine = {"processor": r"Two \1", "cores": 2, "versions": {"ggufx": "1"}}
    section = {"title": "Decode", "columns": [["type", "type", ""], ["gbps", "GB/s", ".1f"]], "note": "Best of many."}
    measured.write_text(
        json.dumps({"machine": machine, "decode": [{**section, "rows": [{"type": "Q8_0", "gbps": 9.54}]}]})
    )
    assert rewrite("--bench", measured) == 0
    text = benchmarks.read_text()
    assert "### Decode\n\n| type | GB/s |\n| --- | ---: |\n| Q8_0 | 9.5 |\n\nBest of many.\n" in text
    assert "on 2 cores of Two \\1; ggufx 1." in text
    page.write_text("no part")
    assert "expected one part <!-- types -->" in run("tools/tables.py", tmp_path).stderr  # as a process


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_the_table_needs_no_compiler(option: str) -> None:
    code = (
        f"import sys; sys.argv = ['ggufx', 'types', {option!r}]\n"
        "from ggufx import cli\ntry:\n cli.main()\nexcept SystemExit: pass\nassert 'numba' not in sys.modules"
    )
    assert run("-c", code).returncode == 0
