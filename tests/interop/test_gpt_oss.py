"""gpt-oss: ggufx writes what llama.cpp's converter writes, and llama.cpp computes from it what transformers does."""

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

from make_tiny_gpt_oss import make_tiny_gpt_oss  # noqa: E402

from . import llama, reference  # noqa: E402
from .commands import convert, upstream_convert  # noqa: E402
from .test_llama_cpp import prompt  # noqa: E402
from .test_upstream_converter import TEMPLATE, differences  # noqa: E402

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpt_oss") / "Tiny-gpt-oss"
    make_tiny_gpt_oss(out, chat_template=TEMPLATE)
    return out


@pytest.mark.parametrize("dense", ["bf16", "q8_0", "f32"])
def test_same_file(llama_cpp_source, checkpoint, tmp_path, dense):
    expected = upstream_convert(llama_cpp_source, dense, checkpoint, tmp_path / "upstream.gguf")
    own = () if dense == "bf16" else ("--dense", dense)
    assert differences(expected, convert(checkpoint, tmp_path / "ggufx.gguf", *own)) == []


def test_same_file_of_another_checkpoint(llama_cpp_source, tmp_path):
    checkpoint = tmp_path / "Tiny-gpt-oss"
    make_tiny_gpt_oss(checkpoint, shards=1, layers=3, experts=5, inter=96, hidden=320, heads=8, seed=3)
    expected = upstream_convert(llama_cpp_source, "bf16", checkpoint, tmp_path / "upstream.gguf")
    assert differences(expected, convert(checkpoint, tmp_path / "ggufx.gguf")) == []


def load_reference(checkpoint: Path):
    """Build transformers' model in float32 with a checkpoint's weights, dequantized from the format's definition.

    llama.cpp rounds the ends of YaRN's ramp to whole dimensions, as transformers does with `truncate`; the released
    config says not to, which no GGUF key can.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config")
    config["rope_scaling"] |= {"truncate": True}
    config |= {"torch_dtype": "float32"}
    built = transformers.GptOssConfig(**config)
    model = transformers.GptOssForCausalLM._from_config(built, attn_implementation="eager").eval()
    state = model.state_dict()
    tensors = reference.read_tensors(checkpoint)
    missing = set(state)
    for name, (dtype, raw) in tensors.items():
        if name.endswith("_scales"):
            continue
        key = name.removesuffix("_blocks")
        if dtype == "U8":
            scales = tensors[f"{key}_scales"][1]
            experts, rows = raw.shape[:2]
            pairs = raw.reshape(experts * rows, -1)
            flat = reference.dequantize_fp4(pairs, scales.reshape(experts * rows, -1))
            values = flat.reshape(experts, rows, -1).transpose(0, 2, 1)
        else:
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        assert state[key].shape == values.shape, name
        state[key].copy_(torch.tensor(np.ascontiguousarray(values)))
        missing.discard(key)
    assert not missing
    return model


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_reference(checkpoint)


def test_file_holds_the_exact_model(checkpoint, model, tmp_path):
    """All values as F32 (see `llama.in_float32`): measured 7e-6 (1 token) to 9e-5 (600) of logits that vary by 4."""
    file = llama.in_float32(convert(checkpoint, tmp_path / "tiny.gguf"), tmp_path / "f32.gguf")
    with llama.opened(file) as runtime:
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
        ("rope.scaling.factor", 4.0),
        ("rope.freq_base", 10000.0),
        ("attention.sliding_window", 16),
        ("expert_used_count", 3),
        ("attention.layer_norm_rms_epsilon", 1e-3),
    ],
)
def test_a_wrong_value_would_show(checkpoint, model, tmp_path, key, wrong):
    """The comparison above cannot pass with a wrong value of one of these keys."""
    tokens = prompt(130)
    expected = reference.reference_logits(model, tokens)
    file = convert(checkpoint, tmp_path / "tiny.gguf")
    with llama.opened(llama.in_float32(file, tmp_path / "wrong.gguf", {f"gpt-oss.{key}": wrong})) as runtime:
        worst = np.abs(runtime.logits(tokens) - expected).max(axis=1)
    assert np.quantile(worst, 0.9) > 1e-2


def test_the_file_as_it_is_runs(checkpoint, model, tmp_path):
    """MXFP4 and BF16 as stored: llama.cpp's rounding of the activations is all that is between.

    Measured, relative to the logits' standard deviation: 0.007 at the median, 0.016 at the 0.9 quantile.
    """
    with llama.opened(convert(checkpoint, tmp_path / "tiny.gguf")) as runtime:
        tokens = prompt(200)
        expected, found = reference.reference_logits(model, tokens), runtime.logits(tokens)
    difference = (found - expected).std(axis=1) / expected.std()
    assert np.quantile(difference, 0.5) < 0.02
    assert np.quantile(difference, 0.9) < 0.1
