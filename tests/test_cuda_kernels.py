"""Triton kernels against the CPU: in Triton's interpreter on small shapes, with ``-m cuda`` on a GPU and on large ones."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from ggufx import kernels, types  # noqa: E402
from ggufx.kernels.cuda import _linear, _scaled, _thresholds, experts  # noqa: E402

# Scales of random bytes are infinite here and there: what becomes of them is part of the test.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TYPES = (
    "F8_E4M3_B128", "IQ2_KS", "IQ2_XXS", "IQ3_KS", "IQ4_K", "IQ4_KS", "IQ4_NL", "IQ5_K",
    "MXFP4", "Q4_0", "Q4_K", "Q6_K", "Q8_0",
)  # fmt: skip
NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 7.25


def kernel(name: str) -> Any:
    module = kernels.find(name, cuda=True)
    assert module is not None
    return module


def random_rows(name: str, n_rows: int, blocks: int, lead: int = 0, seed: int = 0) -> Any:
    """Return packed rows uint8 [R, row_nbytes] of random bytes, ``lead`` bytes after an aligned address."""
    layout = types.get(name).layout
    row_nbytes = layout.row_nbytes(blocks * layout.block_len)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n_rows * row_nbytes,), dtype=torch.uint8, generator=generator)
    place = torch.zeros(len(data) + 64, dtype=torch.uint8, device=DEVICE)
    start = -place.data_ptr() % 16 + lead
    place[start : start + len(data)] = data.to(DEVICE)
    return place[start : start + len(data)].view(n_rows, row_nbytes)


def finite_rows(name: str, n_rows: int, blocks: int, lead: int = 0, seed: int = 0) -> Any:
    """The same with scales as weights have them."""
    rows = random_rows(name, n_rows, blocks, lead, seed)
    layout = types.get(name).layout
    data = rows.cpu().numpy().copy()
    rng = np.random.default_rng(seed)
    for part in layout.split(data):
        for field in () if part is None else part.dtype.names:
            if field in ("d", "dmin"):
                part[field] = rng.uniform(-0.1, 0.1, part[field].shape)
            elif field == "e":
                part[field] = rng.integers(118, 124, part[field].shape)
            elif name == "F8_E4M3_B128":
                part[field][(part[field] & 127) == 127] = 0
    rows.copy_(torch.from_numpy(data))
    return rows


def decoded(name: str, rows: Any, dtype: Any = np.float32) -> Any:
    return types.get(name).decode(rows.cpu().numpy(), dtype=dtype, use_kernel=False)


def assert_exact(name: str, rows: Any, out: Any) -> None:
    expected = decoded(name, rows, NUMPY[out.dtype])
    got = out.cpu()
    bits = got.view({2: torch.int16, 4: torch.int32}[got.element_size()]).numpy()
    same = bits == expected.view(bits.dtype)
    same |= np.isnan(expected.astype(np.float32)) & torch.isnan(got).numpy()
    assert same.all(), f"{name} to {out.dtype}: first at {np.argwhere(~same)[0]}"


def normal(*shape: int, seed: int = 0) -> Any:
    """Activations of a normal distribution, the same in every run: float32 [*shape]."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Products are exact to 2^-16 of the largest of 256 activations; F8_E4M3_B128 adds in binary16.
LIMITS = dict.fromkeys(TYPES, 5e-4) | {"F8_E4M3_B128": 3e-3}


def error(name: str, rows: Any, x: Any, out: Any) -> float:
    """Return the error over the size that such products have: that of the few at hand may be small by cancellation."""
    activations, weights = x.cpu().double().numpy(), decoded(name, rows).astype(np.float64)
    size = np.outer(np.sqrt(np.mean(activations**2, 1)), np.linalg.norm(weights, axis=1))
    return float(np.linalg.norm(out.cpu().double().numpy() - activations @ weights.T) / np.linalg.norm(size))


