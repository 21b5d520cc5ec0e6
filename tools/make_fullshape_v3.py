#!/usr/bin/env python3
"""Write a checkpoint with the headers of the full DeepSeek-V3 and holes in place of its 690 GB of data.

    python tools/make_fullshape_v3.py OUT_DIR [--weights fp8|bf16]

163 shards and 91991 tensors, with names, dtypes and shapes as in the official checkpoint: enough to test planning, recipes
and memory use at full scale. The files are sparse and take some tens of megabytes on disk; all data read as zeros, scales,
too, so that no scale is a power of two. Which tensor lies in which shard is not the official division.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from make_tiny_v3 import OFFICIAL_CONFIG, WEIGHTS, params_from_table, split, stored
from make_tiny_v4 import (
    ADDED_TOKENS,
    TEXT,
    learn_merges,
    tokenizer_json,
    write_checkpoint,
    write_companions,
    write_json,
)

SHARDS = 163


def make_fullshape_v3(out_dir: str | Path, *, weights: str = "fp8") -> None:
    """Write the sparse checkpoint.

    Parameters
    ----------
    out_dir
        Directory for the files; made if it is missing.
    weights
        "fp8" as published, "bf16" for a dequantized one.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is fp8 or bf16, not {weights!r}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = json.loads(OFFICIAL_CONFIG.read_text(encoding="utf-8"))
    if weights == "fp8":
        shutil.copyfile(OFFICIAL_CONFIG, out_dir / "config.json")
    else:
        write_json(out_dir / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
    write_companions(out_dir, tokenizer_json(learn_merges(TEXT, 500), ADDED_TOKENS))
    write_checkpoint(out_dir, split(stored(params_from_table(config), weights), SHARDS), None)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default="fp8", help="as published, or dequantized")
    options = parser.parse_args(arguments)
    make_fullshape_v3(options.out_dir, weights=options.weights)
    files = sorted(options.out_dir.glob("*.safetensors"))
    lengths, used = sum(f.stat().st_size for f in files), sum(f.stat().st_blocks for f in files) * 512
    print(f"{options.out_dir}: {len(files)} shards, {lengths} bytes long, {used} bytes on disk")
    return 0


if __name__ == "__main__":
    sys.exit(main())
