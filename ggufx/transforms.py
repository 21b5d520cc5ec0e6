"""What happens to a tile's bytes: copy, pack, cast or encode. Pure functions over arrays; no files, no threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.errors import CodecError
from ggufx.plan import Transform
from ggufx.types.f8_e4m3_b128 import decode_scaled, exponents

__all__ = ["Outcome", "apply", "decode_source", "native_codes", "source_values"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8"}


class Outcome(NamedTuple):
    """Codes in the source that consumers disagree on, and values that an exact encoding lost."""

    bad_codes: int = 0
    bad_scales: int = 0
    lost: int = 0


def apply(transform: Transform, rows: int, inputs: list[U8], out: U8, phase: int = 0) -> Outcome:
    """Turn the source bytes of ``rows`` rows into output bytes.

    Parameters
    ----------
    transform
        What to do.
    rows
        Number of rows.
    inputs
        1-D uint8 arrays, one per span of the tile: codes, or codes and scales, of every part.
    out
        1-D uint8 of exactly the output's length; filled.
    phase
        Rows of the first row of scales that lie before the tile.

    Raises
    ------
    CodecError
        A value does not fit the target (an integer out of range, NaN or infinity).
    """
    if transform.op == "copy":
        out[:] = _every(transform, rows, inputs)[0]
        return Outcome()
    if transform.op == "pack":
        codec = types.get(transform.target)
        codes, scales, rows_per_scale, lost = native_codes(transform, rows, inputs, phase)
        if lost:
            return Outcome(lost=lost)
        _, bad_codes, bad_scales = codec.pack(codes, scales, rows_per_scale=rows_per_scale, out=out.reshape(rows, -1))
        return Outcome(bad_codes, bad_scales)
    if transform.op == "cast":
        _cast(transform, _every(transform, rows, inputs)[0], out)
        return Outcome()
    return _encode(transform, rows, inputs, out, phase)


def _every(transform: Transform, rows: int, inputs: list[U8]) -> list[U8]:
    """Leave out the rows between; 1-D arrays in and out."""
    if transform.step == 1:
        return inputs
    count = (rows - 1) * transform.step + 1
    return [np.ascontiguousarray(data.reshape(count, -1)[:: transform.step]).reshape(-1) for data in inputs]


def native_codes(transform: Transform, rows: int, inputs: list[U8], phase: int = 0) -> tuple[U8, U8, int, int]:
    """Return a tile's native codes and scale bytes as rows of the output.

    Parameters
    ----------
    transform, rows, inputs, phase
        As in :func:`apply`; ``op`` is ``pack``, or could be.

    Returns
    -------
    (codes uint8 [rows, ...], scales uint8 [ceil(rows / n), ...], n, number of scales that are no E8M0 number)
    """
    source_rows = transform.parts[0] if transform.transposed else rows
    data, scale_data = _every(transform, rows, inputs)
    codes, rows_per_scale, lost = data.reshape(source_rows, -1), transform.rows_per_scale, 0
    scale_rows = -(-(phase + source_rows) // rows_per_scale)
    if transform.kind == "FP8_F32":
        scales, lost = exponents(scale_data.view("<f4").reshape(scale_rows, -1))
    else:
        scales = scale_data.reshape(scale_rows, -1)
    if transform.transposed:
        # Square tiles stay square tiles; the plan asks for it only where they end with the rows.
        return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), rows_per_scale, lost
    if phase:
        return codes, scales[(phase + np.arange(rows)) // rows_per_scale], 1, lost
    return codes, scales, rows_per_scale, lost


def source_values(transform: Transform, rows: int, inputs: list[U8], phase: int = 0) -> tuple[F32, int, int]:
    """Decode a tile's source, whatever will become of it.

    Parameters
    ----------
    transform, rows, inputs, phase
        As in :func:`apply`.

    Returns
    -------
    (float32 [rows, row_len], number of NaN codes, number of scales that are not finite)
    """
    inputs = _every(transform, rows, inputs)
    if transform.transposed:
        values, bad_codes, bad_scales = decode_source(
            transform.kind, transform.parts[0], rows, inputs, transform.rows_per_scale, phase
        )
        return np.ascontiguousarray(values.T), bad_codes, bad_scales
    columns = []
    bad_codes = bad_scales = 0
    per_part = len(inputs) // len(transform.parts)
    for number, part_len in enumerate(transform.parts):
        part = inputs[number * per_part : (number + 1) * per_part]
        decoded, codes, scales = decode_source(transform.kind, rows, part_len, part, transform.rows_per_scale, phase)
        columns.append(decoded)
        bad_codes += codes
        bad_scales += scales
    values = np.ascontiguousarray(columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1))
    return values, bad_codes, bad_scales


def _cast(transform: Transform, source: U8, out: U8) -> None:
    if transform.kind == "BF16" and transform.target == "F32":
        bits = source.view("<u2")
        np.left_shift(bits, 16, out=out.view("<u4"), dtype=np.uint32, casting="unsafe")
        return
    if transform.target == "I32":
        numbers = source.view(_DTYPES[transform.kind])
        low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
        limit = 2**31 if transform.limit is None else transform.limit
        if low < 0 or high >= limit:
            raise CodecError(f"values {low} to {high} are outside 0 to {limit - 1}")
        out.view("<i4")[:] = numbers
        return
    if (transform.kind, transform.target) == ("F16", "F32"):
        out.view("<f4")[:] = source.view("<f2")
        return
    raise CodecError(f"no exact cast from {transform.kind} to {transform.target}")


def _encode(transform: Transform, rows: int, inputs: list[U8], out: U8, phase: int) -> Outcome:
    codec = types.get(transform.target)
    values, bad_codes, bad_scales = source_values(transform, rows, inputs, phase)
    if bad_codes or bad_scales:
        # NaN cannot be encoded; whatever the strictness, the caller must hear of it.
        return Outcome(bad_codes, bad_scales)
    # The same bytes as upstream's converter, where the type has them.
    effort: types.Effort = "reference" if codec.reproduces else "normal"
    packed = codec.encode(values, effort=effort, out=out.reshape(rows, -1), threads=1)
    lost = 0
    if transform.exact:
        lost = int(np.count_nonzero(codec.decode(packed, threads=1).view(np.uint32) != values.view(np.uint32)))
    return Outcome(0, 0, lost)


def decode_source(
    kind: str, rows: int, row_len: int, inputs: list[U8], rows_per_scale: int, phase: int = 0
) -> tuple[F32, int, int]:
    """Decode rows of a checkpoint tensor to float32, exactly; the product with a float32 scale is rounded to float32.

    Parameters
    ----------
    kind
        ``FP8``, ``FP8_F32``, ``FP4``, ``BF16``, ``F16``, ``F32`` or a codec's name.
    rows, row_len
        Shape of the result.
    inputs
        Codes, and scales where the kind has them.
    rows_per_scale
        Rows that share a row of scales.
    phase
        Rows of the first row of scales that lie before the first row.

    Returns
    -------
    (float32 [rows, row_len], number of NaN codes, number of scales that are not finite)
    """
    if kind == "FP8_F32":
        scale_rows = -(-(phase + rows) // rows_per_scale)
        return decode_scaled(
            inputs[0].reshape(rows, row_len), inputs[1].view("<f4").reshape(scale_rows, -1), rows_per_scale, phase
        )
    if kind in ("FP8", "FP4"):
        codec = types.get("F8_E4M3_B128" if kind == "FP8" else "MXFP4")
        codes = inputs[0].reshape(rows, -1)
        scales = inputs[1].reshape(-(-(phase + rows) // rows_per_scale), -1)
        if phase:
            scales, rows_per_scale = scales[(phase + np.arange(rows)) // rows_per_scale], 1
        width = scales.shape[1] * codec.layout.block_len
        if width != row_len:
            # The last block of a row is ragged; the block format is not, so pad it with zeros.
            padded = np.zeros((rows, width * codes.shape[1] // row_len), np.uint8)
            padded[:, : codes.shape[1]] = codes
            codes = padded
        packed, bad_codes, bad_scales = codec.pack(codes, scales, rows_per_scale=rows_per_scale)
        return codec.decode(packed, threads=1)[:, :row_len], bad_codes, bad_scales
    return types.get(kind).decode(inputs[0], (rows, row_len), dtype=np.float32, threads=1), 0, 0
