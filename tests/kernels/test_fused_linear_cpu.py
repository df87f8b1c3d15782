"""fused_linear_cpu against the op's meaning."""

import itertools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.algorithms import quantize
from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.kernels.fused_linear_cpu import HANDLED, fused_anyhow, fused_packed
from qcompile.kernels.fused_linear_cpu import ROUNDING as ROUNDING_OF_X
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.registry import MEANING
from qcompile.quant.activation import ActivationSpec, activation_codes
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

# Where there is a compiler, sources that do not compile are no reason to skip.
if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Rounding the result. What comes on top of it must stay below twice the error of the meaning in this dtype.
ROUNDING = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def arguments(
    dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (1, 1), outputs: int = 34, columns: int = 192,
    spec: str = "u4/g64/asym", norm: bool = False, offset: float = 0.0, bias: bool = False, residual: bool = False,
    activation: str | None = None, gated: bool = False, rounding: str | None = None,
) -> list[Any]:  # fmt: skip
    q = quantize(torch.randn(outputs, columns), QSpec.parse(spec), "rtn")
    x = torch.randn(*shape, columns).to(dtype)
    return [
        x,
        torch.randn(columns).to(dtype) if norm else None,
        1e-5 if norm else None,
        offset,
        q.data,
        q.scale,
        q.zero,
        torch.randn(outputs).to(dtype) if bias else None,
        torch.randn(*shape, outputs // (2 if gated else 1)).to(dtype) if residual else None,
        str(q.spec),
        activation,
        gated,
        rounding,
    ]


def check(given: list[Any]) -> None:
    choice = fused_linear.choose(*given)
    assert (choice.name, choice.refusals) == ("cpu", ())
    want = fused_linear.meaning(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given))
    plain = fused_linear.meaning(*given)
    fused_packed(*given)  # from the second call on without Python
    for got in (choice.function(*given), fused_anyhow(*given)):
        assert (got.shape, got.dtype) == (want.shape, given[0].dtype)
        assert (got - want).norm() <= 2 * (plain - want).norm() + ROUNDING[got.dtype] * want.norm()


def test_it_compiles() -> None:
    assert linear_cpu.without_python() is not None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", ["u4/g64/asym", "i8/row/sym", "u4/g32/shift"])
def test_all_together(dtype: torch.dtype, spec: str) -> None:
    for norm, bias, residual, (activation, gated) in itertools.product(
        (False, True), (False, True), (False, True), ((None, False), ("silu", True), ("gelu_tanh", False))
    ):
        for shape in ((1, 1), (3,), (2, 2)):
            check(arguments(dtype, shape, 34, 192, spec, norm, 0.0, bias, residual, activation, gated))


@pytest.mark.parametrize("activation", HANDLED)
def test_activations(activation: str) -> None:
    for dtype in FLOATS:
        given = arguments(dtype, (2,), 200, activation=activation, gated=True)
        for size in (0.01, 1.0, 100.0):
            check([given[0] * size, *given[1:]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms(dtype: torch.dtype) -> None:
    check(arguments(dtype, norm=True, offset=1.0))
    check(arguments(dtype, columns=100, spec="i8/row/sym", norm=True))
    given = arguments(dtype, norm=True)
    check([given[0] * 1e-3, None, *given[2:]])
    check([given[0], given[1].float(), *given[2:]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [192, 100])
def test_rounding(dtype: torch.dtype, columns: int) -> None:
    """To the same codes, seen by a linear that picks single inputs."""
    x = torch.randn(3, columns).to(dtype)
    x[1] *= 1e-3
    x[2] = 0
    x[0, :4] = torch.tensor([127, 0.5, 1.5, -2.5]).to(dtype)  # a step of one, and ties
    one = QTensor.from_codes(
        QSpec.parse("i8/row/sym"), torch.eye(columns, dtype=torch.uint8) + 128, torch.ones(columns, 1), None
    )
    given = [x, None, None, 0.0, one.data, one.scale, None, None, None, "i8/row/sym", None, False, ROUNDING_OF_X]
    codes, step = activation_codes(x, None, ActivationSpec.parse(ROUNDING_OF_X))
    for run in (fused_packed, fused_packed, fused_anyhow):
        assert torch.equal((run(*given) / step).round(), codes.float())
    check(arguments(dtype, (2,), columns=columns, spec="i8/row/sym", norm=True, residual=True, rounding=ROUNDING_OF_X))


@pytest.mark.parametrize("rounding", [None, ROUNDING_OF_X])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_none(rounding: str | None, number: float) -> None:
    given = arguments(shape=(2,), activation="silu", gated=True, norm=True, rounding=rounding)
    given[0][0, 5] = number
    for _ in range(2):
        y = fused_packed(*given)
        assert y[0].isnan().all() and y[1].isfinite().all()


def test_what_goes_through_python_is_the_same() -> None:
    given = arguments(shape=(2, 1), outputs=192, residual=True)
    fused_packed(*given)
    want = fused_packed(*given)
    apart = given[0].new_zeros(2, 1, 384)[..., ::2].copy_(given[0])
    assert torch.equal(fused_packed(apart, *given[1:]), want)
    given[8] = given[8].expand(2, 2, 192)[:, :1]
    assert torch.equal(fused_packed(*given), want)


def test_opcheck() -> None:
    given = arguments(norm=True, residual=True, activation="silu", gated=True)
    torch.library.opcheck(fused_packed, given)
    torch.library.opcheck(fused_anyhow, given)


def test_refusals() -> None:
    def why(given: list[Any], **changed: Any) -> str:
        names = [argument.name for argument in fused_linear.overload._schema.arguments]
        choice = fused_linear.choose(*(changed.get(name, a) for name, a in zip(names, given)))
        assert choice.name == MEANING
        return dict(choice.refusals)["cpu"]

    given = arguments(norm=True, residual=True)
    assert "needs cpu, got meta" in why(given, x=given[0].to("meta"))
    assert "not gelu" in why(given, activation="gelu")
    assert "norm's weight is torch.float64" in why(given, norm_weight=given[1].double())
    assert "the residual is torch.float32, x torch.bfloat16" in why(given, residual=given[8].float())
    assert "rounds x as i8/token/dynamic, not as u8/token/dynamic" in why(given, rounding="u8/token/dynamic")
    most = linear_cpu.most_few_rows(torch.bfloat16, packed.Reader.of(given[9], 192))
    assert f"up to {most} rows of torch.bfloat16" in why(given, x=given[0].expand(1, most + 1, 192))
