#!/usr/bin/env python3
"""Measure the GPU kernels: decoding, products, experts, encoding where there is one, beside torch's own in bfloat16.

    python tools/bench_cuda.py                                    # everything, a few minutes
    python tools/bench_cuda.py decode linear --types Q4_0 MXFP4   # some subjects, some types
    python tools/bench_cuda.py --json cuda.json --markdown cuda.md

Every number is the median over replays of a CUDA graph that goes through copies of its buffers larger than the second-level
cache. Every result is checked in the same run: outputs are poisoned first; decoding must agree bit for bit with the NumPy
specification, products with a float64 product of its values. A wrong result ends the run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ggufx.torch
from ggufx import kernels, types
from ggufx.kernels.cuda import _linear, _scaled, experts

TYPES = (
    "Q4_0", "Q8_0", "MXFP4", "F8_E4M3_B128", "IQ2_XXS", "IQ2_KS", "IQ3_KS", "IQ4_KS", "IQ4_K", "IQ5_K",
    "IQ4_NL", "Q4_K", "Q6_K",
)  # fmt: skip
LARGE, MIDDLE, SQUARE, SMALL = (8192, 65536), (11008, 4096), (4096, 4096), (2048, 4096)
"""Rows and row lengths: outputs and inputs of a product."""
ROTATED_NBYTES = 256 << 20
SUBJECTS = ("ceilings", "decode", "linear", "shared", "batches", "experts", "large", "fp8")


@dataclass
class Result:
    """One line of the table: ``share`` is the part of ``ceiling``."""

    subject: str
    type: str
    shape: str
    microseconds: float
    gigabytes_per_second: float | None = None
    share: float | None = None
    ceiling: str = ""
    error: float | None = None
    note: str = ""


# Measuring ------------------------------------------------------------------------------------------------------------


def timed(works: Sequence[Callable[[], Any]], replays: int = 25, least: int = 20) -> float:
    """Return the median microseconds of one of ``works``, equal but for their buffers, in a graph that goes through them."""
    works = list(works)
    turns = max(1, math.ceil(least / len(works)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for work in works:
                work()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (turns * len(works)))
    graph.reset()
    return statistics.median(times)


def copies(nbytes: int, limit: int = 64) -> int:
    """Return how many copies of buffers of ``nbytes`` exceed the second-level cache by far."""
    return max(2, min(limit, math.ceil(ROTATED_NBYTES / max(1, nbytes))))


@triton.jit
def _read(data, out, n_words, T: tl.constexpr, EACH: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * (T * EACH) + tl.arange(0, T * EACH)
    words = tl.load(data + at, at < n_words, other=0)
    if DEPENDENT:
        gdc_wait()
    total = tl.sum(words ^ (words >> 3), 0)
    # Never true of random words: the sum must be made, nothing is written.
    tl.store(out, total, total == 0x12345679)


def read(data: torch.Tensor, out: torch.Tensor, dependent: bool = False, each: int = 4, warps: int = 4) -> None:
    """Read ``data`` once: what any product must do at least. Launched dependently as the products are."""
    words = data.view(-1)[: data.numel() // 4 * 4].view(torch.int32)
    tile = 32 * warps * each
    _read[(triton.cdiv(words.numel(), tile),)](
        words, out, words.numel(), T=32 * warps, EACH=each, DEPENDENT=dependent, num_warps=warps, launch_pdl=dependent
    )


@triton.jit
def _copy(source, target, n_words, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at, at < n_words, other=0), at < n_words)


def copy(source: torch.Tensor, target: torch.Tensor, each: int, warps: int) -> None:
    """Copy with a kernel."""
    a, b = source.view(torch.int32), target.view(torch.int32)
    tile = 32 * warps * each
    _copy[(triton.cdiv(a.numel(), tile),)](a, b, a.numel(), TILE=tile, num_warps=warps)


def eager(work: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median microseconds of ``work`` without a graph."""
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times[3:])