@pytest.mark.parametrize("name", TYPES)
def test_decode_is_the_cpu_decoder_rounded(name: str) -> None:
    # Short rows side by side, rows longer than a program, every alignment of the first byte.
    cases = [(torch.bfloat16, 3, 3, 1), (torch.float16, 2, 1, 2), (torch.float32, 1, 2, 3), (torch.bfloat16, 1, 33, 0)]
    for seed, (dtype, n_rows, blocks, lead) in enumerate(cases):
        rows = random_rows(name, n_rows, blocks, lead, seed)
        out = torch.full((n_rows, blocks * types.get(name).layout.block_len), POISON, dtype=dtype, device=DEVICE)
        kernel(name).decode(rows, out)
        assert_exact(name, rows, out)


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_KS"])
def test_decode_of_nothing(name: str) -> None:
    for n_rows, blocks in ((0, 2), (3, 0)):
        rows = random_rows(name, n_rows, blocks)
        kernel(name).decode(rows, torch.empty(n_rows, blocks * types.get(name).layout.block_len, device=DEVICE))


def test_decode_writes_nothing_beyond() -> None:
    rows = random_rows("IQ2_KS", 3, 1)
    place = torch.full((5, 256), POISON, device=DEVICE)
    kernel("IQ2_KS").decode(rows, place[1:4])
    assert_exact("IQ2_KS", rows, place[1:4])
    assert (place[[0, 4]] == POISON).all()


@pytest.mark.parametrize("name", TYPES)
def test_linear(name: str) -> None:
    for seed, (batch, n_rows, blocks, lead) in enumerate([(1, 3, 3, 0), (3, 1, 1, 1)]):
        rows = finite_rows(name, n_rows, blocks, lead, seed)
        x = normal(batch, blocks * types.get(name).layout.block_len)
        out = torch.full((batch, n_rows), math.nan, device=DEVICE)
        kernel(name).linear(x, rows, out)
        assert error(name, rows, x, out) < LIMITS[name]


@pytest.mark.parametrize("name", TYPES)
def test_linear_of_the_largest_does_not_overflow(name: str) -> None:
    # Codes and scales at the ends of their ranges, each with each, and activations of one size.
    kinds = list(itertools.product((0x00, 0x7F, 0x80, 0xFF), repeat=2))
    data = finite_rows(name, 1, 1).cpu().numpy().repeat(len(kinds), 0)
    for part in types.get(name).layout.split(data):
        for field in () if part is None else set(part.dtype.names) - {"d", "dmin", "e"}:
            codes = part.dtype[field].itemsize > 16
            for row, kind in enumerate(kinds):
                part[field][row].view(np.uint8)[...] = kind[codes] & (0xFE if name == "F8_E4M3_B128" else 0xFF)
    rows = torch.from_numpy(data).to(DEVICE)
    x = torch.full((1, types.get(name).layout.block_len), 3.0, device=DEVICE)
    out = torch.full((1, len(kinds)), math.nan, device=DEVICE)
    kernel(name).linear(x, rows, out)
    assert error(name, rows, x, out) < LIMITS[name]


def test_linear_with_steps_in_every_way() -> None:
    # A row of several steps: whole and broken, with weights loaded ahead and not, in programs of 1, 2 and 4 rows.
    rows = finite_rows("Q4_0", 3, 40, lead=2)
    x = normal(1, 40 * 32).bfloat16()
    fused = kernel("Q4_0")._FUSED
    prepared = _linear.prepare(x, kernel("Q4_0").ORDER)
    for tuned in ((1, 32, 1, True), (2, 8, 1, False), (4, 8, 1, True)):
        out = torch.full((1, 3), math.nan, device=DEVICE)
        _linear.linear(fused, prepared, rows, out, tuned=tuned)
        assert error("Q4_0", rows, x, out) < 5e-4


