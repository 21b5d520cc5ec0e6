"""DeepSeek-V3-0324 at full scale: its tensor list, and the plans of a sparse checkpoint of its shapes."""

from __future__ import annotations

import json
import re
import resource
from collections import Counter
from math import prod
from pathlib import Path

import pytest

from ggufx import quantize
from ggufx.convert import plan_convert

from .conftest import run_process
from .oracle import ROOT

assert ROOT  # puts tools/ on the path

from make_tiny_v3 import OFFICIAL_CONFIG, params_from_table, split, stored  # noqa: E402

CONFIG = json.loads(OFFICIAL_CONFIG.read_text())


def test_the_rules_give_the_published_counts() -> None:
    """Tensors of the official index, and the weights by dtype that the model hub shows for it."""
    specs = stored(params_from_table(CONFIG))
    assert len(specs) == 91991
    counts: Counter[str] = Counter()
    for spec in specs.values():
        counts[spec.dtype] += prod(spec.shape)
    assert counts == {"F8_E4M3": 680571043840, "BF16": 3918786560, "F32": 41555600}
    assert counts.total() == 684531386000


@pytest.mark.parametrize("count", [1, 7, 163])
def test_shards_hold_everything_once(count: int) -> None:
    specs = stored(params_from_table(CONFIG))
    shards = split(specs, count)
    assert [name for shard in shards for name in shard] == list(specs)
    lengths = [sum(spec.nbytes for spec in shard.values()) for shard in shards]
    assert max(lengths) - min(lengths) < 4e9


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sparse checkpoint."""
    from make_fullshape_v3 import make_fullshape_v3

    path = tmp_path_factory.mktemp("full") / "DeepSeek-V3-0324"
    make_fullshape_v3(path)
    return path


def test_plan_for_ik_llama_cpp(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1147 tensors and 672.05e9 weights, as the published files have them; no byte of a tensor is read for it."""
    from ggufx.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "read", _forbidden)
    plan = plan_convert(full, tmp_path / "out.gguf", target="ik_llama.cpp")
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    assert len(shapes) == 1147
    assert sum(map(prod, shapes.values())) == 672049829376
    assert Counter(tensor.type for tensor in plan.tensors) == {"BF16": 786, "F32": 361}
    assert shapes["blk.60.attn_kv_b.weight"] == (32768, 512)
    assert shapes["blk.60.attn_k_b.weight"] == (65536, 128)
    assert shapes["blk.60.attn_v_b.weight"] == (16384, 512)
    assert shapes["blk.3.ffn_down_exps.weight"] == (256, 7168, 2048)
    assert shapes["blk.2.ffn_down.weight"] == (7168, 18432)
    assert {name for name, _ in plan.skipped} == {n for n in params_stored() if n.startswith("model.layers.61.")}


# The published recipe --------------------------------------------------------------------------------------------

RECIPE = "deepseek-v3-iq2_xxs"

# Every tensor of the file: (whole name, layers, type). The dense layers are 0 to 2; -1 stands for a tensor of no layer.
PUBLISHED = [
    ("token_embd.weight", [-1], "IQ4_K"),
    ("output.weight", [-1], "IQ5_K"),
    ("output_norm.weight", [-1], "F32"),
    *((f"attn_{name}.weight", range(61), "F32") for name in ("norm", "q_a_norm", "kv_a_norm")),
    ("ffn_norm.weight", range(61), "F32"),
    *((f"attn_{name}.weight", range(61), "IQ4_KS") for name in ("q_a", "q_b", "kv_a_mqa", "kv_b", "v_b", "output")),
    ("attn_k_b.weight", range(61), "Q4_0"),
    ("ffn_down.weight", range(3), "IQ4_KS"),
    ("ffn_gate.weight", range(3), "IQ3_KS"),
    ("ffn_up.weight", range(3), "IQ3_KS"),
    ("ffn_gate_inp.weight", range(3, 61), "F32"),
    ("exp_probs_b.bias", range(3, 61), "F32"),
    ("ffn_down_shexp.weight", range(3, 61), "IQ4_KS"),
    ("ffn_gate_shexp.weight", range(3, 61), "IQ3_KS"),
    ("ffn_up_shexp.weight", range(3, 61), "IQ3_KS"),
    ("ffn_down_exps.weight", range(3, 61), "IQ2_KS"),
    ("ffn_gate_exps.weight", range(3, 61), "IQ2_XXS"),
    ("ffn_up_exps.weight", range(3, 61), "IQ2_XXS"),
]

