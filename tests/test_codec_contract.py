"""The laws that every registered codec obeys; a new type is covered the moment it is registered.

The laws are :mod:`ggufx.testing`'s. Here they meet every type, the strategies try the ones that take data, and what does not
generalise is tested beside them: ties, exact bounds, the meaning of native codes.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import E2M1, E4M3, E8M0, assert_same_bits

from ggufx import testing, types
from ggufx.errors import CodecError, UnknownType
from ggufx.types import Codec, Layout

CODECS = sorted(types.all_codecs(), key=lambda codec: codec.name)
CASES = [(law, codec) for codec in CODECS for law in testing.LAWS.values() if law.applies(codec)]
FUZZED = [case for case in CASES if case[0].fuzzed]
NATIVE = ["F8_E4M3_B128", "MXFP4"]

every_native = pytest.mark.parametrize("codec", [types.get(name) for name in NATIVE], ids=NATIVE)
both_paths = pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])

pytestmark = pytest.mark.filterwarnings("error")


def case_name(value: object) -> str:
    return getattr(value, "name", "")


@pytest.mark.parametrize(("law", "codec"), CASES, ids=case_name)
def test_law(law: testing.Law, codec: Codec) -> None:
    law(codec)


# A seed has no structure to search, and every one makes thousands of values: a few do.
@pytest.mark.parametrize(("law", "codec"), FUZZED, ids=case_name)
@settings(max_examples=settings().max_examples // 4)
@given(seed=st.integers(0, 2**32 - 1))
def test_law_whatever_the_seed(law: testing.Law, codec: Codec, seed: int) -> None:
    law(codec, seed)


@pytest.mark.parametrize("codec", [c for c in CODECS if c.can_decode], ids=case_name)
@given(data=st.data())
def test_decoding_any_rows(codec: Codec, data: st.DataObject) -> None:
    rows = data.draw(testing.rows(codec))
    testing.law_decode_kernel(codec, rows=rows)
    testing.law_decode_rows(codec, rows=rows)


@pytest.mark.parametrize("codec", [c for c in CODECS if c.can_encode and c.value_dtype.kind == "f"], ids=case_name)
@given(data=st.data())
def test_encoding_any_values(codec: Codec, data: st.DataObject) -> None:
    row_len = codec.layout.block_len * data.draw(st.integers(1, 2), "blocks")
    values = data.draw(testing.values(row_len))
    testing.law_encode_kernel(codec, values=values)
    testing.law_encode_rows(codec, values=values)
    testing.law_encode_finite(codec, values=data.draw(testing.values(row_len, limit=65504)))


# Registry -------------------------------------------------------------------------------------------------------------


def test_names_and_ids_are_unique() -> None:
    assert len({c.name.upper() for c in CODECS}) == len(CODECS)
    pairs = [pair for c in CODECS for pair in c.ids.items()]
    assert len(set(pairs)) == len(pairs)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownType, match=r"'Q9_9' is not a known type; known: .*Q8_0"):
        types.get("Q9_9")


def test_registering_a_taken_name_or_id_raises_and_changes_nothing() -> None:
    layout = Layout(1, np.dtype([("v", "u1")]))
    before = list(types.all_codecs())
    with pytest.raises(ValueError, match="already registered"):
        types.register(type("q8_0", (Codec,), {"layout": layout, "ids": {"llama.cpp": 7777}}))
    with pytest.raises(ValueError, match=r"claims id 8 of llama\.cpp, which is Q8_0"):
        types.register(type("MINE", (Codec,), {"layout": layout, "ids": {"llama.cpp": 8}}))
    assert list(types.all_codecs()) == before


# Encode ---------------------------------------------------------------------------------------------------------------


def e8m0_scale(e: np.ndarray) -> np.ndarray:
    return np.float64(2.0) ** (e.astype(np.int64) - 127)


def nearest_lattice(x: np.ndarray, scale: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Distance of every x [..., n] to the nearest of ``table * scale``, by trying them all."""
    lattice = table.astype(np.float64)[None, None, :] * scale[:, None, None]
    return np.abs(x[:, :, None] - lattice).min(axis=-1)