@pytest.mark.parametrize("name", TYPES)
def test_products_with_the_same_activations(name: str) -> None:
    # The second is cut into other programs; a row has more units than a step of theirs, and not a whole number of steps.
    units = types.get(name).layout.block_len // 32
    rows = finite_rows(name, 2, 40 // units, lead=4)
    x = normal(1, 40 * 32)
    prepared = _linear.prepare(x, kernel(name).ORDER)
    planes = kernel(name).split(rows) if hasattr(kernel(name), "split") else None
    for parts in (None, None, planes):
        out = torch.full((1, 2), math.nan, device=DEVICE)
        kernel(name).linear(prepared, rows, out, planes=parts)
        assert error(name, rows, x, out) < LIMITS[name]


class Launches:
    """In place of a kernel: notes what each launch waits for, and fails on demand."""

    def __init__(self) -> None:
        self.waits: list[int] = []
        self.fails = False

    def __getitem__(self, grid: object) -> Any:
        def launch(*_: object, WAIT: int, **__: object) -> None:
            if self.fails:
                raise RuntimeError
            self.waits.append(WAIT)

        return launch


def test_the_first_product_that_is_launched_waits_for_its_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    never, first, before, last = _linear._NEVER, _linear._FIRST, _linear._BEFORE_ACTIVATIONS, _linear._LAST
    rows, ids = finite_rows("Q8_0", 4, 2), torch.zeros((1, 1), dtype=torch.int32, device=DEVICE)
    prepared = [_linear.prepare(normal(1, 64), kernel("Q8_0").ORDER) for _ in range(4)]
    long, many = finite_rows("Q8_0", 1, 130), _linear.prepare(normal(8, 130 * 32), kernel("Q8_0").ORDER)
    launches = Launches()
    monkeypatch.setattr(_linear, "_linear", launches)
    monkeypatch.setattr(_linear, "_dependent", lambda device: True)

    def waits(x: Any, count: int = 1, fails: bool = False, **options: Any) -> list[int]:
        launches.waits.clear()
        launches.fails = fails
        for _ in range(count):
            with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
                if options:
                    out = torch.empty(1, 1, 4, device=DEVICE)
                    kernel("Q8_0").linear(x, rows[None], out, ids=ids, **options)
                else:
                    kernel("Q8_0").linear(x, rows, torch.empty(1, 4, device=DEVICE))
        return list(launches.waits)

    assert waits(prepared[0], 3) == [before, last, last]
    # Others' products do not count, nor do those that failed.
    assert waits(prepared[1], fails=True) == []
    assert waits(prepared[1], 2) == [before, last]
    # Expert numbers may be newer than the activations, if nobody says otherwise.
    assert waits(prepared[2], 2, settled=False) == [first, first]
    assert waits(prepared[2], settled=True) == [last]
    assert waits(prepared[3], 2, settled=True) == [before, last]
    launches.waits.clear()
    kernel("Q8_0").linear(many, long, torch.empty(8, 1, device=DEVICE))
    assert launches.waits == [before, last]
    assert many.settled
    monkeypatch.setattr(_linear, "_dependent", lambda device: False)
    assert waits(prepared[0]) == [never]


def test_linear_of_long_rows_and_eight_tokens() -> None:
    rows = finite_rows("Q8_0", 1, 130)
    x = normal(7, 130 * 32)
    out = torch.full((7, 1), math.nan, device=DEVICE)
    kernel("Q8_0").linear(x, rows, out)
    assert error("Q8_0", rows, x, out) < 5e-4


def test_linear_refuses_what_it_cannot() -> None:
    rows = finite_rows("Q4_0", 2, 2)
    with pytest.raises(ValueError, match="at most 8 rows"):
        kernel("Q4_0").linear(torch.ones(9, 64, device=DEVICE), rows, torch.empty(9, 2, device=DEVICE))
    other = _linear.prepare(torch.ones(1, 64, device=DEVICE), kernel("MXFP4").ORDER)
    with pytest.raises(ValueError, match="order"):
        kernel("Q4_0").linear(other, rows, torch.empty(1, 2, device=DEVICE))


def test_linear_of_planes() -> None:
    rows = finite_rows("F8_E4M3_B128", 3, 3, lead=1)
    codes, exponents, _ = planes = kernel("F8_E4M3_B128").split(rows)
    assert (codes.shape, exponents.shape) == ((3, 384), (3, 3))
    x = normal(2, 384)
    out = torch.full((2, 3), math.nan, device=DEVICE)
    kernel("F8_E4M3_B128").linear(x, rows, out, planes=planes)
    assert error("F8_E4M3_B128", rows, x, out) < LIMITS["F8_E4M3_B128"]


def test_linear_keeps_extremes() -> None:
    """A large activation beside small ones, a group of zeros, and what is not finite."""
    rows = finite_rows("Q8_0", 4, 16)
    x = normal(3, 512)
    x[0, 5] = 1e4
    x[1, :256] = 0
    x[2, 300] = math.inf
    out = torch.full((3, 4), 0.0, device=DEVICE)
    kernel("Q8_0").linear(x, rows, out)
    assert error("Q8_0", rows, x[:2], out[:2]) < 5e-4
    assert torch.isnan(out[2]).all()


@pytest.mark.parametrize("name", ["MXFP4", "F8_E4M3_B128"])
def test_experts(name: str) -> None:
    block_len = types.get(name).layout.block_len
    rows = finite_rows(name, 4 * 3, 2).view(4, 3, -1)
    x = normal(2, 2 * block_len)
    ids = torch.tensor([[3, 0], [1, 3]], dtype=torch.int32, device=DEVICE)
    planes = [None, kernel(name).split(rows)] if hasattr(kernel(name), "split") else [None]
    for parts in planes:
        out = torch.full((2, 2, 3), math.nan, device=DEVICE)
        experts.linear(x, rows, ids, out, name, planes=parts)
        for token in range(2):
            for k in range(2):
                assert error(name, rows[int(ids[token, k])], x[token : token + 1], out[token, k][None]) < LIMITS[name]


@pytest.mark.parametrize(("dtype", "number"), [(torch.int32, 4), (torch.int64, 4), (torch.int64, 1 << 32)])
def test_no_expert_of_that_number(dtype: torch.dtype, number: int) -> None:
    rows = finite_rows("MXFP4", 4 * 3, 2).view(4, 3, -1)
    ids = torch.tensor([[3, number], [-1, 1]], dtype=dtype, device=DEVICE)
    out = torch.zeros(2, 2, 3, device=DEVICE)
    experts.linear(normal(2, 64), rows, ids, out, "MXFP4")
    assert torch.isnan(out).all(-1).tolist() == [[False, True], [True, False]]
    assert torch.isfinite(out[0, 0]).all()
    assert torch.isfinite(out[1, 1]).all()


def test_activations_in_fp8() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 256, generator=generator) * torch.logspace(-8, 8, 256)).to(DEVICE)
    x[1, 128:] = 0
    codes, scales = _scaled.quantize_activations(x)
    assert scales.shape == (3, 2)
    assert scales.stride() == (1, 3)
    blocks = x.cpu().unflatten(1, (2, 128))
    largest = blocks.abs().amax(-1).clamp(min=1e-30)
    np.testing.assert_allclose(scales.cpu().numpy(), (largest / 448).numpy(), rtol=1e-6)
    wanted = (blocks * (448 / largest)[..., None]).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = codes.cpu().float().unflatten(1, (2, 128)).numpy()
    # One rounding of a quotient may fall on the other side of a tie.
    np.testing.assert_allclose(got, wanted, rtol=0.126, atol=2.0**-9)
    assert (got == wanted).mean() > 0.99


