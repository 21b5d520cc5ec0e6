"""DeepSeek-V3-0324 at full scale: its tensor list, and the plan of a sparse checkpoint of its shapes."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import pytest

from ggufx.convert import plan_convert

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


def test_plan_for_ik_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1147 tensors and 672.05e9 weights, as the published files have them; no byte of a tensor is read for it."""
    from make_fullshape_v3 import make_fullshape_v3

    from ggufx.checkpoint import Checkpoint

    make_fullshape_v3(tmp_path / "DeepSeek-V3-0324")
    monkeypatch.setattr(Checkpoint, "read", _forbidden)
    plan = plan_convert(tmp_path / "DeepSeek-V3-0324", tmp_path / "out.gguf", target="ik_llama.cpp")
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


def params_stored() -> dict[str, object]:
    """Names of the full checkpoint."""
    return dict(stored(params_from_table(CONFIG)))


def _forbidden(*_: object) -> None:
    raise AssertionError("a plan for this target reads no tensor")