# Elements and bytes of a block, bytes at the head of a row: ggml's numbers.
BLOCKS = {
    "F32": (1, 4, 0), "Q4_0": (32, 18, 0), "IQ2_XXS": (256, 66, 0), "IQ2_KS": (256, 70, 2), "IQ3_KS": (256, 102, 2),
    "IQ4_KS": (256, 136, 4), "IQ4_K": (256, 144, 0), "IQ5_K": (256, 176, 0),
}  # fmt: skip


def test_the_published_recipe(full: Path, tmp_path: Path) -> None:
    """Types of all tensors, and 169.590 GiB at 2.168 bits per weight.

    The file itself is not here; its loader's log is known of the same publisher's other files of this model: 361 F32
    tensors, 61 of k_b's own type, 672.050 B parameters. That is the number with kv_b beside k_b and v_b (671.03 B without),
    and without kv_b the total would be 0.3 % less than published.
    """
    prepared = quantize.prepare(full, recipe=RECIPE, target="ik_llama.cpp", imatrix="ones")
    assert prepared.findings == [], "the linter's"
    plan = prepared.plan(tmp_path / "o.gguf")
    wanted = {
        name if layer < 0 else f"blk.{layer}.{name}": kind for name, layers, kind in PUBLISHED for layer in layers
    }
    assert {tensor.name: tensor.type for tensor in plan.tensors} == wanted
    assert Counter(wanted.values())["F32"] == 361
    assert Counter(wanted.values())["Q4_0"] == 61
    nbytes = 0
    for tensor in plan.tensors:
        block_len, block_nbytes, head_nbytes = BLOCKS[tensor.type]
        row = head_nbytes + tensor.shape[-1] // block_len * block_nbytes
        assert tensor.nbytes == row * prod(tensor.shape[:-1])
        nbytes += tensor.nbytes
    n_weights = sum(prod(tensor.shape) for tensor in plan.tensors)
    assert f"{n_weights / 1e9:.3f}" == "672.050"
    assert f"{nbytes / 2**30:.3f}" == "169.590"  # to the last digit, and within 0.1 % of the file with its header:
    assert abs(plan.nbytes / 2**30 / 169.590 - 1) < 0.001
    assert f"{nbytes * 8 / n_weights:.3f}" == "2.168"


def test_the_linter_finds_nothing_for_upstream_either(full: Path) -> None:
    prepared = quantize.prepare(full, recipe=RECIPE, target="llama.cpp", imatrix="ones")
    assert prepared.findings == []
    kept = [choice.source.name for choice in prepared.choices if choice.kept]
    assert all(re.search(r"_norm|ffn_gate_inp|exp_probs_b", name) for name in kept)


def test_dry_run_takes_seconds(full: Path, tmp_path: Path) -> None:
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_process(
        "quantize", full, "--recipe", RECIPE, "--imatrix", "ones", "--dry-run", "--outfile", tmp_path / "o.gguf"
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.code == 0, run.err
    assert "1147 tensors, 672049829376 weights, 182095645952 bytes of data, 2.1676 bits per weight" in run.out
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 10
    assert list(tmp_path.iterdir()) == []


def params_stored() -> dict[str, object]:
    """Names of the full checkpoint."""
    return dict(stored(params_from_table(CONFIG)))


def _forbidden(*_: object) -> None:
    raise AssertionError("a plan for this target reads no tensor")