def test_scales_of_weights() -> None:
    shared = torch.arange(100, 130, 5, dtype=torch.uint8, device=DEVICE).view(2, 3)
    scales = _scaled.weight_scales(shared.repeat_interleave(128, 0)[:200])
    assert scales.shape == (2, 3)
    assert scales.stride() == (4, 1)
    assert torch.equal(scales, torch.exp2(shared.float() - 127))
    own = torch.tensor([[0, 1], [254, 127]], dtype=torch.uint8, device=DEVICE)
    scales = _scaled.weight_scales(own)
    assert scales.shape == (2, 2)
    assert scales.stride() == (1, 2)
    assert scales.flatten().tolist() == [2.0**-127, 2.0**-126, 2.0**127, 1.0]


def test_thresholds_name_every_fused_type() -> None:
    fused = {name for name in TYPES if hasattr(kernel(name), "linear")}
    assert set(_thresholds.THRESHOLDS) == fused == set(TYPES)
    assert _thresholds.choose("Q4_0", 1, 64, 64) == "fused"
    assert _thresholds.choose("Q4_0", 4096, 64, 64) == "workspace"
    assert _thresholds.choose("F8_E4M3_B128", 4096, 64, 128) == "fp8"
    assert _thresholds.choose("F8_E4M3_B128", 4096, 63, 128) == "workspace"
    assert _thresholds.choose("Q1_0", 1, 64, 128) == "workspace"


