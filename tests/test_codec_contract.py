"""The laws that every registered codec obeys; a new type is covered the moment it is registered."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import E2M1, E4M3, E8M0, assert_same_bits

from ggufx import types
from ggufx.errors import CodecError, GGUFError, UnknownType, UnsupportedType
from ggufx.types import Codec, Layout
from ggufx.types import codec as codec_module

CODECS = sorted(types.all_codecs(), key=lambda codec: codec.name)
DECODABLE = [c for c in CODECS if c.can_decode]
ENCODABLE = [c for c in CODECS if c.can_encode]
PACKABLE = [c for c in CODECS if c.can_pack]
QUANTS = [c for c in ENCODABLE if c.layout.block_len > 1]
INTEGERS = {"I8", "I16", "I32", "I64"}

every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
every_decoder = pytest.mark.parametrize("codec", DECODABLE, ids=lambda c: c.name)
every_encoder = pytest.mark.parametrize("codec", ENCODABLE, ids=lambda c: c.name)
every_quant_encoder = pytest.mark.parametrize("codec", QUANTS, ids=lambda c: c.name)
every_packer = pytest.mark.parametrize("codec", PACKABLE, ids=lambda c: c.name)
both_paths = pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])


pytestmark = pytest.mark.filterwarnings("error")
"""Random bytes make infinite and NaN scales; no codec may let numpy warn its user about them."""


def random_rows(codec: Codec, n_rows: int, n_blocks: int, seed: int = 1) -> np.ndarray:
    row_nbytes = codec.layout.row_nbytes(n_blocks * codec.layout.block_len)
    return np.random.default_rng(seed).integers(0, 256, (n_rows, row_nbytes), dtype=np.uint8)


def sample_values(codec: Codec, n_rows: int, n_blocks: int, seed: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (n_rows, n_blocks * codec.layout.block_len)
    if codec.name in INTEGERS:
        return rng.integers(-128, 128, shape).astype(codec.value_dtype)
    # Rows of very different magnitude, one of them zero.
    magnitude = np.float32(10.0) ** rng.integers(-4, 4, (n_rows, 1))
    values = (rng.standard_normal(shape) * magnitude).astype(np.float32)
    values[0] = 0
    return values


def guarded(shape: tuple[int, ...], dtype: np.dtype, poison: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an array to fill, every byte poisoned, and the whole buffer around it."""
    margin = 4096
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.full(nbytes + 2 * margin, poison, np.uint8)
    return buffer[margin : margin + nbytes].view(dtype).reshape(shape), buffer


def assert_guards(buffer: np.ndarray, poison: int) -> None:
    assert (buffer[:4096] == poison).all(), "wrote before the output"
    assert (buffer[-4096:] == poison).all(), "wrote beyond the output"


# Registry -----------------------------------------------------------------------------------------------------------


@every_codec
def test_found_by_name_in_any_case(codec: Codec) -> None:
    assert types.get(codec.name) is codec
    assert types.get(codec.name.lower()) is codec
    assert type(codec).__name__ == codec.name
    assert codec.ids


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


# Sizes --------------------------------------------------------------------------------------------------------------


@every_codec
def test_row_sizes_are_inverses(codec: Codec) -> None:
    layout = codec.layout
    assert layout.header_nbytes == (0 if layout.header is None else layout.header.itemsize)
    for n_blocks in (0, 1, 2, 3, 7, 1000, 2**40):
        row_len = n_blocks * layout.block_len
        row_nbytes = layout.row_nbytes(row_len)
        assert row_nbytes == layout.header_nbytes + n_blocks * layout.block.itemsize
        assert layout.row_len(row_nbytes) == row_len
        assert layout.nbytes((3, 5, row_len)) == 15 * row_nbytes
    assert layout.nbytes((row_len,)) == layout.row_nbytes(row_len)
    assert layout.nbytes((0, layout.block_len)) == 0


@every_codec
def test_bits_per_weight(codec: Codec) -> None:
    layout = codec.layout
    assert layout.bits_per_weight() == 8 * layout.block.itemsize / layout.block_len
    row_len = 4 * layout.block_len
    assert layout.bits_per_weight(row_len) * row_len == 8 * layout.row_nbytes(row_len)
    assert (layout.bits_per_weight(row_len) > layout.bits_per_weight()) == (layout.header is not None)


