"""Mixes against llama.cpp's own decisions, recorded in fixtures/mixes.json (see fixtures/PROVENANCE.md)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from oracle import FIXTURES

from ggufx import dialects, mixes, types
from ggufx.errors import PlanError

RECORDED = json.loads((FIXTURES / "mixes.json").read_text())

# llama-quant.cpp's tensor_type_fallback, which the recorded types have been through.
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


def unpacked(families: dict[str, dict[str, str]]) -> dict[str, str]:
    """Name -> value of what is recorded by families and ranges of layers."""
    found = {}
    for family, values in families.items():
        for value, spans in values.items():
            for span in spans.split(","):
                first, _, last = span.partition("-")
                layers = range(int(first), int(last or first) + 1) if first else [""]
                found.update({family.replace("*", str(layer)): value for layer in layers})
    return found


def asked(model: dict[str, Any], mix: str, **options: Any) -> dict[str, str]:
    """The mix's types for a recorded model, after the fallback for rows that do not fit."""
    shapes = {name: tuple(map(int, text.split("x"))) for name, text in unpacked(model["tensors"]).items()}
    found = mixes.find(mix)
    assert found is not None, mix
    # What the recipes' rules protect besides norms is not in these models but for routers.
    routers = {name for name in shapes if "ffn_gate_inp" in name or "_norm" in name}
    facts = mixes.Model.from_keys(model["metadata"], shapes)
    taken = mixes.assign(found, facts, shapes, decided=routers, **options)
    misfit = {name for name, kind in taken.items() if shapes[name][-1] % types.get(kind).layout.block_len}
    return {name: FALLBACK.get(kind, kind) if name in misfit else kind for name, kind in taken.items()}


@pytest.mark.parametrize("label", RECORDED["models"])
def test_every_mix_is_llama_cpps(label: str) -> None:
    model = RECORDED["models"][label]
    for mix in RECORDED["file_types"]:
        expected = unpacked(model["types"][mix])
        assert asked(model, mix) == expected, mix
        expected |= unpacked(model["types"].get(f"{mix} with imatrix", {}))
        assert asked(model, mix, has_imatrix=True) == expected, f"{mix} with an importance matrix"


def test_every_mix_has_upstreams_number() -> None:
    assert set(mixes.MIXES) == set(RECORDED["file_types"])
    for name, number in RECORDED["file_types"].items():
        assert dialects.get("llama.cpp").file_type_number(name) == number


def test_names_are_found_in_any_case() -> None:
    assert mixes.find("q4_k_m") is mixes.find("Q4_K") is mixes.MIXES["Q4_K_M"]
    assert mixes.find("q2_k") is mixes.MIXES["Q2_K"]
    assert mixes.find("iq4_k") is mixes.find("F16") is mixes.find("") is None


def test_a_mix_names_types_only() -> None:
    for mix in mixes.MIXES.values():
        rows = (*mix.value, *mix.key, *mix.query, *mix.attention, *mix.down, *mix.up)
        for name in {mix.type, mix.head, mix.embedding or mix.type, mix.flat or mix.type, *(row[0] for row in rows)}:
            assert types.get(str(name)).name == name


def test_facts_of_a_model() -> None:
    keys = {"general.architecture": "deci", "deci.block_count": 80, "deci.attention.head_count": np.array([64, 8])}
    model = mixes.Model.from_keys(keys | {"deci.attention.head_count_kv": [16, 8]})
    assert (model.n_layers, model.n_sharing, model.n_experts, model.is_70b) == (80, 4, 0, True)
    # Without attention, and without any key.
    assert mixes.Model.from_keys({"general.architecture": "mamba", "mamba.attention.head_count": 0}).n_sharing == 0
    assert mixes.Model.from_keys({}, ["blk.6.attn_q.weight", "output.weight"]) == mixes.Model(n_layers=7)
    # A layer count for no layer says nothing; a value of another type is an error, which a wrong mix would hide.
    empty = {"general.architecture": "llama", "llama.attention.head_count": np.array([], "u4")}
    assert mixes.Model.from_keys(empty) == mixes.Model("llama")
    for key, odd in (("llama.block_count", "many"), ("llama.expert_count", 1.5), ("general.architecture", [1, 2])):
        with pytest.raises(PlanError, match=f"^F: key {key} is .*, expected a"):
            mixes.Model.from_keys(empty | {key: odd}, where="F")
    # Blocks that predict further tokens are none of the 80; in 8 experts upstream sees another model.
    llama = {"general.architecture": "llama", "llama.block_count": 81, "llama.attention.head_count": 64}
    more = {"llama.attention.head_count_kv": 8, "llama.nextn_predict_layers": 1}
    assert mixes.Model.from_keys(llama | more).is_70b
    assert not mixes.Model.from_keys(llama | more | {"llama.expert_count": 8}).is_70b
    assert not mixes.Model.from_keys(llama | {"llama.nextn_predict_layers": 1}).is_70b


def test_two_architectures_with_rules_of_their_own() -> None:
    q4 = mixes.MIXES["Q4_K_M"]
    shapes = {
        "blk.0.attn_q_b.weight": (64, 256),
        "blk.0.indexer.attn_q_b.weight": (64, 256),
        "blk.0.ssm_f_a.weight": (64, 256),
    }
    assert mixes.assign(q4, mixes.Model("glm5-next", 1), shapes) == {"blk.0.attn_q_b.weight": "Q8_0"}
    assert set(mixes.assign(q4, mixes.Model("glm4", 1), shapes).values()) == {"Q4_K"}
    stacks = {"blk.0.attn_k_b.weight": (4, 64, 256), "blk.0.ffn_up_exps.weight": (4, 64, 256)}
    moe = mixes.MIXES["MXFP4_MOE"]
    assert mixes.assign(moe, mixes.Model("bailingmoe3", 1), stacks) == dict(zip(stacks, ("Q8_0", "MXFP4"), strict=True))
    assert set(mixes.assign(moe, mixes.Model("deepseek2", 1), stacks).values()) == {"MXFP4"}
