"""F32 on the CPU: float32 to narrower floats, sixteen at a time. (float32 itself is a copy, which needs no kernel.)"""

from __future__ import annotations

from ggufx.kernels._jit import bits_to_float, kernel, load32, load_floats16, put


@kernel
def decode(rows, out, block_len):
    row_len = out.shape[1]
    whole = row_len - row_len % 16
    for r in range(rows.shape[0]):
        row, y = rows[r], out[r]
        for i in range(0, whole, 16):
            load_floats16(row, 4 * i, y, i)
        for i in range(whole, row_len):
            put(y, i, bits_to_float(load32(row, 4 * i)))