@every_codec
def test_the_block_is_packed_and_fields_tile_it(codec: Codec) -> None:
    for part in filter(None, (codec.layout.block, codec.layout.header)):
        assert sum(part[name].itemsize for name in part.names) == part.itemsize
        assert all(part[name].base.byteorder in "<|" or part[name].base.isnative for name in part.names)


@every_codec
def test_impossible_sizes_raise_with_the_numbers(codec: Codec) -> None:
    layout = codec.layout
    if layout.block_len > 1:
        with pytest.raises(CodecError, match=f"{layout.block_len + 1} elements .* block of {layout.block_len}"):
            layout.row_nbytes(layout.block_len + 1)
        with pytest.raises(CodecError):
            layout.nbytes((2, layout.block_len - 1))
    if layout.block.itemsize > 1:
        with pytest.raises(CodecError, match=str(layout.header_nbytes + 1)):
            layout.row_len(layout.header_nbytes + 1)
    with pytest.raises(CodecError):
        layout.row_len(layout.header_nbytes - 1)
    with pytest.raises(CodecError):
        layout.nbytes((-1, -layout.block_len))


@every_codec
def test_split_gives_views(codec: Codec) -> None:
    rows = random_rows(codec, 3, 2)
    headers, blocks = codec.layout.split(rows)
    assert blocks.shape == (3, 2)
    assert np.shares_memory(blocks, rows)
    assert (headers is None) == (codec.layout.header is None)
    at = codec.layout.header_nbytes + codec.layout.block.itemsize
    assert blocks[1, 1].tobytes() == rows[1, at:].tobytes()
    if headers is not None:
        assert headers.shape == (3,)
        assert headers[1].tobytes() == rows[1, : codec.layout.header_nbytes].tobytes()


@every_codec
def test_a_type_without_a_verb_says_so(codec: Codec) -> None:
    row = random_rows(codec, 1, 1)
    if not codec.can_decode:
        with pytest.raises(UnsupportedType, match=codec.name):
            codec.decode(row)
    if not codec.can_encode:
        with pytest.raises(UnsupportedType, match=codec.name):
            codec.encode(np.zeros((1, codec.layout.block_len), np.float32))
    if not codec.can_pack:
        with pytest.raises(UnsupportedType, match=codec.name):
            codec.pack(row, row)
        with pytest.raises(UnsupportedType, match=codec.name):
            codec.unpack(row)


# Decode -------------------------------------------------------------------------------------------------------------


@every_decoder
@given(data=st.data())
def test_kernel_equals_specification(codec: Codec, data: st.DataObject) -> None:
    n_rows = data.draw(st.integers(1, 7), "rows")
    n_blocks = data.draw(st.integers(1, 5), "blocks")
    row_nbytes = codec.layout.row_nbytes(n_blocks * codec.layout.block_len)
    head = data.draw(st.binary(max_size=min(48, row_nbytes)), "first bytes")
    rows = random_rows(codec, n_rows, n_blocks, data.draw(st.integers(0, 2**32 - 1), "seed"))
    rows[0, : len(head)] = np.frombuffer(head, np.uint8)
    specification = codec.decode(rows, use_kernel=False)
    assert_same_bits(codec.decode(rows), specification)
    assert specification.shape == (n_rows, n_blocks * codec.layout.block_len)
    assert specification.dtype == codec.value_dtype


@every_decoder
@both_paths
def test_decode_writes_every_value_and_nothing_beyond(codec: Codec, use_kernel: bool) -> None:
    rows = random_rows(codec, 5, 3)
    shape = (5, 3 * codec.layout.block_len)
    results = []
    for poison in (0xAA, 0xFF):  # 0xFF is NaN, 0xAA a plain number
        out, buffer = guarded(shape, codec.value_dtype, poison)
        assert codec.decode(rows, out=out, use_kernel=use_kernel) is out
        assert_guards(buffer, poison)
        results.append(out)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], codec.decode(rows))