def bound_rows(block: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((64, block)).astype(np.float32)
    rows *= np.float32(2.0) ** rng.integers(-20, 10, (64, 1)).astype(np.float32)
    rows[1] = np.abs(rows[1])
    rows[2] = -np.abs(rows[2])
    rows[3] = rows[3, 0]
    rows[4, 1:] = 0
    rows[5] = rng.standard_cauchy(block)
    return rows


def test_q8_0_is_within_half_a_step() -> None:
    x = bound_rows(32)
    d = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    stored_off = np.abs(d.astype(np.float16).astype(np.float64) - d)
    error = np.abs(types.get("Q8_0").decode(types.get("Q8_0").encode(x)) - x.astype(np.float64))
    assert (error <= 0.5001 * d + 127 * stored_off).all()


def test_q4_0_is_within_half_a_step_and_one_where_it_clips() -> None:
    x = bound_rows(32)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1).astype(np.float64)
    d = extreme / -8
    stored_off = np.abs(d.astype(np.float16).astype(np.float64) - d)
    decoded = types.get("Q4_0").decode(types.get("Q4_0").encode(x, effort="reference"))
    error = np.abs(decoded - x.astype(np.float64))
    clips = x / d > 7.5  # the side opposite to the extreme element ends at 7
    assert clips.any()
    assert (error <= np.where(clips, 1.0001, 0.5001) * np.abs(d) + 8 * stored_off).all()


def test_q4_0_importance_lowers_the_weighted_error() -> None:
    codec = types.get("Q4_0")
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 256)).astype(np.float32)
    importance = rng.exponential(1, 256).astype(np.float32) ** 3
    plain, weighted = codec.decode(codec.encode(x)), codec.decode(codec.encode(x, importance))
    assert (importance * (weighted - x) ** 2).sum() < 0.9 * (importance * (plain - x) ** 2).sum()


def test_mxfp4_takes_the_nearest_code_and_the_references_scale() -> None:
    codec = types.get("MXFP4")
    x = bound_rows(32)
    packed = codec.encode(x, effort="reference")
    scale = e8m0_scale(packed[:, 0])
    error = np.abs(codec.decode(packed) - x.astype(np.float64))
    assert (error == nearest_lattice(x.astype(np.float64), scale, E2M1)).all()
    amax = np.abs(x).max(axis=1)
    assert ((amax / scale < 8.0001) & (amax / scale >= 3.999)).all()


def test_mxfp4_scale_is_that_of_c_log2f_at_every_power_of_two() -> None:
    log2f = ctypes.CDLL(ctypes.util.find_library("m")).log2f
    log2f.restype, log2f.argtypes = ctypes.c_float, [ctypes.c_float]
    powers = (np.arange(3, 254, dtype=np.int64) << 23)[:, None] + np.arange(-40, 41)
    amax = powers.astype(np.uint32).view(np.float32).ravel()
    rows = np.zeros((amax.size, 32), np.float32)
    rows[:, 7] = -amax
    expected = np.array([int(np.floor(log2f(float(a)))) - 2 + 127 for a in amax]).clip(0, 254)
    assert np.array_equal(types.get("MXFP4").encode(rows, effort="reference")[:, 0], expected)


def test_f8_takes_the_smallest_scale_that_clips_nothing_and_the_nearest_code() -> None:
    codec = types.get("F8_E4M3_B128")
    x = bound_rows(128)
    packed = codec.encode(x)
    scale = e8m0_scale(packed[:, 0])
    amax = np.abs(x).max(axis=1)
    assert (amax <= 448 * scale).all()
    assert (amax > 448 * scale / 2).all()
    error = np.abs(codec.decode(packed) - x.astype(np.float64))
    assert (error == nearest_lattice(x.astype(np.float64), scale, E4M3[np.isfinite(E4M3)])).all()
    # Four significant bits, or half the smallest step: the relative bound per block.
    assert (error <= np.maximum(np.abs(x) / 16, 2.0**-10 * scale[:, None])).all()
    assert not ((packed[:, 1:] & 0x7F) == 0x7F).any()