def test_every_kernel_belongs_to_a_type() -> None:
    names = {codec.name for codec in types.all_codecs() if codec.has_cuda}
    assert names == set(TYPES)
    for name in TYPES:
        assert importlib.import_module(f"ggufx.kernels.cuda.{name.lower()}") is kernel(name)


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", TYPES)
def test_decode_large(name: str, dtype: Any) -> None:
    block_len = types.get(name).layout.block_len
    for n_rows, row_len, lead in ((300, 4096, 0), (7, 65536, 0), (129, 5 * block_len, 3)):
        rows = random_rows(name, n_rows, row_len // block_len, lead)
        out = torch.full((n_rows, row_len), POISON, dtype=dtype, device=DEVICE)
        kernel(name).decode(rows, out)
        assert_exact(name, rows, out)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("name", ["Q8_0", "IQ4_KS", "F8_E4M3_B128"])
def test_past_two_gigabytes(name: str) -> None:
    """Offsets of 64 bits: rows, and what is decoded, lie beyond 2^31 bytes."""
    layout = types.get(name).layout
    row_len = 65536
    row_nbytes = layout.row_nbytes(row_len)
    n_rows = (1 << 31) // row_nbytes + 100
    few = finite_rows(name, 50, row_len // layout.block_len)
    rows = torch.zeros(n_rows, row_nbytes, dtype=torch.uint8, device=DEVICE)
    rows[-50:] = few
    out = torch.full((n_rows, row_len), math.nan, dtype=torch.bfloat16, device=DEVICE)
    kernel(name).decode(rows, out)
    assert_exact(name, few, out[-50:])
    assert not torch.isnan(out[::97]).any()
    x = normal(2, row_len).bfloat16()
    product = torch.full((2, n_rows), math.nan, device=DEVICE)
    kernel(name).linear(x, rows, product)
    assert error(name, few, x, product[:, -50:]) < LIMITS[name]
    assert not torch.isnan(product).any()


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("name", TYPES)
def test_linear_large(name: str, batch: int) -> None:
    block_len = types.get(name).layout.block_len
    for n_rows, row_len in ((257, 4096), (33, 9 * block_len), (18, 16384)):
        rows = finite_rows(name, n_rows, row_len // block_len)
        x = normal(batch, row_len).bfloat16()
        for parts in (None, kernel(name).split(rows)) if hasattr(kernel(name), "split") else (None,):
            out = torch.full((batch, n_rows), math.nan, device=DEVICE, dtype=torch.bfloat16)
            kernel(name).linear(x, rows, out, planes=parts)
            assert error(name, rows, x, out) < 3e-3


@pytest.mark.cuda
@pytest.mark.skipif(not _scaled.supported(torch.device(DEVICE)), reason="no block-scaled FP8 product")
@pytest.mark.parametrize("shared", [True, False])
def test_fp8_product(shared: bool) -> None:
    rows = finite_rows("F8_E4M3_B128", 256, 4)
    if shared:
        rows[:, ::129] = rows[::128, ::129].repeat_interleave(128, 0)
    planes = kernel("F8_E4M3_B128").split(rows)
    x = normal(40, 512).bfloat16()
    codes, scales = _scaled.quantize_activations(x)
    quantized = (codes.float().unflatten(1, (-1, 128)) * scales[..., None]).flatten(1)
    for parts in (planes, planes[:2], planes[:2]):
        assert error("F8_E4M3_B128", rows, quantized, _scaled.linear_fp8(x, parts)) < 3e-3