@every_decoder
@both_paths
def test_rows_are_independent(codec: Codec, use_kernel: bool) -> None:
    rows = random_rows(codec, 9, 2)
    order = np.random.default_rng(0).permutation(9)
    whole = codec.decode(rows, use_kernel=use_kernel)
    assert_same_bits(codec.decode(rows[order], use_kernel=use_kernel), whole[order])
    assert_same_bits(codec.decode(rows[4], use_kernel=use_kernel), whole[4])


@every_decoder
def test_input_may_be_read_only_unaligned_strided_or_mapped(codec: Codec, tmp_path: Path) -> None:
    rows = random_rows(codec, 5, 3)
    before = rows.copy()
    expected = codec.decode(rows)
    read_only = rows.copy()
    read_only.flags.writeable = False
    assert_same_bits(codec.decode(read_only), expected)
    for shift in (1, 3):
        buffer = np.empty(rows.size + 8, np.uint8)
        unaligned = buffer[shift : shift + rows.size].reshape(rows.shape)
        unaligned[...] = rows
        assert_same_bits(codec.decode(unaligned), expected)
    wide = np.zeros((10, 2 * rows.shape[1]), np.uint8)
    wide[::2, ::2] = rows
    assert not wide[::2, ::2].flags.c_contiguous
    assert_same_bits(codec.decode(wide[::2, ::2]), expected)
    assert_same_bits(codec.decode(np.asfortranarray(rows)), expected)
    path = tmp_path / "rows"
    path.write_bytes(b"x" + rows.tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped = np.frombuffer(mapping, np.uint8, offset=1).reshape(rows.shape)
    assert_same_bits(codec.decode(mapped), expected)
    assert np.array_equal(rows, before)


@every_decoder
@both_paths
def test_threads_and_chunks_change_nothing(codec: Codec, use_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(codec, 37, 2)
    expected = codec.decode(rows, threads=1, use_kernel=use_kernel)
    # Chunks of two rows, so that small rows make many.
    monkeypatch.setattr(codec_module, "_CHUNK_NBYTES", 2 * 2 * codec.layout.block_len * 4)
    for threads in (1, 2):
        assert_same_bits(codec.decode(rows, threads=threads, use_kernel=use_kernel), expected)


@every_decoder
def test_shape_may_be_given(codec: Codec) -> None:
    rows = random_rows(codec, 6, 2)
    expected = codec.decode(rows)
    shape = (2, 3, 2 * codec.layout.block_len)
    assert_same_bits(codec.decode(rows.ravel(), shape), expected.reshape(shape))
    assert_same_bits(codec.decode(rows.reshape(2, 3, -1)), expected.reshape(shape))


@every_decoder
def test_dtype_variants_are_astype(codec: Codec) -> None:
    rows = random_rows(codec, 3, 2)
    expected = codec.decode(rows)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            cast = expected.astype(dtype)
        assert_same_bits(codec.decode(rows, dtype=dtype), cast)
        out, buffer = guarded(expected.shape, np.dtype(dtype), 0xAA)
        assert_same_bits(codec.decode(rows, out=out), cast)
        assert_same_bits(codec.decode(rows, out=out, dtype=dtype), cast)
        assert_guards(buffer, 0xAA)


@every_decoder
def test_an_unaligned_out_is_filled(codec: Codec) -> None:
    rows = random_rows(codec, 3, 2)
    expected = codec.decode(rows)
    buffer = np.full(expected.nbytes + 2, 0xAA, np.uint8)
    out = buffer[1:-1].view(expected.dtype).reshape(expected.shape)
    codec.decode(rows, out=out)
    assert_same_bits(out.copy(), expected)
    assert buffer[0] == buffer[-1] == 0xAA


@every_decoder
def test_decode_refuses_what_does_not_fit(codec: Codec) -> None:
    rows = random_rows(codec, 4, 2)
    row_len = 2 * codec.layout.block_len
    good = np.empty((4, row_len), codec.value_dtype)
    locked = good.copy()
    locked.flags.writeable = False
    with pytest.raises(CodecError, match=rf"takes {rows.size + rows.shape[1]} bytes, got {rows.size}"):
        codec.decode(rows, (5, row_len))
    with pytest.raises(CodecError, match="uint8, got int8"):
        codec.decode(rows.view(np.int8))
    with pytest.raises(CodecError, match="uint8, got float32"):
        codec.decode(np.zeros((4, rows.shape[1]), np.float32))
    with pytest.raises(CodecError, match="scalar"):
        codec.decode(np.uint8(1))
    if codec.layout.block.itemsize > 1:
        with pytest.raises(CodecError, match=str(rows.shape[1] - 1)):
            codec.decode(rows[:, :-1])
    with pytest.raises(CodecError):
        codec.decode(rows, (-4, -row_len))
    for out in (
        np.empty((3, row_len), codec.value_dtype),
        np.empty(4 * row_len, codec.value_dtype),
        np.empty((row_len, 4), codec.value_dtype).T,
        np.empty((8, row_len), codec.value_dtype)[::2],
        locked,
    ):
        with pytest.raises(CodecError, match=r"out is .*\[4, "):
            codec.decode(rows, out=out)
    with pytest.raises(CodecError, match="out is"):
        codec.decode(rows, out=np.empty((4, row_len), np.float16), dtype=np.float32)
    with pytest.raises(CodecError, match="complex64"):
        codec.decode(rows, dtype=np.complex64)
    with pytest.raises(CodecError, match="uint16"):
        codec.decode(rows, out=np.empty((4, row_len), np.uint16))


@every_decoder
@both_paths
def test_decoding_nothing(codec: Codec, use_kernel: bool) -> None:
    row_nbytes = codec.layout.row_nbytes(codec.layout.block_len)
    for shape in ((0, row_nbytes), (3, 0, row_nbytes)):
        values = codec.decode(np.empty(shape, np.uint8), use_kernel=use_kernel)
        assert values.shape == (*shape[:-1], codec.layout.block_len)
    empty_rows = np.zeros((3, codec.layout.header_nbytes), np.uint8)
    assert codec.decode(empty_rows, use_kernel=use_kernel).shape == (3, 0)


# Encode -------------------------------------------------------------------------------------------------------------


@every_encoder
@both_paths
def test_encode_writes_every_byte_and_nothing_beyond(codec: Codec, use_kernel: bool) -> None:
    values = sample_values(codec, 5, 3)
    shape = (5, codec.layout.row_nbytes(values.shape[1]))
    results = []
    for poison in (0xAA, 0xFF):
        out, buffer = guarded(shape, np.dtype(np.uint8), poison)
        assert codec.encode(values, out=out, use_kernel=use_kernel) is out
        assert_guards(buffer, poison)
        results.append(out)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], codec.encode(values))


