"""Error and speed of the searching encoders beside the C libraries': the table of docs/encoders.md.

    python tools/frontier.py [--model FILE.gguf] [--types IQ4_K,Q4_K] [--efforts fast,normal] [--json FILE]

Errors are weighted squared errors over those of the reference encoder, with the weights that the type's docstring names: the C
libraries' own for the codebook types, like theirs for the others. They are taken on the vectors of the C libraries (geometric
mean over rows 0, 1, 4..11; the tiny row, whose scale the references round to zero, counts as 1), on fresh Gaussian and Student
t4 data, and on tensors of a real model (geometric mean, and the worst of them). References beyond the vectors: libgguf,
llama.cpp's C code, or for the codebook types a port in NumPy (``tests/reference_encoders.py``); Q6_0 and the trellis types have
neither. Importance columns of fresh and real data are drawn, uniform^2 + 0.001.

The model is gemma3-270m of PyPI, which ``tools/demo_real.py DIRECTORY`` leaves in DIRECTORY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import test_encoders_scalar
from oracle import VECTORS
from reference_encoders import REFERENCES, reference_values
from reference_encoders import weights as codebook_weights

import ggufx
from ggufx import types

ROWS = [0, 1, *range(4, 12)]
TINY = ROWS.index(4)
TENSORS = ("ffn_down", "attn_v", "attn_output", "ffn_up", "attn_q")
NAMES = (*test_encoders_scalar.SEARCHES, *REFERENCES)
EFFORTS: tuple[types.Effort, ...] = ("fast", "normal", "high")


def weights(name: str, x: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """Return the weights of the error."""
    found: np.ndarray = (codebook_weights if name in REFERENCES else test_encoders_scalar.weights)(name, x, m)
    return found


def errors(name: str, x: np.ndarray, y: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """Return the weighted squared error of every row."""
    found: np.ndarray = (weights(name, x, m).astype(np.float64) * (x.astype(np.float64) - y) ** 2).sum(axis=1)
    return found


def importance(n: int, seed: int = 0) -> np.ndarray:
    """Draw column weights."""
    drawn: np.ndarray = (np.random.default_rng(seed).random(n) ** 2 + 1e-3).astype(np.float32)
    return drawn


def geometric(ratios: list[float] | np.ndarray) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.log(ratios).mean()))


def encode(name: str, effort: types.Effort, x: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """Encode and decode."""
    codec = types.get(name)
    return codec.decode(codec.encode(x, m, effort=effort))


def c_encoder(name: str) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray] | None:
    """Return libgguf's encoder of a type, or ``None``."""
    try:
        import gguf
        import libgguf
    except ImportError:
        return None
    number = gguf.GGMLQuantizationType.__members__.get(name)
    return None if number is None else lambda x, m: libgguf.quantize_rows(x, number, m)


def reference(name: str, x: np.ndarray, m: np.ndarray | None) -> np.ndarray | None:
    """Return what the reference encoder makes of ``x``, decoded; ``None`` where there is none."""
    if name in REFERENCES:
        with np.errstate(all="ignore"):
            return reference_values(name, x, m)
    theirs = c_encoder(name)
    if theirs is None:
        return None
    codec = types.get(name)
    return codec.decode(np.asarray(theirs(x, m)).reshape(len(x), -1))


def ratio(name: str, effort: types.Effort, x: np.ndarray, base: float | None, m: np.ndarray | None) -> float | None:
    """Error over that of the reference."""
    return None if base is None else float(errors(name, x, encode(name, effort, x, m), m).sum() / base)


def on_vectors(name: str, effort: types.Effort, case: str) -> float | None:
    """Ratio on the C libraries' vectors; ``None`` where they have no such case."""
    with np.load(VECTORS / f"{name.lower()}.npz") as archive:
        if f"dequant{case}" not in archive:
            return None
        x, m, theirs = archive["x"], archive["imatrix"] if case else None, archive[f"dequant{case}"]
    rows = [row for row in ROWS if row < len(x)]
    ratios = errors(name, x, encode(name, effort, x, m), m)[rows] / errors(name, x, theirs, m)[rows]
    if len(rows) > TINY:
        ratios[TINY] = 1
    return geometric(ratios)


