#!/usr/bin/env python3
"""Measure on a GPU what has a file at its other end: loading packed tensors, and quantizing a checkpoint.

    python tools/bench_device.py [--gigabytes 4] [--device cuda] [--threads 4,8,16] [--work-dir .bench] [--json FILE]

Loading is compared with a copy of as many bytes from page-locked memory, quantizing with the same run on the CPU, whose
bytes must be the same. Files are in the page cache. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ggufx  # noqa: E402
import ggufx.torch  # noqa: E402
from ggufx import quantize, recipe  # noqa: E402

EXPERTS = "ffn_gate_exps=iq2_xxs\nffn_up_exps=iq4_ks\nffn_down_exps=iq2_ks"


def copying(device: torch.device, rounds: int = 5) -> float:
    """Return bytes a second of copies from page-locked memory, the median: what loading cannot exceed."""
    chunk = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(chunk, device=device)
    speeds = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(chunk, non_blocking=True)
        torch.cuda.synchronize(device)
        speeds.append(4 * chunk.numel() / (time.perf_counter() - start))
    return float(np.median(speeds))


def upload(path: Path, device: torch.device, copy: float, threads: int | None, rounds: int = 5) -> dict[str, Any]:
    """Load every tensor of a GGUF, compared with ``copy`` bytes a second; the median after a first one, which compiles."""
    loads, tensors = [], {}
    for _ in range(rounds + 1):
        tensors.clear()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        tensors = ggufx.torch.load(path, device=device, threads=threads)
        torch.cuda.synchronize(device)
        loads.append(sum(tensor.nbytes for tensor in tensors.values()) / (time.perf_counter() - start))
    with ggufx.open(path) as file:
        nbytes = sum(tensor.nbytes for tensor in file.tensors)
        for name, tensor in tensors.items():
            if not np.array_equal(tensor.packed.cpu().numpy().reshape(-1), np.asarray(file[name].packed).reshape(-1)):
                raise AssertionError(f"{name} is not what the file holds")
    load = float(np.median(loads[1:]))
    return {
        "what": "load", "threads": threads, "gigabytes": nbytes / 1e9, "first_gbps": loads[0] / 1e9, "load_gbps": load / 1e9,
        "copy_gbps": copy / 1e9, "ratio": load / copy,
    }  # fmt: skip


def quantizing(checkpoint: Path, folder: Path, device: str, *, compare: bool) -> dict[str, Any]:
    """Quantize the experts of a checkpoint on the device; with ``compare`` on the CPU, too."""
    options: dict[str, Any] = {"recipe": recipe.Recipe.parse(EXPERTS), "imatrix": "ones", "target": "ik_llama.cpp"}
    seconds: dict[str, list[float]] = {}
    for place, runs in ((device, 3), *((("cpu", 1),) if compare else ())):
        for _ in range(runs):
            start = time.perf_counter()
            quantize.quantize(checkpoint, folder / f"{place[:3]}.gguf", device=place, overwrite=True, **options)
            seconds.setdefault(place, []).append(time.perf_counter() - start)
    with ggufx.open(folder / f"{device[:3]}.gguf") as file:
        weights = sum(t.size for t in file.tensors if "_exps" in t.name)
        nbytes = sum(t.nbytes for t in file.tensors)
        same = None
        if compare:
            with ggufx.open(folder / "cpu.gguf") as other:
                same = all(np.array_equal(t.packed, other[t.name].packed) for t in file.tensors)
    # The first run compiles.
    best = min(seconds[device])
    return {
        "what": "quantize", "weights": weights, "output_gb": nbytes / 1e9, "device_s": seconds[device],
        "giga_weights_per_s": weights / best / 1e9, "cpu_s": min(seconds["cpu"]) if compare else None, "same_bytes": same,
    }  # fmt: skip


def main() -> int:
    """Measure, print, and fail where bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work-dir", type=Path, default=Path(".bench"))
    parser.add_argument("--threads", default="0", help="loads by as many threads, 4,8,16 for each; 0: the default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-cpu", action="store_true", help="do not quantize on the CPU for comparison")
    options = parser.parse_args()
    folder: Path = options.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    maker = [sys.executable, ROOT / "tools" / "make_tiny_v4.py", checkpoint, "--gigabytes", str(options.gigabytes)]
    subprocess.run(
        [*map(str, maker), "--hidden", "4096", "--moe", "2048", "--mtp-layers", "0"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    native = folder / "native.gguf"
    ggufx.convert.convert(checkpoint, native, overwrite=True)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}", flush=True)
    copy = copying(device)
    print(f"copy from page-locked memory: {copy / 1e9:.1f} GB/s", flush=True)
    rows = []
    for threads in [int(count) or None for count in options.threads.split(",")]:
        rows.append(loaded := upload(native, device, copy, threads))
        print(
            f"load {loaded['gigabytes']:.2f} GB, {threads or 'default'} threads: {loaded['load_gbps']:.1f} GB/s, "
            f"{loaded['ratio']:.2f} of the copy; the first time {loaded['first_gbps']:.1f} GB/s", flush=True,
        )  # fmt: skip
    done = quantizing(checkpoint, folder, options.device, compare=not options.no_cpu)
    print(
        f"quantize {done['weights'] / 1e9:.2f} billion expert weights to {done['output_gb']:.2f} GB: "
        f"{', '.join(f'{s:.1f} s' for s in done['device_s'])}, {done['giga_weights_per_s']:.2f} billion a second; CPU "
        f"{done['cpu_s']}; same bytes: {done['same_bytes']}"
    )
    if options.json:
        options.json.write_text(json.dumps({"device": name, "rows": [*rows, done]}, indent=1), encoding="utf-8")
    shutil.rmtree(checkpoint)
    for path in folder.glob("*.gguf"):
        path.unlink()
    return 0 if done["same_bytes"] in (True, None) else 1


if __name__ == "__main__":
    sys.exit(main())
