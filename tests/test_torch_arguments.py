"""The registered operations refuse whatever does not fit, executed and traced alike, before a kernel uses it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import VECTORS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ggufx.torch as gt
from ggufx import types
from ggufx.errors import CodecError, UnknownType

OPS = torch.ops.ggufx


def rows(type_name: str, *shape: int) -> Tensor:
    """Return packed rows uint8 [*shape[:-1], row_nbytes] of the C library's first vector block, again and again."""
    codec = types.get(type_name)
    if type_name == "F8_E4M3_B128":
        one = codec.encode(np.linspace(-2, 2, 128, dtype=np.float32)[None])
    else:
        with np.load(VECTORS / f"{type_name.lower()}.npz") as archive:
            one = archive["packed"][:1, : codec.layout.row_nbytes(codec.layout.block_len)]
    row = np.tile(one[0], shape[-1] // codec.layout.block_len)
    return torch.from_numpy(np.broadcast_to(row, (*shape[:-1], row.size)).copy())


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


Q4 = rows("Q4_0", 6, 64)
STACK = rows("Q4_0", 4, 6, 64)
F8 = rows("F8_E4M3_B128", 6, 256)
# A kernel's own plane, which other tests' interpreter would add, is not wanted here.
CODES, SCALES = (gt.GGUFTensor(F8, types.get("F8_E4M3_B128")).with_planes().planes or ())[:2]
IDS = torch.tensor([[0, 3], [1, 2], [3, 0]])
F = "F8_E4M3_B128"
LONG = torch.zeros(6, 64, dtype=torch.int64)
SPARSE = torch.zeros(3, 64).to_sparse()

GOOD: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dequantize": (OPS.dequantize, (Q4, "Q4_0", torch.bfloat16)),
    "linear": (OPS.linear, (values(3, 64), Q4, "Q4_0", values(6))),
    "linear_grad": (OPS.linear_grad, (values(3, 6), Q4, "Q4_0")),
    "linear_planes": (OPS.linear_planes, (values(3, 256), [CODES, SCALES], F, 6, values(6))),
    "linear_planes_grad": (OPS.linear_planes_grad, (values(3, 6), [CODES, SCALES], F, 256)),
    "linears": (
        OPS.linears,
        (values(3, 256), [CODES, SCALES, rows("Q4_0", 2, 256)], [2, 1], f"{F},Q4_0", [6, 2]),
    ),
    "linears_grad": (
        OPS.linears_grad,
        ([values(3, 6), values(3, 2)], [CODES, SCALES, rows("Q4_0", 2, 256)], [2, 1], f"{F},Q4_0", [6, 2]),
    ),
    "experts": (OPS.experts, (values(3, 64), STACK, IDS, "Q4_0")),
    "experts_grad": (OPS.experts_grad, (values(3, 2, 6), STACK, IDS, "Q4_0")),
}

