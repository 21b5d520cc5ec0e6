"""What torch sees: operations, shapes without data, graphs without breaks, gradients, modules and their state."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import VECTORS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ggufx.torch as gt
from ggufx import kernels, types
from ggufx.errors import CodecError, UnknownType, UnsupportedType
from ggufx.torch import ops

TYPES = ["Q4_0", "Q6_K", "IQ2_KS", "MXFP4", "F8_E4M3_B128", "BF16"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests may have switched on for Triton must not decide how CPU tensors are decoded here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def weight(type_name: str, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> gt.GGUFTensor:
    """Return a tensor of blocks of the C libraries' first vector row, normal values: no encoder needs to be compiled."""
    codec, rng = types.get(type_name), np.random.default_rng(seed)
    layout = codec.layout
    if type_name in ("BF16", "F16", "F8_E4M3_B128"):
        row = codec.encode(np.random.default_rng(8).standard_normal((1, 1024)), use_kernel=False)
    else:
        with np.load(VECTORS / f"{type_name.lower()}.npz") as archive:
            row = archive["packed"][:1]
    headers, blocks = layout.split(row)
    packed = np.empty((*shape[:-1], layout.row_nbytes(shape[-1])), np.uint8)
    target_headers, target = layout.split(packed.reshape(-1, packed.shape[-1]))
    target[...] = rng.choice(blocks[0], target.shape)
    if target_headers is not None:
        target_headers[...] = headers
    return gt.GGUFTensor(torch.from_numpy(packed), codec, dtype=dtype)


def activations(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# linear -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 9)], ids=str)
def test_linear_is_the_decoded_product(name: str, batch: tuple[int, ...], device: str) -> None:
    w, x, bias = weight(name, 24, 512).to(device), activations(*batch, 512).to(device), activations(24).to(device)
    expected = x.double() @ w.dequantize(torch.float64).T
    for b in (None, bias):
        y = gt.linear(x, w, b)
        assert y.shape == (*batch, 24)
        assert y.dtype == x.dtype
        exact = expected if b is None else expected + b
        if device == "cuda" and name == "F8_E4M3_B128":
            # Few activations are rounded to binary16, to 2^-11 of each.
            bound = x.double().abs() @ w.dequantize(torch.float64).abs().T * 2**-11
            assert ((y.double() - exact).abs() <= bound + 1e-5).all()
        else:
            # As far as an ordinary float32 product is from float64's.
            torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 9)], ids=str)
def test_linears_are_linear_of_each(batch: tuple[int, ...], device: str) -> None:
    # Types whose products want activations in different orders, one twice, planes, and none at all.
    ws = [weight(name, rows, 512).to(device) for name, rows in (("Q4_0", 24), ("IQ2_KS", 8), ("Q4_0", 40), ("F16", 3))]
    ws.append(weight("F8_E4M3_B128", 16, 512).to(device).with_planes())
    x, bias = activations(*batch, 512).to(device).requires_grad_(), activations(40).to(device)
    biases = [None, None, bias, None, None]
    ys, expected = gt.linears(x, ws, biases), [gt.linear(x, w, b) for w, b in zip(ws, biases, strict=True)]
    assert [y.shape for y in ys] == [(*batch, w.shape[0]) for w in ws]
    for y, e in zip(ys, expected, strict=True):
        # On a GPU a product that need not wait is cut into other programs: its sums are of another order.
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-3) if device == "cuda" else torch.testing.assert_close(
            y, e, rtol=0, atol=0
        )
    (grad,) = torch.autograd.grad(sum((y.square().sum() for y in ys), torch.zeros((), device=device)), x)
    whole = sum((e.square().sum() for e in expected), torch.zeros((), device=device))
    torch.testing.assert_close(grad, torch.autograd.grad(whole, x)[0], rtol=1e-4, atol=1e-3 * grad.abs().max().item())
    assert gt.linears(x, []) == []


