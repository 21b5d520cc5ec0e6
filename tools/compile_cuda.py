#!/usr/bin/env python3
"""Compile the Triton kernels for a GPU that this machine need not have, and count what a weight costs.

    python tools/compile_cuda.py [--capability 90] [--types MXFP4,IQ2_KS] [--rows 8192] [--row-len 65536] [--sass DIR]

Triton's interpreter, which the tests use without a GPU, does not see what the compiler refuses, nor what a kernel costs. Here
every decoder and every fused product of a batch of one (of short rows, too, as they run where activations were prepared before,
and of experts) is brought to machine code by the ``ptxas`` that comes with Triton. Of the innermost loop (of all, where a row
is one step) the table gives instructions a weight: all of them, those of the integer and logic unit (shifts, masks, permutes,
additions), of the multiplier (products, dot products), and loads. Each of these units takes a warp's instruction in two cycles,
so the fuller one is the bound where memory is not. Registers beyond 255 spill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufx import kernels, types
from ggufx.kernels.cuda import _launch, _linear

INTEGER = (
    "VIMNMX",
    "FSEL", "FSETP", "IADD3", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX",
)  # fmt: skip
MULTIPLIER = ("FADD", "FFMA", "FMUL", "HADD2", "HFMA2", "HMUL2", "IDP", "IMAD")
LOADS = ("LDC", "LDG", "LDS")
SHORT_LEN = 4096
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Absent:
    """What Triton asks of a GPU's driver in order to compile for it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


Compiled = tuple[str, dict[str, Any], Any]


@contextlib.contextmanager
def compiling(capability: int) -> Any:
    """Have every launch compile only; gives the list of (kernel's name, constants, what was compiled)."""
    made: list[Compiled] = []

    def launcher(self: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            made.append((self.fn.__name__, constants, self.run(*arguments, grid=grid, warmup=True, **constants)))

        return launch

    driver.set_active(_Absent(capability))
    # Tensors lie on the CPU: only their dtypes and alignment count. What the host asks of their device is answered for it.
    kept = JITFunction.__getitem__, _linear._dependent, _launch.converts_e4m3
    JITFunction.__getitem__ = launcher
    _linear._dependent = lambda device: capability >= 90
    for module in [m for n, m in sys.modules.items() if n.startswith("ggufx.kernels.cuda")]:
        if hasattr(module, "converts_e4m3"):
            module.converts_e4m3 = lambda device: capability >= 89
    try:
        yield made
    finally:
        JITFunction.__getitem__, _linear._dependent, _launch.converts_e4m3 = kept


def disassemble(cubin: bytes) -> tuple[list[str], int, int]:
    """Return the lines of machine code, registers of a thread, and bytes that it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([BINARIES / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True)
        usage = subprocess.run(
            [BINARIES / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    found = dict(re.findall(r"(REG|LOCAL|STACK):(\d+)", usage.stdout))
    return code.stdout.splitlines(), int(found["REG"]), int(found["LOCAL"]) + int(found["STACK"])


def innermost(lines: list[str]) -> list[str]:
    """Return the longest loop, from its label to the branch back; all where there is none."""
    labels: dict[str, int] = {}
    longest: list[str] = []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = number
        branch = re.search(r"BRA.*(\.L_x_\d+)", line)
        if branch and branch[1] in labels and number - labels[branch[1]] > len(longest):
            longest = lines[labels[branch[1]] : number + 1]
    return longest or lines


def opcodes(lines: list[str]) -> Counter[str]:
    """Count opcodes without their suffixes; padding at the end does not count."""
    found = (re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line) for line in lines)
    return Counter(match[1] for match in found if match and match[1] != "NOP")


def row_of(name: str, verb: str, compiled: Compiled, row_len: int, folder: Path | None) -> dict[str, Any]:
    """Return a line of the table."""
    _, constants, kernel = compiled
    lines, registers, spilled = disassemble(kernel.asm["cubin"])
    loop = lines if verb == "decode" or constants["SINGLE"] else innermost(lines)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{verb}.sass").write_text("\n".join(loop) + "\n", encoding="utf-8")
    counts = opcodes(loop)
    if verb == "decode":
        shape = kernels.find(name, cuda=True)._SHAPE  # type: ignore[union-attr]
        weights = shape.block_len // shape.parts * shape.repeat
    else:
        # Activations come in four loads of 16 bytes, or in five with their sums: the compiler may have unrolled the loop.
        wide = sum("LDG.E.128" in line for line in loop)
        weights = 32 * constants["ROWS"] * (2 if wide in (8, 10) and not constants["SINGLE"] else 1)
    total = sum(counts.values())
    return {
        "type": name, "verb": verb, "warps": constants["num_warps"], "registers": registers, "spilled": spilled,
        "instructions": total / weights,
        "integer": sum(n for op, n in counts.items() if op in INTEGER) / weights,
        "multiplier": sum(n for op, n in counts.items() if op in MULTIPLIER) / weights,
        "loads": sum(n for op, n in counts.items() if op in LOADS) / weights,
    }  # fmt: skip


def compile_type(name: str, capability: int, n_rows: int, row_len: int, folder: Path | None) -> list[dict[str, Any]]:
    """Compile a type's decoder and product; returns their lines of the table."""
    module: Any = kernels.find(name, cuda=True)
    rows = torch.empty(n_rows, types.get(name).layout.row_nbytes(row_len), dtype=torch.uint8)
    found = []
    with compiling(capability) as made:
        module.decode(rows, torch.empty(n_rows, row_len, dtype=torch.bfloat16))
        found.append(row_of(name, "decode", made[-1], row_len, folder))
        x, out = torch.empty(1, row_len, dtype=torch.bfloat16), torch.empty(1, n_rows, dtype=torch.bfloat16)
        prepared = _linear.prepare(x, module.ORDER)
        module.linear(prepared, rows, out)
        found.append(row_of(name, "linear", made[-1], row_len, folder))
        # Short rows, with activations that need not be waited for; and experts.
        short = torch.empty(n_rows, types.get(name).layout.row_nbytes(SHORT_LEN), dtype=torch.uint8)
        prepared = _linear.prepare(x[:, :SHORT_LEN].contiguous(), module.ORDER)
        prepared.settled = True
        module.linear(prepared, short, out)
        found.append(row_of(name, "settled", made[-1], SHORT_LEN, folder))
        ids = torch.zeros(1, 2, dtype=torch.int64)
        module.linear(prepared, short[None], torch.empty(1, 2, n_rows, dtype=torch.bfloat16), ids=ids, settled=True)
        found.append(row_of(name, "experts", made[-1], SHORT_LEN, folder))
    return found


def main() -> int:
    """Compile, print the table, and fail where a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capability", type=int, default=90, help="80 A100, 89 Ada, 90 Hopper (default), 100 Blackwell"
    )
    parser.add_argument("--types", default=",".join(c.name for c in types.all_codecs() if c.has_cuda))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--row-len", type=int, default=65536)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sass", type=Path, metavar="DIR", help="leave the machine code that was counted here")
    options = parser.parse_args()
    report = []
    print("| type | verb | instructions | integer | multiplier | loads | registers | spilled bytes |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name in options.types.upper().split(","):
        for line in compile_type(name, options.capability, options.rows, options.row_len, options.sass):
            report.append(line)
            numbers = " | ".join(f"{line[key]:.2f}" for key in ("instructions", "integer", "multiplier", "loads"))
            print(f"| {name} | {line['verb']} | {numbers} | {line['registers']} | {line['spilled']} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(line["spilled"] for line in report) else 0


if __name__ == "__main__":
    sys.exit(main())