def fresh(kind: str, seed: int = 12345) -> np.ndarray:
    """Draw rows that no parameter was chosen on."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((48, 1024)) if kind == "gauss" else rng.standard_t(4, (48, 1024))
    return (drawn * 0.05).astype(np.float32)


def real(path: Path, n_rows: int) -> list[tuple[str, np.ndarray]]:
    """Rows of real tensors, cut to whole blocks of 256, and the types that the tensors are stored as."""
    found = []
    with ggufx.open(path) as file:
        for layer in (0, 8, 17):
            for part in TENSORS:
                tensor = file[f"blk.{layer}.{part}.weight"]
                values = np.asarray(tensor.numpy(), np.float32)
                step = max(1, len(values) // n_rows)
                found.append((tensor.type, np.ascontiguousarray(values[::step, : values.shape[1] // 256 * 256])))
    return found


def speed(name: str, effort: types.Effort, repeats: int = 4) -> tuple[float, float | None]:
    """Million weights a second on one core, Gaussian with importance, 4096 columns; and the ratio to libgguf's, in turns."""
    codec, theirs = types.get(name), c_encoder(name)
    x = np.random.default_rng(1).standard_normal((64, 4096)).astype(np.float32)
    m = importance(4096)
    out = codec.encode(x, m, effort=effort)
    best = [np.inf, np.inf]
    for _ in range(repeats):
        # Processor time: libgguf takes threads of its own.
        start = time.process_time()
        codec.encode(x, m, effort=effort, threads=1, out=out)
        best[0] = min(best[0], time.process_time() - start)
        if theirs is not None:
            start = time.process_time()
            theirs(x, m)
            best[1] = min(best[1], time.process_time() - start)
    return x.size / best[0] / 1e6, best[1] / best[0] if theirs is not None else None


def measured(name: str, efforts: list[types.Effort], tensors: list[tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return the rows of a type."""
    codec = types.get(name)
    # What is stored as this very type both encoders give back without an error: nothing to compare.
    sets = [fresh("gauss"), fresh("t4"), *(x for stored, x in tensors if stored != name)]
    rows: list[dict[str, Any]] = [{"type": name, "effort": effort} for effort in efforts]
    for case in ("_imatrix",) if codec.needs_importance else ("_imatrix", ""):
        ms = [importance(x.shape[1], 5) if case else None for x in sets]
        decoded = [reference(name, x, m) for x, m in zip(sets, ms, strict=True)]
        bases = [
            None if y is None else float(errors(name, x, y, m).sum()) for x, y, m in zip(sets, decoded, ms, strict=True)
        ]
        for row in rows:
            effort = row["effort"]
            found = [ratio(name, effort, x, base, m) for x, base, m in zip(sets, bases, ms, strict=True)]
            worst = [r for r in found[2:] if r is not None]
            row |= {
                f"vectors{case}": on_vectors(name, effort, case),
                f"gauss{case}": found[0],
                f"t4{case}": found[1],
                f"real{case}": geometric(worst) if worst else None,
                f"worst{case}": max(worst) if worst else None,
            }
    for row in rows:
        row["mws"], row["times_c"] = speed(name, row["effort"])
    return rows


COLUMNS = {
    "type": ("type", ""),
    "effort": ("effort", ""),
    "vectors_imatrix": ("vectors", ".3f"),
    "gauss_imatrix": ("Gauss", ".3f"),
    "t4_imatrix": ("t4", ".3f"),
    "real_imatrix": ("real", ".3f"),
    "worst_imatrix": ("real, worst", ".3f"),
    "vectors": ("plain: vectors", ".3f"),
    "gauss": ("plain: Gauss", ".3f"),
    "t4": ("plain: t4", ".3f"),
    "real": ("plain: real", ".3f"),
    "mws": ("Mw/s", ".1f"),
    "times_c": ("x libgguf", ".1f"),
}


def markdown(report: dict[str, Any]) -> str:
    """Return what ``--json`` wrote as a table with the note that explains it."""
    lines = [
        [title for title, _ in COLUMNS.values()],
        ["---:" if form else "---" for _, form in COLUMNS.values()],
        *(
            ["n/a" if row.get(key) is None else format(row[key], form) for key, (_, form) in COLUMNS.items()]
            for row in report["rows"]
        ),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = (
        "Squared error over that of the C library's encoder (1 is as good, less is better), with importance and plain, "
        "with the weights that the type's docstring names (the K types' and those without importance are like the C "
        "libraries', not the same): geometric mean over the C libraries' own test rows, fresh Gaussian "
        f"and Student t4 rows, and {report['n_tensors']} tensors of gemma3-270m, decoded, with the worst of them "
        "(without those that the file stores as the very type; all are quantized already, so that types finer than "
        "theirs come close to reproducing them, which makes those ratios too good). "
        "Mw/s: million weights a second on one core, beside llama.cpp's C code in libgguf. Measured with "
        f"`python tools/frontier.py --model gemma-3-270m-q4_k_m.gguf --efforts {','.join(report['efforts'])}`."
    )
    return f"{table}\n\n{note}\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF with layers blk.0, blk.8, blk.17 (gemma3-270m)")
    parser.add_argument("--types", default=",".join(NAMES))
    parser.add_argument("--efforts", default=",".join(EFFORTS))
    parser.add_argument("--rows", type=int, default=48, help="rows of each tensor (default 48)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too, as tools/tables.py takes it")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        # libgguf takes threads of its own and cannot be told to use one.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tensors = real(arguments.model, arguments.rows) if arguments.model else []
    efforts = [effort for effort in EFFORTS if effort in arguments.efforts.split(",")]
    rows: list[dict[str, Any]] = []
    report = {"n_tensors": len(tensors), "efforts": efforts, "rows": rows}
    for name in arguments.types.split(","):
        rows += measured(name, efforts, tensors)
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(report), end="")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