@every_encoder
def test_encode_is_deterministic_in_rows_threads_and_paths(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    values = sample_values(codec, 33, 2)
    before = values.copy()
    packed = codec.encode(values, threads=1)
    order = np.random.default_rng(0).permutation(33)
    assert np.array_equal(codec.encode(values[order]), packed[order])
    assert np.array_equal(codec.encode(values[7]), packed[7])
    assert np.array_equal(codec.encode(values, use_kernel=False), packed)
    assert np.array_equal(codec.encode(np.asfortranarray(values)), packed)
    assert np.array_equal(codec.encode(values.reshape(3, 11, -1)), packed.reshape(3, 11, -1))
    locked = values.copy()
    locked.flags.writeable = False
    assert np.array_equal(codec.encode(locked), packed)
    if codec.name not in INTEGERS:
        halves = values.astype(ml_dtypes.bfloat16)
        assert np.array_equal(codec.encode(halves), codec.encode(halves.astype(np.float32)))
    monkeypatch.setattr(codec_module, "_CHUNK_NBYTES", 2 * values.shape[1] * 4)
    for threads in (1, 2):
        assert np.array_equal(codec.encode(values, threads=threads), packed)
    assert np.array_equal(values, before)


@every_encoder
@given(data=st.data())
def test_encode_gives_finite_values(codec: Codec, data: st.DataObject) -> None:
    block = codec.layout.block_len
    # 65504 is the largest binary16: larger numbers do not fit the types whose number or scale is one.
    limit = 127 if codec.name in INTEGERS else 65504
    values = np.zeros((2, block), np.float32)
    drawn = data.draw(st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=min(12, block)), "values")
    values[0, : len(drawn)] = drawn
    values[1, -len(drawn) :] = drawn
    if codec.name in INTEGERS:
        values = np.rint(values)
    packed = codec.encode(values)
    decoded = codec.decode(packed)
    assert np.isfinite(decoded).all()
    assert np.array_equal(codec.encode(values, use_kernel=False), packed)
    if not codec.lossy:
        assert np.array_equal(decoded, values)


