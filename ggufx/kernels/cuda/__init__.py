"""Triton kernels, twins of the CPU kernels of the same file name; found by :func:`ggufx.kernels.find`.

A type's module has, over tensors of one device (``rows`` uint8 [R, row_nbytes], contiguous, at any address; ``out``
contiguous):

``decode(rows, out)``
    Fill ``out``, bfloat16, float16 or float32 [R, row_len], with the CPU decoder's values rounded to nearest even, bit for bit.
``linear(x, rows, out, *, planes=None, ids=None)``
    Fill ``out``, float [B, R], with ``x @ decode(rows).T`` of float x [B, row_len], B at most 8; x may be prepared once for
    several matrices by :func:`ggufx.kernels.cuda._linear.prepare` in the order of the module's ``ORDER``. With ``ids``,
    int32 or int64 [T, K], rows are [E, R, row_nbytes] and ``out`` is [T, K, R]: see :mod:`ggufx.kernels.cuda.experts`.
``split(rows)``
    Planes that ``linear`` reads faster than the rows, where that pays; they serve the FP8 product of
    :mod:`ggufx.kernels.cuda._scaled` too.

:mod:`ggufx.kernels.cuda._thresholds` says which way a product of B rows is fastest. Nothing here waits for the device, but
``split``.
"""

from __future__ import annotations
