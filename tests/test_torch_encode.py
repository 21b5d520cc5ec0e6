"""Encoding torch tensors: bytes and errors of the CPU's encoders, and where a device's own encoder runs."""

from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import ggufx.torch as gt
from ggufx import kernels, types
from ggufx.errors import CodecError, UnsupportedType
from ggufx.torch import encoding
from ggufx.types import ImportanceWarning

VALUES = np.random.default_rng(4).standard_normal((2, 3, 256)).astype(np.float32)
WEIGHTS = np.random.default_rng(5).random(256).astype(np.float32)
TYPES = ["Q8_0", "F8_E4M3_B128", "Q4_0", "BF16", "F32"]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests may have switched on for Triton must not decide how CPU tensors are decoded here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("name", TYPES)
def test_a_tensor_gives_the_bytes_of_its_array(name: str) -> None:
    codec = types.get(name)
    expected = codec.encode(VALUES, WEIGHTS)
    for packed in (
        gt.encode(torch.from_numpy(VALUES), name, WEIGHTS),
        gt.encode(torch.from_numpy(VALUES).requires_grad_(), codec, torch.from_numpy(WEIGHTS).double()),
        codec.encode(torch.from_numpy(VALUES), torch.from_numpy(WEIGHTS)),
        gt.encode(torch.from_numpy(VALUES.swapaxes(0, 1).copy()).transpose(0, 1), name, WEIGHTS),
    ):
        assert isinstance(packed, Tensor)
        assert packed.dtype == torch.uint8
        assert np.array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16], ids=str)
def test_values_of_any_dtype(dtype: torch.dtype) -> None:
    values = (torch.from_numpy(VALUES) * 10).to(dtype)
    assert np.array_equal(gt.encode(values, "Q8_0").numpy(), types.get("Q8_0").encode(values.float().numpy()))
    integers = torch.arange(-4, 4)
    assert torch.equal(gt.encode(integers, "I64").view(torch.int64), integers)


def test_out_is_filled() -> None:
    out = torch.full((2, 3, 272), 255, dtype=torch.uint8)
    assert gt.encode(torch.from_numpy(VALUES), "Q8_0", out=out) is out
    assert np.array_equal(out.numpy(), types.get("Q8_0").encode(VALUES))
    for bad in (out[0], out.int(), torch.empty((2, 3, 544), dtype=torch.uint8)[..., ::2]):
        with pytest.raises(CodecError, match=r"it must be contiguous torch.uint8\[2, 3, 272\] on cpu"):
            gt.encode(torch.from_numpy(VALUES), "Q8_0", out=bad)


def test_errors_are_those_of_arrays() -> None:
    bad = torch.from_numpy(VALUES.copy())
    bad[1, 2, 77] = torch.nan
    for values, type_name, importance in (
        (bad, "Q8_0", None),
        (torch.zeros(31), "Q8_0", None),
        (torch.tensor(1.0), "Q8_0", None),
        (torch.zeros(256), "Q4_K", -WEIGHTS),
        (torch.zeros(256), "IQ2_XXS", None),
        (torch.zeros(256), "IQ1_S", None),
        (torch.zeros((0, 31)), "Q8_0", None),
    ):
        codec = types.get(type_name)
        with pytest.raises((CodecError, UnsupportedType)) as expected:
            codec.encode(values.numpy(), importance)
        with pytest.raises((CodecError, UnsupportedType)) as found:
            codec.encode(values, importance)
        assert (found.type, str(found.value)) == (expected.type, str(expected.value))
    with pytest.raises(CodecError, match=r"real numbers, got torch\.complex64"):
        gt.encode(torch.zeros(32, dtype=torch.complex64), "Q8_0")
    with pytest.raises(TypeError, match=r"values are a torch\.Tensor, got ndarray"):
        gt.encode(np.zeros(32, np.float32), "Q8_0")  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="effort 'best'"):
        gt.encode(torch.zeros(32), "Q8_0", effort="best")  # type: ignore[arg-type]


