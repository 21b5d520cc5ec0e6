"""The makers of tiny DeepSeek-V3 and gpt-oss checkpoints: what they promise about their files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_gpt_oss  # noqa: E402
import make_tiny_v3  # noqa: E402

SMALL = ["--hidden", "256", "--experts", "4", "--merges", "40", "--layers", "2"]
MAKERS = {"v3": (make_tiny_v3.main, [*SMALL, "--heads", "2"]), "gpt-oss": (make_tiny_gpt_oss.main, SMALL)}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end]
    return found


@pytest.mark.parametrize("maker", MAKERS)
def test_same_arguments_same_bytes(maker, tmp_path, capsys):
    main, arguments = MAKERS[maker]
    for name in "ab":
        assert main([str(tmp_path / name), *arguments]) == 0
    assert main([str(tmp_path / "c"), *arguments, "--seed", "1"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    assert "MB of weights" in capsys.readouterr().out


def test_scales_are_what_was_asked_for(tmp_path):
    small = {"hidden": 256, "experts": 4, "merges": 40, "layers": 2, "heads": 2}
    for scales in make_tiny_v3.SCALES:
        make_tiny_v3.make_tiny_v3(tmp_path / scales, scales=scales, **small)
        found = tensors(tmp_path / scales)
        for name, (dtype, _, data) in found.items():
            if name.endswith("_scale_inv"):
                assert dtype == "F32"
                power = bool(np.all(np.frexp(np.frombuffer(data, "<f4"))[0] == 0.5))
                assert power == (scales == "ue8m0" and ".o_proj." not in name), name
    assert json.loads((tmp_path / "ue8m0/config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"


def test_bf16_weights_are_the_fp8_ones_rounded(tmp_path):
    small = {"hidden": 256, "experts": 4, "merges": 40, "layers": 2, "heads": 2}
    for weights in make_tiny_v3.WEIGHTS:
        make_tiny_v3.make_tiny_v3(tmp_path / weights, weights=weights, **small)
    native, rounded = tensors(tmp_path / "fp8"), tensors(tmp_path / "bf16")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    _, shape, data = native[name]
    scales = np.frombuffer(native[f"{name}_scale_inv"][2], "<f4").reshape(native[f"{name}_scale_inv"][1])
    full = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    values = np.frombuffer(data, ml_dtypes.float8_e4m3fn).reshape(shape).astype(np.float32) * full
    assert rounded[name] == ("BF16", shape, values.astype(ml_dtypes.bfloat16).tobytes())
    assert set(rounded) == {name for name in native if not name.endswith("_scale_inv")}
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


def test_gigabytes_adds_experts(tmp_path, capsys):
    assert make_tiny_v3.main([str(tmp_path), "--gigabytes", "0.1", "--merges", "40", "--moe", "512"]) == 0
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert abs(size - 100e6) < 10e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": "int4"}, "scales 'int4' is not one of float, ue8m0"),
        ({"weights": "f16"}, "weights 'f16' is not one of fp8, bf16"),
        ({"experts": 6}, "6 experts do not divide into 4 groups"),
        ({"vocab_size": 5}, "vocab_size 5 is less than the tokenizer's"),
        ({"shards": 100000}, "shards are possible, not 100000"),
    ],
)
def test_impossible_wishes(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_v3.make_tiny_v3(tmp_path, merges=40, **change)
