"""Values of config.json: every spelling of the rotary embedding, and values that a file has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracle import FIXTURES

from ggufx.architectures import Architecture, DeepSeekV3, DeepSeekV4, GptOss
from ggufx.checkpoint import Checkpoint, SourceTensor
from ggufx.errors import CheckpointError

V4: dict[str, Any] = json.loads((FIXTURES / "dsv4" / "config.json").read_text())
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "vocab_size": 129280,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "rope_theta": 10000, "hidden_act": "silu",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32, "vocab_size": 201088,
    "num_experts_per_tok": 4, "experts_per_token": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "sliding_window": 128, "rope_theta": 150000, "swiglu_limit": 7.0, "attention_bias": True, "hidden_act": "silu",
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False,
    },
}  # fmt: skip
FAMILIES = {"deepseek_v4": (DeepSeekV4, V4), "deepseek_v3": (DeepSeekV3, V3), "gpt_oss": (GptOss, OSS)}

YARN4 = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
# What transformers 5.23 saves for DeepSeek-V4-Flash.
MAIN = {"partial_rotary_factor": 0.125, "rope_theta": 10000, "rope_type": "default"}
COMPRESS = YARN4 | {
    "attention_factor": 1.0, "partial_rotary_factor": 0.125, "rope_theta": 160000, "rope_type": "yarn",
}  # fmt: skip
GONE = object()


def architecture(family: str, changes: dict[str, Any]) -> Architecture:
    """The family over its config with some values changed or taken out; as many tensors as any count there."""
    kind, config = FAMILIES[family]
    merged = {key: value for key, value in (config | changes).items() if value is not GONE}
    tensors = [SourceTensor(str(number), "BF16", (1,), 0, 0, 2) for number in range(300)]
    return kind(Checkpoint.imagined(Path("D"), merged, (), tensors))


def rope_keys(family: str, target: str = "llama.cpp", **changes: Any) -> dict[str, Any]:
    """The ``rope.*`` keys without their prefixes."""
    found = architecture(family, changes).keys(target, mtp=False, file_type=0, chat_template="t")
    return {key.partition(".rope.")[2]: value.data for key, value in found.items() if ".rope." in key}


SCALED4 = {
    "scaling.type": "yarn", "scaling.factor": 16.0, "scaling.original_context_length": 65536,
    "scaling.yarn_beta_fast": 32.0, "scaling.yarn_beta_slow": 1.0, "freq_base": 10000.0, "dimension_count": 64,
}  # fmt: skip
NESTED = {"rope_scaling": GONE, "rope_theta": GONE, "compress_rope_theta": GONE}


@pytest.mark.parametrize("target", ["llama.cpp", "nisparks"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": YARN4 | {"rope_type": "yarn"}},
        {"rope_parameters": None},
        {"rope_parameters": {}},
        {"rope_scaling": GONE, "rope_parameters": YARN4},
        {"rope_scaling": {}, "rope_parameters": YARN4 | {"rope_theta": 10000}, "rope_theta": GONE},
        {"rope_parameters": {"rope_theta": 10000}},
        NESTED | {"rope_parameters": {"main": MAIN, "compress": COMPRESS}},
        NESTED | {"rope_parameters": {"compress": COMPRESS, "main": MAIN}},
        {"rope_parameters": {"main": MAIN, "compress": COMPRESS}},
        {"rope_scaling": {"main": MAIN, "compress": COMPRESS}},
        {"rope_parameters": {"main": MAIN, "compress": COMPRESS, "rope_type": "default", "rope_theta": 10000}},
        NESTED | {"rope_parameters": {
            "sliding_attention": MAIN, "compressed_sparse_attention": COMPRESS, "heavily_compressed_attention": COMPRESS,
        }},
    ],
)  # fmt: skip
def test_v4_has_yarn_in_every_spelling(changes: dict[str, Any], target: str) -> None:
    expected = SCALED4 | ({"freq_base_swa": 160000.0} if target == "nisparks" else {})
    assert rope_keys("deepseek_v4", target, **changes) == expected
    keys = architecture("deepseek_v4", changes).keys("llama.cpp", mtp=False, file_type=0, chat_template="t")
    assert keys["deepseek4.attention.compress_rope_freq_base"].data == 160000.0


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {}, "rope_parameters": {}},
        {"rope_scaling": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        NESTED | {"rope_parameters": {"main": MAIN, "compress": MAIN | {"rope_theta": 160000}}},
    ],
)
def test_v4_without_scaling(changes: dict[str, Any]) -> None:
    bare = {"freq_base": 10000.0, "dimension_count": 64}
    assert rope_keys("deepseek_v4", **changes) == bare
    # Readers of nisparks files without the key would suppose YaRN.
    expected = bare | {"scaling.type": "none", "freq_base_swa": 160000.0}
    assert rope_keys("deepseek_v4", "nisparks", **changes) == expected


SCALED3 = {
    "scaling.type": "yarn", "scaling.factor": 40.0, "scaling.original_context_length": 4096,
    "scaling.yarn_beta_fast": 32.0, "scaling.yarn_beta_slow": 1.0, "scaling.yarn_log_multiplier": 0.10000000149011612,
    "freq_base": 10000.0, "dimension_count": 64,
}  # fmt: skip
FLAT3 = V3["rope_scaling"] | {"rope_type": "yarn"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {}},
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_parameters": FLAT3 | {"rope_theta": 10000.0}},
        {"rope_parameters": FLAT3 | {"rope_theta": 10000}},
        {"rope_parameters": {"full_attention": FLAT3}},
        {"rope_scaling": None, "rope_parameters": {"full_attention": FLAT3, "sliding_attention": FLAT3}},
    ],
)
def test_v3_has_yarn_in_every_spelling(changes: dict[str, Any]) -> None:
    assert rope_keys("deepseek_v3", **changes) == SCALED3


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {}, "rope_parameters": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_parameters": {"rope_theta": 10000}},
    ],
)
def test_v3_without_scaling(changes: dict[str, Any]) -> None:
    assert rope_keys("deepseek_v3", **changes) == {"freq_base": 10000.0, "dimension_count": 64}


SCALED_OSS = {
    "scaling.type": "yarn", "scaling.factor": 32.0, "scaling.original_context_length": 4096,
    "scaling.yarn_beta_fast": 32.0, "scaling.yarn_beta_slow": 1.0, "freq_base": 150000.0,
}  # fmt: skip
FLAT_OSS = OSS["rope_scaling"] | {"rope_theta": 150000}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_parameters": FLAT_OSS},
        {"rope_scaling": GONE, "rope_parameters": {"full_attention": FLAT_OSS, "sliding_attention": FLAT_OSS}},
        # transformers' class has this scaling of its own where the file names none.
        {"rope_scaling": GONE},
        {"rope_scaling": None, "rope_parameters": None},
    ],
)
def test_gpt_oss_has_yarn_in_every_spelling(changes: dict[str, Any]) -> None:
    assert rope_keys("gpt_oss", **changes) == SCALED_OSS


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_theta": 150000}])
def test_gpt_oss_without_scaling(scaling: dict[str, Any]) -> None:
    assert rope_keys("gpt_oss", rope_scaling=scaling) == {"freq_base": 150000.0}
    assert rope_keys("gpt_oss", rope_scaling=GONE, rope_parameters=scaling) == {"freq_base": 150000.0}


@pytest.mark.parametrize(
    ("family", "changes", "needed"),
    [
        ("deepseek_v4", {"rope_parameters": {"main": MAIN, "squeezed": COMPRESS}}, "'squeezed' beside each other"),
        ("deepseek_v4", {"rope_parameters": {"full_attention": COMPRESS}}, "called main, sliding_attention"),
        ("deepseek_v4", {"rope_parameters": YARN4 | {"main": MAIN}}, "a layout that is not known"),
        ("deepseek_v4", {"rope_parameters": {"main": MAIN, "compress": COMPRESS, "type": "yarn"}}, "not known"),
        ("deepseek_v4", {"rope_parameters": {"main": None, "compress": COMPRESS}}, "rope_parameters.main is None"),
        ("deepseek_v4", {"rope_parameters": {"main": COMPRESS, "compress": COMPRESS}}, "contradict"),
        (
            "deepseek_v4",
            {"rope_scaling": GONE, "rope_parameters": {"main": YARN4, "compress": COMPRESS}},
            "compressed layers only",
        ),
        (
            "deepseek_v4",
            {"rope_parameters": YARN4 | {"factor": 8}},
            "rope_parameters's factor (8.0) and rope_scaling's (16.0) contradict each other",
        ),
        ("deepseek_v4", {"rope_parameters": {"rope_type": "default"}}, "contradict each other"),
        ("deepseek_v4", {"rope_parameters": {"rope_theta": 20000}}, "rope_parameters.rope_theta (20000.0) and rope_theta"),
        ("deepseek_v4", {"rope_scaling": YARN4 | {"attention_factor": 1.5}}, "attention_factor is 1.5, expected 1.0"),
        ("deepseek_v4", {"rope_scaling": YARN4 | {"partial_rotary_factor": 0.25}}, "qk_rope_head_dim says 64"),
        ("deepseek_v3", {"rope_parameters": {"full_attention": FLAT3, "odd": FLAT3}}, "'odd' beside each other"),
        (
            "deepseek_v3",
            {"rope_scaling": {"full_attention": FLAT3, "sliding_attention": FLAT3 | {"factor": 2}}},
            "rope_scaling.full_attention's factor (40.0) and rope_scaling.sliding_attention's (2.0) contradict",
        ),
        ("deepseek_v3", {"rope_scaling": FLAT3 | {"rope_type": "llama3"}}, "contradict"),
        ("deepseek_v3", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3'; expected yarn"),
        ("deepseek_v3", {"rope_scaling": {"factor": 8}}, "rope_scaling.rope_type is missing, expected yarn"),
        ("deepseek_v3", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type is ['yarn'], expected a text"),
        ("deepseek_v3", {"rope_scaling": FLAT3 | {"long_factor": [1, 2]}}, "long_factor, a list"),
        ("deepseek_v3", {"rope_scaling": FLAT3 | {"beta_fast": "32"}}, "rope_scaling.beta_fast is '32', expected a number"),
        ("deepseek_v3", {"rope_scaling": FLAT3 | {"mscale": 0.7}}, "mscale is 0.7 and mscale_all_dim 1.0"),
        ("deepseek_v3", {"rope_scaling": FLAT3 | {"partial_rotary_factor": 0.5}}, "rotated in part"),
        ("deepseek_v3", {"rope_scaling": [FLAT3]}, "rope_scaling is [{"),
        ("deepseek_v3", {"rope_scaling": GONE, "rope_theta": GONE}, "rope_theta is missing"),
        ("gpt_oss", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ("gpt_oss", {"rope_scaling": FLAT_OSS | {"truncate": 0}}, "rope_scaling.truncate is 0, expected true or false"),
    ],
)  # fmt: skip
def test_a_rotary_embedding_that_no_file_has(family: str, changes: dict[str, Any], needed: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        rope_keys(family, **changes)
    assert needed in str(caught.value)
    assert str(caught.value).startswith(f"{Path('D', 'config.json')}: ")


# Values without a key ---------------------------------------------------------------------------------------------


def checked(family: str, target: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Tensors are none here, so that their check ends late, after that of the config."""
    model = architecture(family, changes)
    try:
        model.outputs(target, mtp=False, skip=lambda _: False)
    except CheckpointError as error:
        if "Can not map" not in str(error):
            raise
    found = model.keys(target, mtp=False, file_type=0, chat_template="t")
    return {key: value.data for key, value in found.items()}


