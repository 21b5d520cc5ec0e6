"""What the first use of a type costs in a fresh process, cold (nothing compiled) and warm (machine code on disk).

    python tools/cold_start.py [TYPE ...] [--verb encode] [--effort normal ...] [--importance] [--repeat 5] [--json FILE]

Bars: a cold first use under 3 s, a warm one under 0.3 s; both include importing Numba, which is printed alone above them. The
clock starts when ``import ggufx`` is done and a row is at hand. Of the warm runs the fastest counts: the others measured the
machine. Every run is a process of its own, every cold one has an empty cache. "CPU" is the processor time of the cold call: on
a machine that does other things, too, what the wall clock would show on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ggufx import types, warmup

_CHILD = """
import sys, time
import numpy as np
from ggufx import types
codec, verb, effort, weighted = types.get(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "1"
n = codec.layout.block_len
options = {"effort": effort, "importance": np.ones(n, np.float32) if weighted else None} if verb == "encode" else {}
row = np.zeros((1, codec.layout.row_nbytes(n)), np.uint8)
values, codes, scales = np.zeros((1, n), np.float32), np.zeros((1, max(1, row.size - 1)), np.uint8), np.zeros((1, 1), np.uint8)
arguments = {"decode": (row,), "unpack": (row,), "encode": (values,), "pack": (codes, scales), "import": ()}[verb]
start, start_cpu = time.perf_counter(), time.process_time()
if verb == "import":
    import numba
else:
    getattr(codec, verb)(*arguments, **options)
print(time.perf_counter() - start, time.process_time() - start_cpu)
"""


def first_use(name: str, verb: str, cache: str, effort: str = "normal", weighted: bool = False) -> tuple[float, float]:
    """Return seconds, of the clock and of the processor, of the first call of ``verb`` in a fresh process.

    ``import`` is importing Numba alone.
    """
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, name, verb, effort, str(int(weighted))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def uses(names: list[str] | None) -> list[tuple[types.Codec, str]]:
    """Return (codec, verb) of what compiles at its first use: kernels of the verbs, and the searches behind ``encode``."""
    found = warmup.kernels_of(names)
    codecs = types.all_codecs() if names is None else map(types.get, names)
    searches = [(codec, "encode") for codec in codecs if codec.can_encode and codec.has_kernel]
    # F16 and BF16 encode without a kernel of theirs: nothing to compile, little to measure.
    return found + [pair for pair in searches if pair not in found]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: every type with a kernel")
    parser.add_argument("--verb", choices=["decode", "encode", "pack", "unpack"], help="default: every kernel")
    parser.add_argument(
        "--effort",
        nargs="+",
        choices=["fast", "normal", "high"],
        default=["normal"],
        help="of encoders (default: normal)",
    )
    parser.add_argument(
        "--importance", action="store_true", help="encode with importance (types that need it always do)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="warm runs (default 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows there too, as tools/tables.py takes them"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        numba, _ = min(first_use("F32", "import", cache) for _ in range(options.repeat))
    heads = f"{'type':14} {'verb':14} {'cold':>7} {'CPU':>7} {'warm':>7}   seconds"
    print(f"import numba alone: {numba:.3f} s\n{heads}", flush=True)
    rows = []
    pairs = [(codec, verb) for codec, verb in uses(options.types or None) if options.verb in (None, verb)]
    for codec, verb in pairs:
        for effort in options.effort if verb == "encode" else [""]:
            wish = (effort, options.importance or codec.needs_importance)
            with tempfile.TemporaryDirectory() as cache:
                cold, cpu = first_use(codec.name, verb, cache, *wish)
                warm, _ = min(first_use(codec.name, verb, cache, *wish) for _ in range(options.repeat))
            over = "" if cold < 3 and warm < 0.3 else "OVER"
            label = f"{verb} {effort}".strip()
            print(f"{codec.name:14} {label:14} {cold:7.2f} {cpu:7.2f} {warm:7.3f}   {over}", flush=True)
            times = {"cold s": round(cold, 2), "cold CPU s": round(cpu, 2), "warm s": round(warm, 3)}
            rows.append({"type": codec.name, "kernel": label, **times})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