# Operation, number of the argument (or of one in a list), what stands there instead, and the words of the error.
WRONG: list[tuple[str, Any, Any, str]] = [
    ("dequantize", 0, Q4.float(), r"packed rows of Q4_0 must be torch.uint8, got torch.float32"),
    ("dequantize", 0, Q4[0, 0], r"must have at least one axis, got \[\]"),
    ("dequantize", 0, Q4[:, :-1].contiguous(), "35 bytes"),
    ("dequantize", 0, Q4.to_sparse(), "must be dense"),
    ("dequantize", 1, "Q4_9", "Q4_9"),
    ("dequantize", 2, torch.int32, "not to torch.int32"),
    ("linear", 0, values(3, 32), r"activations \[3, 32\] do not fit Q4_0 rows of 64 elements"),
    ("linear", 0, torch.tensor(1.0), r"activations \[\] do not fit"),
    ("linear", 0, LONG, "activations must be floats"),
    ("linear", 0, values(3, 64, dtype=torch.complex64), "activations must be floats"),
    ("linear", 0, SPARSE, "activations must be dense"),
    ("linear", 0, values(3, 64).to("meta"), "activations are on meta, Q4_0 weights on cpu"),
    ("linear", 1, STACK, r"packed rows of Q4_0 must have \[R, row_nbytes\], got \[4, 6, 36\]"),
    ("linear", 1, STACK[None], r"got \[1, 4, 6, 36\]"),
    ("linear", 1, Q4[0], r"got \[36\]"),
    ("linear", 1, Q4.to(torch.int8), "must be torch.uint8, got torch.int8"),
    ("linear", 2, "F8_E4M3_B128", "36 bytes"),
    ("linear", 3, values(5), r"bias has the shape \[5\], expected \[6\]"),
    ("linear", 3, values(6, 1), r"bias has the shape \[6, 1\]"),
    ("linear", 3, values(6).double(), "bias is torch.float64 on cpu, activations are torch.float32"),
    ("linear", 3, values(6).to("meta"), "bias is torch.float32 on meta"),
    ("linear_grad", 0, values(3, 5), r"a gradient \[3, 5\] does not fit 6 rows of Q4_0"),
    ("linear_grad", 0, torch.tensor(1.0), r"a gradient \[\]"),
    ("linear_grad", 0, LONG[:, :6], "gradients must be floats"),
    ("linear_grad", 1, STACK, r"must have \[R, row_nbytes\]"),
    ("linear_planes", 0, values(3, 128), r"activations \[3, 128\] do not fit F8_E4M3_B128 rows of 256"),
    ("linear_planes", 1, [CODES], "codes and scales, got 1 tensors"),
    ("linear_planes", 1, [], "codes and scales, got 0 tensors"),
    ("linear_planes", 1, [CODES.to(torch.int8), SCALES], "codes of F8_E4M3_B128 must be torch.uint8, got torch.int8"),
    ("linear_planes", 1, [CODES, SCALES.float()], "scales of F8_E4M3_B128 must be torch.uint8"),
    ("linear_planes", 1, [CODES[None], SCALES[None]], r"must have \[R, row_len\].*got \[1, 6, 256\]"),
    ("linear_planes", 1, [CODES[:, :200], SCALES], r"multiple of 128 elements a row, got \[6, 200\]"),
    ("linear_planes", 1, [CODES, SCALES[:5]], r"codes \[6, 256\] .* go with scales \[6, 2\], got \[5, 2\]"),
    ("linear_planes", 1, [CODES, SCALES[:, :1]], r"go with scales \[6, 2\], got \[6, 1\]"),
    ("linear_planes", 1, [CODES[:5], SCALES], r"go with scales \[5, 2\], got \[6, 2\]"),
    ("linear_planes", 1, [CODES, SCALES.to("meta")], "are on cpu, their scales on meta"),
    ("linear_planes", 1, [CODES, SCALES, SCALES], r"third plane .*torch.uint8\[6, 2\]"),
    ("linear_planes", 1, [CODES, SCALES, values(5, 2)], r"third plane .* \[6 or 1, 2\].*torch.float32\[5, 2\]"),
    ("linear_planes", 1, [CODES, SCALES, values(6, 2), values(6, 2)], "third plane"),
    ("linear_planes", 2, "Q4_0", "Q4_0 has no planes"),
    ("linear_planes", 3, 7, "out_features is 7, but F8_E4M3_B128 planes have 6 rows"),
    ("linear_planes", 3, 5, "out_features is 5"),
    ("linear_planes", 3, -1, "out_features is -1"),
    ("linear_planes", 4, values(7), r"bias has the shape \[7\], expected \[6\]"),
    ("linear_planes", 4, values(6).half(), "bias is torch.float16"),
    ("linear_planes_grad", 0, values(3, 5), "planes have 6 rows"),
    ("linear_planes_grad", 0, LONG[:, :6], "gradients must be floats"),
    ("linear_planes_grad", 1, [CODES, SCALES[:5]], "go with scales"),
    ("linear_planes_grad", 3, 128, "in_features is 128, but F8_E4M3_B128 planes have rows of 256"),
    ("linears", 0, values(3, 64), r"activations \[3, 64\] do not fit"),
    ("linears", (1, 2), rows("Q4_0", 2, 64), r"activations \[3, 256\] do not fit Q4_0 rows of 64 elements"),
    ("linears", (1, 2), rows("Q4_0", 1, 2, 256), r"must have \[R, row_nbytes\], got \[1, 2, 144\]"),
    ("linears", (1, 1), SCALES[:1], "go with scales"),
    ("linears", 2, [1, 1], r"the counts \[1, 1\], .* must add up to the 3 tensors"),
    ("linears", 2, [2, 2], "must add up to the 3 tensors"),
    ("linears", 2, [3, 0], "at least 1 each"),
    ("linears", 2, [4, -1], "at least 1 each"),
    ("linears", 2, [3], "2 types, 1 counts and 2 out_features"),
    ("linears", 3, F, "1 types, 2 counts"),
    ("linears", 3, f"{F},", "''"),
    ("linears", 4, [6, 1], r"out_features is 1, but packed rows of Q4_0 are \[2, 144\]: 2 rows"),
    ("linears", 4, [6, 3], "out_features is 3"),
    ("linears", 4, [5, 2], "out_features is 5, but F8_E4M3_B128 planes have 6 rows"),
    ("linears", 4, [6], "2 types, 2 counts and 1 out_features"),
    ("linears_grad", 0, [values(3, 6)], "2 matrices have 1 gradients"),
    ("linears_grad", 0, [values(3, 6), values(4, 2)], "are not those of one x"),
    ("linears_grad", 0, [values(3, 6), values(3, 3)], r"a gradient \[3, 3\] does not fit 2 rows of Q4_0"),
    ("linears_grad", (1, 2), rows("Q4_0", 2, 128), "are not those of one x"),
    ("experts", 0, values(2, 64), r"expected activations \[T, row_len\]"),
    ("experts", 0, values(3, 2, 64), r"expected activations \[T, row_len\]"),
    ("experts", 0, values(3, 32), "do not fit Q4_0 rows of 64"),
    ("experts", 0, SPARSE, "activations must be dense"),
    ("experts", 1, Q4, r"must have \[E, R, row_nbytes\], got \[6, 36\]"),
    ("experts", 1, STACK[None], r"got \[1, 4, 6, 36\]"),
    ("experts", 2, IDS.float(), "expert ids must be integers, got torch.float32"),
    ("experts", 2, IDS > 1, "expert ids must be integers, got torch.bool"),
    ("experts", 2, IDS[0], "ids \\[T, K\\]"),
    ("experts", 2, IDS.to("meta"), "expert ids are on meta"),
    ("experts", 2, IDS.to_sparse(), "expert ids must be dense"),
    ("experts_grad", 0, values(3, 1, 6), r"expected gradients \[T, K, R\]"),
    ("experts_grad", 0, values(3, 2, 5), r"a gradient \[3, 2, 5\] does not fit 6 rows of Q4_0"),
    ("experts_grad", 1, Q4, r"must have \[E, R, row_nbytes\]"),
    ("experts_grad", 2, IDS[:2], r"expected gradients \[T, K, R\]"),
]