def random_rows(name: str, n_rows: int, row_len: int, *, seed: int = 0, native: bool = True) -> torch.Tensor:
    """Return packed rows on the GPU: random bytes with scales around those of real weights, and no NaN.

    ``native``: F8_E4M3_B128's scales are shared by 128 rows, as in checkpoints.
    """
    layout = types.get(name).layout
    generator = torch.Generator("cuda").manual_seed(seed)
    row_nbytes = layout.row_nbytes(row_len)
    rows = torch.randint(0, 256, (n_rows, row_nbytes), dtype=torch.uint8, device="cuda", generator=generator)

    def fill(part: torch.Tensor, dtype: np.dtype[Any], name: str, width: int) -> None:
        field, offset = dtype.fields[name][:2]
        place = part[..., offset : offset + field.itemsize]
        count = place.shape[:-1]
        if name in ("d", "dmin"):
            values = torch.rand(count, device="cuda", generator=generator) * 0.01 + 0.001
            kind = torch.float16 if field == np.dtype("<f2") else torch.float32
            place.copy_(values.to(kind).view(torch.uint8).view(*count, field.itemsize))
        elif name == "e":
            place.copy_(torch.randint(118, 123, place.shape, dtype=torch.uint8, device="cuda", generator=generator))
            if native and width == 128:
                place.copy_(place[::128].repeat_interleave(128, 0)[:n_rows])
        elif name == "qs" and width == 128:
            # As weights are: the matrix units draw more power for evenly random codes, and clock lower.
            values = torch.randn(count + place.shape[-1:], device="cuda", generator=generator) * 100
            place.copy_(values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))

    header = layout.header_nbytes
    if layout.header is not None:
        for field in layout.header.names or ():
            fill(rows[:, :header], layout.header, field, layout.block_len)
    blocks = rows[:, header:].unflatten(1, (-1, layout.block.itemsize))
    for field in layout.block.names or ():
        fill(blocks, layout.block, field, layout.block_len)
    return rows


# Checking -------------------------------------------------------------------------------------------------------------


