"""What the first use of a type costs in a fresh process, cold (nothing compiled) and warm (machine code on disk).

    python tools/cold_start.py [TYPE ...] [--verb decode] [--repeat 5] [--json FILE]

Bars: a cold first use under 3 s, a warm one under 0.3 s; both include importing Numba, which is printed alone above them. The
clock starts when ``import ggufx`` is done and a row is at hand. Of the warm runs the fastest counts: the others measured the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ggufx import warmup

_CHILD = """
import sys, time
import numpy as np
from ggufx import types
codec, verb = types.get(sys.argv[1]), sys.argv[2]
n = codec.layout.block_len
row = np.zeros((1, codec.layout.row_nbytes(n)), np.uint8)
values, codes, scales = np.zeros((1, n), np.float32), np.zeros((1, max(1, row.size - 1)), np.uint8), np.zeros((1, 1), np.uint8)
arguments = {"decode": (row,), "unpack": (row,), "encode": (values,), "pack": (codes, scales), "import": ()}[verb]
start = time.perf_counter()
if verb == "import":
    import numba
else:
    getattr(codec, verb)(*arguments)
print(time.perf_counter() - start)
"""


def first_use(name: str, verb: str, cache: str) -> float:
    """Return seconds of the first call of ``verb`` in a fresh process, or of importing Numba (``import``) alone."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, name, verb], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: every type with a kernel")
    parser.add_argument("--verb", choices=["decode", "encode", "pack", "unpack"], help="default: every kernel")
    parser.add_argument("--repeat", type=int, default=5, help="warm runs (default 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows there too, as tools/readme.py takes them"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        numba = min(first_use("F32", "import", cache) for _ in range(options.repeat))
    print(f"import numba alone: {numba:.3f} s\n{'type':14} {'kernel':7} {'cold':>7} {'warm':>7}   seconds", flush=True)
    rows = []
    for codec, verb in warmup.kernels_of(options.types or None):
        if options.verb not in (None, verb):
            continue
        with tempfile.TemporaryDirectory() as cache:
            cold = first_use(codec.name, verb, cache)
            warm = min(first_use(codec.name, verb, cache) for _ in range(options.repeat))
        over = "" if cold < 3 and warm < 0.3 else "OVER"
        print(f"{codec.name:14} {verb:7} {cold:7.2f} {warm:7.3f}   {over}", flush=True)
        rows.append({"type": codec.name, "kernel": verb, "cold s": round(cold, 2), "warm s": round(warm, 3)})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
