"""What the first use of a type costs in a fresh process, cold (nothing compiled) and warm (machine code on disk).

    python tools/cold_start.py [TYPE ...] [--verb decode] [--repeat 5] [--json FILE]

Bars: a cold first use under 3 s, a warm one under 0.3 s; both include importing Numba, which is printed beside them. The clock
starts when ``import ggufx`` is done and a row is at hand. Of the warm runs the fastest counts: the others measured the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = """
import json, sys, time
import numpy as np
from ggufx import types
codec, verb = types.get(sys.argv[1]), sys.argv[2]
n = codec.layout.block_len
row = np.zeros((1, codec.layout.row_nbytes(n)), np.uint8)
argument = {"decode": row, "unpack": row, "encode": np.zeros((1, n), np.float32)}.get(verb)
arguments = (argument,) if verb != "pack" else (np.zeros((1, row.size - 1), np.uint8), np.zeros((1, 1), np.uint8))
start = time.perf_counter()
import numba
imported = time.perf_counter()
getattr(codec, verb)(*arguments)
done = time.perf_counter()
print(json.dumps([imported - start, done - start]))
"""


def first_use(name: str, verb: str, cache: str) -> tuple[float, float]:
    """Return seconds of (importing Numba, importing it and the first call) in a fresh process."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, name, verb], env=environment, capture_output=True, text=True, check=True
    )
    numba, total = json.loads(done.stdout)
    return numba, total


def main() -> None:
    """Measure and print."""
    from ggufx import warmup

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: every type with a kernel")
    parser.add_argument("--verb", choices=["decode", "encode", "pack", "unpack"], help="default: every kernel")
    parser.add_argument("--repeat", type=int, default=5, help="warm runs (default 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows there, too (tools/readme.py takes them)"
    )
    options = parser.parse_args()
    rows = []
    print(f"{'type':14} {'kernel':7} {'cold':>7} {'warm':>7} {'numba':>7}   seconds")
    for codec, verb in warmup.kernels_of(options.types or None):
        if options.verb not in (None, verb):
            continue
        with tempfile.TemporaryDirectory() as cache:
            _, cold = first_use(codec.name, verb, cache)
            runs = [first_use(codec.name, verb, cache) for _ in range(options.repeat)]
        warm, numba = min(total for _, total in runs), min(numba for numba, _ in runs)
        print(
            f"{codec.name:14} {verb:7} {cold:7.2f} {warm:7.3f} {numba:7.3f}   {'' if warm < 0.3 and cold < 3 else 'OVER'}",
            flush=True,
        )
        rows.append({"type": codec.name, "kernel": verb, "cold s": round(cold, 2), "warm s": round(warm, 3)})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
