"""Tests against the programs that read and write these files: transformers, llama.cpp and its converter.

They need the `interop` extra and run with `pytest -m interop`. Reference values come from a random checkpoint in the
official format (tools/make_tiny_v4.py) and from transformers; nothing is stored.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
