"""Nothing is called verified that is not: blocks that no encoder makes, keys that nobody writes, and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from ggufx import quantize as quantize_module
from ggufx import rounding, types
from ggufx.convert import convert
from ggufx.diff import diff
from ggufx.edit import plan_edit, set_keys
from ggufx.errors import GGUFError
from ggufx.values import Value
from ggufx.verify import verify

from .conftest import Run

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_gpt_oss  # noqa: E402
import make_tiny_v3  # noqa: E402
import make_tiny_v4  # noqa: E402

Cli = Callable[..., Run]

VECTORS = sorted((ROOT / "fixtures" / "vectors").glob("*.npz"))

# Blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_blocks_of_the_c_encoders_are_within_the_bounds(path: Path) -> None:
    """Rows of all kinds, spikes and values near zero among them, as the C libraries encode them."""
    arrays, codec = np.load(path), types.get(path.stem.upper())
    assert rounding.judges(codec)
    for case in ("packed", "packed_imatrix"):
        if case in arrays:
            assert rounding.far_blocks(codec, codec.decode(arrays[case], dtype=np.float32), arrays["x"]) == []


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_damaged_blocks_are_not(path: Path) -> None:
    codec = types.get(path.stem.upper())
    rng = np.random.default_rng(7)
    source = (rng.standard_normal((8, 1024)) * 0.02).astype(np.float32)
    importance = np.exp(rng.standard_normal(1024)).astype(np.float32)
    values = codec.decode(codec.encode(source, importance, effort="fast"), dtype=np.float32)
    block_len = codec.layout.block_len
    assert rounding.far_blocks(codec, values, source) == []
    for damage in (lambda block: block * 0, lambda block: block * 2, lambda block: -block):
        damaged = values.copy()
        damaged[5, block_len : 2 * block_len] = damage(damaged[5, block_len : 2 * block_len])
        (found,) = rounding.far_blocks(codec, damaged, source)
        assert (found.row, found.block) == (5, 1)
    swapped = values.copy()
    swapped[[2, 3]] = swapped[[3, 2]]
    assert {found.row for found in rounding.far_blocks(codec, swapped, source)} == {2, 3}
    broken = values.copy()
    broken[0, 0] = np.nan
    assert [(found.row, found.block) for found in rounding.far_blocks(codec, broken, source)] == [(0, 0)]


NAME = "blk.2.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of F32 experts and one matrix, as other programs write them."""
    path = tmp_path_factory.mktemp("floats") / "f32.gguf"
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "Source")
    writer.add_file_type(0)
    writer.add_tensor(NAME, (rng.standard_normal((4, 32, 512)) * 0.02).astype(np.float32))
    writer.add_tensor("blk.2.attn_q.weight", (rng.standard_normal((64, 512)) * 0.02).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def zero_codes(blocks: np.ndarray) -> None:
    """Of every tenth block of Q4_K: the codes lie behind 4 bytes of halves and 12 of scales."""
    blocks[::10, 16:] = 0


def double_a_scale(blocks: np.ndarray) -> None:
    """The half ``d``, and ``dmin``, of one block."""
    halves = blocks[70:71, :4].copy().view("<f2")
    blocks[70, :4] = (halves * 2).view(np.uint8)[0]


def swap_rows(blocks: np.ndarray) -> None:
    blocks[[66, 67, 68, 69]] = blocks[[68, 69, 66, 67]]


def swap_experts(blocks: np.ndarray) -> None:
    blocks[:128] = np.concatenate([blocks[64:128], blocks[:64]])


DAMAGE = {
    zero_codes: (26, "expert 0, row 0, block 0"),
    double_a_scale: (1, "expert 1, row 3, block 0"),
    swap_rows: (4, "expert 1, row 1, block 0"),
    swap_experts: (128, "expert 0, row 0, block 0"),
}
"""How many of the 256 blocks (4 experts, 32 rows, 2 a row) are wrong, and the first of them."""


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_a_lossy_file_is_rounded_and_a_damaged_one_is_not_verified(
    change: Callable[[np.ndarray], None], floats: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "q.gguf"
    quantize_module.quantize(floats, out, default="q4_k", pure=True)
    report = verify(out, floats)
    assert (report.ok, report.exact, report.metadata) == (True, False, [])
    assert report.counts() == {"rounded": 2}
    run = cli("verify", out, "--against", floats)
    assert run.code == 0
    assert "rounded within the bounds of its types (a copy): 2 rounded" in run.out
    run = cli("verify", out, "--against", floats, "--exact")
    assert run.code == 1
    assert "NOT EXACT" in run.out
    tensor = next(t for t in gguf.GGUFReader(out).tensors if t.name == NAME)
    raw = bytearray(out.read_bytes())
    blocks = np.frombuffer(raw, np.uint8, 256 * 144, int(tensor.data_offset)).reshape(256, 144)
    change(blocks)
    out.write_bytes(raw)
    report = verify(out, floats)
    assert not report.ok
    assert report.counts() == {"different": 1, "rounded": 1}
    (found,) = [t for t in report.tensors if t.status == "different"]
    count, first = DAMAGE[change]
    assert found.name == NAME
    assert found.detail.startswith(f"{count} block")
    assert f"the first at {first} (squared error " in found.detail
    run = cli("verify", out, "--against", floats)
    assert (run.code, run.err) == (1, "")
    assert "NOT VERIFIED" in run.out
    assert NAME in run.out


# Keys -----------------------------------------------------------------------------------------------------------

SMALL = {"hidden": 256, "experts": 4, "merges": 40}
TINY = {
    "v4": lambda path: make_tiny_v4.make_tiny_v4(
        path, layers=2, hash_layers=1, mtp_layers=0, experts_per_token=2, index_heads=2, **SMALL
    ),
    "v3": lambda path: make_tiny_v3.make_tiny_v3(path, layers=2, heads=2, **SMALL),
    "gpt-oss": lambda path: make_tiny_gpt_oss.make_tiny_gpt_oss(path, layers=2, **SMALL),
}
LAYERS = ["layers.*", "model.layers.*"]
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ANY_VALUE = {"ggufx.version"}
"""Any version may have written a file, so one digit for another is none of verify's business."""


def values_in(raw: bytes) -> Iterator[tuple[str, int, int, int]]:
    """Yield the key, and the type, place and size of the value, or of an array's first element, of every pair of a GGUF."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    at = 24
    for _ in range(number(16, 8)):
        length = number(at, 8)
        key = raw[at + 8 : at + 8 + length].decode()
        kind, at = number(at + 8 + length, 4), at + 12 + length
        count, element, place = 1, kind, at
        if kind == 9:
            element, count, place = number(at, 4), number(at + 4, 8), at + 12
        at = place
        for index in range(count):
            size = SIZES[element] if element != 8 else number(at, 8)
            start = at if element != 8 else at + 8
            if index == 0:
                first = (key, element, start, size)
            at = start + size
        if count:
            yield first


@pytest.mark.parametrize("family", TINY)
def test_a_flipped_bit_in_any_key_is_not_verified(family: str, tmp_path: Path) -> None:
    TINY[family](tmp_path / "model")
    # Tensors have tests of their own; without the layers', each of some fifty runs is quick.
    (path,) = convert(tmp_path / "model", tmp_path / "o.gguf", target="llama.cpp", skip=LAYERS)
    assert verify(path, tmp_path / "model", skip=LAYERS).ok
    raw = path.read_bytes()
    pairs = [pair for pair in values_in(raw) if pair[3]]
    assert len(pairs) > 30
    passed = []
    for key, _, place, size in pairs:
        with path.open("rb+") as file:
            file.seek(place + size - 1)
            file.write(bytes([raw[place + size - 1] ^ 1]))
        try:
            if verify(path, tmp_path / "model", skip=LAYERS).ok:
                passed.append(key)
        except GGUFError as error:
            assert str(path) in str(error)  # noqa: PT017
        with path.open("rb+") as file:
            file.seek(place + size - 1)
            file.write(raw[place + size - 1 : place + size])
    assert set(passed) <= ANY_VALUE
    assert path.read_bytes() == raw


def test_keys_that_may_differ_are_named(floats: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "e.gguf"
    out.write_bytes(floats.read_bytes())
    assert verify(out, floats).verdict == "verified"
    set_keys(plan_edit(out, {"general.name": Value.string("Mine"), "llama.context_length": Value.u32(7)}))
    wrong = ["general.name: 'Mine', expected 'Source'", "llama.context_length: not expected"]
    report = verify(out, floats)
    assert (report.ok, report.metadata, report.allowed) == (False, wrong, [])
    report = verify(out, floats, allow_keys=["general.*"])
    assert (report.ok, report.metadata, report.allowed) == (False, wrong[1:], wrong[:1])
    report = verify(out, floats, allow_keys=["general.*", "*.context_length"])
    assert (report.ok, report.exact, report.metadata, report.allowed) == (True, True, [], wrong)
    run = cli("verify", out, "--against", floats)
    assert (run.code, run.err) == (1, "")
    assert "key general.name: 'Mine', expected 'Source'" in run.out
    assert "NOT VERIFIED (a copy): 2 exact; 2 keys differ" in run.out
    run = cli("verify", out, "--against", floats, "--allow-key", "general.*", "--allow-key", "llama.context_length")
    assert run.code == 0
    assert "allowed to differ: key general.name: 'Mine', expected 'Source'" in run.out
    run = cli("verify", out, "--against", floats, "--ignore-metadata", "--exact")
    assert run.code == 0
    assert "verified (a copy): 2 exact" in run.out


def test_a_file_type_that_is_none_is_not_quantized(floats: Path, tmp_path: Path) -> None:
    """Another file type is what quantizing writes, but only one that there is."""
    out = tmp_path / "q.gguf"
    quantize_module.quantize(floats, out, default="q4_k", pure=True)
    assert verify(out, floats).metadata == []
    set_keys(plan_edit(out, {"general.file_type": Value.u32(12345)}))
    (line,) = verify(out, floats).metadata
    assert line.startswith("general.file_type: 12345, which names no file type")


# Exit codes and figures -----------------------------------------------------------------------------------------


def test_exit_codes(floats: Path, tmp_path: Path, cli: Cli) -> None:
    """0 the same, 1 different, 2 trouble, as of cmp and diff."""
    other, broken, missing = tmp_path / "o.gguf", tmp_path / "b.gguf", tmp_path / "none.gguf"
    quantize_module.quantize(floats, other, default="q8_0", pure=True)
    broken.write_bytes(floats.read_bytes()[:1000])
    assert cli("diff", floats, floats).code == 0
    assert cli("verify", floats, "--against", floats).code == 0
    assert cli("diff", floats, other).code == 1
    assert cli("verify", floats, "--against", other).code == 1
    for bad in (broken, missing, tmp_path):
        for run in (
            cli("diff", floats, bad), cli("diff", bad, floats), cli("verify", floats, "--against", bad),
            cli("verify", bad, "--against", floats),
        ):  # fmt: skip
            assert run.code == 2
            assert run.out == ""
            assert len(run.err.splitlines()) == 1
            assert run.err.startswith("error: ")


def test_relative_errors_are_relative_to_the_source(floats: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    quantize_module.quantize(floats, out, default="q4_k", pure=True)
    values = {
        path: {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in gguf.GGUFReader(path).tensors}
        for path in (floats, out)
    }  # fmt: skip
    source, stored = values[floats][NAME], values[out][NAME]
    wanted = np.sqrt(np.square(stored - source).sum() / np.square(source).sum())
    found = {
        "verify": next(t for t in verify(out, floats).tensors if t.name == NAME),
        "diff": next(t for t in diff(floats, out).tensors if t.name == NAME),
    }
    assert {which: t.relative_rms for which, t in found.items()} == pytest.approx({"verify": wanted, "diff": wanted})


def test_json_says_the_verdict(floats: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "q.gguf"
    quantize_module.quantize(floats, out, default="q8_0", pure=True)
    run = cli("verify", out, "--against", floats, "--json", "--exact")
    found = json.loads(run.out)
    assert run.code == 1
    assert (found["ok"], found["exact"], found["counts"]) == (True, False, {"rounded": 2})
    assert found["verdict"] == "rounded within the bounds of its types"