@pytest.mark.cuda
def test_linears_in_a_graph_read_what_was_prepared_in_it() -> None:
    # Products that do not wait for their activations: the graph's preparation must be complete before the second begins.
    ws = [weight("MXFP4", 1024, 4096, seed=seed).to("cuda") for seed in range(5)]
    x = torch.zeros(1, 4096, device="cuda", dtype=torch.bfloat16)
    given = [activations(1, 4096, seed=seed, dtype=torch.bfloat16).to("cuda") for seed in range(4)]
    expected = [[v.double() @ w.dequantize(torch.float64).T for w in ws] for v in given]
    gt.linears(x, ws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gt.linears(x * 0, ws)
        ys = [y.clone() for y in gt.linears(x * 2, ws)]
    for turn in range(200):
        x.copy_(given[turn % 4])
        graph.replay()
        for y, e in zip(ys, expected[turn % 4], strict=True):
            assert (y.double() - 2 * e).norm() < 4e-3 * (2 * e).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_in_half_precision_is_torchs_own(dtype: torch.dtype) -> None:
    w, x = weight("Q8_0", 24, 256), activations(3, 256, dtype=dtype)
    assert torch.equal(gt.linear(x, w), x @ w.dequantize(dtype).T)


def test_a_matrix_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight("Q4_0", 50, 64), activations(3, 64).requires_grad_()
    expected, (expected_grad,) = gt.linear(x, w), torch.autograd.grad(gt.linear(x, w).square().sum(), x)
    monkeypatch.setattr(ops, "_WORKSPACE_LEN_CPU", 7 * 64)
    torch.testing.assert_close(gt.linear(x, w), expected)
    torch.testing.assert_close(torch.autograd.grad(gt.linear(x, w).square().sum(), x)[0], expected_grad)


@given(data=st.data())
def test_linear_of_any_shape(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["Q4_0", "IQ2_KS", "F16"]))
    w = weight(name, data.draw(st.integers(0, 5)), 256 * data.draw(st.integers(1, 2)))
    x = activations(*data.draw(st.lists(st.integers(0, 3), max_size=3)), w.shape[1])
    torch.testing.assert_close(gt.linear(x, w), torch.nn.functional.linear(x, w.dequantize()), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    w = weight("Q4_0", 4, 64)
    with pytest.raises(CodecError, match=r"activations \[2, 32\] do not fit Q4_0 rows of 64 elements"):
        gt.linear(activations(2, 32), w)
    with pytest.raises(CodecError, match="must be floats"):
        gt.linear(torch.ones((2, 64), dtype=torch.int32), w)
    with pytest.raises(CodecError, match="linear takes a matrix"):
        gt.linear(activations(2, 64), weight("Q4_0", 2, 2, 64))
    with pytest.raises(CodecError, match="linears takes matrices"):
        gt.linears(activations(2, 64), [w, weight("Q4_0", 2, 2, 64)])
    with pytest.raises(CodecError, match=r"activations \[2, 64\] do not fit Q8_0 rows of 128 elements"):
        gt.linears(activations(2, 64), [w, weight("Q8_0", 2, 128)])
    with pytest.raises(CodecError, match="1 matrices have 2 biases"):
        gt.linears(activations(2, 64), [w], [None, None])
    with pytest.raises(CodecError, match=r"must be torch\.uint8"):
        torch.ops.ggufx.dequantize(torch.zeros(18), "Q4_0", torch.float32)
    with pytest.raises(CodecError, match="17 bytes"):
        torch.ops.ggufx.dequantize(torch.zeros(17, dtype=torch.uint8), "Q4_0", torch.float32)
    with pytest.raises(UnsupportedType):
        torch.ops.ggufx.dequantize(torch.zeros(60, dtype=torch.uint8), "IQ1_KT", torch.float32)


@pytest.mark.parametrize("planes", [False, True])
def test_a_bias_that_does_not_fit_is_refused(planes: bool) -> None:
    w = weight("F8_E4M3_B128", 4, 128)
    w, x = w.with_planes() if planes else w, activations(3, 128)
    stored = gt.GGUFTensor(torch.zeros(16, dtype=torch.uint8), types.get("F32"), (4,))
    for call in (gt.linear, lambda x, w, b: gt.linears(x, [w], [b]), lambda x, w, b: gt.GGUFLinear(w, b)(x)):
        for shape in ((1,), (3, 4), (5,)):
            with pytest.raises(CodecError, match=r"bias has the shape .*, expected \[4\]"):
                call(x, w, torch.zeros(shape))
        with pytest.raises(TypeError, match=r"a bias is a torch\.Tensor, got GGUFTensor; dequantize\(\) it first"):
            call(x, w, stored)


def test_what_is_no_packed_tensor_or_no_tensor_is_refused() -> None:
    w, plain = weight("Q4_0", 4, 64), torch.zeros(4, 64)
    for module in (gt.GGUFLinear, gt.GGUFEmbedding, gt.GGUFExperts):
        with pytest.raises(TypeError, match=f"{module.__name__} takes a weight as a GGUFTensor, got Tensor"):
            module(plain)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear takes a matrix \(GGUFTensor\), got Tensor"):
        gt.linear(activations(2, 64), plain)  # type: ignore[arg-type]
    for call in (lambda x: gt.linear(x, w), lambda x: gt.linears(x, [w]), gt.GGUFLinear(w)):
        with pytest.raises(TypeError, match=r"activations are a torch\.Tensor, got ndarray"):
            call(np.zeros((2, 64), np.float32))
        with pytest.raises(CodecError, match="activations must be floats of 16, 32 or 64 bits"):
            call(activations(2, 64).to(torch.float8_e4m3fn))
        with pytest.raises(CodecError, match="activations are on meta, Q4_0 weights on cpu"):
            call(activations(2, 64).to("meta"))
    unknown = gt.GGUFTensor(torch.zeros(64, dtype=torch.uint8), None, (2, 32), name="mystery", type="id 999")
    with pytest.raises(UnknownType, match="'mystery' is of type id 999"):
        gt.linear(activations(2, 32), unknown)


def test_dequantize_gives_what_the_cpus_decoder_gives_and_nothing_else() -> None:
    w = weight("Q4_0", 4, 64)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(CodecError, match=f"Q4_0 decodes to torch.float32 .*, not to {dtype}"):
            w.dequantize(dtype)
    for wrong in (lambda: w.dequantize("bfloat16"), lambda: w.to(dtype="bfloat16")):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"dtype is a torch\.dtype or None, got 'bfloat16'"):
            wrong()