@every_quant_encoder
@given(data=st.data())
def test_encode_kernel_equals_specification_on_any_finite_bits(codec: Codec, data: st.DataObject) -> None:
    # Every magnitude in one block, subnormals and numbers whose scale overflows included; or all of one magnitude.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    shape = (4, 2 * codec.layout.block_len)
    exponent = data.draw(st.one_of(st.none(), st.integers(0, 254)), "exponent")
    patterns = rng.integers(0, 2**32, shape, dtype=np.uint32)
    if exponent is not None:
        patterns = patterns & np.uint32(0x807FFFFF) | np.uint32(exponent << 23)
    values = patterns.view(np.float32)
    values[~np.isfinite(values)] = 0
    values[:, ::5] = -0.0  # under a subnormal scale the inverse is infinite and the product NaN
    packed = codec.encode(values)
    assert np.array_equal(packed, codec.encode(values, use_kernel=False))
    assert codec.decode(packed).shape == shape


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
    error = np.abs(types.get("Q4_0").decode(types.get("Q4_0").encode(x)) - x.astype(np.float64))
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
    packed = codec.encode(x)
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
    assert np.array_equal(types.get("MXFP4").encode(rows)[:, 0], expected)


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


# Every tie of a lattice, at scale 1: random values never meet one. Searching encoders choose the lattice themselves.
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


@pytest.mark.parametrize("codec", [c for c in QUANTS if c.name in TIES], ids=lambda c: c.name)
@both_paths
def test_ties_go_where_the_reference_sends_them(codec: Codec, use_kernel: bool) -> None:
    values, expected = TIES[codec.name]
    row = np.zeros((1, codec.layout.block_len), np.float32)
    row[0, : len(values)] = values
    decoded = codec.decode(codec.encode(row, use_kernel=use_kernel))
    assert np.array_equal(decoded[0, : len(values)], np.array(expected, np.float32))
    assert not decoded[0, len(values) :].any()


@every_encoder
@both_paths
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encode_refuses_what_is_not_finite_and_names_the_place(codec: Codec, bad: float, use_kernel: bool) -> None:
    values = np.zeros((2, 3, 2 * codec.layout.block_len), np.float32)
    values[1, 1, 1] = bad
    with pytest.raises(CodecError, match=r"at row 4, column 1\b"):
        codec.encode(values, use_kernel=use_kernel)


