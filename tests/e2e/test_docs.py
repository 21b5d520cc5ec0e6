"""README and docs: their code runs, their commands exist, their links lead somewhere, and the README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import typer

from ggufx import dialects, types
from ggufx.cli import app

from .conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Return the code blocks of a page with the number of their first line."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[1] == language:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, checkpoint_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the pages speak of; types that a page registers are gone afterwards."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("A model")
    rng = np.random.default_rng(0)
    for name, shape in (("blk.0.attn_q.weight", (64, 256)), ("blk.3.ffn_gate_exps.weight", (18, 32, 256))):
        writer.add_tensor(name, rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "DeepSeek-V4-Flash").symlink_to(checkpoint_path("mini"))
    (tmp_path / "my.recipe").write_text("attn_.*=q8_0\nffn_.*=iq4_ks\n")
    matrix = gguf.GGUFWriter(tmp_path / "imatrix.dat", "")
    matrix.add_type("imatrix")
    matrix.add_array("imatrix.datasets", ["text"])
    matrix.add_uint32("imatrix.chunk_count", 1)
    matrix.add_uint32("imatrix.chunk_size", 512)
    for name, experts in (("blk.0.attn_q.weight", 1), ("blk.3.ffn_gate_exps.weight", 18)):
        matrix.add_tensor(f"{name}.in_sum2", np.ones((experts, 256), np.float32))
        matrix.add_tensor(f"{name}.counts", np.full((experts, 1), 4, np.float32))
    matrix.write_header_to_file()
    matrix.write_kv_data_to_file()
    matrix.write_tensors_to_file()
    matrix.close()
    list(types.all_codecs())
    monkeypatch.setattr(types, "_by_name", dict(types._by_name))
    monkeypatch.setattr(types, "_by_id", dict(types._by_id))
    held = dict(dialects.DIALECTS)
    monkeypatch.setattr(dialects, "_dialects", held)
    monkeypatch.setattr(dialects, "DIALECTS", held)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=named)
@pytest.mark.usefixtures("workplace")
def test_the_code_of_a_page_runs(page: Path) -> None:
    names = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        # CI has no GPU; numbers of lines are the page's.
        exec(compile("\n" * (line - 1) + code.replace('"cuda"', '"cpu"'), str(page), "exec"), names)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for start, code in blocks(page, "sh"):
            for number, line in enumerate(code.splitlines(), start):
                if line.startswith("ggufx "):
                    yield f"{named(page)}:{number}", line


def test_there_are_commands_of_every_kind() -> None:
    lines = [line for _, line in commands()]
    assert len(lines) > 40
    assert {line.split()[1] for line in lines} >= {"convert", "verify", "quantize", "recipe", "rewrite", "set", "split"}


@pytest.mark.parametrize(("place", "line"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_a_command_line_of_a_page_is_one(place: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if ">" in words:
        words = words[: words.index(">")]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"{place}: {line}"
        command = command.commands[name]
    command.make_context(name, words)  # raises a usage error that says what is wrong


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.parent == ROOT or page.name == "index.md" or f"({page.name})" in index
