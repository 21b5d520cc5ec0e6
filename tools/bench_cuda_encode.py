"""Measure the GPU encoders: bytes and error against the CPU's effort ``normal`` and the reference, then speed.

``python tools/bench_cuda_encode.py`` on a machine with a GPU prints a table; ``--json FILE`` writes the numbers too.
Where the CPU's encoders cannot run (no Numba), their bytes come from a file: ``--write-cpu FILE`` elsewhere, then
``--cpu FILE``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ggufx import types  # noqa: E402

VECTORS = ROOT / "fixtures" / "vectors"
NAMES = ("IQ2_KS", "IQ4_KS", "IQ2_XXS", "IQ3_KS", "IQ4_K", "IQ5_K", "MXFP4", "Q4_0", "Q8_0", "F8_E4M3_B128")
GOALS = {"IQ2_KS": 3.0, "IQ4_KS": 1.0, "IQ2_XXS": 1.0}
"""Billion weights a second on an H200."""
REALISTIC = [0, 1, *range(4, 12)]
"""Rows of the vectors that are neither zero nor constant."""
# Of the reference encoders' weights: factor of the mean square, its factor without importance, elements it is taken over
# (0: the row).
WEIGHTS = {
    "IQ2_KS": (1.5, 0.25, 256), "IQ3_KS": (2.0, 0.0, 256), "IQ4_KS": (2.0, 0.0, 256), "IQ4_K": (2.0, 0.0, 256),
    "IQ5_K": (2.0, 0.25, 256), "IQ2_XXS": (1.0, 0.0, 256), "Q4_0": (1.0, None, 0),
}  # fmt: skip


def weights(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Return the weights of the squared error that the type's reference encoder minimises, float64 like ``x`` [R, n]."""
    x = x.astype(np.float64)
    m = np.ones_like(x) if importance is None else np.broadcast_to(importance.astype(np.float64), x.shape)
    if name not in WEIGHTS or (importance is None and WEIGHTS[name][1] is None):
        return m
    factor, plain, over = WEIGHTS[name]
    parts = x.reshape(len(x), -1, over or x.shape[1])
    sigma = np.repeat(factor * (parts**2).mean(axis=2), parts.shape[2], axis=1)
    return plain * sigma + x * x if importance is None else m * np.sqrt(sigma + x * x)


def vector(name: str) -> dict[str, np.ndarray]:
    """Return the fixture of a type; of a type without one, the values of another and no reference."""
    path = VECTORS / f"{name.lower()}.npz"
    with np.load(path if path.exists() else VECTORS / "q8_0.npz") as archive:
        keys = archive.files if path.exists() else ["x", "imatrix"]
        found = {key: archive[key] for key in keys}
    if "imatrix" not in found:
        with np.load(VECTORS / "mxfp4.npz") as archive:
            found["imatrix"] = archive["imatrix"]
    return found


