"""What imports what: `import ggufx` is light, and imports between modules go up only."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
HEAVY = ("numba", "llvmlite", "torch", "triton", "gguf", "typer", "rich", "safetensors", "transformers")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_importing_ggufx_loads_no_heavy_package() -> None:
    done = run(f"import sys, ggufx; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_opening_and_listing_a_file_loads_no_heavy_package(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(24))
    done = run(
        f"import sys, ggufx; f = ggufx.open({str(path)!r}); list(f); print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_imports_go_up_only() -> None:
    # The contracts are in pyproject.toml, [tool.importlinter].
    done = run("from importlinter.cli import lint_imports_command as run; run(['--no-cache'])")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


def named_imports(path: Path) -> set[str]:
    """Modules of ggufx that a file imports by a name in a text, as importlib does."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    texts = (call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant))
    return {text for text in texts if isinstance(text, str) and text.startswith("ggufx.")}


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("ggufx", cache_dir=None)
    edges = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    for module, targets in edges.items():
        path = ROOT / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        targets |= named_imports(path) & graph.modules
    edges["ggufx"] = set()  # the package's own names are for users, and lazy
    sorter = graphlib.TopologicalSorter(edges)
    sorter.prepare()  # raises CycleError with the cycle
    assert len(edges) > 150
