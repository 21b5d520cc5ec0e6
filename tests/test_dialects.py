"""An id is not a type until its dialect is named: detection by spans, stamps, choices, and the tables themselves."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from oracle import MANIFEST

import ggufx
from ggufx import dialects, types
from ggufx.container import Entry, Value, align_up, encode_header
from ggufx.errors import AmbiguousDialect, UnknownDialect

NAMES = ("llama.cpp", "ik_llama.cpp", "nisparks")
BLOCKS = {  # elements, bytes: from public sources, not from the registry
    "F8": (128, 129, 42),
    "Q2_0": (64, 18, 42),
    "IQ2_KS": (256, 70, 145),
    "Q8_0": (32, 34, 8),
    "F32": (1, 4, 0),
    "NVFP4": (64, 36, 40),
}
HEADER = {"IQ2_KS": 2}

Spec = tuple[str, tuple[int, ...]]


def nbytes_of(kind: str, shape: tuple[int, ...]) -> int:
    block_len, block_nbytes, _ = BLOCKS[kind]
    return int(np.prod(shape[:-1])) * (HEADER.get(kind, 0) + shape[-1] // block_len * block_nbytes)


def write(path: Path, *specs: Spec, alignment: int = 32, stamp: str | None = None, padded: bool = True) -> Path:
    """A GGUF whose tensors are ``(kind, shape)``, named ``t0``, ``t1`` ..., all bytes 1."""
    metadata = {} if alignment == 32 else {"general.alignment": Value.u32(alignment)}
    if stamp is not None:
        metadata["ggufx.dialect"] = Value.string(stamp)
    directory, data = [], b""
    for number, (kind, shape) in enumerate(specs):
        directory.append((f"t{number}", shape, BLOCKS[kind][2], len(data)))
        data += b"\1" * nbytes_of(kind, shape)
        if padded or number < len(specs) - 1:
            data += bytes(align_up(len(data), alignment) - len(data))
    path.write_bytes(encode_header(metadata, directory, alignment) + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# Id 42 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128,), (3, 128), (7, 256), (2, 5, 384), (256, 4096)])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize(
    ("kind", "dialect", "name"), [("F8", "nisparks", "F8_E4M3_B128"), ("Q2_0", "llama.cpp", "Q2_0")]
)
def test_id_42_is_told_apart_by_its_span(
    path: Path, kind: str, dialect: str, name: str, shape: tuple[int, ...], padded: bool, followed: bool
) -> None:
    specs: list[Spec] = [("F32", (8,)), (kind, shape)] + ([("F32", (8,))] if followed else [])
    with ggufx.open(write(path, *specs, padded=padded)) as f:
        assert f.dialect == dialect
        assert f.equivalent == (dialect,)
        assert f["t1"].type == name
        assert f["t1"].nbytes == nbytes_of(kind, shape)


def test_a_row_that_is_no_multiple_of_128_can_only_be_q2_0(path: Path) -> None:
    with ggufx.open(write(path, ("Q2_0", (192,)), alignment=512)) as f:
        assert f["t0"].type == "Q2_0"


@pytest.mark.parametrize("alignment", [256, 512, 4096])
def test_a_span_that_fits_both_meanings_is_ambiguous(path: Path, alignment: int) -> None:
    # 36 and 129 bytes round up to the same span.
    write(path, ("F8", (128,)), ("F32", (8,)), alignment=alignment)
    with pytest.raises(AmbiguousDialect, match=r"id 42 of tensor 't0' .* Q2_0 in llama\.cpp, F8_E4M3_B128 in nisparks"):
        ggufx.open(path)
    for dialect, name in (("nisparks", "F8_E4M3_B128"), ("llama.cpp", "Q2_0")):
        with ggufx.open(path, dialect=dialect) as f:
            assert f["t0"].type == name
            assert f.dialect == dialect


def test_one_telling_tensor_decides_for_all_of_its_id(path: Path) -> None:
    with ggufx.open(write(path, ("F8", (128,)), ("F8", (64, 128)), ("F32", (8,)), alignment=256)) as f:
        assert [t.type for t in f.tensors] == ["F8_E4M3_B128", "F8_E4M3_B128", "F32"]


def test_ambiguity_is_not_hidden_by_an_id_of_a_third_fork(path: Path) -> None:
    write(path, ("F8", (128,)), ("IQ2_KS", (2, 256)), alignment=256)
    with pytest.raises(AmbiguousDialect, match="id 42"):
        ggufx.open(path)


def test_a_misfit_of_a_contested_id_hides_its_tensors_and_names_every_size(path: Path) -> None:
    write(path, ("Q8_0", (8, 128)), ("F32", (8,)))
    data = bytearray(path.read_bytes())
    at = data.index(b"t0") + 2 + 4 + 16
    assert data[at] == 8
    data[at] = 42  # 1088 bytes: neither 288 as Q2_0 nor 1032 as F8
    path.write_bytes(data)
    with ggufx.open(path) as f:
        assert (f["t0"].type, f["t0"].codec, f["t1"].type) == ("id 42", None, "F32")
        assert "1088 bytes but takes 288 bytes as Q2_0 or 1032 bytes as F8_E4M3_B128" in f.notes[0]
    with pytest.raises(UnknownDialect, match=r"1088 bytes .* 288 bytes as Q2_0"):
        ggufx.open(path, dialect="llama.cpp")


def test_types_of_two_meanings_at_once_are_hidden(path: Path) -> None:
    # One tensor can only be Q2_0, another only F8: no dialect gives 42 both meanings.
    write(path, ("F8", (64, 128)), ("Q2_0", (64, 128)), ("F32", (8,)))
    with ggufx.open(path) as f:
        assert [t.type for t in f.tensors] == ["id 42", "id 42", "F32"]


# Choices and stamps --------------------------------------------------------------------------------------------------


def test_an_explicit_dialect_that_does_not_fit_is_refused(path: Path) -> None:
    write(path, ("F8", (64, 128)))
    with pytest.raises(UnknownDialect, match=r"2304 bytes as Q2_0"):
        ggufx.open(path, dialect="llama.cpp")
    with pytest.raises(
        UnknownDialect, match=r"'nope' is not a known dialect; known: llama\.cpp, ik_llama\.cpp, nisparks"
    ):
        ggufx.open(path, dialect="nope")


def test_an_explicit_dialect_without_the_id_leaves_it_unknown(path: Path) -> None:
    with ggufx.open(write(path, ("F8", (64, 128)), ("Q8_0", (2, 64))), dialect="ik_llama.cpp") as f:
        assert f["t0"].codec is None
        assert f["t0"].type == "id 42"
        assert f["t1"].type == "Q8_0"


@pytest.mark.parametrize(("stamp", "name"), [("nisparks", "F8_E4M3_B128"), ("llama.cpp", "Q2_0")])
def test_our_stamp_settles_what_spans_cannot(path: Path, stamp: str, name: str) -> None:
    with ggufx.open(write(path, ("F8", (128,)), ("F32", (8,)), alignment=256, stamp=stamp)) as f:
        assert f.dialect == stamp
        assert f["t0"].type == name
    with ggufx.open(path, dialect="nisparks") as f:  # an explicit choice wins
        assert f["t0"].type == "F8_E4M3_B128"


def test_a_stamp_that_does_not_fit_is_refused(path: Path) -> None:
    with pytest.raises(UnknownDialect, match="2304 bytes as Q2_0"):
        ggufx.open(write(path, ("F8", (64, 128)), stamp="llama.cpp"))


def test_a_stamp_of_a_newer_version_does_not_keep_a_file_shut(path: Path) -> None:
    with ggufx.open(write(path, ("F8", (64, 128)), stamp="a-dialect-of-tomorrow")) as f:
        assert f.dialect == "nisparks"


@pytest.mark.parametrize("alignment", [64, 4096])
def test_every_split_has_its_own_alignment(tmp_path: Path, alignment: int) -> None:
    # llama-gguf-split copies general.alignment into the first member only.
    paths = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        metadata = {"split.no": Value.u32(number), "split.count": Value.u32(2)}
        if number == 0:
            metadata["general.alignment"] = Value.u32(alignment)
        step = 32 if number else alignment
        directory = [(f"t{number}", (64,), 8, 0), (f"u{number}", (8,), 0, align_up(68, step))]
        path.write_bytes(encode_header(metadata, directory, step) + bytes(align_up(68, step)) + bytes(32))
    for path in paths:
        with ggufx.open(path) as f:
            assert [t.type for t in f.tensors] == ["Q8_0", "F32", "Q8_0", "F32"]


# Other ids -----------------------------------------------------------------------------------------------------------


def test_common_types_fit_every_dialect(path: Path) -> None:
    with ggufx.open(write(path, ("Q8_0", (2, 64)), ("F32", (8,)))) as f:
        assert f.dialect == "llama.cpp"
        assert f.equivalent == NAMES


def test_ik_ids_mean_ik(path: Path) -> None:
    with ggufx.open(write(path, ("IQ2_KS", (3, 512)), ("Q8_0", (2, 64)))) as f:
        assert f.dialect == "ik_llama.cpp"
        assert f.equivalent == ("ik_llama.cpp",)
        assert f["t0"].type == "IQ2_KS"
        assert f["t0"].packed.shape == (3, 2 + 2 * 70)


def test_ids_that_ik_lacks_exclude_it(path: Path) -> None:
    with ggufx.open(write(path, ("NVFP4", (2, 64)))) as f:
        assert f.equivalent == ("llama.cpp", "nisparks")


def test_a_mix_of_forks_opens_without_a_dialect(path: Path) -> None:
    with ggufx.open(write(path, ("F8", (64, 128)), ("IQ2_KS", (3, 512)), ("Q8_0", (2, 64)))) as f:
        assert f.dialect is None
        assert f.equivalent == ()
        assert [t.type for t in f.tensors] == ["F8_E4M3_B128", "IQ2_KS", "Q8_0"]
        assert f["t0"].numpy().shape == (64, 128)


def test_unknown_ids_do_not_take_part_in_detection(path: Path) -> None:
    data = write(path, ("F32", (8,)), ("F8", (64, 128)), ("Q8_0", (2, 64))).read_bytes()
    patched = bytearray(data)
    at = patched.index(b"t0") + 2 + 4 + 8
    patched[at : at + 4] = (999).to_bytes(4, "little")
    path.write_bytes(patched)
    with ggufx.open(path) as f:
        assert f.dialect == "nisparks"
        assert [t.type for t in f.tensors] == ["id 999", "F8_E4M3_B128", "Q8_0"]


def test_spans_of_last_tensors_may_lack_padding_and_others_not() -> None:
    codec = types.get("Q8_0")
    for span, last, expected in (
        (68, True, True), (96, True, True), (80, True, True), (67, True, False), (97, True, False),
        (68, False, False), (96, False, True), (128, False, False), (0, False, False),
    ):  # fmt: skip
        assert dialects.fits(codec, Entry("x", (64,), 8, 0, span, last)) == expected
    assert not dialects.fits(codec, Entry("x", (63,), 8, 0, 96, False))


# The tables ---------------------------------------------------------------------------------------------------------


def test_the_dialects() -> None:
    assert tuple(dialects.DIALECTS) == NAMES
    for name in NAMES:
        assert dialects.get(name).name == name
    with pytest.raises(UnknownDialect):
        dialects.get("LLAMA.CPP")


@pytest.mark.parametrize("name", NAMES)
def test_type_id_is_the_inverse_of_codec(name: str) -> None:
    dialect = dialects.get(name)
    known = {i: codec for i in range(500) if (codec := dialect.codec(i)) is not None}
    assert len(set(known.values())) == len(known)
    for type_id, codec in known.items():
        assert dialect.type_id(codec) == type_id
    for codec in types.all_codecs():
        assert (dialect.type_id(codec) is None) == (codec not in known.values())
    assert dialect.codec(999) is None


def test_ids_and_sizes_of_upstream_are_those_of_the_gguf_package() -> None:
    upstream = dialects.get("llama.cpp")
    for theirs in gguf.GGMLQuantizationType:
        codec = upstream.codec(theirs)
        if codec is not None:
            assert codec.name == theirs.name
            assert (codec.layout.block_len, codec.layout.block.itemsize) == gguf.GGML_QUANT_SIZES[theirs]
    unknown = {t.name for t in gguf.GGMLQuantizationType if upstream.codec(t) is None}
    assert unknown == {"Q8_1", "Q8_K"}  # activations: never in a file


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_every_vector_type_has_its_id_in_its_library_and_heirs(name: str) -> None:
    facts = MANIFEST[name]
    codec = types.get(name)
    assert dialects.get(facts["source"]).codec(facts["type_id"]) is codec
    if facts["source"] == "ik_llama.cpp":
        assert dialects.get("llama.cpp").type_id(codec) is None
        assert dialects.get("nisparks").type_id(codec) is None
    elif facts["type_id"] < 39:
        assert dialects.get("nisparks").codec(facts["type_id"]) is codec
        assert (dialects.get("ik_llama.cpp").codec(facts["type_id"]) is codec) == (name not in ("TQ1_0", "TQ2_0"))


def test_inheritance_and_its_exceptions() -> None:
    upstream, ik, nisparks = (dialects.get(name) for name in NAMES)
    assert upstream.codec(42).name == "Q2_0"
    assert nisparks.codec(42).name == "F8_E4M3_B128"
    assert ik.codec(42) is None
    assert ik.codec(40) is None
    assert nisparks.codec(40).name == upstream.codec(40).name == "NVFP4"
    assert ik.codec(41) is upstream.codec(41)
    assert upstream.type_id(types.get("F8_E4M3_B128")) is None
    assert nisparks.type_id(types.get("Q2_0")) is None
    assert upstream.codec(145) is None


def test_file_type_names_are_those_of_the_gguf_package() -> None:
    upstream, ik, nisparks = (dialects.get(name) for name in NAMES)
    for number in range(50):
        name = upstream.file_type_name(number)
        if name is not None and number in {t.value for t in gguf.LlamaFileType}:
            assert gguf.LlamaFileType(number).name in (f"MOSTLY_{name}", f"ALL_{name}")
    assert upstream.file_type_name(38) == nisparks.file_type_name(38) == "MXFP4_MOE"
    assert (upstream.file_type_name(41), nisparks.file_type_name(41)) == ("Q2_0", "F8_E4M3_MXFP4")
    assert ik.file_type_name(15) == "Q4_K_M"
    assert upstream.file_type_name(9999) is None


def test_a_type_brings_its_fallback_and_its_file_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's type needs no table of ours: the numbers are on its class, and dialects inherit them."""
    list(types.all_codecs())
    monkeypatch.setattr(types, "_by_name", dict(types._by_name))
    monkeypatch.setattr(types, "_by_id", dict(types._by_id))
    layout = types.get("Q8_0").layout
    made = types.register(
        type(
            "Q8_NEW",
            (types.Codec,),
            {"layout": layout, "ids": {"llama.cpp": 4100}, "file_types": {"llama.cpp": 4200, "ik_llama.cpp": 4300},
             "fallbacks": {"llama.cpp": "Q8_0", "ik_llama.cpp": "Q6_0"}},
        )
    )  # fmt: skip
    upstream, ik, nisparks = (dialects.get(name) for name in ("llama.cpp", "ik_llama.cpp", "nisparks"))
    assert [d.fallback(made).name for d in (upstream, ik, nisparks)] == ["Q8_0", "Q6_0", "Q8_0"]
    assert [d.file_type_number("Q8_NEW") for d in (upstream, ik, nisparks)] == [4200, 4300, 4200]
    assert (upstream.file_type_name(4200), ik.file_type_name(4300), upstream.file_type_name(4300)) == (
        "Q8_NEW", "Q8_NEW", None,
    )  # fmt: skip
    assert upstream.fallback(types.get("Q8_0")) is None
