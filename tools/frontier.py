"""Error against speed of the searching encoders: the table of the README.

Errors are weighted squared errors over those of the reference encoder, with its own weights: on the vectors of the C libraries
(geometric mean over rows 0, 1, 4..11; in brackets with the tiny row, whose scale the references round to zero, counted as 1),
and against a port of the reference encoders on fresh Gaussian and Student t4 data and on tensors of a real model. Importance
columns of fresh and real data are drawn, uniform^2 + 0.001.

    python tools/frontier.py [--model FILE.gguf] [--types IQ4_K,IQ5_K]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracle import VECTORS
from reference_encoders import REFERENCES, reference_values, weights

import ggufx
from ggufx import types

ROWS = [0, 1, *range(4, 12)]
C_SPEED = {"IQ2_KS": 1.24, "IQ3_KS": 5.0, "IQ4_KS": 4.6, "IQ4_K": 4.7, "IQ5_K": 3.95}
"""Million weights a second of the C encoders, one thread, on the machine of CPU_NOTES."""
TENSORS = ("ffn_down", "attn_v", "attn_output", "ffn_up", "attn_q")


def errors(name: str, x: np.ndarray, y: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """Return the weighted squared error of every row."""
    found: np.ndarray = (weights(name, x, m).astype(np.float64) * (x.astype(np.float64) - y) ** 2).sum(axis=1)
    return found


def importance(n: int, seed: int = 0) -> np.ndarray:
    """Draw column weights."""
    drawn: np.ndarray = (np.random.default_rng(seed).random(n) ** 2 + 1e-3).astype(np.float32)
    return drawn


def geometric(ratios: np.ndarray) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.log(ratios).mean()))


def encode(name: str, effort: types.Effort, x: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """Encode and decode."""
    codec = types.get(name)
    return codec.decode(codec.encode(x, m, effort=effort))


def ratio(name: str, effort: types.Effort, x: np.ndarray, base: float, plain: bool) -> float:
    """Error over that of the reference, without or with importance."""
    m = None if plain else importance(x.shape[1], 5)
    return float(errors(name, x, encode(name, effort, x, m), m).sum() / base)


def on_vectors(name: str, effort: types.Effort) -> str:
    """Ratios on the C libraries' vectors, as text."""
    with np.load(VECTORS / f"{name.lower()}.npz") as archive:
        x, m, reference = archive["x"], archive["imatrix"], archive["dequant_imatrix"]
    ratios = errors(name, x, encode(name, effort, x, m), m)[ROWS] / errors(name, x, reference, m)[ROWS]
    return f"{geometric(ratios):.3f} ({geometric(np.where(np.array(ROWS) == 4, 1, ratios)):.3f})"


def fresh(kind: str, seed: int = 12345) -> np.ndarray:
    """Draw rows that no parameter was chosen on."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((48, 1024)) if kind == "gauss" else rng.standard_t(4, (48, 1024))
    return (drawn * 0.05).astype(np.float32)


def real(path: Path, n_rows: int = 48) -> list[np.ndarray]:
    """Rows of real tensors, cut to whole blocks of 256."""
    found = []
    with ggufx.open(path) as file:
        for layer in (0, 8, 17):
            for part in TENSORS:
                values = np.asarray(file[f"blk.{layer}.{part}.weight"].numpy(), np.float32)
                step = max(1, len(values) // n_rows)
                found.append(np.ascontiguousarray(values[::step, : values.shape[1] // 256 * 256]))
    return found


def speed(codec: types.Codec, effort: types.Effort, repeats: int = 4) -> tuple[float, float]:
    """Million weights a second of CPU time, one thread, Gaussian, 4096 columns; and how two threads scale (wall time)."""
    x = np.random.default_rng(1).standard_normal((512, 4096)).astype(np.float32)
    m = importance(4096)
    out = codec.encode(x, m, effort=effort)
    cpu, wall = np.inf, [np.inf, np.inf]
    for _ in range(repeats):
        for threads in (1, 2):
            start, start_cpu = time.perf_counter(), time.thread_time()
            codec.encode(x, m, effort=effort, threads=threads, out=out)
            if threads == 1:
                cpu = min(cpu, time.thread_time() - start_cpu)
            wall[threads - 1] = min(wall[threads - 1], time.perf_counter() - start)
    return x.size / cpu / 1e6, wall[0] / wall[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF with layers blk.0, blk.8, blk.17 (gemma3-270m)")
    parser.add_argument("--types", default=",".join(REFERENCES))
    arguments = parser.parse_args()
    tensors = real(arguments.model) if arguments.model else []
    print(
        "| type | effort | vectors | Gauss | t4 | real | real, worst | plain real | Mw/s 1 thread | x C | 2 threads |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.types.split(","):
        codec = types.get(name)
        sets = [fresh("gauss"), fresh("t4"), *tensors]
        bases: list[list[float]] = []
        with np.errstate(all="ignore"):
            for plain in (False, True):
                bases.append([])
                for x in sets:
                    m = None if plain else importance(x.shape[1], 5)
                    bases[plain].append(errors(name, x, reference_values(name, x, m), m).sum())
        for effort in ("fast", "normal", "high"):
            weighted = [ratio(name, effort, x, base, False) for x, base in zip(sets, bases[0], strict=True)]
            cells = [name, effort, on_vectors(name, effort), *(f"{r:.3f}" for r in weighted[:2])]
            if tensors:
                unweighted = [
                    ratio(name, effort, x, base, True) for x, base in zip(sets[2:], bases[1][2:], strict=True)
                ]
                cells += [f"{geometric(np.array(weighted[2:])):.3f}", f"{max(weighted[2:]):.3f}"]
                cells += [f"{geometric(np.array(unweighted)):.3f}"]
            else:
                cells += ["", "", ""]
            one, scaling = speed(codec, effort)
            against = f"{one / C_SPEED[name]:.1f}" if name in C_SPEED else ""
            cells += [f"{one:.1f}", against, f"x {scaling:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