def specified(name: str, rows: torch.Tensor, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Return the values of a few rows by the type's NumPy specification."""
    return types.get(name).decode(rows.cpu().numpy(), dtype=dtype, use_kernel=False)


def check_decode(name: str, rows: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Decode into poison and compare every seventh row (64 at most) with the specification, bit for bit."""
    module = kernels.find(name, cuda=True)
    out = torch.full(
        (rows.shape[0], types.get(name).layout.row_len(rows.shape[1])), math.nan, dtype=dtype, device="cuda"
    )
    module.decode(rows, out)
    pick = torch.arange(0, rows.shape[0], 7, device="cuda")[-64:]
    numpy_dtype = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}[dtype]
    expected = specified(name, rows[pick], numpy_dtype)
    bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
    got = out[pick].view(bits).cpu().numpy()
    wrong = got != expected.view(got.dtype)
    wrong &= ~(torch.isnan(out[pick]).cpu().numpy() & np.isnan(expected.astype(np.float32)))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise SystemExit(f"{name} to {dtype} at {at}: {out[pick][at]} where the specification has {expected[at]}")
    if not torch.isfinite(out).all():
        raise SystemExit(f"{name} to {dtype}: left something unwritten")


def error_of(name: str, rows: torch.Tensor, x: torch.Tensor, out: torch.Tensor, limit: float = 4e-3) -> float:
    """Return the relative error of ``out`` [B, R] against a float64 product, over 16 to 128 rows."""
    if not torch.isfinite(out).all():
        raise SystemExit(f"product with {name}: not finite, or left unwritten")
    count = min(rows.shape[0], max(16, min(128, (1 << 21) // x.shape[1])))
    pick = torch.linspace(0, rows.shape[0] - 1, count, device="cuda").long()
    weights = torch.from_numpy(specified(name, rows[pick])).double().cuda()
    expected = x.double() @ weights.T
    error = ((out[:, pick].double() - expected).norm() / expected.norm()).item()
    if not error < limit:
        raise SystemExit(f"product with {name}: error {error}")
    return error


# Subjects -------------------------------------------------------------------------------------------------------------


class Bench:
    """Subjects are methods; each yields results."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.copy = 0.0
        self.reading = 0.0

    def ceilings(self) -> Iterator[Result]:
        """What the memory can do."""
        source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        # In a graph a copy may go to a copy engine, which is slower than a kernel: the fastest of them all is the ceiling.
        ways = {
            "torch copy": timed([lambda: target.copy_(source)], least=4),
            "torch copy, no graph": eager(lambda: target.copy_(source)),
            "kernel": min(
                timed([lambda e=e, w=w: copy(source, target, e, w)], least=4) for e in (4, 8) for w in (4, 8)
            ),
        }
        for note, took in ways.items():
            yield Result(
                "ceiling", "copy", "1 GiB", took, 2 * source.numel() / took / 1e3, note=f"read + written, {note}"
            )
        self.copy = 2 * source.numel() / min(ways.values()) / 1e3
        out = torch.zeros(1, dtype=torch.int32, device="cuda")
        took = min(timed([lambda e=e: read(source, out, False, e)], least=4) for e in (4, 8, 16))
        self.reading = source.numel() / took / 1e3
        yield Result("ceiling", "read", "1 GiB", took, self.reading)
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        took = timed([lambda: a @ a])
        yield Result("ceiling", "bf16 matmul", "4096^3", took, note=f"{2 * 4096**3 / took / 1e6:.0f} TFLOP/s")

    def decode(self) -> Iterator[Result]:
        """Decode to bfloat16; percent of a copy of as many bytes."""
        for n_rows, row_len in (LARGE, MIDDLE):
            shape = f"{n_rows} x {row_len}"
            for name in self.names:
                module = kernels.find(name, cuda=True)
                rows = random_rows(name, n_rows, row_len)
                check_decode(name, rows)
                nbytes = rows.numel() + 2 * n_rows * row_len
                sets = [
                    (
                        rows if i == 0 else rows.clone(),
                        torch.empty(n_rows, row_len, dtype=torch.bfloat16, device="cuda"),
                    )
                    for i in range(copies(nbytes))
                ]
                took = timed([lambda r=r, o=o, m=module: m.decode(r, o) for r, o in sets])
                rate = nbytes / took / 1e3
                yield Result("decode", name, shape, took, rate, rate / self.copy, "copy", 0.0)

    def _products(
        self, name: str, n_rows: int, row_len: int, batch: int, planes: bool = False, prepared: bool = True
    ) -> Result:
        module = kernels.find(name, cuda=True)
        rows = random_rows(name, n_rows, row_len)
        x = torch.randn(batch, row_len, device="cuda").bfloat16()
        count = copies(rows.numel())
        sets = []
        for i in range(count):
            own = rows if i == 0 else rows.clone()
            parts = module.split(own) if planes else None
            sets.append((own, parts, torch.full((batch, n_rows), math.nan, device="cuda", dtype=torch.bfloat16)))
        ready = _linear.prepare(x, module.ORDER) if prepared else x
        error = 0.0
        for own, parts, out in sets[:1]:
            module.linear(x, own, out, planes=parts)
            error = error_of(name, rows, x, out)
            out.fill_(math.nan)
            module.linear(ready, own, out, planes=parts)
            error = max(error, error_of(name, rows, x, out))
        took = timed([lambda r=r, p=p, o=o: module.linear(ready, r, o, planes=p) for r, p, o in sets])
        rate = rows.numel() / took / 1e3
        note = ", ".join(filter(None, ("planes" if planes else "", "x shared" if prepared else "x prepared each time")))
        return Result(
            f"linear, batch {batch}",
            name,
            f"{n_rows} x {row_len}",
            took,
            rate,
            rate / self.reading,
            "read",
            error,
            note,
        )

    def linear(self) -> Iterator[Result]:
        """Batch 1: percent of the read ceiling, and for small matrices of a plain read launched the same way."""
        for n_rows, row_len in (LARGE, MIDDLE, SQUARE, SMALL):
            small = n_rows * row_len < 1 << 25
            for name in self.names:
                module = kernels.find(name, cuda=True)
                kinds = [False, True] if hasattr(module, "split") else [False]
                for planes in kinds:
                    result = self._products(name, n_rows, row_len, 1, planes)
                    if small:
                        nbytes = types.get(name).layout.row_nbytes(row_len) * n_rows
                        data = [
                            torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
                            for _ in range(copies(nbytes))
                        ]
                        sink = torch.zeros(1, dtype=torch.int32, device="cuda")
                        plain = min(
                            timed([lambda d=d, e=e, w=w, s=sink: read(d, s, True, e, w) for d in data])
                            for e in (4, 8, 16, 32)
                            for w in (4, 8)
                        )
                        result.share, result.ceiling = plain / result.microseconds, f"plain read, {plain:.2f} us"
                    yield result
                    if (n_rows, row_len) != SMALL:
                        yield self._products(name, n_rows, row_len, 1, planes, prepared=False)

    def shared(self) -> Iterator[Result]:
        """Three matrices of 4096 x 4096 with one x, as a user calls them: ``linears``, and ``linear`` three times."""
        n_rows, row_len = SQUARE
        x = torch.randn(1, row_len, device="cuda").bfloat16()
        for name in self.names:
            rows = random_rows(name, n_rows, row_len)
            count = 3 * math.ceil(copies(rows.numel()) / 3)
            matrices = [ggufx.torch.GGUFTensor(rows.clone(), types.get(name)) for _ in range(count)]
            threes = [matrices[i : i + 3] for i in range(0, count, 3)]
            error = max(error_of(name, rows, x, y) for y in ggufx.torch.linears(x, threes[0]))
            for note, work in (
                ("linears", lambda three: ggufx.torch.linears(x, three)),
                ("linear, three times", lambda three: [ggufx.torch.linear(x, w) for w in three]),
            ):
                took = timed([lambda t=t, w=work: w(t) for t in threes]) / 3
                rate = rows.numel() / took / 1e3
                yield Result(
                    "linear, three of one x", name, f"{n_rows} x {row_len}", took, rate, rate / self.reading, "read", error,
                    note,
                )  # fmt: skip

    def batches(self) -> Iterator[Result]:
        """Batches of 2 to 8, fused, beside the bfloat16 product."""
        for n_rows, row_len in (LARGE, SQUARE):
            for batch in (2, 4, 8):
                yield self._bfloat16(n_rows, row_len, batch)
                for name in self.names:
                    module = kernels.find(name, cuda=True)
                    yield self._products(name, n_rows, row_len, batch, hasattr(module, "split"))

    def _bfloat16(self, n_rows: int, row_len: int, batch: int) -> Result:
        count = copies(2 * n_rows * row_len)
        weights = [torch.randn(n_rows, row_len, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        x = torch.randn(batch, row_len, device="cuda").bfloat16()
        took = timed([lambda w=w: x @ w.T for w in weights])
        return Result(f"linear, batch {batch}", "BF16 (torch)", f"{n_rows} x {row_len}", took)

    def experts(self) -> Iterator[Result]:
        """Six of 256 experts, 2048 x 4096, one launch, other experts in each call."""
        for name in ("MXFP4", "IQ2_XXS", "IQ2_KS", "Q4_0"):
            if name not in self.names:
                continue
            module = kernels.find(name, cuda=True)
            n_experts, n_rows, row_len, k = 256, *SMALL, 6
            rows = random_rows(name, n_experts * n_rows, row_len).view(n_experts, n_rows, -1)
            for tokens in (1, 8):
                x = torch.randn(tokens, row_len, device="cuda").bfloat16()
                draws = [
                    torch.stack([torch.randperm(n_experts, device="cuda")[:k] for _ in range(tokens)]).int()
                    for _ in range(40)
                ]
                out = torch.full((tokens, k, n_rows), math.nan, device="cuda", dtype=torch.bfloat16)
                experts.linear(x, rows, draws[0], out, name)
                error = 0.0
                for j in range(k):
                    error = max(error, error_of(name, rows[draws[0][0, j]], x[:1], out[0, j][None]))
                ready = _linear.prepare(x, module.ORDER)
                for note, given in (("x shared", ready), ("x prepared each time", x)):
                    took = timed(
                        [
                            lambda i=i, g=given, r=rows, o=out, n=name: experts.linear(g, r, i, o, n, settled=True)
                            for i in draws
                        ]
                    )
                    nbytes = sum(len(i.unique()) for i in draws) / len(draws) * rows[0].numel()
                    rate = nbytes / took / 1e3
                    yield Result(
                        f"experts, {tokens} token", name, "6 of 256, 2048 x 4096", took, rate, rate / self.reading, "read",
                        error, note,
                    )  # fmt: skip

    def large(self) -> Iterator[Result]:
        """Large batches at 4096 x 4096 by way of a bfloat16 workspace, beside the bfloat16 product."""
        n_rows, row_len = SQUARE
        for batch in (16, 64, 256, 1024, 4096):
            base = self._bfloat16(n_rows, row_len, batch)
            yield base
            workspace = torch.empty(n_rows, row_len, device="cuda", dtype=torch.bfloat16)
            for name in self.names:
                module = kernels.find(name, cuda=True)
                rows = random_rows(name, n_rows, row_len)
                sets = [rows] + [rows.clone() for _ in range(copies(rows.numel() + 2 * batch * row_len, 16) - 1)]
                xs = [torch.randn(batch, row_len, device="cuda").bfloat16() for _ in sets]

                def product(
                    x: torch.Tensor, r: torch.Tensor, decode: Any = module.decode, space: torch.Tensor = workspace
                ) -> torch.Tensor:
                    decode(r, space)
                    return x @ space.T

                workspace.fill_(math.nan)
                error = error_of(name, rows, xs[0], product(xs[0], rows))
                took = timed([lambda r=r, x=x, p=product: p(x, r) for r, x in zip(sets, xs, strict=True)])
                yield Result(
                    f"linear, batch {batch}", name, f"{n_rows} x {row_len}", took, None, took / base.microseconds,
                    "time of bf16", error, "workspace",
                )  # fmt: skip

    def fp8(self) -> Iterator[Result]:
        """The block-scaled FP8 product, activation quantization included."""
        if "F8_E4M3_B128" not in self.names or not _scaled.supported(torch.device("cuda", 0)):
            return
        module = kernels.find("F8_E4M3_B128", cuda=True)
        n_rows, row_len = SQUARE
        for native in (True, False):
            rows = random_rows("F8_E4M3_B128", n_rows, row_len, native=native)
            sets = [module.split(rows.clone()) for _ in range(copies(rows.numel(), 12))]
            for batch in (64, 128, 256, 512, 1024, 4096):
                base = self._bfloat16(n_rows, row_len, batch)
                xs = [torch.randn(batch, row_len, device="cuda").bfloat16() for _ in sets]
                error = error_of("F8_E4M3_B128", rows, xs[0], _scaled.linear_fp8(xs[0], sets[0]), limit=0.05)
                codes, scales = _scaled.quantize_activations(xs[0])
                same = codes.float().unflatten(1, (-1, 128)) * scales[..., None]
                inner = error_of("F8_E4M3_B128", rows, same.flatten(1), _scaled.linear_fp8(xs[0], sets[0]))
                took = timed([lambda p=p, x=x: _scaled.linear_fp8(x, p) for p, x in zip(sets, xs, strict=True)])
                alone = timed([lambda x=x: _scaled.quantize_activations(x) for x in xs])
                yield Result(
                    f"linear, batch {batch}", "F8_E4M3_B128", f"{n_rows} x {row_len}", took, None, took / base.microseconds,
                    "time of bf16", error,
                    f"FP8, scales {'128 x 128' if native else '1 x 128'}, quantizing {alone:.1f} us, "
                    f"product's own error {inner:.1e}",
                )  # fmt: skip


def table(results: Sequence[Result], head: str) -> str:
    """Return a Markdown table."""
    lines = [
        head,
        "",
        "| what | type | shape | us | GB/s | part of | error | how |",
        "|---|---|---|--:|--:|---|--:|---|",
    ]
    for r in results:
        rate = "" if r.gigabytes_per_second is None else f"{r.gigabytes_per_second:.0f}"
        share = "" if r.share is None else f"{100 * r.share:.0f} % of {r.ceiling}"
        error = "" if r.error is None else ("exact" if r.error == 0 else f"{r.error:.1e}")
        lines.append(
            f"| {r.subject} | {r.type} | {r.shape} | {r.microseconds:.2f} | {rate} | {share} | {error} | {r.note} |"
        )
    return "\n".join(lines)


def summary(results: Sequence[Result], head: str) -> str:
    """Return the table of docs/benchmarks.md: one line a type."""
    columns = {
        "decode 8192 x 65536, of copy": ("decode", LARGE, True),
        "11008 x 4096": ("decode", MIDDLE, True),
        "times x, 8192 x 65536, us (of read)": ("linear, batch 1", LARGE, False),
        "11008 x 4096, us": ("linear, batch 1", MIDDLE, False),
        "4096 x 4096, us (of a plain read)": ("linear, batch 1", SQUARE, False),
        "2048 x 4096": ("linear, batch 1", SMALL, False),
        "four x, 4096 x 4096, us": ("linear, batch 4", SQUARE, False),
    }
    lines = [head, "", "| type | " + " | ".join(columns) + " |", "|---" + "|--:" * len(columns) + "|"]
    for name in dict.fromkeys(r.type for r in results if r.subject == "decode"):
        cells = []
        for subject, (n_rows, row_len), bare in columns.values():
            found = [
                r
                for r in results
                if (r.subject, r.type, r.shape) == (subject, name, f"{n_rows} x {row_len}")
                and "each time" not in r.note
            ]
            # With planes, where there are some.
            result = found[-1] if found else None
            share = "" if result is None or result.share is None else f"{100 * result.share:.0f} %"
            if result is None:
                cells.append("")
            elif bare:
                cells.append(share)
            else:
                cells.append(f"{result.microseconds:.1f}" + (f" ({share})" if subject.endswith(" 1") and share else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the subjects named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=f"of {', '.join(SUBJECTS)}; default all")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES, metavar="TYPE")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    subjects = arguments.subjects or SUBJECTS
    if unknown := set(subjects) - set(SUBJECTS):
        parser.error(f"no such subject: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    bench = Bench(arguments.types)
    results: list[Result] = []
    for subject in ("ceilings", *(s for s in subjects if s != "ceilings")):
        for result in getattr(bench, subject)():
            print(result, flush=True)
            results.append(result)
        torch.cuda.empty_cache()
    head = (
        f"{device}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}: "
        f"`python tools/bench_cuda.py {' '.join(sys.argv[1:])}`"
    )
    text = table(results, head)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(summary(results, head) + "\n\n" + text + "\n")
    if arguments.json:
        about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        arguments.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
