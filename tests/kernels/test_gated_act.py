"""gated_act against its meaning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import fused_linear, gated_act
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.activation import gated_act as op
from qcompile.ops.fused_linear import fused_linear as fused_op
from qcompile.quant.tensor import QTensor

SHAPES = [(1, 1), (3, 7), (2, 5, 100), (17, 128), (1, 1030), (4, 2, 3, 33), (300, 2)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_meaning(activation: str, random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    for shape in SHAPES:
        gate, up = random_tensor(*shape) * 3, random_tensor(*shape)
        got = gated_act.gated_act_cuda(gate, up, activation)
        assert_close(got, op.meaning(gate.double(), up.double(), activation))


def test_halves_of_one_tensor(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    for shape in SHAPES:
        n = shape[-1]
        both = random_tensor(*shape[:-1], 2 * n)
        gate, up = both.narrow(-1, 0, n), both.narrow(-1, n, n)
        got = gated_act.gated_act_cuda(gate, up, "silu")
        assert got.is_contiguous()
        assert_close(got, op.meaning(gate.double(), up.double(), "silu"))


def test_other_strides(random_tensor: Callable[..., Tensor], assert_close: Callable) -> None:
    for gate, up in (
        (random_tensor(5, 3).t(), random_tensor(3, 5)),
        (random_tensor(2, 3, 4, 8).permute(2, 0, 1, 3), random_tensor(4, 1, 3, 8).expand(4, 2, 3, 8)),
    ):
        assert_close(gated_act.gated_act_cuda(gate, up, "tanh"), op.meaning(gate.double(), up.double(), "tanh"))


@pytest.mark.parametrize("rows", [3, 20])
def test_behind_a_linear_that_leaves_it_to_another_kernel(
    rows: int, random_tensor: Callable[..., Tensor], random_weight: Callable[..., QTensor], assert_close: Callable
) -> None:
    x, bias = random_tensor(1, rows, 64), random_tensor(10)
    q = random_weight("nf4/g64/sym", 10, 64, x.dtype)
    args = (x, None, None, 0.0, q.data, q.scale, q.zero, bias, None, str(q.spec), "silu", True)
    assert fused_linear.refuses(*args) is None
    want = fused_op.meaning(x.double(), *args[1:7], bias.double(), *args[8:])
    assert_close(fused_linear.fused_linear_cuda(*args), want, rounded=True)


def test_large_values(device: str) -> None:
    gate = torch.tensor([[-1e30, -100.0, -1e-20, 0.0, 1e-20, 100.0, 1e30]], device=device)
    for name in ("silu", "gelu", "relu", "sigmoid", "tanh", "quick_gelu"):
        got = gated_act.gated_act_cuda(gate, torch.ones_like(gate), name)
        torch.testing.assert_close(got, op.meaning(gate, torch.ones_like(gate), name), rtol=1e-5, atol=1e-30)


def test_refusals_and_empty(device: str) -> None:
    x = torch.ones(2, 4, device=device)
    assert gated_act.refuses(x, x, "silu") is None
    assert gated_act.refuses(x, x[:1], "silu") == "gate and up differ in shape"
    assert gated_act.refuses(x, x, "swish") == "does not know the activation swish"
    assert gated_act.gated_act_cuda(x[:0], x[:0], "silu").shape == (0, 4)
