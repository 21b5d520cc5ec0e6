"""Rewrite the generated parts of README.md in place.

    python tools/readme.py [README.md] [--check] [--recipes] [--bench FILE ...]

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``:

- ``types``: the table of ``ggufx types --markdown``.
- ``recipes``: sizes of the shipped recipes, planned on their models' full tensor lists (with ``--recipes``: a minute).
- ``encode``: the table of ``tools/frontier.py --json FILE`` (``--frontier FILE``; stays as it is without one).
- ``bench``: the tables of ``tools/bench.py all --json FILE`` (``--bench FILE ...``; the part stays as it is without one).

``--check`` writes nothing and exits with 1 when a part is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ggufx import catalog


def bench(data: Mapping[str, Any]) -> str:
    """Return what ``tools/bench.py --json`` wrote as Markdown: every section as that command prints it with --markdown."""
    from bench import sections_of

    return "\n\n".join(section.markdown() for section in sections_of(data)) + "\n"


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


def rewritten(text: str, generators: Mapping[str, Callable[[], str]]) -> str:
    """Return ``text`` with the parts that have a generator made anew; raises ValueError when one has no place."""
    for name, generate in generators.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"expected one part <!-- {name} --> ... <!-- /{name} -->")
        content = generate()
        text = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", nargs="?", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument(
        "--bench", type=Path, metavar="FILE", nargs="+", help="what bench.py --json wrote, of one or more runs"
    )
    parser.add_argument("--recipes", action="store_true", help="plan the shipped recipes for their sizes")
    parser.add_argument("--frontier", type=Path, metavar="FILE", help="what frontier.py --json wrote")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a part is not up to date")
    options = parser.parse_args()
    generators: dict[str, Callable[[], str]] = {"types": catalog.markdown}
    if options.recipes:
        generators["recipes"] = recipes
    if options.bench:
        measured = {key: value for file in options.bench for key, value in json.loads(file.read_text("utf-8")).items()}
        generators["bench"] = lambda: bench(measured)
    if options.frontier:
        errors_and_speed = json.loads(options.frontier.read_text("utf-8"))
        generators["encode"] = lambda: encode(errors_and_speed)
    before = options.readme.read_text(encoding="utf-8")
    after = rewritten(before, generators)
    if options.check:
        sys.exit(f"{options.readme} is not up to date: python tools/readme.py" if after != before else 0)
    options.readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
