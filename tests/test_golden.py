"""Bits against oracles that share no author with the code: the C libraries' vectors, ml_dtypes and numpy."""

from __future__ import annotations

import hashlib
import json
import zlib

import gguf
import ml_dtypes
import numpy as np
import pytest
from oracle import E4M3, E8M0, FIXTURES, MANIFEST, VECTORS, assert_same_bits

from ggufx import types

SCALARS = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
NO_REFERENCE = {"F8_E4M3_B128"}
"""Types without a reference library; ml_dtypes is their oracle below."""
SHORT = {"IQ4_KT": 4}
"""Rows of a vector that has fewer than the others' twelve."""
EXACT_ENCODERS = sorted(c.name for c in types.all_codecs() if c.reproduces and c.name not in SCALARS)
"""Types whose encoder promises the reference's bytes."""

GOLDEN = sorted(c.name for c in types.all_codecs() if c.can_decode and c.name not in SCALARS | NO_REFERENCE)
CONFORMANCE = json.loads((FIXTURES / "conformance.json").read_text())
CASES = [(name, case) for name in GOLDEN for case in ("", "_imatrix", "_random")]


def vector(name: str) -> dict[str, np.ndarray]:
    path = VECTORS / f"{name.lower()}.npz"
    assert path.is_file(), f"{name} can be decoded but has no reference vector: {path} is missing"
    with np.load(path) as archive:
        return dict(archive)


def with_case(name: str, case: str) -> tuple[np.ndarray, np.ndarray]:
    data = vector(name)
    expected = {"" if c == "" else f"_{c}" for c in MANIFEST[name]["cases"]}
    present = {key.removeprefix("packed") for key in data if key.startswith("packed")}
    assert present == expected, f"{name}: the file has the cases {present}, the manifest says {expected}"
    return data[f"packed{case}"], data[f"dequant{case}"]