@every_encoder
def test_encode_names_the_row_of_a_later_chunk(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((9, codec.layout.block_len), np.float32)
    values[8, 0] = np.nan
    monkeypatch.setattr(codec_module, "_CHUNK_NBYTES", values.shape[1] * 4)
    with pytest.raises(CodecError, match="row 8, column 0"):
        codec.encode(values, threads=2)


@every_encoder
def test_encode_refuses_what_does_not_fit(codec: Codec) -> None:
    row_len = codec.layout.block_len
    good = np.zeros((2, row_len), np.float32)
    row_nbytes = codec.layout.row_nbytes(row_len)
    with pytest.raises(CodecError, match="scalar"):
        codec.encode(np.float32(1))
    if row_len > 1:
        with pytest.raises(CodecError, match=f"{row_len + 1} elements"):
            codec.encode(np.zeros((2, row_len + 1), np.float32))
    for values in (good.astype(np.complex64), good.astype("U3"), good.astype(object)):
        with pytest.raises(CodecError, match=r"real numbers, got (complex64|<U3|object)"):
            codec.encode(values)
    for out in (
        np.empty((3, row_nbytes), np.uint8),
        np.empty((2, row_nbytes), np.int8),
        np.empty((4, row_nbytes), np.uint8)[::2],
        np.frombuffer(bytes(2 * row_nbytes), np.uint8).reshape(2, row_nbytes),
    ):
        with pytest.raises(CodecError, match=rf"uint8\[2, {row_nbytes}\]"):
            codec.encode(good, out=out)


@every_encoder
def test_encode_refuses_bad_importance(codec: Codec) -> None:
    row_len = 2 * codec.layout.block_len
    values = np.zeros((2, row_len), np.float32)
    good = np.ones(row_len, np.float32)
    for bad in (good[:-1], good[None], -good, good * np.nan, good * np.inf, np.float32(1)):
        with pytest.raises(CodecError, match=f"{row_len} finite weights"):
            codec.encode(values, bad)
    assert codec.encode(values, good).shape == codec.encode(values, good.tolist()).shape


@every_encoder
def test_encoding_nothing(codec: Codec) -> None:
    row_len = codec.layout.block_len
    for shape in ((0, row_len), (2, 0, row_len)):
        packed = codec.encode(np.empty(shape, np.float32))
        assert packed.shape == (*shape[:-1], codec.layout.row_nbytes(row_len))
    assert codec.encode(np.empty((3, 0), np.float32)).shape == (3, codec.layout.row_nbytes(0))


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


@every_packer
@both_paths
@pytest.mark.parametrize(("n_rows", "rows_per_scale"), [(1, 1), (7, 1), (128, 128), (300, 128), (129, 128), (5, 128)])
def test_pack_then_unpack_is_the_identity(codec: Codec, n_rows: int, rows_per_scale: int, use_kernel: bool) -> None:
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


@every_packer
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


@every_packer
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


@every_packer
@both_paths
def test_pack_writes_every_byte_and_nothing_beyond(codec: Codec, use_kernel: bool) -> None:
    codes, scales = native(codec, 5, 3, 2)
    shape = (5, codec.layout.row_nbytes(3 * codec.layout.block_len))
    results = []
    for poison in (0xAA, 0x55):
        out, buffer = guarded(shape, np.dtype(np.uint8), poison)
        assert codec.pack(codes, scales, rows_per_scale=2, out=out, use_kernel=use_kernel)[0] is out
        assert_guards(buffer, poison)
        results.append(out)
    assert np.array_equal(results[0], results[1])
    locked, wide = codes.copy(), np.repeat(codes, 2, axis=1)[:, ::2]
    locked.flags.writeable = False
    assert np.array_equal(codec.pack(locked, scales, rows_per_scale=2, use_kernel=use_kernel)[0], results[0])
    assert np.array_equal(codec.pack(wide, scales, rows_per_scale=2, use_kernel=use_kernel)[0], results[0])


@every_packer
def test_pack_refuses_what_does_not_fit(codec: Codec) -> None:
    codes, scales = native(codec, 4, 2, 1)
    for bad_codes, bad_scales in (
        (codes[:3], scales),
        (codes[:, :-1], scales),
        (codes, scales[:, :1]),
        (codes[0], scales),
        (codes, scales[0]),
        (codes.view(np.int8), scales),
        (codes, scales.astype(np.float32)),
    ):
        with pytest.raises(CodecError, match=r"\[\d+"):
            codec.pack(bad_codes, bad_scales)
    with pytest.raises(CodecError, match="128 rows a scale"):
        codec.pack(codes, scales, rows_per_scale=128)
    with pytest.raises(CodecError, match="rows_per_scale is 0"):
        codec.pack(codes, scales, rows_per_scale=0)
    row_nbytes = codec.layout.row_nbytes(2 * codec.layout.block_len)
    for out in (
        np.empty((3, row_nbytes), np.uint8),
        np.empty((4, row_nbytes - 1), np.uint8),
        np.empty((4, row_nbytes), np.float32),
        np.empty((8, row_nbytes), np.uint8)[::2],
    ):
        with pytest.raises(CodecError, match="out is"):
            codec.pack(codes, scales, out=out)
    with pytest.raises(GGUFError):
        codec.unpack(np.zeros((2, row_nbytes - 1), np.uint8))


@every_packer
@both_paths
def test_packing_nothing(codec: Codec, use_kernel: bool) -> None:
    codes, scales = native(codec, 0, 2, 1)
    packed, bad_codes, bad_scales = codec.pack(codes, scales, use_kernel=use_kernel)
    assert (packed.shape[0], bad_codes, bad_scales) == (0, 0, 0)
    codes_back, scales_back = codec.unpack(packed, use_kernel=use_kernel)
    assert codes_back.shape == codes.shape
    assert scales_back.shape == scales.shape
