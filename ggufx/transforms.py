"""What happens to a tile's bytes: copy, pack, unpack, cast or encode. Pure functions over arrays; no files, no threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ggufx import types
from ggufx.errors import CodecError
from ggufx.plan import Transform

__all__ = ["Outcome", "apply", "decode_source"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_PIECE_LEN = 1 << 17
_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8"}


class Outcome(NamedTuple):
    """Codes in the source that consumers disagree on, and values that an exact encoding lost."""

    bad_codes: int = 0
    bad_scales: int = 0
    lost: int = 0


def apply(transform: Transform, rows: int, inputs: list[U8], out: U8) -> Outcome:
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
    if transform.op in ("codes", "scales"):
        _unpack(transform, rows, inputs[0], out)
        return Outcome()
    if transform.op == "cast":
        _cast(transform, inputs[0], out)
        return Outcome()
    return _encode(transform, rows, inputs, out)


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
    if transform.target == "I32":
        numbers = source.view(_DTYPES[transform.kind])
        low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
        limit = 2**31 if transform.limit is None else transform.limit
        if low < 0 or high >= limit:
            raise CodecError(f"values {low} to {high} are outside 0 to {limit - 1}")
        out.view("<i4")[:] = numbers
        return
    if (transform.kind, transform.target) == ("I32", "I64"):
        out.view("<i8")[:] = source.view("<i4")
        return
    if (transform.kind, transform.target) == ("F16", "F32"):
        out.view("<f4")[:] = source.view("<f2")
        return
    raise CodecError(f"no exact cast from {transform.kind} to {transform.target}")


def _encode(transform: Transform, rows: int, inputs: list[U8], out: U8) -> Outcome:
    """Encode a few rows at a time: their float32 values then stay in the processor's cache, and fresh memory is little."""
    row_len = sum(transform.parts)
    grain = transform.rows_per_scale
    step = max(grain, _PIECE_LEN // max(1, row_len) // grain * grain)
    per_part = len(inputs) // len(transform.parts)
    bad_codes = bad_scales = lost = 0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        pieces = []
        for number, data in enumerate(inputs):
            # Codes have a line for each row, scales one for each row of scales.
            held, first, end = rows, start, stop
            if number % per_part:
                held, first, end = (-(-n // grain) for n in (rows, start, stop))
            width = data.size // held
            pieces.append(data[first * width : end * width])
        width = out.size // rows
        found = _encode_rows(transform, stop - start, pieces, out[start * width : stop * width])
        bad_codes += found.bad_codes
        bad_scales += found.bad_scales
        lost += found.lost
    return Outcome(bad_codes, bad_scales, lost)


def _encode_rows(transform: Transform, rows: int, inputs: list[U8], out: U8) -> Outcome:
    codec = types.get(transform.target)
    per_part = len(inputs) // len(transform.parts)
    columns = []
    bad_codes = bad_scales = 0
    for number, part_len in enumerate(transform.parts):
        part = inputs[number * per_part : (number + 1) * per_part]
        decoded, codes, scales = decode_source(transform.kind, rows, part_len, part, transform.rows_per_scale)
        columns.append(decoded)
        bad_codes += codes
        bad_scales += scales
    if bad_codes or bad_scales:
        # NaN cannot be encoded; whatever the strictness, the caller must hear of it.
        return Outcome(bad_codes, bad_scales)
    values = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
    # The same bytes as upstream's converter, where the type has them.
    effort: types.Effort = "reference" if codec.reproduces else "normal"
    packed = codec.encode(values, effort=effort, out=out.reshape(rows, -1), threads=1)
    lost = 0
    if transform.exact:
        lost = int(np.count_nonzero(codec.decode(packed, threads=1).view(np.uint32) != values.view(np.uint32)))
    return Outcome(0, 0, lost)


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