def test_matrices_may_come_from_generators() -> None:
    w, x, bias = weight("Q4_0", 4, 64), activations(2, 64), activations(2, 4)
    one, other = gt.linears(x, (w for _ in range(2)), iter(bias))  # type: ignore[arg-type]
    assert torch.equal(one, gt.linear(x, w, bias[0]))
    assert torch.equal(other, gt.linear(x, w, bias[1]))


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("shape", [(0, 256), (4, 0)], ids=str)
def test_empty_matrices_are_multiplied_and_have_gradients(shape: tuple[int, int], planes: bool) -> None:
    w = gt.GGUFTensor(torch.zeros(0, dtype=torch.uint8), types.get("F8_E4M3_B128"), shape)
    w, x, bias = w.with_planes() if planes else w, activations(3, shape[1]).requires_grad_(), activations(shape[0])
    bias.requires_grad_()
    assert w.packed.shape == (shape[0], shape[1] * 129 // 128)
    for y in (gt.linear(x, w, bias), gt.linears(x, [w, w], [bias, None])[0]):
        assert torch.equal(y, bias.expand(3, -1))
        grads = torch.autograd.grad(y.sum(), (x, bias))
        assert [grad.shape for grad in grads] == [x.shape, bias.shape]


# What torch is told -----------------------------------------------------------------------------------------------------


def test_the_operations_keep_torchs_contract() -> None:
    w, x, bias = weight("IQ2_KS", 8, 256), activations(3, 256).requires_grad_(), activations(8).requires_grad_()
    torch.library.opcheck(torch.ops.ggufx.dequantize.default, (w.packed, w.type, torch.bfloat16))
    torch.library.opcheck(torch.ops.ggufx.linear.default, (x, w.packed, w.type, bias))
    f8 = weight("F8_E4M3_B128", 8, 256).with_planes()
    torch.library.opcheck(torch.ops.ggufx.linear_planes.default, (x, list(f8.planes or ()), f8.type, 8, bias))
    three = (
        x,
        [w.packed, *(f8.planes or ()), w.packed],
        [1, len(f8.planes or ()), 1],
        "IQ2_KS,F8_E4M3_B128,IQ2_KS",
        [8] * 3,
    )
    torch.library.opcheck(torch.ops.ggufx.linears.default, three)
    stacked, ids = weight("Q4_0", 4, 8, 256), torch.tensor([[0, 3], [3, 1], [1, 3]])
    torch.library.opcheck(torch.ops.ggufx.experts.default, (x, stacked.packed, ids, stacked.type))


class Block(nn.Module):
    """An embedding, a layer, routed experts: everything there is."""

    def __init__(self, planes: bool = False) -> None:
        super().__init__()
        up = weight("F8_E4M3_B128", 256, 256, seed=3)
        self.tokens = gt.GGUFEmbedding(weight("Q8_0", 40, 256, seed=2))
        self.up = gt.GGUFLinear(up.with_planes() if planes else up, activations(256))
        self.experts = gt.GGUFExperts(weight("Q4_0", 4, 32, 256, seed=4))

    def forward(self, ids: Tensor, routed: Tensor) -> Tensor:
        x = torch.relu(self.up(self.tokens(ids)))
        return self.experts(x, routed).sum(1)


IDS, ROUTED = torch.tensor([5, 39, 5, 0]), torch.tensor([[0, 1], [3, 1], [0, 1], [1, 0]])


@pytest.mark.parametrize("planes", [False, True])
def test_a_model_compiles_and_exports_in_one_graph(planes: bool) -> None:
    block = Block(planes)
    expected = block(IDS, ROUTED)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, ROUTED), expected)
    exported = torch.export.export(block, (IDS, ROUTED))
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"ggufx.dequantize.default", "ggufx.experts.default"} <= names
    assert f"ggufx.linear{'_planes' if planes else ''}.default" in names
    torch.testing.assert_close(exported.module()(IDS, ROUTED), expected)


