"""What happens to a tile's bytes: copy, pack, unpack, cast or encode. Pure functions over arrays; no files, no threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx import kernels, offload, types
from ggufx.errors import BadValueError, CodecError
from ggufx.plan import FLOAT_SCALES, Transform
from ggufx.types.f8_e4m3_b128 import decode_scaled, exponents, widened

__all__ = ["ColumnEnergy", "Outcome", "apply", "decode_parts", "decode_source", "native_codes"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_PIECE_LEN: Final = 1 << 17
"""Elements that are decoded and encoded at a time: 512 KiB of float32."""

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

    def plus(self, other: Outcome) -> Outcome:
        """Return what was found here and there."""
        return Outcome(
            self.bad_codes + other.bad_codes, self.bad_scales + other.bad_scales, self.lost + other.lost,
            self.square_sum + other.square_sum, self.error_sum + other.error_sum,
        )  # fmt: skip


def apply(
    transform: Transform,
    rows: int,
    inputs: list[U8],
    out: U8,
    weights: F32 | None = None,
    phase: int = 0,
    factor: np.float32 | None = None,
) -> Outcome:
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
    phase
        Rows of the first row of scales that lie before the tile.
    factor
        What ``encode`` divides the values by.

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
    if transform.op in ("codes", "scales"):
        _unpack(transform, rows, inputs[0], out)
        return Outcome()
    if transform.op == "cast":
        _cast(transform, _every(transform, rows, inputs)[0], out)
        return Outcome()
    return _encode(transform, rows, inputs, out, weights, phase, factor)


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
    if transform.kind in FLOAT_SCALES:
        scales, lost = exponents(widened(scale_data, FLOAT_SCALES[transform.kind]).reshape(scale_rows, -1))
    else:
        scales = scale_data.reshape(scale_rows, -1)
    if transform.transposed:
        # Square tiles stay square tiles; the plan asks for it only where they end with the rows.
        return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), rows_per_scale, lost
    if phase:
        return codes, scales[(phase + np.arange(rows)) // rows_per_scale], 1, lost
    return codes, scales, rows_per_scale, lost


def decode_parts(transform: Transform, rows: int, inputs: list[U8], phase: int = 0) -> tuple[F32, int, int]:
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


def _unpack(transform: Transform, rows: int, packed: U8, out: U8) -> None:
    codes, scales = types.get(transform.kind).unpack(packed.reshape(rows, -1))
    if transform.op == "codes":
        out[:] = codes.reshape(-1)
        return
    step = transform.rows_per_scale
    kept = scales[::step]
    out[:] = kept.reshape(-1)
    unlike = scales != np.repeat(kept, step, axis=0)[:rows]
    if unlike.any():
        row, column = (int(n) for n in np.argwhere(unlike)[0])
        width = types.get(transform.kind).layout.block_len
        raise CodecError(
            f"the scales do not form {step}x{width} tiles: columns {column * width} to {column * width + width - 1} have "
            f"scale byte {kept[row // step, column]} in one row and {scales[row, column]} {row % step} rows further down; "
            "the checkpoint format has one scale for the whole tile, so this tensor was not made from one"
        )


def _cast(transform: Transform, source: U8, out: U8) -> None:
    if transform.kind == "BF16" and transform.target == "F32":
        bits = source.view("<u2")
        np.left_shift(bits, 16, out=out.view("<u4"), dtype=np.uint32, casting="unsafe")
        return
    if transform.kind in ("I32", "I64") and transform.target in ("I32", "I64"):
        numbers = source.view(_DTYPES[transform.kind])
        low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
        limit = 2**31 if transform.limit is None else transform.limit
        if low < 0 or high >= limit:
            raise CodecError(f"values {low} to {high} are outside 0 to {limit - 1}")
        out.view(_DTYPES[transform.target])[:] = numbers
        return
    if (transform.kind, transform.target) == ("F16", "F32"):
        out.view("<f4")[:] = source.view("<f2")
        return
    raise CodecError(f"no exact cast from {transform.kind} to {transform.target}")


def _encode(
    transform: Transform,
    rows: int,
    inputs: list[U8],
    out: U8,
    weights: F32 | None,
    phase: int,
    factor: np.float32 | None,
) -> Outcome:
    """Decode and encode a few rows at a time: float32 that stays in the processor's cache costs next to nothing."""
    packed = out.reshape(rows, -1)
    if transform.device:
        assert factor is None, "no type with a factor is encoded on a device"
        return _encode_on_device(transform, rows, inputs, packed, weights, phase)
    total = Outcome()
    for start, count, pieces in _pieces(transform, rows, inputs, phase):
        try:
            found = _encode_rows(transform, count, pieces, packed[start : start + count], weights, phase, factor)
        except BadValueError as error:
            raise error.moved(start) from None
        total = total.plus(found)
        if total.bad_codes or total.bad_scales:
            break
    return total