def fresh(n_rows: int = 48, row_len: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian, Student-t and tiny rows that tuned nothing, and an uneven importance."""
    rng = np.random.default_rng(20261122)
    x = rng.standard_normal((n_rows, row_len))
    x[1::2] = rng.standard_t(4, (n_rows // 2, row_len))
    x[::16] *= 1e-5
    return (x * 0.02).astype(np.float32), (rng.random(row_len) ** 2 + 1e-3).astype(np.float32)


def cases(name: str) -> list[tuple[str, np.ndarray, np.ndarray | None, str, str]]:
    """Return (label, values, importance, objective, effort) of what is compared with the CPU."""
    data = vector(name)
    x, m = data["x"], data["imatrix"]
    y, n = fresh()
    found: list[tuple[str, np.ndarray, np.ndarray | None, str, str]] = [
        ("imatrix", x, m, "reference", "normal"),
        ("imatrix mse", x, m, "mse", "normal"),
        ("fresh imatrix", y, n, "reference", "normal"),
    ]
    if not types.get(name).needs_importance:
        found += [("plain", x, None, "reference", "normal"), ("fresh plain", y, None, "reference", "normal")]
    if name in ("MXFP4", "Q4_0"):
        found += [
            ("reference", x, None, "reference", "reference"),
            ("reference imatrix", x, m, "reference", "reference"),
        ]
    return found


def cpu_bytes(name: str) -> dict[str, np.ndarray]:
    """Return what the CPU's encoders make of :func:`cases`."""
    codec = types.get(name)
    return {
        f"{name}/{label}": codec.encode(x, m, objective=objective, effort=effort)  # type: ignore[arg-type]
        for label, x, m, objective, effort in cases(name)
    }


def compare(name: str, expected: dict[str, np.ndarray], device: str) -> dict[str, Any]:
    """Encode :func:`cases` on the device: bytes that differ from the CPU's, ratios of errors."""
    import torch

    from ggufx.kernels.cuda.encode import encode

    codec, data = types.get(name), vector(name)
    found: dict[str, Any] = {"differing_bytes": {}}
    for label, x, m, objective, effort in cases(name):
        want = expected[f"{name}/{label}"]
        out = torch.full(want.shape, 0xAA, dtype=torch.uint8, device=device)
        values = torch.from_numpy(x).to(device)
        importance = None if m is None else torch.from_numpy(m).to(device)
        encode(name, values, importance, out, objective, effort)  # type: ignore[arg-type]
        got = out.cpu().numpy()
        found["differing_bytes"][label] = int((got != want).sum())
        if label not in ("imatrix", "plain"):
            continue
        w = weights(name, x, m)

        def error(y: np.ndarray, x: np.ndarray = x, w: np.ndarray = w) -> np.ndarray:
            return np.maximum((w * (x.astype(np.float64) - y) ** 2).sum(axis=1), 1e-300)

        ours = error(codec.decode(got, use_kernel=False))
        cpu = ours / error(codec.decode(want, use_kernel=False))
        found[f"{label}: worst row over CPU normal"] = float(cpu[REALISTIC].max())
        key = "dequant_imatrix" if label == "imatrix" and "dequant_imatrix" in data else "dequant"
        if key in data:
            ratio = (ours / error(data[key]))[REALISTIC]
            found[f"{label}: worst row over reference"] = float(ratio.max())
            found[f"{label}: mean over reference"] = float(np.exp(np.log(ratio).mean()))
    return found


def speed(name: str, shape: tuple[int, int], device: str, repeats: int) -> dict[str, Any]:
    """Return the rate of encoding a matrix of normal values with importance, and whether pieces of it give the same bytes."""
    import torch

    from ggufx.kernels.cuda.encode import encode

    generator = torch.Generator(device=device).manual_seed(1)
    values = torch.randn(shape, generator=generator, device=device) * 0.02
    importance = torch.rand(shape[1], generator=generator, device=device) ** 2 + 1e-3
    out = torch.full((shape[0], types.get(name).layout.row_nbytes(shape[1])), 0xAA, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats + 1):  # the first compiles
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        encode(name, values, importance, out)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    part = torch.full_like(out[-100:], 0x55)
    encode(name, values[-100:], importance, part)
    seconds = statistics.median(times[1:]) / 1e3
    return {
        "shape": list(shape),
        "ms": seconds * 1e3,
        "weights_per_second": values.numel() / seconds,
        "rows_alone_agree": bool((part == out[-100:]).all().item()),
        "scratch_bytes": peak,
    }


def profile(name: str, shape: tuple[int, int], device: str) -> list[tuple[str, int, float]]:
    """Return (kernel, launches, ms) of one encoding."""
    import torch

    from ggufx.kernels.cuda.encode import encode

    values = torch.randn(shape, device=device) * 0.02
    importance = torch.rand(shape[1], device=device) + 1e-3
    out = torch.empty((shape[0], types.get(name).layout.row_nbytes(shape[1])), dtype=torch.uint8, device=device)
    encode(name, values, importance, out)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        encode(name, values, importance, out)
        torch.cuda.synchronize()
    rows = [(e.key, e.count, e.self_device_time_total / 1e3) for e in profiler.key_averages() if e.key.startswith("_")]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(NAMES))
    parser.add_argument("--shapes", default="8192x65536,11008x4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cpu", type=Path, help="bytes of the CPU's encoders, as --write-cpu wrote them")
    parser.add_argument("--write-cpu", type=Path)
    parser.add_argument("--profile", action="store_true", help="time by kernel, first shape")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.types.split(",")
    if arguments.write_cpu:
        np.savez_compressed(arguments.write_cpu, **{k: v for name in names for k, v in cpu_bytes(name).items()})
        return
    import torch

    if arguments.cpu:
        with np.load(arguments.cpu) as archive:
            expected = {key: archive[key] for key in archive.files}
    else:
        expected = {k: v for name in names for k, v in cpu_bytes(name).items()}
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in arguments.shapes.split(",") if shape]
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    report: dict[str, Any] = {"device": title, "types": {}}
    print(f"# {title}\n")
    heads = "".join(f" {r}x{n}, G/s |" for r, n in shapes)
    print(
        f"| type | bytes unlike CPU | worst row / CPU normal | worst row / reference | mean / reference |{heads} goal |"
    )
    print("|---|--:|--:|--:|--:|" + "--:|" * len(shapes) + "--:|")
    for name in names:
        found = compare(name, expected, arguments.device)
        found["speed"] = []
        for shape in shapes:
            found["speed"].append(speed(name, shape, arguments.device, arguments.repeats))  # type: ignore[arg-type]
        report["types"][name] = found

        def worst(what: str, found: dict[str, Any] = found) -> str:
            values = [v for k, v in found.items() if k.endswith(what)]
            return f"{max(values):.4f}" if values else "-"

        rates = "".join(
            f" {s['weights_per_second'] / 1e9:.2f}{'' if s['rows_alone_agree'] else ' ROWS DIFFER'} |"
            for s in found["speed"]
        )
        print(
            f"| {name} | {sum(found['differing_bytes'].values())} | {worst('over CPU normal')} "
            f"| {worst('worst row over reference')} | {worst('mean over reference')} |{rates} {GOALS.get(name, '-')} |",
            flush=True,
        )
        if arguments.profile:
            found["profile"] = profile(name, shapes[0], arguments.device)  # type: ignore[arg-type]
    for name in names if arguments.profile else ():
        kernels = ", ".join(f"{k} x{n} {ms:.2f}" for k, n, ms in report["types"][name]["profile"][:12])
        print(f"\n{name}, ms: {kernels}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