def test_f8_every_finite_value_under_every_scale_survives() -> None:
    codec = types.get("F8_E4M3_B128")
    finite = E4M3[np.isfinite(E4M3)]  # 254 values
    rows = np.zeros((246, 2, 128), np.float32)
    # 448 is in every block, so the scale that was taken out must be the one that goes in.
    rows[:, 0, :127], rows[:, 1, :127] = finite[:127], finite[127:]
    rows[:, :, 127] = 448
    rows = rows.reshape(246, 256)
    e = np.arange(1, 247)
    with np.errstate(under="ignore"):
        rows = rows * np.exp2(e - 127.0)[:, None].astype(np.float32)
    packed = codec.encode(rows)
    assert_same_bits(codec.decode(packed), rows)
    assert np.array_equal(packed[:, 0], e)
    assert np.array_equal(packed[:, 129], e)


def test_f8_of_the_largest_floats_is_finite() -> None:
    codec = types.get("F8_E4M3_B128")
    largest = np.finfo(np.float32).max
    rows = np.full((4, 128), largest, np.float32)
    rows[1] *= -1
    rows[2] = np.nextafter(largest, np.float32(0))
    rows[3] = largest * np.linspace(0, 1, 128, dtype=np.float32)
    decoded = codec.decode(codec.encode(rows))
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded.astype(np.float64) - rows) <= rows.max() / 14).all()


def test_f8_keeps_the_sign_of_zero_and_codes_zero_rows_with_scale_0() -> None:
    codec = types.get("F8_E4M3_B128")
    row = np.zeros((1, 128), np.float32)
    row[0, 3] = -0.0
    packed = codec.encode(row)
    assert packed[0, 0] == 0
    assert_same_bits(codec.decode(packed), row)


# Every tie of a lattice, at scale 1: random values never meet one.
TIES = {
    "Q8_0": ([127, 0.5, -0.5, 1.5, -1.5, 2.5, np.nextafter(np.float32(0.5), np.float32(0))], [127, 1, -1, 2, -2, 3, 0]),
    "Q4_0": ([-8, 0.5, -0.5, 1.5, -1.5, 6.5, 7.5, 8], [-8, 1, 0, 2, -1, 7, 7, 7]),
    "MXFP4": (
        [6, 0.25, -0.25, 0.75, -0.75, 1.25, 1.75, 2.5, 3.5, 5, -5, 7],
        [6, 0, 0, 0.5, -0.5, 1, 1.5, 2, 3, 4, -4, 6],
    ),
    "F8_E4M3_B128": (
        [448, 17, -17, 19, 2.0**-10, 3 * 2.0**-10, 5 * 2.0**-10, 432, 2.0**-11],
        [448, 16, -16, 20, 0, 2.0**-8, 2.0**-8, 448, 0],
    ),
}


@pytest.mark.parametrize("codec", [types.get(name) for name in TIES], ids=list(TIES))
@both_paths
def test_ties_go_where_the_reference_sends_them(codec: Codec, use_kernel: bool) -> None:
    values, expected = TIES[codec.name]
    row = np.zeros((1, codec.layout.block_len), np.float32)
    row[0, : len(values)] = values
    effort = "reference" if codec.reproduces else "normal"
    decoded = codec.decode(codec.encode(row, effort=effort, use_kernel=use_kernel))
    assert np.array_equal(decoded[0, : len(values)], np.array(expected, np.float32))
    assert not decoded[0, len(values) :].any()


@pytest.mark.parametrize(("name", "bad"), [("I8", 128), ("I8", 0.5), ("I16", -32769), ("I32", 2**31), ("I64", 2.0**63)])
def test_integers_refuse_what_they_cannot_hold(name: str, bad: float) -> None:
    with pytest.raises(CodecError, match="integers"):
        types.get(name).encode(np.array([[0, bad]]))


def test_large_integers_and_doubles_are_not_rounded_through_float32() -> None:
    for name, values in (
        ("I32", np.array([[2**24 + 1, -(2**31)]], np.int64)),
        ("I64", np.array([[2**53 + 1, -(2**63)]], np.int64)),
        ("F64", np.array([[np.pi, 1e300]])),
    ):
        assert np.array_equal(types.get(name).decode(types.get(name).encode(values)), values)


# Pack and unpack ------------------------------------------------------------------------------------------------------