def _pieces(transform: Transform, rows: int, inputs: list[U8], phase: int) -> Iterator[tuple[int, int, list[U8]]]:
    """Cut a tile's rows and their source bytes; yields (first row, rows, inputs)."""
    row_len = sum(transform.parts)
    grain = transform.rows_per_scale
    step = max(1, _PIECE_LEN // max(1, row_len) // grain) * grain
    plain = len(transform.parts) == 1 and not transform.transposed and phase == 0
    if not plain or step >= rows or inputs[0].nbytes % rows or len(inputs) > 2:
        yield 0, rows, inputs
        return
    code_nbytes = inputs[0].nbytes // rows
    scale_nbytes = inputs[1].nbytes // -(-rows // grain) if len(inputs) == 2 else 0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        cut = [inputs[0][start * code_nbytes : stop * code_nbytes]]
        if scale_nbytes:
            cut.append(inputs[1][start // grain * scale_nbytes : -(-stop // grain) * scale_nbytes])
        yield start, stop - start, cut


def _encode_rows(
    transform: Transform,
    rows: int,
    inputs: list[U8],
    out: U8,
    weights: F32 | None,
    phase: int,
    factor: np.float32 | None,
) -> Outcome:
    codec = types.get(transform.target)
    values, bad_codes, bad_scales = decode_parts(transform, rows, inputs, phase)
    if bad_codes or bad_scales:
        # NaN cannot be encoded; whatever the strictness, the caller must hear of it.
        return Outcome(bad_codes, bad_scales)
    if factor is not None:
        values /= factor
    # By default the same bytes as upstream's converter, where the type has them.
    effort: types.Effort = transform.effort or ("reference" if codec.reproduces else "normal")
    packed = codec.encode(
        values, weights, effort=effort, objective=transform.objective, out=out, threads=1, saturate=False
    )
    lost = 0
    square_sum = error_sum = 0.0
    if transform.exact or transform.measure:
        decoded = codec.decode(packed, dtype=np.float32, threads=1)
        if transform.exact:
            lost = int(np.count_nonzero(decoded.view(np.uint32) != values.view(np.uint32)))
        if transform.measure:
            unit = 1.0 if factor is None else float(factor) ** 2
            square_sum = unit * _square_sum(values)
            error_sum = unit * _square_sum(np.subtract(values, decoded, out=decoded))
    return Outcome(0, 0, lost, square_sum, error_sum)


def _encode_on_device(
    transform: Transform, rows: int, inputs: list[U8], out: U8, weights: F32 | None, phase: int
) -> Outcome:
    """Encode a tile on a GPU: packed bytes go up where the device decodes them, else values."""
    codec = types.get(transform.target)
    kind = {"FP8": "F8_E4M3_B128", "FP4": "MXFP4"}.get(transform.kind, transform.kind)
    native = kind != transform.kind
    row_len = sum(transform.parts)
    plain = len(transform.parts) == 1 and not transform.transposed and phase == 0 and len(inputs) <= 2
    source: npt.NDArray[Any]
    if plain and offload.decodes(kind) and row_len % types.get(kind).layout.block_len == 0:
        source, bad_codes, bad_scales = inputs[0], 0, 0
        if native:
            scales = inputs[1].reshape(-(-rows // transform.rows_per_scale), -1)
            source, bad_codes, bad_scales = types.get(kind).pack(
                inputs[0].reshape(rows, -1), scales, rows_per_scale=transform.rows_per_scale
            )
    else:
        source, bad_codes, bad_scales = decode_parts(transform, rows, inputs, phase)
    if bad_codes or bad_scales:
        return Outcome(bad_codes, bad_scales)
    effort, objective = transform.effort or "normal", transform.objective
    offload.encode(codec, kind, source, rows, out, weights, effort=effort, objective=objective, device=transform.device)
    if not transform.measure:
        return Outcome()
    values, _, _ = decode_parts(transform, rows, inputs, phase)
    decoded = codec.decode(out, dtype=np.float32, threads=1)
    return Outcome(0, 0, 0, _square_sum(values), _square_sum(np.subtract(values, decoded, out=decoded)))


def _square_sum(values: F32) -> float:
    # By rows: float64 of a whole tile would be twice the tile.
    return sum(float(np.dot(row, row)) for row in (line.astype(np.float64) for line in values))


def decode_source(
    kind: str, rows: int, row_len: int, inputs: list[U8], rows_per_scale: int, phase: int = 0
) -> tuple[F32, int, int]:
    """Decode rows of a checkpoint tensor to float32, exactly; the product with a float32 scale is rounded to float32.

    Parameters
    ----------
    kind
        ``FP8``, one of :data:`ggufx.plan.FLOAT_SCALES`, ``FP4``, ``BF16``, ``F16``, ``F32`` or a codec's name.
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
    if kind in FLOAT_SCALES:
        floats = widened(inputs[1], FLOAT_SCALES[kind]).reshape(-(-(phase + rows) // rows_per_scale), -1)
        return decode_scaled(inputs[0].reshape(rows, row_len), floats, rows_per_scale, phase)
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


class ColumnEnergy:
    """Mean square of a matrix's columns, a substitute for recorded importance, from rows that come in chunks.

    Rows are added one after the other in float64, so the result does not depend on how they were cut into chunks. Use one
    for each expert.
    """

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
        kernels.load("_columns").add_squares(np.require(rows, np.float32, ("C", "A")), self._sums)
        if not np.isfinite(self._sums).all():  # the squares of finite float32 never overflow float64
            raise CodecError("energy of values that are NaN or infinite")
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
