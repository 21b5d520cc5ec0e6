"""What happens to a tile's bytes: copy, pack, cast or encode. Pure functions over arrays; no files, no threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.errors import CodecError
from ggufx.plan import Transform

__all__ = ["ColumnEnergy", "Outcome", "apply", "decode_parts", "decode_source"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8"}


class Outcome(NamedTuple):
    """What was found in a tile.

    Attributes
    ----------
    bad_codes, bad_scales
        Codes in the source that consumers disagree on.
    lost
        Values that an exact encoding lost.
    square_sum, error_sum
        Sums of squares of the values and of the encoding's errors, where the transform asks for them.
    """

    bad_codes: int = 0
    bad_scales: int = 0
    lost: int = 0
    square_sum: float = 0.0
    error_sum: float = 0.0


def apply(transform: Transform, rows: int, inputs: list[U8], out: U8, weights: F32 | None = None) -> Outcome:
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
    weights
        Importance of the columns, float32 [row_len]; only ``encode`` uses it.

    Raises
    ------
    CodecError
        A value does not fit the target (an integer out of range, NaN or infinity).
    """
    if transform.op == "copy":
        out[:] = inputs[0]
        return Outcome()
    if transform.op == "pack":
        codec = types.get(transform.target)
        codes = inputs[0].reshape(rows, -1)
        scales = inputs[1].reshape(-(-rows // transform.rows_per_scale), -1)
        _, bad_codes, bad_scales = codec.pack(
            codes, scales, rows_per_scale=transform.rows_per_scale, out=out.reshape(rows, -1)
        )
        return Outcome(bad_codes, bad_scales)
    if transform.op == "cast":
        _cast(transform, inputs[0], out)
        return Outcome()
    return _encode(transform, rows, inputs, out, weights)


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


def _encode(transform: Transform, rows: int, inputs: list[U8], out: U8, weights: F32 | None) -> Outcome:
    codec = types.get(transform.target)
    values, bad_codes, bad_scales = decode_parts(transform, rows, inputs)
    if bad_codes or bad_scales:
        # NaN cannot be encoded; whatever the strictness, the caller must hear of it.
        return Outcome(bad_codes, bad_scales)
    # By default the same bytes as upstream's converter, where the type has them.
    effort: types.Effort = transform.effort or ("reference" if codec.reproduces else "normal")
    packed = codec.encode(
        values, weights, effort=effort, objective=transform.objective, out=out.reshape(rows, -1), threads=1
    )
    lost = 0
    square_sum = error_sum = 0.0
    if transform.exact or transform.measure:
        decoded = codec.decode(packed, dtype=np.float32, threads=1)
        if transform.exact:
            lost = int(np.count_nonzero(decoded.view(np.uint32) != values.view(np.uint32)))
        if transform.measure:
            square_sum = _square_sum(values)
            error_sum = _square_sum(np.subtract(values, decoded, out=decoded))
    return Outcome(0, 0, lost, square_sum, error_sum)


def _square_sum(values: F32) -> float:
    # By rows: float64 of a whole tile would be twice the tile.
    return sum(float(np.dot(row, row)) for row in (line.astype(np.float64) for line in values))


def decode_parts(transform: Transform, rows: int, inputs: list[U8]) -> tuple[F32, int, int]:
    """Decode the parts of some rows, side by side; see :func:`decode_source`."""
    if len(transform.parts) == 1:
        return decode_source(transform.kind, rows, transform.parts[0], inputs, transform.rows_per_scale)
    values = np.empty((rows, sum(transform.parts)), np.float32)
    bad_codes = bad_scales = column = 0
    per_part = len(inputs) // len(transform.parts)
    for number, part_len in enumerate(transform.parts):
        part = inputs[number * per_part : (number + 1) * per_part]
        values[:, column : column + part_len], codes, scales = decode_source(
            transform.kind, rows, part_len, part, transform.rows_per_scale
        )
        column += part_len
        bad_codes += codes
        bad_scales += scales
    return values, bad_codes, bad_scales


def decode_source(kind: str, rows: int, row_len: int, inputs: list[U8], rows_per_scale: int) -> tuple[F32, int, int]:
    """Decode rows of a checkpoint tensor to float32, exactly.

    Parameters
    ----------
    kind
        ``FP8``, ``FP4``, ``BF16``, ``F16``, ``F32`` or a codec's name.
    rows, row_len
        Shape of the result.
    inputs
        Codes, and scales where the kind has them.
    rows_per_scale
        Rows that share a row of scales.

    Returns
    -------
    (float32 [rows, row_len], number of NaN codes, number of scales 255)
    """
    if kind in ("FP8", "FP4"):
        codec = types.get("F8_E4M3_B128" if kind == "FP8" else "MXFP4")
        codes = inputs[0].reshape(rows, -1)
        scales = inputs[1].reshape(-(-rows // rows_per_scale), -1)
        width = scales.shape[1] * codec.layout.block_len
        if width != row_len:
            # The last block of a row is ragged; the block format is not, so pad it with zeros.
            padded = np.zeros((rows, width * codes.shape[1] // row_len), np.uint8)
            padded[:, : codes.shape[1]] = codes
            codes = padded
        packed, bad_codes, bad_scales = codec.pack(codes, scales, rows_per_scale=rows_per_scale)
        return codec.decode(packed, threads=1)[:, :row_len], bad_codes, bad_scales
    return types.get(kind).decode(inputs[0], (rows, row_len), dtype=np.float32, threads=1), 0, 0


class ColumnEnergy:
    """Mean square of a matrix's columns, a substitute for recorded importance, from rows that come in chunks.

    Rows are added one after the other in float64, so the result does not depend on how they were cut into chunks. Use one
    for each expert.
    """

    _BLOCK_LEN = 1 << 16

    def __init__(self) -> None:
        self._sums: npt.NDArray[np.float64] | None = None
        self._n_rows = 0

    def add(self, rows: F32) -> None:
        """Add rows, float32 [n, row_len].

        Raises
        ------
        CodecError
            Values that are not finite, or rows of another length than before.
        """
        if rows.ndim != 2 or not rows.shape[1]:
            raise CodecError(f"energy needs rows [n, row_len], not an array of shape {list(rows.shape)}")
        if self._sums is None:
            self._sums = np.zeros(rows.shape[1])
        if rows.shape[1] != self._sums.size:
            raise CodecError(f"energy of rows of {self._sums.size} values was given rows of {rows.shape[1]}")
        step = max(1, self._BLOCK_LEN // rows.shape[1])
        for start in range(0, rows.shape[0], step):
            block = rows[start : start + step].astype(np.float64)
            if not np.isfinite(block).all():
                raise CodecError("energy of values that are NaN or infinite")
            # Not block.sum(axis=0): numpy is free to add in another order where rows are short.
            for row in np.square(block, out=block):
                self._sums += row
        self._n_rows += rows.shape[0]

    def result(self) -> F32:
        """Return the mean squares, float32 [row_len]; ones for a matrix of zeros, which has no column that matters more.

        Raises
        ------
        CodecError
            No row was added.
        """
        if self._sums is None or not self._n_rows:
            raise CodecError("energy of no rows")
        mean = np.minimum(self._sums / self._n_rows, np.finfo(np.float32).max).astype(np.float32)
        return mean if mean.any() else np.ones_like(mean)
