"""``ggufx quantize`` with a mix of llama-quantize's, and with its order of arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import ggufx
from ggufx import quantize, recipe
from ggufx.errors import RecipeError

from .conftest import Run
from .oracle import Gguf

Cli = Callable[..., Run]
PathOf = Callable[[str], Path]

LAYERS = 8
GLOBALS = {"token_embd.weight": (32, 256), "output.weight": (32, 256), "output_norm.weight": (256,)}
FAMILY = {
    "attn_norm": (256,), "attn_q": (32, 256), "attn_k": (8, 256), "attn_v": (8, 256), "attn_output": (32, 256),
    "ffn_up": (32, 256), "ffn_down": (32, 256), "cls": (1, 256),
}  # fmt: skip

# llama-quantize's Q4_K_M of such a model; tests/test_mixes.py has the other mixes.
FINER = {0: "Q6_K", 3: "Q6_K", 6: "Q6_K", 7: "Q6_K"}
Q4_K_M = {
    "token_embd.weight": "Q4_K", "output.weight": "Q6_K", "output_norm.weight": "F32",
    **{f"blk.{n}.{rest}.weight": "Q4_K" for n in range(LAYERS) for rest in ("attn_q", "attn_k", "attn_output", "ffn_up")},
    **{f"blk.{n}.{rest}.weight": FINER.get(n, "Q4_K") for n in range(LAYERS) for rest in ("attn_v", "ffn_down")},
    **{f"blk.{n}.{rest}.weight": "F32" for n in range(LAYERS) for rest in ("attn_norm", "cls")},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with 8 layers and four heads of queries to one of values, F32."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_head_count(16)
    writer.add_head_count_kv(4)
    shapes = GLOBALS | {f"blk.{n}.{rest}.weight": shape for n in range(LAYERS) for rest, shape in FAMILY.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, np.float32) * 0.02)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kinds(path: Path) -> dict[str, str]:
    """Type names by tensor."""
    with ggufx.open(path) as file:
        return {tensor.name: tensor.type for tensor in file.tensors}


def decided(model: Path, default: str, **options: object) -> dict[str, str]:
    """Type names by tensor, before any work."""
    prepared = quantize.prepare(model, default=default, **options)  # type: ignore[arg-type]
    return {choice.source.name: choice.type for choice in prepared.choices}


def test_a_mix_is_written_as_llama_quantize_has_it(model: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out.gguf"
    run = cli("quantize", "--effort", "fast", model, out, "q4_k_m", "2")
    assert run.code == 0
    assert kinds(out) == Q4_K_M
    with ggufx.open(out) as file:
        assert file.metadata["general.file_type"] == 15
    again = tmp_path / "again.gguf"
    assert cli("quantize", model, "Q4_K_M", "--outfile", again, "--effort", "fast").code == 0
    assert again.read_bytes() == out.read_bytes()


def test_names_of_types_stay_types_unless_the_mix_is_asked_for(model: Path) -> None:
    plain = quantize.prepare(model, default="q2_k")
    assert {c.type for c in plain.choices if ".attn_v" in c.source.name} == {"Q2_K"}
    noted = [finding for finding in plain.findings if finding.code == "mix"]
    assert [finding.severity for finding in noted] == ["note"]
    assert "--mix takes llama-quantize's mix of that name" in noted[0].message
    assert len(noted[0].tensors) == 3 * LAYERS  # attn_v, attn_output, ffn_down
    mixed = quantize.prepare(model, default="q2_k", mix=True)
    assert {c.type for c in mixed.choices if ".attn_v" in c.source.name} == {"Q4_K"}
    assert {c.type for c in mixed.choices if ".ffn_down" in c.source.name} == {"Q3_K"}
    assert not [f for f in mixed.findings if f.code == "mix"]
    assert decided(model, "q4_k", mix=True) == Q4_K_M
    # Where the mix is the type, there is nothing to say.
    assert not quantize.prepare(model, default="q6_k").findings
    with pytest.raises(RecipeError, match="'iq4_k' is no mix"):
        quantize.prepare(model, default="iq4_k", mix=True)


def test_rules_and_options_win_over_the_mix(model: Path) -> None:
    rules = recipe.Recipe.parse("attn_v=q8_0\nblk\\.0\\.ffn_down=native")
    expected = Q4_K_M | {f"blk.{n}.attn_v.weight": "Q8_0" for n in range(LAYERS)} | {"blk.0.ffn_down.weight": "F32"}
    # The layers of a role are counted among those that are left to the mix, as upstream counts them.
    left = {n + 1: FINER.get(n, "Q4_K") for n in range(LAYERS - 1)}
    expected |= {f"blk.{n}.ffn_down.weight": kind for n, kind in left.items()}
    assert decided(model, "q4_k_m", recipe=rules) == expected
    ends = {"output.weight": "Q8_0", "token_embd.weight": "Q5_0"}
    assert decided(model, "q4_k_m", output_type="q8_0", embedding_type="q5_0") == Q4_K_M | ends
    flat = {name: "F32" if kind == "F32" else "Q4_K" for name, kind in Q4_K_M.items()}
    assert decided(model, "q4_k_m", pure=True) == flat
    assert decided(model, "q4_k_m", leave_output=True) == Q4_K_M | {"output.weight": "F32"}


def test_embeddings_that_are_the_head(tmp_path: Path) -> None:
    path = tmp_path / "tied.gguf"
    writer = gguf.GGUFWriter(path, "gemma3n")
    for name in ("token_embd.weight", "per_layer_token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.zeros((8, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert list(decided(path, "q4_k_m").values()) == ["Q6_K", "Q6_K", "Q4_K"]
    assert list(decided(path, "q4_k_m", output_type="q8_0", embedding_type="q5_0").values()) == ["Q5_0", "Q5_0", "Q4_K"]
    assert list(decided(path, "q4_k", embedding_type="q5_0").values()) == ["Q5_0", "Q5_0", "Q4_K"]
    assert list(decided(path, "q4_k_m", output_type="q8_0").values()) == ["Q8_0", "Q8_0", "Q4_K"]


def test_a_file_says_which_mix_it_is(model: Path, tmp_path: Path) -> None:
    for name, number in (("q4_k_s", 14), ("q5_k_m", 17), ("q3_k_l", 13), ("q2_k_s", 21), ("mxfp4_moe", 38)):
        prepared = quantize.prepare(model, default=name)
        assert not prepared.errors
        plan = prepared.plan(tmp_path / "m-{ftype}.gguf")
        assert plan.metadata["general.file_type"].data == number
        assert plan.files[0].path.name == f"m-{name}.gguf"


def test_a_mix_as_a_recipe(model: Path, tmp_path: Path, cli: Cli) -> None:
    run = cli("recipe", "show", "q4_k_m", "--for", model)
    assert run.code == 0
    path = tmp_path / "q4_k_m.recipe"
    path.write_text(run.out)
    assert r"^blk\.(1|2|4|5)\.attn_v\.weight$=q4_k" in run.out.splitlines()
    prepared = quantize.prepare(model, recipe=path)
    assert {choice.source.name: choice.type for choice in prepared.choices} == Q4_K_M
    assert not prepared.findings
    assert "--for MODEL" in cli("recipe", "show", "q4_k_m").err
    assert "is no mix" in cli("recipe", "show", "iq4_k", "--for", model).err
    assert "--imatrix goes with --for" in cli("recipe", "show", "q4_k_m", "--imatrix", "ones").err


def test_a_checkpoint_takes_the_types_of_its_conversion(
    checkpoint_path: PathOf, converted: Callable[..., Gguf]
) -> None:
    for target in ("llama.cpp", "nisparks"):
        file = converted("flash", target, "bf16").path
        for name in ("q4_k_m", "q2_k_s", "mxfp4_moe"):
            made = decided(checkpoint_path("flash"), name, target=target)
            assert made == decided(file, name, target=target)
            assert made["output.weight"] == ("Q8_0" if name == "mxfp4_moe" else "Q6_K")
            experts = {kind for t, kind in made.items() if "_exps" in t}
            # Rows of 128 take upstream's next type.
            expected = {"q4_k_m": {"Q4_K", "Q5_0", "Q8_0"}, "q2_k_s": {"Q2_K", "Q4_0", "Q5_0"}, "mxfp4_moe": {"MXFP4"}}
            assert experts <= expected[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["o.gguf", "q4_k_m", "2", "--threads", "3"], "the number of threads is given twice: 2 and --threads 3"),
        (["o.gguf", "q4_k_m", "--outfile", "p.gguf"], "the output is given twice: o.gguf and --outfile p.gguf"),
        (["q4_k_m", "o.gguf"], "q4_k_m o.gguf: expected [OUT.gguf] [TYPE] [NTHREADS]"),
        (["o.gguf", "p.gguf", "q4_0"], "expected [OUT.gguf] [TYPE] [NTHREADS]"),
        (["q4_0", "q5_k_m"], "q4_0 and q5_k_m are two types"), (["o.gguf", "q4_0", "0"], "NTHREADS 0"),
        (["o.gguf"], "nothing to do"), (["o", "zzz"], "Invalid quantization type 'zzz'"),
        (["iq4_ks", "--mix", "--dry-run"], "is no mix of llama-quantize's; these are: "),
    ],
)  # fmt: skip
def test_arguments_that_contradict_are_told(arguments: list[str], message: str, model: Path, cli: Cli) -> None:
    run = cli("quantize", model, *arguments)
    assert run.code == 1
    assert message in run.err
    assert "Traceback" not in run.err


def test_words_in_llama_quantizes_order(model: Path, tmp_path: Path, cli: Cli) -> None:
    def planned(*arguments: object) -> tuple[str, str]:
        plan = json.loads(cli("quantize", model, *arguments, "--dry-run", "--json").out)
        return Path(plan["file"]["path"]).name, plan["file"]["file_type"]

    assert planned(tmp_path / "a.gguf", "q8_0", 4) == ("a.gguf", "Q8_0")
    assert planned(tmp_path / "a.gguf", "--tensor-type", "ffn=q8_0") == ("a.gguf", "F32")
    assert planned("bare", "q8_0") == ("bare", "Q8_0")
    assert planned("q8_0", 4)[1] == "Q8_0"