def test_an_exported_model_has_its_planes_once_and_reads_them_from_its_state() -> None:
    layer, x = gt.GGUFLinear(weight("F8_E4M3_B128", 8, 256).with_planes()), activations(3, 256)
    exported = torch.export.export(layer, (x,))
    assert not exported.constants
    assert torch.equal(exported.module()(x), layer(x))
    other = {"codes": torch.zeros(8, 256, dtype=torch.uint8)}
    assert not torch.func.functional_call(layer, other, (x,)).any()


def test_a_compiled_model_takes_other_batches_and_gradients() -> None:
    layer = gt.GGUFLinear(weight("Q4_0", 16, 64))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5, 9):
        x = activations(batch, 64).requires_grad_()
        y = compiled(x * 2)
        torch.testing.assert_close(y, layer(x * 2))
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(layer(x * 2).square().sum(), x)[0])


def test_functions_of_packed_tensors_compile_and_batches_stay_free() -> None:
    w = weight("Q4_0", 16, 64)

    def function(x: Tensor) -> Tensor:
        return gt.linear(x, w) + w[:3].dequantize().sum() + sum(gt.linears(x, [w, w]))

    x = activations(3, 64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(gt.GGUFLinear(w), (x,), dynamic_shapes=batch)
    torch.testing.assert_close(exported.module()(activations(7, 64)), gt.linear(activations(7, 64), w))


@pytest.mark.parametrize("planes", [False, True])
def test_autocast_casts_as_for_torchs_own_layers(planes: bool) -> None:
    w, bias, x = weight("F8_E4M3_B128", 8, 128), activations(8), activations(3, 128)
    w = w.with_planes() if planes else w
    experts, ids = gt.GGUFExperts(weight("Q4_0", 4, 8, 128)), torch.tensor([[0], [1], [0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert gt.linear(x, w, bias).dtype == gt.GGUFLinear(w, bias)(x).dtype == torch.bfloat16
        assert experts(x, ids).dtype == torch.bfloat16
        assert gt.linear(x.double(), w).dtype == torch.float64
    assert gt.linear(x, w, bias).dtype == torch.float32


# Gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [False, True])
def test_gradients_are_those_of_the_decoded_weight(planes: bool) -> None:
    w = weight("F8_E4M3_B128", 12, 256)
    x, bias = activations(2, 3, 256).requires_grad_(), activations(12).requires_grad_()
    y = gt.linear(x, w.with_planes() if planes else w, bias)
    expected = torch.nn.functional.linear(x, w.dequantize(), bias)
    ours = torch.autograd.grad(y.square().sum(), (x, bias))
    theirs = torch.autograd.grad(expected.square().sum(), (x, bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert gt.linear(x.detach(), w).grad_fn is None


@pytest.mark.parametrize("name", ["linear", "planes", "linears", "experts"])
def test_gradients_have_gradients(name: str) -> None:
    w, ids = weight("F8_E4M3_B128", 6, 128), torch.tensor([[0, 1], [1, 1], [3, 0]])
    functions = {
        "linear": lambda x: gt.linear(x, w),
        "planes": lambda x: gt.linear(x, w.with_planes(), activations(6).double()),
        "linears": lambda x: torch.cat(gt.linears(x, [w, w.with_planes(), weight("Q4_0", 4, 128)]), 1),
        "experts": lambda x: gt.GGUFExperts(weight("Q4_0", 4, 8, 128))(x, ids),
    }
    x = activations(3, 128, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: functions[name](x).square(), (x,), fast_mode=True)


def test_a_lora_step_on_a_packed_base_learns() -> None:
    torch.manual_seed(0)
    base = gt.GGUFLinear(weight("IQ4_KS", 32, 256), activations(32))
    down, up = nn.Linear(256, 4, bias=False), nn.Linear(4, 32, bias=False)
    nn.init.zeros_(up.weight)
    before = base.get_buffer("weight").clone()
    assert not list(base.parameters())
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2)
    x, target = activations(64, 256), activations(64, 32, seed=9)
    losses = []
    for _ in range(20):
        adapted = up(down(x))
        # Through the frozen weight a second time: its gradient reaches the adapter, too.
        loss = (adapted - target).square().mean() + 1e-4 * base(adapted.repeat(1, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert down.weight.grad is not None
    assert down.weight.grad.abs().sum() > 0
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(base.get_buffer("weight"), before)


# Experts and embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 8, 30])
def test_experts_are_the_decoded_products(tokens: int, device: str) -> None:
    w = weight("MXFP4", 6, 8, 64).to(device)
    x = activations(tokens, 64).to(device).requires_grad_()
    ids = torch.randint(0, 6, (tokens, 3), generator=torch.Generator().manual_seed(0)).to(device)
    experts = gt.GGUFExperts(w)
    expected = torch.einsum("tc,tkrc->tkr", x, w.dequantize()[ids])
    y = experts(x, ids)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-2)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-3, atol=1e-2)


def test_experts_take_a_row_for_each_of_them() -> None:
    w, x, ids = weight("MXFP4", 6, 8, 64), activations(5, 2, 64), torch.tensor([[0, 1], [2, 0], [5, 5], [1, 0], [3, 2]])
    expected = torch.einsum("tkc,tkrc->tkr", x, w.dequantize()[ids])
    torch.testing.assert_close(gt.GGUFExperts(w)(x, ids), expected)
    with pytest.raises(CodecError, match="do not fit expert ids"):
        gt.GGUFExperts(w)(x, ids[:, :1])


def test_only_routed_experts_are_decoded_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, seen = weight("Q4_0", 100, 8, 64), []
    decode_rows = ops.decode_rows

    def counting(codec: types.Codec, rows: Tensor, out: Tensor) -> None:
        seen.append(rows.shape[0])
        decode_rows(codec, rows, out)

    monkeypatch.setattr(ops, "decode_rows", counting)
    gt.GGUFExperts(w)(activations(5, 64), torch.tensor([[7, 99], [7, 3], [99, 7], [3, 99], [3, 7]]))
    assert seen == [8, 8, 8]
    seen.clear()
    gt.GGUFEmbedding(weight("Q4_0", 1000, 64))(torch.tensor([[3, 900]]))
    assert seen == [2]


def test_an_expert_that_is_not_there_is_an_index_error() -> None:
    w = weight("Q4_0", 4, 8, 64)
    for bad in (4, -1):
        with pytest.raises(IndexError, match=f"expert id {bad} is not one of 4"):
            gt.GGUFExperts(w)(activations(1, 64), torch.tensor([[0, bad]]))
    for wrong in (torch.tensor([[0.9, 0.1]]), torch.tensor([[True]])):
        with pytest.raises(CodecError, match="expert ids must be integers"):
            gt.GGUFExperts(w)(activations(1, 64), wrong)
    with pytest.raises(CodecError, match="expert ids are on meta, Q4_0 weights on cpu"):
        gt.GGUFExperts(w)(activations(1, 64), torch.tensor([[0]], device="meta"))
    with pytest.raises(CodecError, match=r"expected activations \[T, row_len\]"):
        gt.GGUFExperts(w)(activations(2, 64), torch.tensor([0, 1]))
    with pytest.raises(CodecError, match="expected activations"):
        torch.ops.ggufx.experts(activations(2, 64), w.packed, torch.tensor([[0]]), "Q4_0")


def test_no_tokens_are_no_work() -> None:
    assert gt.GGUFExperts(weight("Q4_0", 4, 8, 64))(activations(0, 64), torch.empty((0, 2), dtype=torch.int64)).shape == (
        0, 2, 8,
    )  # fmt: skip


def test_an_embedding_gives_the_rows() -> None:
    w = weight("Q6_K", 50, 256)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(gt.GGUFEmbedding(w)(ids), w.dequantize()[ids])
    assert gt.GGUFEmbedding(w)(ids[:0]).shape == (0, 2, 256)
    with pytest.raises(IndexError):
        gt.GGUFEmbedding(w)(torch.tensor([50]))
    assert gt.GGUFEmbedding(w, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16
    assert gt.GGUFEmbedding(weight("Q6_K", 50, 256, dtype=torch.float16))(ids).dtype == torch.float16


def test_modules_without_memory_tell_shapes() -> None:
    x, ids = torch.empty((3, 128), device="meta"), torch.zeros((3, 2), dtype=torch.int64, device="meta")
    linear = gt.GGUFLinear.empty(128, 16, "Q4_0", bias=True, device="meta")
    assert linear(x).shape == (3, 16)
    assert gt.GGUFEmbedding.empty(10, 64, "Q4_0", device="meta", dtype=torch.bfloat16)(ids).shape == (3, 2, 64)
    assert gt.GGUFExperts.empty(4, 128, 8, "Q4_0", device="meta")(x, ids).shape == (3, 2, 8)
    real = gt.GGUFLinear(weight("Q4_0", 16, 128), torch.zeros(16))
    linear.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(linear(activations(1, 128)), real(activations(1, 128)))


# State ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [False, True])
def test_a_state_dict_goes_there_and_back(planes: bool, tmp_path: Path) -> None:
    block, other = Block(planes), Block(planes)
    for buffer in other.buffers():
        buffer.zero_()
    state = block.state_dict()
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(IDS, ROUTED), block(IDS, ROUTED))
    save_file(state, tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(IDS, ROUTED), block(IDS, ROUTED))


def test_a_state_loads_into_empty_modules() -> None:
    linear = gt.GGUFLinear(weight("Q4_0", 16, 64), activations(16))
    empty = gt.GGUFLinear.empty(64, 16, "q4_0", bias=True)
    empty.load_state_dict(linear.state_dict())
    assert torch.equal(empty(activations(2, 64)), linear(activations(2, 64)))
    embedding = gt.GGUFEmbedding.empty(10, 64, "Q4_0", dtype=torch.bfloat16)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16
    assert gt.GGUFExperts.empty(3, 64, 8, "Q4_0")(activations(1, 64), torch.tensor([[2]])).shape == (1, 1, 8)


def test_bytes_of_another_type_are_not_taken_for_numbers() -> None:
    # Both have 18 bytes for 32 elements.
    q4, nl = gt.GGUFLinear(weight("Q4_0", 4, 64)), gt.GGUFLinear(weight("IQ4_NL", 4, 64))
    before = q4.get_buffer("weight").clone()
    with pytest.raises(CodecError, match="the state is of type IQ4_NL, the module of type Q4_0"):
        q4.load_state_dict(nl.state_dict())
    assert torch.equal(q4.get_buffer("weight"), before)


def test_planes_take_a_state_without_the_types_name() -> None:
    layer, x = gt.GGUFLinear(weight("F8_E4M3_B128", 8, 128).with_planes()), activations(2, 128)
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "_extra_state"}
    moved = deepcopy(layer).to("meta")
    moved.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(moved(x), layer(x))
    # In two pieces, as large checkpoints come.
    moved.to("meta")
    for name, tensor in state.items():
        moved.load_state_dict({name: tensor}, strict=False, assign=True)
    assert torch.equal(moved(x), layer(x))


def test_modules_move_and_keep_their_bytes() -> None:
    linear = gt.GGUFLinear(weight("F8_E4M3_B128", 8, 128).with_planes())
    expected = linear.gguf().packed.clone()
    linear.to(torch.bfloat16)
    assert torch.equal(linear.gguf().packed, expected)
    assert repr(linear) == "GGUFLinear(F8_E4M3_B128[8, 128], planes)"
    assert repr(gt.GGUFLinear(weight("Q4_0", 8, 128))) == "GGUFLinear(Q4_0[8, 128])"
    assert linear.to("meta").gguf().device.type == "meta"


def test_a_cast_says_what_an_embedding_gives() -> None:
    embedding = nn.Sequential(gt.GGUFEmbedding(weight("Q4_0", 8, 128)), nn.Linear(128, 4)).to(torch.bfloat16)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16
    numbers = gt.GGUFTensor(torch.zeros((4, 8), dtype=torch.uint8), types.get("I32"))
    assert gt.GGUFEmbedding(numbers).half()(torch.tensor([1])).dtype == torch.int32


def test_a_cut_with_gaps_is_copied_once(tmp_path: Path) -> None:
    w, x, ids = weight("Q4_0", 4, 8, 64), activations(3, 64), torch.tensor([[0], [3], [1]])
    experts = gt.GGUFExperts(w[:, :4])
    assert experts.get_buffer("weight").is_contiguous()
    assert torch.equal(experts(x, ids), gt.GGUFExperts(w)(x, ids)[..., :4])
    save_file(experts.state_dict(), tmp_path / "state.safetensors")
    assert gt.GGUFExperts(w).get_buffer("weight").data_ptr() == w.packed.data_ptr()


def test_modules_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(CodecError, match="GGUFExperts takes a weight of 3 axes"):
        gt.GGUFExperts(weight("Q4_0", 4, 64))
    with pytest.raises(CodecError, match=r"bias has the shape \[3\], expected \[4\]"):
        gt.GGUFLinear(weight("Q4_0", 4, 64), torch.zeros(3))


# The way that is chosen -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """Kernels in plain torch under the names of CUDA ones, where Triton's interpreter would run; tells who was called."""
    called: dict[str, list[str]] = {"ways": []}
    modules: dict[str, ModuleType] = {}

    def module(name: str, **verbs: object) -> None:
        modules[name] = ModuleType(name)
        for verb, function in verbs.items():
            setattr(modules[name], verb, function)

    def decode(rows: Tensor, out: Tensor) -> None:
        called["ways"].append("decode")
        out.copy_(torch.from_numpy(types.get("Q4_0").decode(rows.numpy())))

    def prepare(x: Tensor, order: int) -> tuple[int, Tensor]:
        called["ways"].append(f"prepare {order}")
        return order, x

    def linear(x: Tensor | tuple[int, Tensor], rows: Tensor, out: Tensor, *, planes: object = None) -> None:
        called["ways"].append("fused")
        if isinstance(x, tuple):
            order, x = x
            assert order == 1
        assert x.is_contiguous()
        assert rows.is_contiguous()
        assert x.shape[0] <= 8
        out.copy_(x @ torch.from_numpy(types.get("Q4_0").decode(rows.numpy())).to(x.dtype).T)

    def experts(x: Tensor, rows: Tensor, ids: Tensor, out: Tensor, type_name: str) -> None:
        called["ways"].append("experts")
        assert ids.dtype in (torch.int32, torch.int64)
        w = torch.from_numpy(types.get(type_name).decode(rows.numpy()))
        out.copy_(torch.einsum("tc,tkrc->tkr", x, w[ids.long()]))

    def split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales = rows.unflatten(-1, (-1, 129))[..., 1:].flatten(-2), rows[:, ::129].contiguous()
        # Column-major: a copy that loses the strides would be of no use to the kernel.
        return codes, scales, torch.exp2(scales.float() - 127).t().contiguous().t()

    def linear_of_planes(
        x: Tensor | tuple[int, Tensor], rows: Tensor, out: Tensor, *, planes: tuple[Tensor, ...]
    ) -> None:
        called["ways"].append("planes")
        if isinstance(x, tuple):
            order, x = x
            assert order == 5
        codes, _, scales = planes
        assert scales.dtype == torch.float32
        assert scales.stride(0) == 1
        weights = codes.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, 1)
        out.copy_(x @ weights.to(x.dtype).T)

    module("f8_e4m3_b128", linear=linear_of_planes, split=split, ORDER=5)
    module("q4_0", decode=decode, linear=linear, ORDER=1)
    module("_linear", prepare=prepare)
    module("experts", linear=experts)
    module("_thresholds", choose=lambda type_name, batch, rows, columns: called["table"][0])
    called["table"] = ["fused"]
    find = kernels.find

    def finding(name: str, *, cuda: bool = False) -> ModuleType | None:
        return modules.get(name.lower()) if cuda else find(name)

    monkeypatch.setattr(kernels, "find", finding)
    monkeypatch.setattr(type(types.get("Q4_0")), "has_cuda", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops._cuda_verb.cache_clear()
    yield called
    ops._cuda_verb.cache_clear()


def test_small_batches_are_fused_and_large_ones_are_not(fake_cuda: dict[str, list[str]]) -> None:
    w = weight("Q4_0", 24, 64)
    for batch, way in ((1, "fused"), (8, "fused"), (9, "decode")):
        x = activations(batch, 64, dtype=torch.bfloat16)
        y = gt.linear(x, w, activations(24, dtype=torch.bfloat16))
        assert fake_cuda["ways"].pop() == way
        expected = (x @ w.dequantize(torch.bfloat16).T) + activations(24, dtype=torch.bfloat16)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-1)
        fake_cuda["ways"].clear()
    fake_cuda["table"] = ["workspace"]
    gt.linear(activations(1, 64), w)
    assert fake_cuda["ways"] == ["decode"]
    # Nothing that the kernels do not write, and no type without one.
    gt.linear(activations(1, 64, dtype=torch.float64), w)
    gt.linear(activations(1, 64), weight("Q5_1", 4, 64))
    assert fake_cuda["ways"] == ["decode", "decode"]


def test_one_x_is_prepared_once_for_each_order(fake_cuda: dict[str, list[str]]) -> None:
    q4, f8, other = weight("Q4_0", 24, 256), weight("F8_E4M3_B128", 8, 256).with_planes(), weight("Q5_1", 3, 256)
    few = [q4, other, f8, q4, weight("Q4_0", 0, 256), f8]
    shared = ["prepare 1", "fused", "prepare 5", "planes", "fused", "planes"]
    for batch, ws, ways in ((2, few, shared), (0, few, []), (9, [q4, q4], ["decode", "decode"])):
        x = activations(batch, 256)
        fake_cuda["ways"].clear()
        ys = gt.linears(x, ws)
        assert fake_cuda["ways"] == ways
        for y, w in zip(ys, ws, strict=True):
            assert w.codec is not None
            expected = x @ torch.from_numpy(w.codec.decode(w.packed.numpy())).T
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-2)


def test_experts_of_few_tokens_are_one_launch(fake_cuda: dict[str, list[str]]) -> None:
    w, ids = weight("Q4_0", 5, 8, 64), torch.tensor([[4, 0], [0, 1]])
    expected = torch.einsum("tc,tkrc->tkr", activations(2, 64), w.dequantize()[ids])
    fake_cuda["ways"].clear()
    torch.testing.assert_close(gt.GGUFExperts(w)(activations(2, 64), ids), expected)
    assert fake_cuda["ways"] == ["experts"]
    with pytest.raises(IndexError, match="expert id 0 is not one of 0"):
        gt.GGUFExperts(w[:0])(activations(2, 64), ids)
    gt.GGUFExperts(w)(activations(9, 64), ids.repeat(5, 1)[:9])
    # Expert 0 has nine tokens, the other two no more than a fused product takes.
    assert fake_cuda["ways"] == ["experts", "decode", "fused", "fused"]


def test_what_a_kernel_adds_to_planes_is_neither_cast_nor_stored(fake_cuda: dict[str, list[str]]) -> None:
    w, x = weight("F8_E4M3_B128", 16, 256), activations(2, 256)
    expected = x @ torch.from_numpy(w.codec.decode(w.packed.numpy())).T
    layer = gt.GGUFLinear(w.with_planes())
    other = gt.GGUFLinear(weight("F8_E4M3_B128", 16, 256, seed=9).with_planes())
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"codes", "scales", "_extra_state"}
    for module in (layer, other, layer.to(torch.bfloat16), deepcopy(layer)):
        torch.testing.assert_close(module(x), expected, rtol=1e-3, atol=1e-3)
    assert fake_cuda["ways"] == ["planes"] * 4
    moved = w.with_planes().to("meta").planes
    assert moved is not None
    assert len(moved) == 2
    assert w.with_planes().to(torch.float16).planes[2].stride(0) == 1  # type: ignore[index]


def test_no_kernels_no_choice() -> None:
    assert ops.choose("Q4_0", activations(1, 64), 24) == "workspace"