def put(arguments: tuple[Any, ...], at: int | tuple[int, int], instead: Any) -> list[Any]:
    changed = list(arguments)
    if isinstance(at, tuple):
        inner = list(changed[at[0]])
        inner[at[1]] = instead
        changed[at[0]] = inner
    else:
        changed[at] = instead
    return changed


def executed(op: Callable[..., Any], arguments: list[Any]) -> None:
    op(*arguments)


def traced(op: Callable[..., Any], arguments: list[Any]) -> None:
    with FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        op(*(fake(value) for value in arguments))


@pytest.mark.parametrize("way", [executed, traced])
@pytest.mark.parametrize(("name", "at", "instead", "message"), WRONG)
def test_what_does_not_fit_is_refused(
    name: str, at: Any, instead: Any, message: str, way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the kernels would run: nothing but the checks stands before them.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op, arguments = GOOD[name]
    with pytest.raises((CodecError, UnknownType), match=message):
        way(op, put(arguments, at, instead))


@pytest.mark.parametrize("name", GOOD)
def test_what_fits_keeps_torchs_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op, arguments = GOOD[name]
    given = [
        value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in (v.clone() if isinstance(v, Tensor) else v for v in arguments)
    ]
    torch.library.opcheck(op.default, tuple(given))


def test_every_registered_operation_is_here() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ggufx::")}
    assert registered == set(GOOD)
    assert {name for name, *_ in WRONG} == set(GOOD)


def test_planes_that_do_not_fit_are_refused_where_a_tensor_is_made() -> None:
    codec = types.get(F)
    with pytest.raises(CodecError, match="go with scales"):
        gt.GGUFTensor(None, codec, (6, 256), planes=(CODES, SCALES.T.contiguous()))
    with pytest.raises(CodecError, match=r"planes \[\[6, 256\], \[6, 2\]\] do not make up F8_E4M3_B128\[2, 768\]"):
        gt.GGUFTensor(None, codec, (2, 768), planes=(CODES, SCALES))


# A packed tensor among torch's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [False, True])
def test_a_packed_tensor_is_saved_and_loaded_as_weights_only(planes: bool, tmp_path: Path) -> None:
    w = gt.GGUFTensor(F8, types.get(F), dtype=torch.bfloat16, name="blk.0.ffn_up.weight")
    w = w.with_planes() if planes else w
    torch.save({"w": w}, tmp_path / "w.pt")
    back = torch.load(tmp_path / "w.pt", weights_only=True)["w"]
    assert (back.name, back.shape, back.dtype, back.type) == ("blk.0.ffn_up.weight", (6, 256), torch.bfloat16, F)
    assert (back.planes is not None) is planes
    assert torch.equal(back.packed, F8)
    assert torch.equal(copy.deepcopy(w).packed, F8)


def test_torchs_linear_takes_a_packed_weight_and_other_functions_say_no() -> None:
    w, x, bias = gt.GGUFTensor(Q4, types.get("Q4_0")), values(3, 64), values(6)
    expected = x @ w.dequantize().T + bias
    torch.testing.assert_close(torch.nn.functional.linear(x, w, bias), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.nn.functional.linear(input=x, weight=w, bias=bias), expected)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch's matmul does not take a packed tensor; dequantize\(\) first"):
        torch.matmul(x, w)  # type: ignore[arg-type]
    assert w.cpu() is w
