"""DeepSeek-V3: ggufx writes what llama.cpp's converter writes, and llama.cpp computes from it what transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from . import need

torch = need("torch")
transformers = need("transformers")
need("llama_cpp")
need("gguf")

from make_tiny_v3 import make_tiny_v3  # noqa: E402

from . import llama, reference  # noqa: E402
from .commands import convert, upstream_convert  # noqa: E402
from .test_llama_cpp import prompt  # noqa: E402
from .test_upstream_converter import TEMPLATE, differences  # noqa: E402

pytestmark = pytest.mark.interop

VARIANTS = {
    "float": {},
    "ue8m0": {"scales": "ue8m0", "chat_template": TEMPLATE},
    "bf16": {"weights": "bf16", "shards": 1},
    # llama.cpp takes a model without q_lora_rank for one of V2-Lite's kind, which it knows by its 27 layers. Heads that
    # do not end with a tile of scales, too.
    "plain query": {
        "layers": 27, "q_lora": 0, "nope": 96, "value": 64, "rope": 32, "heads": 6, "dense_layers": 20, "hidden": 256,
        "moe": 128, "experts": 8, "mtp_layers": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("v3")

    def get(variant: str) -> Path:
        path = root / variant / "Tiny-DeepSeek-V3"
        if not path.exists():
            make_tiny_v3(path, **VARIANTS[variant])
        return path

    return get


@pytest.mark.parametrize("dense", ["bf16", "q8_0", "f32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_file(llama_cpp_source, checkpoint_of, tmp_path, variant, dense):
    checkpoint = checkpoint_of(variant)
    expected = upstream_convert(llama_cpp_source, dense, checkpoint, tmp_path / "upstream.gguf")
    own = () if dense == "bf16" else ("--dense", dense)
    assert differences(expected, convert(checkpoint, tmp_path / "ggufx.gguf", *own)) == []


@pytest.mark.parametrize(
    "changes",
    [{"attention_factor": 1.25}, {"attn_factor": 1.25, "extrapolation_factor": 0.5}, {"beta_slow": None}],
)
def test_same_file_of_another_yarn(llama_cpp_source, tmp_path, changes):
    checkpoint = tmp_path / "Tiny-DeepSeek-V3"
    make_tiny_v3(checkpoint, hidden=256, ffn=384, moe=128, experts=8, heads=2, merges=40, shards=1)
    config = json.loads((checkpoint / "config.json").read_text())
    scaling = config["rope_scaling"] | changes
    config["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    expected = upstream_convert(llama_cpp_source, "bf16", checkpoint, tmp_path / "upstream.gguf")
    assert differences(expected, convert(checkpoint, tmp_path / "ggufx.gguf")) == []


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every parameter by its name, dequantized from the published definition of the format: float32."""
    tensors = reference.read_tensors(checkpoint)
    weights: dict[str, np.ndarray] = {}
    for name, (dtype, raw) in tensors.items():
        if dtype == "F8_E4M3":
            scales = tensors[name + "_scale_inv"][1]
            full = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)
            weights[name] = reference.e4m3(raw) * full[: raw.shape[0], : raw.shape[1]]
        elif dtype == "BF16":
            weights[name] = (raw.astype(np.uint32) << 16).view(np.float32)
        elif not name.endswith("_scale_inv"):
            weights[name] = raw
    return weights


def load_reference(checkpoint: Path):
    """Build transformers' model in float32 with a checkpoint's weights."""
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)  # the weights are loaded dequantized
    config |= {"torch_dtype": "float32", "num_nextn_predict_layers": 0}
    built = transformers.DeepseekV3Config(**config)
    model = transformers.DeepseekV3ForCausalLM._from_config(built, attn_implementation="eager").eval()
    state = model.state_dict()
    filled = dict.fromkeys(state, 0)
    for name, values in weights_of(checkpoint).items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= config["num_hidden_layers"]:
            continue  # the MTP layer
        key, target = name, None
        if ".experts." in name:
            # Experts lie in one tensor, gate over up.
            down = parts[6] == "down_proj"
            key = ".".join([*parts[:5], "down_proj" if down else "gate_up_proj"])
            target = state[key][int(parts[5])]
            target = target if down else target.chunk(2)[parts[6] == "up_proj"]
        target = state[key] if target is None else target
        assert target.shape == values.shape, name
        target.copy_(torch.tensor(values))
        filled[key] += values.size
    missing = [key for key, count in filled.items() if count != state[key].numel()]
    assert not missing
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_f32_file_holds_the_exact_model(checkpoint_of, tmp_path, variant):
    """FP8 times a float32 scale is no BF16 number, so the exact model is the F32 file.

    Measured: 5e-6 (1 token) to 8e-5 (600 tokens, the 0.9 quantile) where the logits' standard deviation is 4.
    """
    checkpoint = checkpoint_of(variant)
    model = load_reference(checkpoint)
    with llama.opened(convert(checkpoint, tmp_path / "f32.gguf", "--dense", "f32")) as runtime:
        for length in (1, 7, 130, 600):
            tokens = prompt(length)
            expected, found = reference.reference_logits(model, tokens), runtime.logits(tokens)
            assert expected.std() > 1
            worst = np.abs(found - expected).max(axis=1)
            # A tie between two scores of the router, decided by the last bit, shows from its position on.
            assert np.quantile(worst, 0.5) < 2e-4, length
            assert np.quantile(worst, 0.9) < 1e-3, length
            assert np.mean(found.argmax(axis=1) == expected.argmax(axis=1)) > 0.99, length


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("rope.scaling.yarn_log_multiplier", 0.05),
        ("rope.scaling.factor", 4.0),
        ("rope.freq_base", 160000.0),
        ("expert_weights_scale", 1.0),
        ("expert_weights_norm", False),
        ("expert_gating_func", 1),
        ("expert_group_used_count", 1),
        ("expert_used_count", 3),
        ("attention.layer_norm_rms_epsilon", 1e-3),
    ],
)
def test_a_wrong_value_would_show(checkpoint_of, tmp_path, key, wrong):
    """The comparison above cannot pass with a wrong value of one of these keys."""
    checkpoint = checkpoint_of("ue8m0")
    model = load_reference(checkpoint)
    tokens = prompt(130)
    expected = reference.reference_logits(model, tokens)
    file = convert(checkpoint, tmp_path / "f32.gguf", "--dense", "f32")
    with llama.opened(llama.in_float32(file, tmp_path / "wrong.gguf", {f"deepseek2.{key}": wrong})) as runtime:
        worst = np.abs(runtime.logits(tokens) - expected).max(axis=1)
    assert np.quantile(worst, 0.9) > 1e-2


def test_default_file_runs(checkpoint_of, tmp_path):
    """BF16, the default: its own rounding and llama.cpp's of the activations are all that is between.

    Measured, relative to the logits' standard deviation: 0.012 at the median, 0.04 at the 0.9 quantile.
    """
    checkpoint = checkpoint_of("float")
    model = load_reference(checkpoint)
    with llama.opened(convert(checkpoint, tmp_path / "bf16.gguf")) as runtime:
        tokens = prompt(200)
        expected, found = reference.reference_logits(model, tokens), runtime.logits(tokens)
    difference = (found - expected).std(axis=1) / expected.std()
    assert np.quantile(difference, 0.5) < 0.03
    assert np.quantile(difference, 0.9) < 0.1