def native(
    codec: Codec, n_rows: int, n_blocks: int, rows_per_scale: int, seed: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes_per_block = {"F8_E4M3_B128": 128, "MXFP4": 16}[codec.name]
    codes = rng.integers(0, 256, (n_rows, n_blocks * codes_per_block), dtype=np.uint8)
    scales = rng.integers(0, 256, (-(-n_rows // rows_per_scale), n_blocks), dtype=np.uint8)
    return codes, scales


def native_values(codec: Codec, codes: np.ndarray, scales: np.ndarray, rows_per_scale: int) -> np.ndarray:
    """What a checkpoint means: the code's value times its scale, from ml_dtypes' tables alone."""
    if codec.name == "MXFP4":
        table = E2M1[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(codes.shape[0], -1)  # low nibble is even
        table = table + np.float32(0)  # code 8 is +0 in the reference
        block = 32
    else:
        table, block = E4M3[codes], 128
    scale = np.repeat(np.repeat(E8M0[scales], rows_per_scale, axis=0)[: codes.shape[0]], block, axis=1)
    with np.errstate(over="ignore"):
        return table * scale


@every_native
@both_paths
@pytest.mark.parametrize(("n_rows", "rows_per_scale"), [(1, 1), (7, 1), (128, 128), (300, 128), (129, 128), (5, 128)])
def test_unpacking_counts_and_gives_back(codec: Codec, n_rows: int, rows_per_scale: int, use_kernel: bool) -> None:
    codes, scales = native(codec, n_rows, 3, rows_per_scale)
    packed, bad_codes, bad_scales = codec.pack(codes, scales, rows_per_scale=rows_per_scale, use_kernel=use_kernel)
    assert packed.shape == (n_rows, codec.layout.row_nbytes(3 * codec.layout.block_len))
    codes_back, scales_back = codec.unpack(packed, use_kernel=use_kernel)
    assert np.array_equal(codes_back, codes)
    assert np.array_equal(scales_back, np.repeat(scales, rows_per_scale, axis=0)[:n_rows])
    assert bad_scales == np.count_nonzero(scales == 255)
    assert bad_codes == (0 if codec.name == "MXFP4" else np.count_nonzero(np.isnan(E4M3[codes])))
    again, _, _ = codec.pack(codes_back, scales_back, use_kernel=use_kernel)
    assert np.array_equal(again, packed)


@every_native
@both_paths
@pytest.mark.parametrize("rows_per_scale", [1, 128])
def test_packing_keeps_the_value_of_every_code_under_every_scale(
    codec: Codec, rows_per_scale: int, use_kernel: bool
) -> None:
    codes_per_block = {"F8_E4M3_B128": 128, "MXFP4": 16}[codec.name]
    n_blocks = 256 // codes_per_block
    # All 256 bytes in every row; scales 0..254 (255 is no number and below).
    n_scale_rows = 255 if rows_per_scale == 1 else 3
    n_rows = n_scale_rows if rows_per_scale == 1 else 300
    codes = np.tile(np.arange(256, dtype=np.uint8), (n_rows, 1))
    scales = (np.arange(n_scale_rows * n_blocks) % 255).astype(np.uint8).reshape(n_scale_rows, n_blocks)
    if rows_per_scale == 1:
        scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], n_blocks, axis=1)
    packed, bad_codes, bad_scales = codec.pack(codes, scales, rows_per_scale=rows_per_scale, use_kernel=use_kernel)
    assert_same_bits(codec.decode(packed), native_values(codec, codes, scales, rows_per_scale))
    assert bad_scales == 0
    assert bad_codes == (2 * n_rows if codec.name == "F8_E4M3_B128" else 0)


@every_native
@both_paths
def test_nan_codes_and_scales_255_are_counted_once(codec: Codec, use_kernel: bool) -> None:
    codes, scales = native(codec, 300, 2, 128)
    codes[...] = 0x11
    scales[...] = 100
    assert codec.pack(codes, scales, rows_per_scale=128, use_kernel=use_kernel)[1:] == (0, 0)
    scales[2, 1] = 255  # of the ragged last tile
    codes[299, 0], codes[0, -1], codes[1, :] = 0x7F, 0xFF, 0x7F
    expected = 2 + codes.shape[1] if codec.name == "F8_E4M3_B128" else 0
    assert codec.pack(codes, scales, rows_per_scale=128, use_kernel=use_kernel)[1:] == (expected, 1)