@pytest.mark.parametrize("target", ["llama.cpp", "ik_llama.cpp", "nisparks"])
@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("deepseek_v4", "scoring_func", "softmax"),
        ("deepseek_v4", "scoring_func", ["sqrtsoftplus"]),
        ("deepseek_v4", "hidden_act", "gelu"),
        ("deepseek_v4", "attention_bias", True),
        ("deepseek_v4", "tie_word_embeddings", True),
        ("deepseek_v4", "tie_word_embeddings", 0),
        ("deepseek_v4", "topk_method", "greedy"),
        ("deepseek_v4", "n_group", 8),
        ("deepseek_v4", "norm_topk_prob", "no"),
        ("deepseek_v4", "quantization_config", {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ("deepseek_v4", "quantization_config", "fp8"),
        ("deepseek_v3", "hidden_act", "gelu"),
        ("deepseek_v3", "rope_interleave", False),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "topk_method", "group_limited_greedy"),
        ("deepseek_v3", "topk_method", []),
        ("deepseek_v3", "scoring_func", "tanh"),
        ("deepseek_v3", "norm_topk_prob", 1),
        ("deepseek_v3", "tie_word_embeddings", "false"),
        ("deepseek_v3", "first_k_dense_replace", []),
        ("deepseek_v3", "q_lora_rank", {}),
        ("deepseek_v3", "num_nextn_predict_layers", 0.0),
        ("deepseek_v3", "quantization_config", {"quant_method": ["fp8"]}),
        ("gpt_oss", "swiglu_limit", 8.0),
        ("gpt_oss", "swiglu_alpha", 1.5),
        ("gpt_oss", "attention_bias", False),
        ("gpt_oss", "tie_word_embeddings", True),
        ("gpt_oss", "layer_types", ["full_attention", "sliding_attention"] * 12),
        ("gpt_oss", "layer_types", ["sliding_attention", "full_attention"] * 11),
        ("gpt_oss", "layer_types", 5),
        ("gpt_oss", "experts_per_token", 8),
        ("gpt_oss", "quantization_config", {"quant_method": "awq"}),
    ],
)
def test_a_value_that_a_file_would_lose(family: str, key: str, value: object, target: str) -> None:
    checked(family, target, {})
    with pytest.raises(CheckpointError, match=f"^{Path('D', 'config.json')}: .*{key}"):
        checked(family, target, {key: value})


