#!/usr/bin/env python3
"""Write a checkpoint with the headers of the full DeepSeek-V4-Flash and holes in place of its 160 GB of data.

    python tools/make_fullshape_v4.py OUT_DIR [--tokenizer tiny|full]

46 shards, 69187 tensors, names, dtypes, shapes, offsets and file lengths as in the official checkpoint: enough to test
planning, memory use and header code at full scale. The files are sparse and take a few megabytes on disk; all data read
as zeros. With `--tokenizer full` the tokenizer has the official number of merges (127741), but made-up ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from make_tiny_v4 import (
    ADDED_TOKENS,
    OFFICIAL_CONFIG,
    TEXT,
    learn_merges,
    official_shards,
    shapes_from_table,
    synthetic_merges,
    tokenizer_json,
    write_checkpoint,
    write_companions,
)

MERGES = 127741  # with 3 special tokens and the 256 bytes: 128000
FULL_ADDED = 815  # tokens 128000..128814; the rows of the embedding beyond them are padding


def make_fullshape_v4(out_dir: str | Path, *, tokenizer: str = "tiny") -> None:
    """Write the sparse checkpoint.

    Parameters
    ----------
    out_dir
        Directory for the files; made if it is missing.
    tokenizer
        "tiny" for the tokenizer of the tiny checkpoint, "full" for one of the official size.
    """
    if tokenizer not in ("tiny", "full"):
        raise ValueError(f"tokenizer is tiny or full, not {tokenizer!r}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(OFFICIAL_CONFIG, out_dir / "config.json")
    if tokenizer == "full":
        holders = tuple((f"<｜place▁holder▁no▁{i}｜>", True) for i in range(2, FULL_ADDED - len(ADDED_TOKENS) + 2))
        contents = tokenizer_json(synthetic_merges(MERGES), (*holders, *ADDED_TOKENS))
    else:
        contents = tokenizer_json(learn_merges(TEXT, 500), ADDED_TOKENS)
    write_companions(out_dir, contents)
    config = json.loads(OFFICIAL_CONFIG.read_text(encoding="utf-8"))
    write_checkpoint(out_dir, official_shards(shapes_from_table(config), config), None)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--tokenizer", choices=("tiny", "full"), default="tiny", help="size of the tokenizer")
    options = parser.parse_args(arguments)
    make_fullshape_v4(options.out_dir, tokenizer=options.tokenizer)
    files = sorted(options.out_dir.glob("*.safetensors"))
    lengths, used = sum(f.stat().st_size for f in files), sum(f.stat().st_blocks for f in files) * 512
    print(f"{options.out_dir}: {len(files)} shards, {lengths} bytes long, {used} bytes on disk")
    return 0


if __name__ == "__main__":
    sys.exit(main())
