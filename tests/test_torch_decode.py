"""The torch decoders: every type, the bits of the CPU's decoder, on bytes of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import VECTORS, assert_same_bits

from ggufx import testing, types
from ggufx.errors import CodecError, UnsupportedType
from ggufx.torch import decoding
from ggufx.torch.decoding import as_numpy, decode_rows, dtype_of
from ggufx.types import Codec, Layout

CODECS = [codec for codec in types.all_codecs() if codec.can_decode]
NAMES = [codec.name for codec in CODECS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests may have switched on for Triton must not decide how CPU tensors are decoded here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def decoded(
    codec: Codec, rows: np.ndarray, dtype: torch.dtype | None = None, way: str = "torch", device: str = "cpu"
) -> np.ndarray:
    """Decode into poisoned memory, so that what is not written shows."""
    dtype = dtype_of(codec) if dtype is None else dtype
    shape = (rows.shape[0], codec.layout.row_len(rows.shape[1]))
    out = torch.full(shape, torch.nan if dtype.is_floating_point else 77, dtype=dtype, device=device)
    decode_rows(codec, torch.from_numpy(rows.copy()).to(device), out, way)
    return as_numpy(out.cpu())


def rows_of_every_kind(codec: Codec, blocks: int = 3) -> np.ndarray:
    """Random bytes, which no quantizer writes, and the edges of the test kit: zero, infinite and NaN scales."""
    rng = np.random.default_rng(5)
    edges = testing.random_rows(codec, rng, 8, blocks)
    noise = rng.integers(0, 256, (33, edges.shape[1]), dtype=np.uint8)
    return np.concatenate([edges, noise])


@pytest.mark.parametrize("name", sorted(path.stem.upper() for path in VECTORS.glob("*.npz")))
def test_the_vectors_of_the_c_libraries(name: str) -> None:
    with np.load(VECTORS / f"{name.lower()}.npz") as archive:
        data = dict(archive)
    for key in [key for key in data if key.startswith("packed")]:
        assert_same_bits(decoded(types.get(name), data[key]), data[key.replace("packed", "dequant")])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_as_on_the_cpu(name: str, device: str) -> None:
    codec = types.get(name)
    rows = rows_of_every_kind(codec)
    assert_same_bits(decoded(codec, rows, device=device), codec.decode(rows, use_kernel=False))


@pytest.mark.parametrize("name", ["Q4_0", "IQ2_KS", "IQ4_KT", "F8_E4M3_B128", "IQ6_K"])
@given(data=st.data())
def test_any_shape_decodes_as_on_the_cpu(name: str, data: st.DataObject) -> None:
    codec = types.get(name)
    rows = data.draw(testing.rows(codec))
    assert_same_bits(decoded(codec, rows), codec.decode(rows))


@pytest.mark.parametrize("way", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ2_KS", "MXFP4", "F32", "I16"])
def test_other_dtypes_are_float32_rounded(name: str, dtype: torch.dtype, way: str) -> None:
    codec = types.get(name)
    rows = rows_of_every_kind(codec)
    numpy_dtype = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float64: np.float64}[dtype]
    with np.errstate(over="ignore"):
        expected = codec.decode(rows).astype(numpy_dtype)
    assert_same_bits(decoded(codec, rows, dtype, way), expected)


def test_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = types.get("IQ3_KS")
    rows = rows_of_every_kind(codec)
    monkeypatch.setitem(decoding._CHUNK_LEN, "cpu", 5 * 768)
    assert_same_bits(decoded(codec, rows), codec.decode(rows))


@pytest.mark.parametrize("way", ["torch", "cpu"])
@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_nothing_decodes_to_nothing(shape: tuple[int, int], way: str) -> None:
    codec = types.get("Q4_K")
    assert decoded(codec, np.empty((shape[0], codec.layout.row_nbytes(shape[1])), np.uint8), way=way).shape == shape


def test_every_type_of_ours_has_a_torch_decoder_and_no_other_has() -> None:
    assert {codec.name for codec in types.all_codecs() if codec.has_torch} == set(NAMES)


def test_the_way_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = types.get("Q5_1")
    devices = [torch.device(name) for name in ("cpu", "cuda", "mps")]
    monkeypatch.setattr(type(codec), "has_cuda", False)
    assert [decoding.way_of(codec, device) for device in devices] == ["cpu", "torch", "torch"]
    monkeypatch.setattr(type(codec), "has_cuda", True)
    assert [decoding.way_of(codec, device) for device in devices] == ["cpu", "cuda", "torch"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [decoding.way_of(codec, device) for device in devices] == ["cuda", "cuda", "torch"]


class HALVES(Codec):
    """A third-party type: NumPy only."""

    layout = Layout(2, np.dtype([("qs", "u1", (2,))]))
    ids = {"llama.cpp": 251}  # noqa: RUF012

    def decode_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        out[...] = rows.astype(np.float32) / 2


def test_a_type_without_a_torch_decoder_goes_by_the_cpu() -> None:
    codec = HALVES()
    assert decoding.way_of(codec, torch.device("cuda")) == "cpu"
    rows = np.arange(12, dtype=np.uint8).reshape(2, 6)
    assert_same_bits(decoded(codec, rows, way="cpu"), rows.astype(np.float32) / 2)
    assert_same_bits(
        decoded(codec, rows, torch.bfloat16, "cpu"), (rows.astype(np.float32) / 2).astype(ml_dtypes.bfloat16)
    )


def test_a_type_without_a_decoder_says_so() -> None:
    codec = types.get("IQ1_KT")
    rows = torch.zeros((1, codec.layout.row_nbytes(256)), dtype=torch.uint8)
    with pytest.raises(UnsupportedType, match="IQ1_KT"):
        decode_rows(codec, rows, torch.empty((1, 256)))


def test_a_value_dtype_that_torch_lacks_says_so() -> None:
    class STRANGE(HALVES):
        value_dtype = np.dtype(np.complex64)

    with pytest.raises(CodecError, match="STRANGE"):
        dtype_of(STRANGE())


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not recwarn.list, [str(warning.message) for warning in recwarn.list]


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_tensor_decodes_as_on_the_cpu(name: str) -> None:
    codec = types.get(name)
    rows = rows_of_every_kind(codec)
    for dtype in (dtype_of(codec), torch.bfloat16, torch.float16):
        expected = decoded(codec, rows, dtype, "cpu")
        assert_same_bits(decoded(codec, rows, dtype, None, "cuda"), expected)


@pytest.mark.cuda
def test_more_than_2_to_the_31_bytes_decode() -> None:
    codec = types.get("Q8_0")
    rows = torch.zeros((70_000, codec.layout.row_nbytes(32_768)), dtype=torch.uint8, device="cuda")
    assert rows.numel() > 2**31
    rows[-1] = torch.from_numpy(codec.encode(np.linspace(-1, 1, 32_768, dtype=np.float32)))
    out = torch.full((70_000, 32_768), torch.nan, dtype=torch.bfloat16, device="cuda")
    decode_rows(codec, rows, out, "torch")
    assert not out[:-1].any()
    expected = torch.from_numpy(codec.decode(rows[-1].cpu().numpy())).bfloat16()
    assert torch.equal(out[-1].cpu(), expected)