@pytest.mark.parametrize("target", ["llama.cpp", "ik_llama.cpp", "nisparks"])
def test_hyper_connections_are_written_where_readers_would_suppose_others(target: str) -> None:
    """Nisparks files have no keys for them: the family's own values are left out there, others are not."""
    own = {"deepseek4.hyper_connection.sinkhorn_iterations": 7, "deepseek4.hyper_connection.epsilon": 1e-5}
    usual = checked("deepseek_v4", target, {})
    odd = checked("deepseek_v4", target, {"hc_sinkhorn_iters": 7, "hc_eps": 1e-5})
    assert {key: pytest.approx(odd[key]) for key in own} == own
    assert set(odd) - set(usual) == (set(own) if target == "nisparks" else set())
    model = architecture("deepseek_v4", {"hc_sinkhorn_iters": 7})
    model.keys("nisparks", mtp=False, file_type=0, chat_template="t")
    (note,) = model.notes
    assert "sinkhorn_iterations = 7" in note
    with pytest.raises(CheckpointError, match=r"hc_eps is '1e-6', expected a number"):
        checked("deepseek_v4", target, {"hc_eps": "1e-6"})


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_groups_of_experts_are_stated_where_they_choose(key: str) -> None:
    """Transformers' class has 8 and 4 where config.json has none, programs for GGUF have no groups then."""
    for value in (GONE, None, 0, "8", True):
        with pytest.raises(CheckpointError, match=f"config.json: {key} is .*, expected an integer from 1"):
            checked("deepseek_v3", "llama.cpp", {key: value})
    plain = {"topk_method": "greedy", "n_group": GONE, "topk_group": None}
    assert not [name for name in checked("deepseek_v3", "llama.cpp", plain) if "expert_group" in name]


def test_groups_that_ik_llama_cpp_does_not_know_are_told() -> None:
    model = architecture("deepseek_v3", {})
    model.keys("ik_llama.cpp", mtp=False, file_type=0, chat_template=None)
    assert ["4 of 8 groups" in note for note in model.notes] == [True]
    for target, changes in (("llama.cpp", {}), ("ik_llama.cpp", {"n_group": 1, "topk_group": 1})):
        other = architecture("deepseek_v3", changes)
        other.keys(target, mtp=False, file_type=0, chat_template=None)
        assert other.notes == []
