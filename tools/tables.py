"""Rewrite the generated parts of the documentation in place.

    python tools/tables.py [DOCS] [--check] [--recipes] [--frontier FILE] [--bench FILE ...]

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``:

- ``types`` in types.md: the table of ``ggufx types --markdown``.
- ``cli`` in cli.md: every command with its help, arguments and options.
- ``recipes`` in quantize.md: sizes of the shipped recipes, planned on the full models (``--recipes``: takes a minute).
- ``encode`` in encoders.md: the table of ``tools/frontier.py --json FILE`` (``--frontier FILE``).
- ``bench`` in benchmarks.md: the tables of ``tools/bench.py all --json FILE`` (``--bench FILE ...``).

A part whose option is not given stays as it is. ``--check`` writes nothing and exits with 1 when a part is not up to date.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ggufx import catalog

PLACES = {
    "types": "types.md",
    "cli": "cli.md",
    "recipes": "quantize.md",
    "encode": "encoders.md",
    "bench": "benchmarks.md",
}


def bench(data: Mapping[str, Any]) -> str:
    """Return what ``tools/bench.py --json`` wrote as Markdown: every section as that command prints it with --markdown."""
    from bench import sections_of

    return "\n\n".join(section.markdown() for section in sections_of(data)) + "\n"


def cli() -> str:
    """Return every command's help as Markdown."""
    import typer

    from ggufx.cli import app

    def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{path} {name}")
            else:
                yield f"{path} {name}", command

    sections = []
    for path, command in commands(typer.main.get_command(app), "ggufx"):
        # Not parsed: a context is what help is printed in.
        context = command.context_class(command, info_name=path)
        usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
        lines = [f"## {path}", "", inspect.cleandoc(command.help or ""), "", "```", usage, "```", ""]
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
        lines += ["| Argument or option | Meaning |", "|---|---|"]
        lines += [f"| `{_cell(name, code=True)}` | {_cell(text)} |" for name, text in filter(None, records)]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _cell(text: str, *, code: bool = False) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if code else text.replace("<", "&lt;")


def recipes() -> str:
    """Return what the shipped recipes come to, as Markdown: one line a recipe, one column a target."""
    from make_fullshape_v3 import make_fullshape_v3
    from make_fullshape_v4 import make_fullshape_v4

    from ggufx import quantize, recipe

    targets = ("ik_llama.cpp", "nisparks", "llama.cpp")
    lines = [f"| recipe | {' | '.join(targets)} |", "|---|" + "--:|" * len(targets)]
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "deepseek-v3": Path(folder) / "DeepSeek-V3-0324",
            "deepseek-v4-flash": Path(folder) / "DeepSeek-V4-Flash",
        }
        make_fullshape_v3(models["deepseek-v3"])
        make_fullshape_v4(models["deepseek-v4-flash"])
        for name in recipe.shipped():
            checkpoint = next(path for prefix, path in models.items() if name.startswith(f"{prefix}-"))
            cells = []
            for target in targets:
                plan = quantize.plan_quantize(
                    checkpoint, Path(folder) / "out.gguf", recipe=name, target=target, imatrix=quantize.ENERGY
                )
                bits = plan.to_json()["file"]["bits_per_weight"]
                cells.append(f"{plan.nbytes / 1e9:.1f} GB, {bits:.3f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def encode(data: dict[str, Any]) -> str:
    """Return what ``tools/frontier.py --json`` wrote as the table that it prints."""
    from frontier import markdown

    return markdown(data)


def rewritten(text: str, name: str, content: str) -> str:
    """Return ``text`` with the part of that name made anew; raises ValueError when it has no place."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one part <!-- {name} --> ... <!-- /{name} -->")
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", nargs="?", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument(
        "--bench", type=Path, metavar="FILE", nargs="+", help="what bench.py --json wrote, of one or more runs"
    )
    parser.add_argument("--recipes", action="store_true", help="plan the shipped recipes for their sizes")
    parser.add_argument("--frontier", type=Path, metavar="FILE", help="what frontier.py --json wrote")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a part is not up to date")
    options = parser.parse_args()
    generators: dict[str, Callable[[], str]] = {"types": catalog.markdown, "cli": cli}
    if options.recipes:
        generators["recipes"] = recipes
    if options.bench:
        measured = {key: value for file in options.bench for key, value in json.loads(file.read_text("utf-8")).items()}
        generators["bench"] = lambda: bench(measured)
    if options.frontier:
        errors_and_speed = json.loads(options.frontier.read_text("utf-8"))
        generators["encode"] = lambda: encode(errors_and_speed)
    for name, generate in generators.items():
        page = options.docs / PLACES[name]
        before = page.read_text(encoding="utf-8")
        after = rewritten(before, name, generate())
        if not options.check:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            sys.exit(f"{page} is not up to date: python tools/tables.py")


if __name__ == "__main__":
    main()
