"""The test kit itself: a codec broken on purpose breaks the law that says so, and strategies give what they promise."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggufx
from ggufx import kernels, rewrite, testing, types
from ggufx.errors import UnknownType, UnsupportedType
from ggufx.types import Codec, Layout, Search

ROOT = Path(__file__).parent.parent
BLOCK = 16
COUNT = {"calls": 0}


class Bytes16(Codec):
    """A sound type: a float32 scale and 16 signed bytes, packed natively too; every broken one differs in one thing."""

    layout: ClassVar = Layout(BLOCK, np.dtype([("d", "<f4"), ("qs", "i1", (BLOCK,))]))
    ids: ClassVar = {"llama.cpp": 4000}
    rms_bound: ClassVar = 0.01

    def decode_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        _, blocks = self.layout.split(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            out.reshape(blocks["qs"].shape)[...] = blocks["qs"] * blocks["d"][..., None]

    def encode_rows(self, values: np.ndarray, out: np.ndarray, importance: np.ndarray | None, search: Search) -> None:
        _, blocks = self.layout.split(out)
        x = values.reshape(blocks["qs"].shape).astype(np.float64)
        d = np.abs(x).max(axis=-1) / 127
        with np.errstate(over="ignore", under="ignore"):
            blocks["d"] = d
        safe = np.where(d > 0, d, 1)[..., None]
        blocks["qs"] = np.rint(x / safe).clip(-127, 127)


class Native16(Codec):
    """A sound type with native packing: a scale byte and 16 code bytes."""

    layout: ClassVar = Layout(BLOCK, np.dtype([("e", "u1"), ("qs", "u1", (BLOCK,))]))
    ids: ClassVar = {"llama.cpp": 4000}

    def decode_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        _, blocks = self.layout.split(rows)
        out.reshape(blocks["qs"].shape)[...] = blocks["qs"] * blocks["e"].astype(np.float32)[..., None]

    def pack_rows(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray, rows_per_scale: int) -> tuple[int, int]:
        _, blocks = self.layout.split(out)
        blocks["e"] = np.repeat(scales, rows_per_scale, axis=0)[: codes.shape[0]]
        blocks["qs"] = codes.reshape(blocks["qs"].shape)
        return 0, int(np.count_nonzero(scales == 255))

    def unpack_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, blocks = self.layout.split(rows)
        return blocks["qs"].reshape(rows.shape[0], blocks.shape[1] * BLOCK), blocks["e"].copy()


def beyond(out: np.ndarray) -> np.ndarray:
    """What follows ``out`` in the byte buffer that it is a view of (the law's guard), or nothing."""
    root = out
    while isinstance(root.base, np.ndarray):
        root = root.base
    end = out.__array_interface__["data"][0] + out.nbytes - root.__array_interface__["data"][0]
    return root[end:] if root.dtype == np.uint8 and root.ndim == 1 else np.empty(0, np.uint8)


Body = Callable[..., Any]


def decoder(change: Body) -> dict[str, Any]:
    def decode_rows(self: Codec, rows: np.ndarray, out: np.ndarray) -> None:
        Bytes16.decode_rows(self, rows, out)
        change(rows, out)

    return {"decode_rows": decode_rows}


def encoder(change: Body) -> dict[str, Any]:
    def encode_rows(self: Codec, values: np.ndarray, out: np.ndarray, importance: Any, search: Search) -> None:
        Bytes16.encode_rows(self, values, out, importance, search)
        change(self.layout.split(out)[1], values, importance, search)

    return {"encode_rows": encode_rows}


def kernel_of(verb: str, change: Body) -> dict[str, Any]:
    """Give the type a "kernel": its specification with something changed."""

    def kernel(self: Codec) -> dict[str, Body]:
        def decode(rows: np.ndarray, out: np.ndarray, block_len: int) -> None:
            values = np.empty(out.shape, np.float32)
            self.decode_rows(rows, values)
            change(rows, values)
            # The dtype of the bits tells which float is meant.
            meant = next(name for name, bits in kernels.OUTPUTS.items() if bits == out.dtype)
            with np.errstate(all="ignore"):
                out[...] = values.astype(meant).view(out.dtype)

        def encode(values: np.ndarray, out: np.ndarray, block_len: int) -> None:
            self.encode_rows(values, out, None, Search())
            change(values, out)

        return {verb: {"decode": decode, "encode": encode}[verb]}

    return {"_kernels": property(kernel)}


def poke(array: np.ndarray, value: float) -> None:
    if array.size:
        array.flat[0] = value


def count_calls(blocks: np.ndarray, *_: Any) -> None:
    COUNT["calls"] += 1
    blocks["qs"][..., 0] ^= COUNT["calls"] % 2


def halve(codes: np.ndarray) -> None:
    codes &= -2


def smear(blocks: np.ndarray, *_: Any) -> None:
    blocks["d"] = blocks["d"].max(initial=0)
    blocks["qs"] = 0


def by_chunk(rows: np.ndarray, out: np.ndarray) -> None:
    if 2 <= len(rows) <= 3:  # the law's chunks; other laws have more rows, or one
        out[-1] = 0


def warn(rows: np.ndarray, out: np.ndarray) -> None:
    np.float32(3e38) * np.full(2, 10, np.float32)


def pack_wrong(
    self: Codec, codes: np.ndarray, scales: np.ndarray, out: np.ndarray, rows_per_scale: int
) -> tuple[int, int]:
    counts = Native16.pack_rows(self, codes, scales, out, rows_per_scale)
    _, blocks = self.layout.split(out)
    blocks["qs"] &= 0xFE  # the lowest bit is lost
    return counts


def pack_half(
    self: Codec, codes: np.ndarray, scales: np.ndarray, out: np.ndarray, rows_per_scale: int
) -> tuple[int, int]:
    keep = out[:, -1].copy()
    counts = Native16.pack_rows(self, codes, scales, out, rows_per_scale)
    out[:, -1] = keep
    return counts


def miscounting_kernel(self: Codec) -> dict[str, Body]:
    def pack(codes: Any, scales: Any, out: Any, block_len: int, rows_per_scale: int) -> tuple[int, int]:
        bad_codes, bad_scales = self.pack_rows(codes, scales, out, rows_per_scale)
        return bad_codes + 1, bad_scales

    return {"pack": pack}


class ShortRows(Layout):
    def row_nbytes(self, row_len: int) -> int:
        return max(0, super().row_nbytes(row_len) - (row_len > 2 * self.block_len))


class CopyingSplit(Layout):
    def split(self, rows: np.ndarray) -> tuple[None, np.ndarray]:
        return None, super().split(rows)[1].copy()


class Lenient(Layout):
    def row_len(self, row_nbytes: int) -> int:
        return row_nbytes // self.block.itemsize * self.block_len


def parts(layout: Layout) -> tuple[Any, ...]:
    return layout.block_len, layout.block, layout.header


BROKEN: dict[str, tuple[str, type[Codec], dict[str, Any]]] = {
    # what is wrong: (the law that says so, the sound type, what replaces its members)
    "wrong size": ("sizes", Bytes16, {"layout": ShortRows(*parts(Bytes16.layout))}),
    "half blocks taken": ("misfits", Bytes16, {"layout": Lenient(*parts(Bytes16.layout))}),
    "an unknown dialect": ("registered", Bytes16, {"ids": {"llama.cp": 4000}}),
    "an id past uint32": ("registered", Bytes16, {"ids": {"llama.cpp": 2**32}}),
    "no id": ("registered", Bytes16, {"ids": {}}),
    "a block with holes": (
        "layout",
        Bytes16,
        {"layout": Layout(BLOCK, np.dtype([("qs", "i1", (BLOCK,)), ("d", "<f4")], align=False).newbyteorder(">"))},
    ),
    "verbs that say nothing": (
        "missing_verbs",
        Bytes16,
        {"pack": lambda self, codes, scales: None, "unpack": lambda self, data: None},
    ),
    "decode leaves the last value": ("decode_writes", Bytes16, {}),
    "decode writes past its rows": ("decode_writes", Bytes16, decoder(lambda rows, out: poke(beyond(out), 1))),
    "decode depends on the other rows": ("decode_rows", Bytes16, decoder(lambda rows, out: poke(out, len(rows)))),
    "decode depends on the chunk": ("decode_threads", Bytes16, decoder(by_chunk)),
    "decode warns": ("quiet", Bytes16, decoder(warn)),
    "decode raises on zero scales": (
        "decode_writes",
        Bytes16,
        decoder(lambda rows, out: [1 / int(row.any()) for row in rows]),
    ),
    "decode kernel off by one code": (
        "decode_kernel",
        Bytes16,
        kernel_of("decode", lambda rows, out: np.add(out[:, :1], 1, out=out[:, :1])),
    ),
    "decode kernel with another minus zero": (
        "decode_kernel",
        Bytes16,
        kernel_of("decode", lambda rows, out: np.add(out, np.float32(0), out=out)),
    ),
    "encode differs from call to call": ("encode_deterministic", Bytes16, encoder(count_calls)),
    "encode leaves a byte": ("encode_writes", Bytes16, {}),
    "encode depends on the other rows": ("encode_rows", Bytes16, encoder(smear)),
    "encode kernel off by one code": (
        "encode_kernel",
        Bytes16,
        kernel_of("encode", lambda values, out: np.bitwise_xor(out[:, 4:5], 1, out=out[:, 4:5])),
    ),
    "encode gives infinities": (
        "encode_finite",
        Bytes16,
        encoder(lambda blocks, *_: np.copyto(blocks["d"], np.where(blocks["d"] > 1, np.inf, blocks["d"]))),
    ),
    "encode misses its bound": ("encode_error", Bytes16, {"rms_bound": 0.001}),
    "encode is worse than zeros": (
        "encode_error",
        Bytes16,
        encoder(lambda blocks, *_: np.negative(blocks["d"], out=blocks["d"])) | {"rms_bound": None},
    ),
    "encode rounds tiny scales up": (
        "encode_tiny",
        Bytes16,
        encoder(lambda blocks, *_: np.maximum(blocks["d"], np.float32(1e-12), out=blocks["d"])),
    ),
    "encode gives high effort half the codes": (
        "encode_effort",
        Bytes16,
        encoder(lambda blocks, values, importance, search: halve(blocks["qs"]) if search.effort == "high" else None)
        | {"nested": True, "rms_bound": None},
    ),
    "encode is coarse above zero": (
        "encode_sides",
        Bytes16,
        encoder(
            lambda blocks, *_: np.copyto(blocks["qs"], blocks["qs"] & -16, where=(blocks["qs"] > 0).all(-1)[..., None])
        ),
    ),
    "encode warns": ("quiet", Bytes16, encoder(lambda blocks, values, *_: warn(values, values))),
    "NaN is encoded": ("encode_refuses", Bytes16, {"_finite": lambda self, part, first: np.nan_to_num(part)}),
    "bad importance is taken": (
        "encode_importance",
        Bytes16,
        {"_importance": lambda self, importance, row_len: None},
    ),
    "lossless, it says": ("encode_finite", Bytes16, {"lossy": False}),
    "packing loses a bit": ("pack_inverse", Native16, {"pack_rows": pack_wrong}),
    "packing leaves a byte": ("pack_writes", Native16, {"pack_rows": pack_half}),
    "pack kernel miscounts": ("pack_kernel", Native16, {"_kernels": property(miscounting_kernel)}),
    "packing takes anything": ("pack_refuses", Native16, {"_check_packed_out": lambda self, out, shape: None}),
}


def leave_last_value(self: Codec, rows: np.ndarray, out: np.ndarray) -> None:
    keep = out[:, -1].copy()
    Bytes16.decode_rows(self, rows, out)
    out[:, -1] = keep


def leave_last_byte(self: Codec, values: np.ndarray, out: np.ndarray, importance: Any, search: Search) -> None:
    keep = out[:, -1].copy()
    Bytes16.encode_rows(self, values, out, importance, search)
    out[:, -1] = keep


BROKEN["decode leaves the last value"][2]["decode_rows"] = leave_last_value
BROKEN["encode leaves a byte"][2]["encode_rows"] = leave_last_byte


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    list(types.all_codecs())
    monkeypatch.setattr(types, "_by_name", dict(types._by_name))
    monkeypatch.setattr(types, "_by_id", dict(types._by_id))
    return


@pytest.mark.parametrize("base", [Bytes16, Native16])
@pytest.mark.usefixtures("registry")
def test_a_sound_codec_breaks_nothing(base: type[Codec]) -> None:
    codec = types.register(base)
    found = list(testing.verdicts(codec))
    assert [v.law for v in found] == list(testing.LAWS)
    assert not [v for v in found if v.status in ("broken", "undecided")]
    testing.check(codec)


@pytest.mark.usefixtures("registry")
def test_the_documented_type_keeps_the_laws() -> None:
    page = (ROOT / "docs" / "add-a-type.md").read_text(encoding="utf-8")
    example, calls, *_ = (part.partition("```")[0] for part in page.split("```python\n")[1:])
    scope: dict[str, Any] = {"__name__": "page"}
    exec(example, scope)
    codec = types.get("TERNARY")
    assert type(codec) is scope["TERNARY"]
    assert codec.can_decode
    exec(calls, {"TERNARY": scope["TERNARY"]})
    with pytest.raises(testing.LawBroken, match="another object: check the class"):
        testing.check(scope["TERNARY"]())


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.usefixtures("registry")
def test_a_broken_codec_breaks_its_law_and_no_other(fault: str) -> None:
    law, base, members = BROKEN[fault]
    codec = types.register(type("BROKEN_TYPE", (base,), {"__doc__": fault, **members}))
    found = list(testing.verdicts(codec))
    assert {v.law: v.detail for v in found if v.status == "broken"}.keys() == {law}, [v for v in found if v.detail]
    assert all(v.detail == f"needs {law}" for v in found if v.status == "undecided")
    with pytest.raises(testing.LawBroken, match=f"BROKEN_TYPE breaks the law {law}: ") as caught:
        testing.check(codec)
    assert (caught.value.law, caught.value.codec) == (law, codec)
    assert isinstance(caught.value, AssertionError)
    with pytest.raises(testing.LawBroken):
        getattr(testing, f"law_{law}")(codec)


def test_a_law_says_the_numbers() -> None:
    codec = type("OFF", (Bytes16,), kernel_of("decode", lambda rows, out: poke(out, 7)))()
    rows = np.zeros((2, 20), np.uint8)
    with pytest.raises(testing.LawBroken, match=r"1 of 32 values differ, first at \[0, 0\]: 7\.0, expected 0\.0"):
        testing.law_decode_kernel(codec, rows=rows)


def test_an_unregistered_codec_is_told_so() -> None:
    with pytest.raises(testing.LawBroken, match="registered: raised UnknownType"):
        testing.check(Bytes16())
    testing.check(Bytes16(), laws=[law for law in testing.LAWS if law != "registered"])


def test_every_law_is_documented_and_needs_earlier_ones() -> None:
    seen: set[str] = set()
    for name, law in testing.LAWS.items():
        assert getattr(testing, f"law_{name}") is law
        assert f"law_{name}" in testing.__all__
        assert 20 < len(law.description) < 120
        assert set(law.needs) <= seen
        seen.add(name)
    assert {law for law, _, _ in BROKEN.values()} >= seen - {"decode_shapes", "decode_inputs", "decode_dtypes"} - {
        "decode_refuses", "encode_inputs", "encode_threads",
    }  # fmt: skip
    with pytest.raises(ValueError, match="decode_quickly: not a law; the laws are registered, "):
        testing.check(Bytes16(), laws=["decode_quickly"])


# The base class keeps these laws for every type; only one that overrides it can break them.
OVERRIDES: dict[str, tuple[str, str, Body]] = {
    "decode gives another shape": (
        "decode_shapes",
        "decode",
        lambda call, data, shape=None, **rest: call(data, None, **rest),
    ),
    "decode changes its input": (
        "decode_inputs",
        "decode",
        lambda call, data, *a, **k: call(spoil(data, **k), *a, **k),
    ),
    "decode to float16 by truncation": ("decode_dtypes", "decode", lambda call, *a, **k: chop(call(*a, **k))),
    "decode takes int8": (
        "decode_refuses",
        "decode",
        lambda call, data, *a, **k: call(data.view(np.uint8) if data.dtype == np.int8 else data, *a, **k),
    ),
    "encode rounds float16 values": (
        "encode_inputs",
        "encode",
        lambda call, v, *a, **k: call(np.rint(v) if np.asarray(v).dtype == np.float16 else v, *a, **k),
    ),
    "encode depends on threads": (
        "encode_threads",
        "encode",
        lambda call, v, *a, threads=None, **k: call(np.negative(v) if threads == 2 and len(v) > 9 else v, *a, **k),
    ),
}


def spoil(data: np.ndarray, out: np.ndarray | None = None, **_: Any) -> np.ndarray:
    if out is None and data.flags.writeable and data.shape == (5, 60):
        data[0, 0] ^= 1
    return data


def chop(found: np.ndarray) -> np.ndarray:
    if found.dtype == np.float16:
        found.view(np.uint16)[...] &= 0xFFF0
    return found


@pytest.mark.parametrize("fault", OVERRIDES)
@pytest.mark.usefixtures("registry")
def test_overriding_a_final_method_is_noticed(fault: str) -> None:
    law, verb, change = OVERRIDES[fault]

    def method(self: Codec, *arguments: Any, **options: Any) -> np.ndarray:
        return change(lambda *a, **k: getattr(Codec, verb)(self, *a, **k), *arguments, **options)

    codec = types.register(type("BROKEN_TYPE", (Bytes16,), {verb: method}))
    assert law in {v.law for v in testing.verdicts(codec) if v.status == "broken"}


# Strategies -----------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_rows_are_rows_of_the_codec(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(list(types.all_codecs())))
    rows = data.draw(testing.rows(codec, max_rows=3, max_blocks=2))
    assert rows.dtype == np.uint8
    assert 1 <= len(rows) <= 3
    assert codec.layout.row_len(rows.shape[1]) in (codec.layout.block_len, 2 * codec.layout.block_len)


@given(data=st.data(), row_len=st.integers(1, 300))
def test_values_and_importances_are_finite_and_as_asked(data: st.DataObject, row_len: int) -> None:
    for limit in (None, 65504):
        values = data.draw(testing.values(row_len, limit=limit))
        assert values.dtype == np.float32
        assert values.shape[1] == row_len
        assert np.isfinite(values).all()
        assert limit is None or np.abs(values).max() <= limit
    weights = data.draw(testing.importances(row_len))
    assert weights.dtype == np.float32
    assert weights.shape == (row_len,)
    assert np.isfinite(weights).all()
    assert weights.min() >= 0
    assert weights.any()


def test_every_kind_of_value_is_what_it_is_called() -> None:
    rng = np.random.default_rng(0)
    found = {name: kind(rng, 64).astype(np.float32) for name, kind in testing.VALUE_KINDS.items()}
    assert all(np.isfinite(values).all() and values.shape == (64,) for values in found.values())
    tiny = np.finfo(np.float32).tiny
    assert (np.abs(found["denormal"]) < tiny).all()
    assert found["denormal"].any()
    assert np.signbit(found["negative zeros"]).all()
    assert np.count_nonzero(found["spike"]) == 1
    assert len(set(found["constant"])) == 1
    assert 1e29 < np.abs(found["1e30"]).max() < 1e32
    assert 0 < np.abs(found["1e-30"]).max() < 1e-28


def decodes(tensor: ggufx.Tensor) -> bool:
    return tensor.codec is not None and tensor.codec.can_decode


@given(data=st.data(), dialect=st.sampled_from(["llama.cpp", "ik_llama.cpp", "nisparks"]))
def test_files_open_decode_and_are_rewritten(
    data: st.DataObject, dialect: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = data.draw(testing.gguf_files(dialect=dialect))
    folder = tmp_path_factory.mktemp("files")
    path, copy = folder / "a.gguf", folder / "b.gguf"
    path.write_bytes(content)
    with ggufx.open(path) as file:
        rewrite.rewrite(path, copy)
        with ggufx.open(copy) as again:
            assert list(again) == list(file)
            for key, value in file.metadata.typed().items():
                assert again.metadata.value(key).same(value)
            for tensor in file.tensors:
                # Nobody knows where an unknown last tensor ends: the padding that a copy adds counts as its own.
                packed = again[tensor.name].packed
                assert np.array_equal(packed.ravel()[: tensor.nbytes], tensor.packed.ravel())
                assert packed.shape == tensor.packed.shape or tensor.codec is None
                assert again[tensor.name].shape == tensor.shape
                with contextlib.nullcontext() if decodes(tensor) else pytest.raises((UnknownType, UnsupportedType)):
                    assert tensor.numpy().shape == tensor.shape


@given(content=testing.gguf_files(unknown=False))
def test_files_are_those_that_the_gguf_package_reads(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("files") / "a.gguf"
    path.write_bytes(content)
    with ggufx.open(path) as file:
        # It has no scalar-free files, no empty arrays and no empty tensors: compare the rest.
        empty = any(0 in t.shape for t in file.tensors) or any(
            v.data is not None and np.size(v.data) == 0 for v in file.metadata.typed().values() if v.element is not None
        )
        if empty or any(t.type_id not in set(gguf.GGMLQuantizationType) for t in file.tensors) or not file.tensors:
            return
        reader = gguf.GGUFReader(path)
        assert [t.name for t in reader.tensors] == list(file)
        assert [t.n_bytes for t in reader.tensors] == [t.nbytes for t in file.tensors]


def test_without_hypothesis_strategies_say_what_to_install_and_the_laws_work() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
import ggufx
from ggufx import testing, types
codec = types.get("Q8_0")
for strategy in (lambda: testing.rows(codec), lambda: testing.values(32), lambda: testing.importances(32), testing.gguf_files):
    try:
        strategy()
    except ggufx.GGUFError as error:
        assert "pip install 'ggufx[testing]'" in str(error)
    else:
        raise SystemExit("it found Hypothesis")
testing.check(codec)
sys.argv = ["ggufx", "selftest", "Q8_0"]
from ggufx import cli
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0 laws broken" in done.stdout


def test_selftest_exits_1_and_says_what_is_broken() -> None:
    code = """
import sys
from ggufx import cli, types
types.get("Q8_0").decode_rows = lambda rows, out: out.fill(1)
sys.argv = ["ggufx", "selftest", "Q8_0", *sys.argv[1:]]
cli.main()
"""
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *more], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1, done.stderr
        assert "decode_kernel" in done.stdout
        assert "kernel against specification" in done.stdout
