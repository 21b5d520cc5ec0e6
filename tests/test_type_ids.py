"""Tables of ids and file types against each program's own headers, and the types that have a name and no codec."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import ggufx
from ggufx import dialects, quantize, types
from ggufx.budget import Budget
from ggufx.container import align_up, encode_header
from ggufx.dialects import DIALECTS
from ggufx.errors import RecipeError, UnknownDialect, UnknownType
from ggufx.named_types import FOREIGN, NamedType

FIXTURES = Path(__file__).parent.parent / "fixtures"
ALIASES = {"Q1_0_G128": "Q1_0"}


def table(name: str) -> list[dict[str, str]]:
    with (FIXTURES / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def gguf(path: Path, *tensors: tuple[int, tuple[int, ...], int], suffix: str = "") -> Path:
    """A file of ``(type id, shape, bytes)``, named t0, t1 ... and the suffix, all bytes 1."""
    directory, data = [], b""
    for number, (type_id, shape, nbytes) in enumerate(tensors):
        directory.append((f"t{number}{suffix}", shape, type_id, len(data)))
        data += b"\1" * nbytes + bytes(align_up(nbytes, 32) - nbytes)
    path.write_bytes(encode_header({}, directory, 32) + data)
    return path


# The programs' own tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DIALECTS))
def test_a_dialect_has_the_ids_of_its_program_and_no_other(name: str) -> None:
    rows = {int(row["id"]): row for row in table("type_ids.tsv") if row["program"] == name}
    assert len(rows) > 30
    for type_id in range(1024):
        meaning = DIALECTS[name].meaning(type_id)
        if type_id not in rows:
            assert meaning is None, type_id
            continue
        row = rows[type_id]
        assert meaning is not None, row
        assert meaning.name == ALIASES.get(row["name"], row["name"])
        if meaning.name == "I2_S":
            continue
        layout = meaning.layout
        sizes = (layout.block_len, layout.block.itemsize, layout.header_nbytes)
        assert sizes == (int(row["block_len"]), int(row["block_nbytes"]), int(row["row_header_nbytes"])), row["name"]


@pytest.mark.parametrize("name", list(DIALECTS))
def test_a_dialect_has_the_file_types_of_its_program(name: str) -> None:
    wanted = {int(row["number"]): row["name"] for row in table("file_types.tsv") if row["program"] == name}
    dialect = DIALECTS[name]
    assert {n: s for n in range(1025) if (s := dialect.file_type_name(n)) is not None} == wanted
    assert all(dialect.file_type_number(spelling) == number for number, spelling in wanted.items())


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "NVFP4", "Q2_0"])
def test_ik_llama_cpp_cannot_hold_what_it_lacks(name: str) -> None:
    assert DIALECTS["ik_llama.cpp"].type_id(types.get(name)) is None
    assert DIALECTS["llama.cpp"].type_id(types.get(name)) is not None


def test_the_bytes_of_i2_s_are_a_quarter_and_a_scale(tmp_path: Path) -> None:
    # ggml_nbytes of ik_llama.cpp: (number of elements) / 4 + 32.
    with ggufx.open(gguf(tmp_path / "f.gguf", (36, (6, 128), 6 * 32 + 32), (0, (8,), 32))) as f:
        assert (f["t0"].type, f["t0"].nbytes, f.dialect) == ("I2_S", 224, "ik_llama.cpp")


# Types without a codec ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_id", "label", "nbytes"),
    [
        (337, "IQ2_K_R4 (id 337)", 8 * 76),
        (344, "IQ4_KS_R4 (id 344)", 8 * (4 + 136)),
        (202, "Q4_0_R8 (id 202)", 8 * 8 * 18),
        (31, "Q4_0_4_4 (id 31)", 8 * 8 * 18),
    ],
)
def test_types_of_ik_llama_cpp_make_a_file_its_own(tmp_path: Path, type_id: int, label: str, nbytes: int) -> None:
    with ggufx.open(gguf(tmp_path / "f.gguf", (type_id, (8, 256), nbytes), (0, (8,), 32))) as f:
        assert (f.dialect, f.equivalent, f.notes) == ("ik_llama.cpp", ("ik_llama.cpp",), ())
        tensor = f["t0"]
        assert (tensor.type_label, tensor.nbytes, tensor.codec) == (label, nbytes, None)
        assert tensor.packed.tobytes() == b"\1" * nbytes
        with pytest.raises(UnknownType, match=r"'t0' is of type .* of ik_llama\.cpp \(its rows are interleaved"):
            tensor.numpy()


@pytest.mark.parametrize(
    ("type_id", "name", "nbytes"),
    [(42, "Q2_0_G128", 8 * 8 * 34), (40, "Q1_0_G32", 8 * 32 * 6), (66, "IQ1_XXXS", 8 * 4 * 38)],
)
def test_another_forks_layout_of_an_id_hides_its_tensors_only(
    tmp_path: Path, type_id: int, name: str, nbytes: int
) -> None:
    path = gguf(tmp_path / "f.gguf", (0, (8,), 32), (type_id, (8, 1024), nbytes), (0, (8,), 32))
    with ggufx.open(path) as f:
        assert [t.type for t in f.tensors] == ["F32", name, "F32"]
        assert f["t0"].numpy().shape == f["t2"].numpy().shape == (8,)
        assert all(name in note and f"{nbytes} bytes" in note for note in f.notes)
        assert len(f.notes) == (type_id != 66)


def test_one_tensor_of_a_larger_layout_decides_for_all_of_its_id(tmp_path: Path) -> None:
    # 128 weights are 34 bytes in one block and 36 in two: both round up to 64.
    with ggufx.open(gguf(tmp_path / "f.gguf", (42, (128,), 34), (42, (8, 1024), 2176), (0, (8,), 32))) as f:
        assert [t.type for t in f.tensors] == ["Q2_0_G128", "Q2_0_G128", "F32"]


def test_ids_that_mean_the_same_everywhere_must_fit(tmp_path: Path) -> None:
    with pytest.raises(UnknownDialect, match="272 bytes as Q8_0"):
        ggufx.open(gguf(tmp_path / "f.gguf", (8, (8, 32), 320), (0, (8,), 32)))


def test_a_file_that_ends_within_a_tensor_of_a_contested_id_is_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path / "f.gguf", (0, (8,), 32), (39, (64, 512), 64 * 16 * 17))
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(UnknownDialect, match="the file ends there"):
        ggufx.open(path)


def test_no_name_without_a_codec_is_a_types(tmp_path: Path) -> None:
    known = {codec.name for codec in types.all_codecs()}
    named = [t for d in DIALECTS.values() for i in range(1024) if isinstance(t := d.meaning(i), NamedType)]
    assert not known & {t.name for t in [*named, *FOREIGN]}
    assert all(dialects.DS4.meaning(t.type_id) is None for t in named)


def test_quantizing_writes_them_only_for_programs_that_read_them(tmp_path: Path) -> None:
    values = np.ones((8, 256), np.float32)
    repacked = tmp_path / "r4.gguf"
    unknown = tmp_path / "u.gguf"
    for path, type_id in ((repacked, 337), (unknown, 999)):
        gguf(path, (0, (8, 256), values.nbytes), (type_id, (8, 256), 8 * 76), suffix=".weight")
        with pytest.raises(RecipeError, match=r"tensor 't1\.weight' has type .*llama\.cpp would not load the file"):
            quantize.plan_quantize(path, tmp_path / "o.gguf", default="q8_0", target="llama.cpp")
        plan = quantize.plan_quantize(path, tmp_path / "o.gguf", default="q8_0")
        assert plan.tensors[1].type_id == type_id
        assert any(note.startswith("t1.weight ") and "it stays" in note for note in plan.notes)
    plan = quantize.plan_quantize(repacked, tmp_path / "o.gguf", default="q8_0", target="ik_llama.cpp")
    assert plan.tensors[1].type == "IQ2_K_R4"


def test_fitting_a_budget_never_chooses_what_the_target_lacks(tmp_path: Path) -> None:
    ternary = np.tile(np.array([-0.02, 0, 0.02, 0.02], np.float32), (64, 256))
    path = gguf(tmp_path / "t.gguf", *[(0, ternary.shape, ternary.nbytes)] * 2, suffix=".weight")
    for target, held in (("llama.cpp", True), ("ik_llama.cpp", False)):
        candidates = Budget(path, target=target, imatrix="ones").candidates
        assert ("TQ1_0" in candidates) is held
        assert ("TQ2_0" in candidates) is held