def golden_cases() -> list[tuple[str, str]]:
    # A case is left out only where the manifest says that the reference refuses it (no encoding without importance).
    return [(n, c) for n, c in CASES if n not in MANIFEST or c.removeprefix("_") in MANIFEST[n]["cases"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_decodable_type_has_its_vector(name: str) -> None:
    data = vector(name)
    assert name in MANIFEST
    for case in MANIFEST[name]["cases"]:
        packed, expected = with_case(name, f"_{case}" if case else "")
        assert packed.shape[0] == expected.shape[0] > 0
    assert data["x"].shape == (SHORT.get(name, 12), 1024)


def test_no_vector_is_left_untested() -> None:
    assert {path.stem.upper() for path in VECTORS.glob("*.npz")} == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_ids_and_sizes_are_those_of_the_c_libraries(name: str) -> None:
    facts = MANIFEST[name]
    codec = types.get(name)
    assert codec.layout.block_len == facts["block_size"]
    assert codec.layout.block.itemsize == facts["type_size"]
    assert codec.layout.header_nbytes == facts["row_meta_size"]
    assert facts["type_id"] in codec.ids.values()
    assert facts["type_id"] == codec.ids.get(facts["source"], codec.ids.get("llama.cpp"))


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_decode_has_the_reference_bits(name: str, case: str, use_kernel: bool) -> None:
    packed, expected = with_case(name, case)
    assert_same_bits(types.get(name).decode(packed, use_kernel=use_kernel), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_decode_to_a_narrow_float_is_astype_of_float32(name: str, case: str, dtype: type) -> None:
    packed, expected = with_case(name, case)
    assert_same_bits(types.get(name).decode(packed, dtype=dtype), expected.astype(dtype))


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
@pytest.mark.parametrize(("name", "case"), [c for c in golden_cases() if c[0] in EXACT_ENCODERS and c[1] != "_random"])
def test_encode_has_the_reference_bytes(name: str, case: str, use_kernel: bool) -> None:
    data = vector(name)
    importance = data["imatrix"] if case else None
    packed = types.get(name).encode(data["x"], importance, effort="reference", use_kernel=use_kernel)
    wrong = np.argwhere(packed != data[f"packed{case}"])
    assert wrong.size == 0, f"{len(wrong)} bytes differ, first at row, byte {wrong[0]}"


def test_an_importance_matrix_matters_for_q4_0_only() -> None:
    # Guards the test above: with and without must be different vectors, else it would prove nothing.
    assert (vector("Q4_0")["packed"] != vector("Q4_0")["packed_imatrix"]).any()
    assert (vector("Q8_0")["packed"] == vector("Q8_0")["packed_imatrix"]).all()


# Conformance rows ---------------------------------------------------------------------------------------------------


def conformance_row(name: str) -> np.ndarray:
    """Make the row of four blocks as conformance.json describes it, from the manifest's sizes."""
    rule, edit = CONFORMANCE["generator"], CONFORMANCE["overwrite"]
    if name in MANIFEST:
        header, block = MANIFEST[name]["row_meta_size"], MANIFEST[name]["type_size"]
    else:
        assert name == "F8_E4M3_B128"
        header, block = 0, 129
    x, row = 1, bytearray()
    for _ in range(header + 4 * block):
        x = (rule["multiplier"] * x + rule["increment"]) % 2**32
        row.append(x >> 24)
    assert row[:4].hex() == rule["first_bytes"]
    if name == "F8_E4M3_B128":
        row = bytearray(0 if byte & 0x7F == 0x7F else byte for byte in row)
    starts = [header + k * block for k in range(4)]
    if name in edit["e8m0"]:
        for start, e in zip(starts, edit["e8m0"][name], strict=True):
            row[start] = e
    elif header:
        row[:header] = bytes.fromhex(edit["f16"] if header == 2 else edit["f32"])
    elif name != "NVFP4":
        for start in starts:
            row[start : start + 2] = bytes.fromhex(edit["f16"])
    return np.frombuffer(bytes(row), np.uint8)


DECODABLE_CONFORMANCE = sorted(n for n in CONFORMANCE["types"] if types.get(n).can_decode)


def test_conformance_covers_every_type_with_a_kernel() -> None:
    assert {"Q4_0", "Q8_0", "MXFP4", "F8_E4M3_B128"} <= set(DECODABLE_CONFORMANCE)


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
@pytest.mark.parametrize("name", DECODABLE_CONFORMANCE)
def test_conformance_row(name: str, use_kernel: bool) -> None:
    facts = CONFORMANCE["types"][name]
    values = types.get(name).decode(conformance_row(name), use_kernel=use_kernel)
    for index, text in facts["values"].items():
        assert values[int(index)] == np.float32(text)
        assert np.signbit(values[int(index)]) == text.startswith("-")
    assert f"{zlib.crc32(values.astype('<f4').tobytes()):08x}" == facts["crc32"]


# Types whose oracle is ml_dtypes or numpy ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
def test_f8_e4m3_b128_every_scale_and_code(use_kernel: bool) -> None:
    # One row a scale, two blocks a row: every one of the 256 codes under every one of the 256 scales.
    rows = np.empty((256, 2, 129), np.uint8)
    rows[:, :, 0] = np.arange(256)[:, None]
    rows[:, :, 1:] = np.arange(256).reshape(2, 128)
    assert E8M0[0] == 2.0**-127
    assert np.isnan(E8M0[255])
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()
    with np.errstate(over="ignore"):
        expected = E8M0[:, None] * E4M3[None, :]
    actual = types.get("F8_E4M3_B128").decode(rows.reshape(256, 258), use_kernel=use_kernel)
    assert_same_bits(actual, expected)


def test_nvfp4_reference_has_no_scale_between_240_and_448() -> None:
    # Beyond the vectors: bytes of llama.cpp's quantize_row_nvfp4_ref, by libgguf 0.2.2. One sub-block for each largest value.
    largest = [1400, 1487, 1488, 1600, 2000, 2640, 2688, 3000]
    x = np.repeat(np.array(largest, np.float32)[:, None], 16, axis=1) * np.linspace(-0.5, 1, 16, dtype=np.float32)
    scales = [119, 119, 126, 126, 126, 126, 126, 126]
    codes = (
        "4d4c5c6a696071724d4c5c6a696071722b3b3a49495051512c3b4a4949505161"
        "3c4c4b5a596061624d4c5c6a696071724d4c5c6a696071724d5d5c6b69707173"
    )
    blocks = types.get("NVFP4").encode(x.reshape(1, 128), effort="reference").reshape(2, 36)
    assert blocks[:, :4].ravel().tolist() == scales
    assert blocks[:, 4:].tobytes().hex() == codes
    # What searches need not copy: the scales are there, and better.
    y = types.get("NVFP4").decode(types.get("NVFP4").encode(x.reshape(1, 128))).reshape(x.shape)
    theirs = types.get("NVFP4").decode(blocks.reshape(1, 72)).reshape(x.shape)
    assert (((x - y) ** 2).sum(axis=1) <= ((x - theirs) ** 2).sum(axis=1)).all()


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
def test_nvfp4_every_scale_and_code(use_kernel: bool) -> None:
    # One block a scale, the same in all four places, over all sixteen codes in both nibbles.
    blocks = np.empty((256, 36), np.uint8)
    blocks[:, :4] = np.arange(256)[:, None]
    blocks[:, 4:] = np.tile(np.arange(16) * 16 + np.arange(16)[::-1], 2)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4)
    assert_same_bits(types.get("NVFP4").decode(blocks, use_kernel=use_kernel), expected)


def half_patterns(dtype: type) -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(dtype)


@pytest.mark.parametrize(("name", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_every_half_pattern_widens_exactly(name: str, dtype: type) -> None:
    halves = half_patterns(dtype)
    assert_same_bits(types.get(name).decode(halves.view(np.uint8)), halves.astype(np.float32))
    narrow = types.get(name).decode(halves.view(np.uint8), dtype=dtype)
    assert_same_bits(narrow, halves)


@pytest.mark.parametrize(("name", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_every_half_pattern_narrows_exactly_and_ties_go_to_even(name: str, dtype: type) -> None:
    halves = half_patterns(dtype)
    halves = halves[np.isfinite(halves.astype(np.float32))]
    codec = types.get(name)
    assert np.array_equal(codec.encode(halves.astype(np.float32)), halves.view(np.uint8))
    # Midpoints of neighbours, and the floats on either side of them: where rounding goes wrong.
    up = np.sort(halves.astype(np.float32))
    middle = (up[:-1].astype(np.float64) + up[1:]) / 2
    middle = middle.astype(np.float32)
    points = np.concatenate(
        [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]
    )
    assert np.array_equal(codec.encode(points), points.astype(dtype).view(np.uint8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", "<f4"), ("F64", "<f8"), ("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")],
)
def test_scalars_decode_to_themselves(name: str, dtype: str) -> None:
    packed = np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * 4096), np.uint8).reshape(8, -1)
    assert_same_bits(types.get(name).decode(packed), packed.view(dtype))
    values = packed.view(dtype)
    values = np.where(np.isfinite(values), values, 1).astype(dtype) if dtype[1] == "f" else values
    assert np.array_equal(types.get(name).encode(values), values.view(np.uint8))


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
def test_every_binary16_scale_times_every_code(use_kernel: bool) -> None:
    scales = half_patterns(np.float16)
    # Q4_0: one block holds every nibble twice. Q8_0: eight blocks would; here the 32 codes vary with the scale.
    q4 = np.empty((65536, 18), np.uint8)
    q4[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    q4[:, 2:] = np.arange(16) * 17
    levels = np.tile(np.arange(16) - 8, 2).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = levels[None, :] * scales.astype(np.float32)[:, None]
    assert_same_bits(types.get("Q4_0").decode(q4, use_kernel=use_kernel), expected)
    q8 = np.empty((65536, 34), np.uint8)
    q8[:, :2] = q4[:, :2]
    q8[:, 2:] = (np.arange(65536)[:, None] * 32 + np.arange(32)) % 256
    with np.errstate(invalid="ignore"):
        expected = q8[:, 2:].view(np.int8).astype(np.float32) * scales.astype(np.float32)[:, None]
    assert_same_bits(types.get("Q8_0").decode(q8, use_kernel=use_kernel), expected)


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
def test_q8_0_scales_round_as_numpys_float16(use_kernel: bool) -> None:
    halves = half_patterns(np.float16)[:0x7C00].astype(np.float32)  # every finite magnitude, ascending
    middles = (halves[:-1] + halves[1:]) / 2
    # 127 times a midpoint is exact in float32, so the division gives the tie itself.
    tops = np.concatenate([127 * halves, 127 * middles, np.nextafter(127 * middles, np.float32(np.inf))])
    tops = np.concatenate([tops, np.nextafter(127 * middles, np.float32(0)), np.float32([127 * 65520, 1e30, 1e-42])])
    rows = np.zeros((tops.size, 32), np.float32)
    rows[:, 5] = -tops
    with np.errstate(over="ignore"):
        expected = np.minimum(
            (tops / np.float32(127)).astype(np.float16), np.float16(65504)
        )  # the library's inf is clamped
    packed = types.get("Q8_0").encode(rows, effort="reference", use_kernel=use_kernel)
    assert np.array_equal(packed[:, :2].copy().view("<u2")[:, 0], expected.view(np.uint16))


# The gguf package's NumPy decoders, on bytes that no quantizer writes ----------------------------------------------------


@pytest.mark.parametrize("use_kernel", [False, True], ids=["specification", "kernel"])
@pytest.mark.parametrize("name", [name for name in GOLDEN if hasattr(gguf.quants, name)])
def test_random_bytes_decode_as_in_the_gguf_package(name: str, use_kernel: bool) -> None:
    codec = types.get(name)
    rng = np.random.default_rng(3)
    # Enough that every grid point is met; scales of every kind, infinities, NaN and subnormals included.
    rows = rng.integers(0, 256, (128, codec.layout.row_nbytes(2048)), dtype=np.uint8)
    _, blocks = codec.layout.split(rows)
    for field in [
        name for name in ("d", "dmin", "m") if name in blocks.dtype.names and blocks.dtype[name] == np.float16
    ]:
        scales = rng.choice(half_patterns(np.float16), blocks.shape)
        special = rng.choice(np.array([0x7C00, 0xFC00, 0x7E00, 0x8000, 0, 1], np.uint16).view(np.float16), blocks.shape)
        blocks[field] = np.where(rng.random(blocks.shape) < 0.1, special, scales)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    assert_same_bits(codec.decode(rows, use_kernel=use_kernel), expected)