def test_what_another_device_sends_through_the_cpu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_LEN", 2 * 256)
    codec, flat = types.get("Q4_0"), torch.from_numpy(VALUES).view(6, 256)
    weights = WEIGHTS.copy()
    weights[:32] = 0
    out = torch.full((6, 144), 255, dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoding._encode_by_cpu(codec, flat.bfloat16(), out, weights, {})
    assert [warning.category for warning in caught] == [ImportanceWarning]
    with pytest.warns(ImportanceWarning):
        assert np.array_equal(out.numpy(), codec.encode(flat.bfloat16().float().numpy(), weights))


@pytest.fixture
def device_encoder(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """An encoder under the CUDA one's name where Triton's interpreter would run; tells how it was called."""
    calls: list[tuple[object, ...]] = []
    module = ModuleType("encode")

    def encode(name: str, values: Tensor, importance: Tensor | None, out: Tensor, objective: str, effort: str) -> None:
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        assert out.is_contiguous()
        calls.append((name, tuple(values.shape), importance is not None, objective, effort))
        weights = None if importance is None else importance.numpy()
        out.copy_(torch.from_numpy(types.get(name).encode(values.numpy(), weights, objective=objective, effort=effort)))

    def count_heads(values: Tensor, size: int) -> Tensor:
        counts = np.empty((len(values), 3), np.int64)
        kernels.load("_rows").count_heads(values.numpy().view(np.int32), size, counts)
        return torch.from_numpy(counts)

    module.__dict__.update(
        encode=encode,
        count_heads=count_heads,
        SUPPORTED=frozenset({"Q4_0", "Q5_0"}),
        REPRODUCES=frozenset({"Q4_0"}),
    )
    exists, find = kernels.exists, kernels.find
    monkeypatch.setattr(kernels, "exists", lambda name, **way: name == "encode" or exists(name, **way))
    monkeypatch.setattr(kernels, "find", lambda name, **way: module if name == "encode" else find(name, **way))
    monkeypatch.setattr(encoding, "_CHUNK_LEN", 4 * 256)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return calls


def test_a_device_encoder_runs_where_there_is_one(device_encoder: list[tuple[object, ...]]) -> None:
    values = torch.from_numpy(VALUES)
    packed = gt.encode(values.double(), "Q4_0", WEIGHTS, objective="mse")
    assert np.array_equal(packed.numpy(), types.get("Q4_0").encode(VALUES, WEIGHTS, objective="mse"))
    assert device_encoder == [("Q4_0", (4, 256), True, "mse", "normal"), ("Q4_0", (2, 256), True, "mse", "normal")]
    device_encoder.clear()
    packed = gt.encode(values, "Q4_0", effort="reference")
    assert np.array_equal(packed.numpy(), types.get("Q4_0").encode(VALUES, effort="reference"))
    assert device_encoder[0] == ("Q4_0", (4, 256), False, "reference", "reference")
    device_encoder.clear()
    # Longer searches are the CPU's; so are types without an encoder on the device.
    gt.encode(values, "Q4_0", effort="high")
    gt.encode(values, "F16")
    with pytest.raises(UnsupportedType, match="does not promise"):
        gt.encode(values, "Q5_0", effort="reference")
    assert not device_encoder
    gt.encode(values[:0], "Q4_0")
    assert not device_encoder


def test_rows_unlike_weights_are_compared_with_a_lower_effort_on_the_cpu(
    device_encoder: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernels.find("encode", cuda=True)
    monkeypatch.setattr(module, "encode", lambda name, values, importance, out, **search: out.zero_())
    values = VALUES.reshape(6, 256).copy()
    values[[1, 4]] += 3
    packed = gt.encode(torch.from_numpy(values), "Q4_0", WEIGHTS).numpy()
    fast = types.get("Q4_0").encode(values, WEIGHTS, effort="fast")
    assert np.array_equal(packed[[1, 4]], fast[[1, 4]])
    assert not packed[[0, 2, 3, 5]].any()
    assert not gt.encode(torch.from_numpy(values), "Q4_0", WEIGHTS, effort="fast").any()


def test_a_device_encoder_never_sees_what_is_not_finite(device_encoder: list[tuple[object, ...]]) -> None:
    values = torch.from_numpy(VALUES.copy()).double()
    values[1, 2, 77] = torch.inf
    values[1, 2, 78] = torch.nan
    with pytest.raises(CodecError, match="found inf at row 5, column 77: Q4_0 encodes finite values only"):
        gt.encode(values, "Q4_0")
    values[1, 2, 77] = 1e300  # infinite in float32
    with pytest.raises(CodecError, match="found inf at row 5, column 77"):
        gt.encode(values, "Q4_0")
    with pytest.raises(CodecError, match="importance must be 256 finite weights"):
        gt.encode(torch.from_numpy(VALUES), "Q4_0", -WEIGHTS)
    assert not device_encoder


@pytest.mark.cuda
@pytest.mark.parametrize("name", TYPES)
def test_a_cuda_tensor_gives_bytes_on_its_device(name: str) -> None:
    packed = gt.encode(torch.from_numpy(VALUES).cuda(), name, WEIGHTS)
    assert packed.is_cuda
    codec = types.get(name)
    ours, expected = codec.decode(packed.cpu().numpy()), codec.decode(codec.encode(VALUES, WEIGHTS))
    assert np.square(ours - VALUES).sum() <= 1.005 * np.square(expected - VALUES).sum() + 1e-9
