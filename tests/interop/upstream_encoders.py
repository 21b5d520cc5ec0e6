"""Write the C library's encoding errors of ``structured_rows`` as JSON: ``python -m tests.interop.upstream_encoders > FILE``.

Needs libgguf (PyPI), which is llama.cpp's encoders and decoders; does not use ggufx.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from tests.structured_rows import structured_rows


def main() -> None:
    """Print type -> name of rows -> sum of squared errors, with ones as the importance."""
    import libgguf

    found: dict[str, Any] = {}
    for kind in libgguf.GGMLQuantizationType:
        try:
            found[kind.name] = {name: _error(libgguf, int(kind), rows) for name, rows in structured_rows().items()}
        except ValueError:
            continue  # no encoder
    json.dump(found, sys.stdout, indent=1)
    print()


def _error(libgguf: Any, kind: int, rows: np.ndarray) -> float:
    packed = libgguf.quantize_rows_raw(kind, rows, *rows.shape, np.ones(rows.shape[1], np.float32))
    decoded = np.frombuffer(libgguf.dequantize_rows_raw(kind, packed, *rows.shape), np.float32).reshape(rows.shape)
    return float(f"{((decoded.astype(np.float64) - rows) ** 2).sum():.6g}")


if __name__ == "__main__":
    main()
