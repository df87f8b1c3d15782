"""A linear with what is around it, in one launch, against the meaning in float64; on a GPU, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.kernels import _gluon, fused_linear, linear_cuda
from qcompile.kernels.fused_linear import fused_linear_cuda
from qcompile.ops.fused_linear import fused_linear as op
from qcompile.quant.tensor import QTensor

U4 = "u4/g64/asym"

# spec, rows of x, rows of the weight, columns
CASES = [
    *(
        (U4, m, n, k)
        for m, n, k in ((1, 10, 192), (2, 130, 1024), (1, 4098, 4096), (1, 66, 14336), (2, 70, 576), (2, 16400, 4096))
    ),
    *(
        ("i8/row/sym", 2, 66, 144),
        ("u3/g64/asym", 1, 38, 320),
        ("u2/g16/asym_int", 1, 34, 8192),
        ("u1/g64/asym", 1, 6, 256),
    ),
]


def exactly(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("normed", "added", "biased"), [(1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 1, 1)])
@pytest.mark.parametrize(("spec", "m", "n", "k"), CASES)
def test_meaning(
    spec: str, m: int, n: int, k: int, normed: int, added: int, biased: int, gated: bool, dtype: torch.dtype,
    random_weight: Callable[..., QTensor], assert_close: Callable[..., None],
) -> None:  # fmt: skip
    q = random_weight(spec, n, k, dtype)
    like = {"device": "cuda", "dtype": dtype}
    x, weight, bias = torch.randn(m, 1, k, **like) + 0.25, torch.randn(k, **like), torch.randn(n, **like)
    residual = torch.randn(m, 1, n // 2 if gated else n, **like) if added else None
    norm = (weight if biased else None, 1e-5, 1.0) if normed else (None, None, 0.0)
    activation = "silu" if gated else "gelu" if biased else None
    args = (x, *norm, q.data, q.scale, q.zero, bias if biased else None, residual, spec, activation, gated)
    assert fused_linear.refuses(*args) is None
    sides = [q.scale, q.zero]
    want = op.meaning(*(arg if any(arg is side for side in sides) else exactly(arg) for arg in args))
    assert_close(fused_linear_cuda(*args), want)


@pytest.mark.cuda
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("spec", "m", "n", "k"),
    [
        *((U4, m, n, k) for m, n, k in ((3, 10, 192), (8, 130, 1024), (16, 4098, 4096), (70, 66, 576))),
        *(("i8/row/sym", 9, 66, 144), ("u3/g64/asym", 12, 38, 320), ("nf4/g64/sym", 20, 6, 128)),
    ],
)
def test_a_gate_of_any_number_of_rows(
    spec: str, m: int, n: int, k: int, biased: bool, random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    q, x = random_weight(spec, n, k, torch.bfloat16), torch.randn(m, 1, k, device="cuda").bfloat16() + 0.25
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    args = (x, None, None, 0.0, q.data, q.scale, q.zero, bias, None, spec, "silu", True)
    assert fused_linear.refuses(*args) is None
    want = op.meaning(*(exactly(arg) if i in (0, 7) else arg for i, arg in enumerate(args)))
    assert_close(fused_linear_cuda(*args), want, rounded=True)


@pytest.mark.cuda
def test_operator(random_weight: Callable[..., QTensor]) -> None:
    q = random_weight(U4, 32, 128, torch.bfloat16)
    x, residual = torch.randn(2, 1, 1, 128, device="cuda").bfloat16()
    args = (x, None, 1e-6, 0.0, q.data, q.scale, q.zero, None, residual[..., :32], U4, None, False)
    torch.library.opcheck(fused_linear_cuda, args)


@pytest.mark.cuda
def test_tensors_that_are_misaligned(random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    q = random_weight(U4, 32, 128, torch.bfloat16)
    x, weight, residual = torch.randn(3, 1, 129, device="cuda").bfloat16()[..., 1:]
    args = (x, weight[0], 1e-6, 0.0, q.data, q.scale, q.zero, None, residual[..., :32], U4, None, False)
    want = op.meaning(*(exactly(arg) if i not in (5, 6) else arg for i, arg in enumerate(args)))
    assert_close(fused_linear_cuda(*args), want)


def refusal(monkeypatch: pytest.MonkeyPatch, spec: str = U4, rows: int = 1, k: int = 128, **others: Any) -> str | None:
    """Why this call is refused where the device is right."""
    monkeypatch.setattr(linear_cuda, "refuses_device", lambda x, dtype: None)
    monkeypatch.setattr(_gluon, "gl", _gluon.gl or object())
    monkeypatch.setattr(_gluon, "INTERPRET", False)
    group = 1 if "row" in spec else k // int(spec.split("/g")[1].split("/")[0])
    x = torch.empty(rows, k, dtype=others.pop("dtype", torch.bfloat16))
    sides = (torch.empty(64, k, dtype=torch.uint8), torch.empty(64, group), None)
    arguments = {"norm_weight": None, "eps": 1e-5, "weight_offset": 0.0, "bias": None, "residual": None}
    arguments |= {"rounding": None, **others}
    names = [argument.name for argument in op.overload._schema.arguments]
    arguments = {"activation": None, "gated": False} | arguments | dict(zip(("data", "scale", "zero"), sides))
    arguments |= {"x": x, "spec": spec}
    return fused_linear.refuses(*(arguments[name] for name in names))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch) is None and refusal(monkeypatch, rows=2) is None
    assert "one or two rows" in str(refusal(monkeypatch, rows=3))
    gate = {"eps": None, "gated": True, "activation": "silu"}
    assert refusal(monkeypatch, rows=3, **gate) is None
    assert "one or two rows" in str(refusal(monkeypatch, rows=3, **gate | {"residual": torch.empty(3, 32)}))
    assert "not 2 by u3/g64/sym" in str(refusal(monkeypatch, "u3/g64/sym", rows=2))
    assert "16 bits" in str(refusal(monkeypatch, dtype=torch.float32))
    assert "integers" in str(refusal(monkeypatch, "nf4/g64/sym"))
    assert "multiples of 16" in str(refusal(monkeypatch, "i8/row/sym", k=24))
    assert "no rounding of x" in str(refusal(monkeypatch, rounding="i8/token/dynamic"))
    assert "dtype of x" in str(refusal(monkeypatch, norm_weight=torch.empty(128)))


def test_refuses_the_cpu() -> None:
    names = [argument.name for argument in op.overload._schema.arguments]
    arguments = dict.fromkeys(names) | {"x": torch.empty(1, 64), "spec": U4}
    assert "needs cuda" in str(fused_linear.refuses(*arguments.values()))
