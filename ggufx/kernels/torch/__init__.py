"""Decoders in plain torch, one module per quant type, found by the type's name in lower case: for any device of torch's.

A module defines ``decode(block, header) -> Tensor``. ``block`` maps the field names of the type's block to their bytes,
uint8 [R, n, nbytes of the field], ``header`` those of the row header to uint8 [R, nbytes]. The result is [R, n, block_len] of
float32 (of the stored dtype for integers and float64): the very bits of the type's NumPy specification, any NaN for a NaN. They
are the same operations in the same order, each a kernel of its own, so that no product and sum are fused.

It may define ``split(rows) -> (codes, scales)`` and ``join(codes, scales) -> rows``: scales and codes apart, uint8 all of them,
for products that want both in one piece.

Like the kernels for the CPU, these know no type's layout; :mod:`ggufx.torch` splits the rows into fields.
"""
