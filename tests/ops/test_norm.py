"""rms_norm, layer_norm and their sums: what they mean, on every kind of input."""

import pytest
import torch

from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

INPUTS = {
    "rows": lambda: torch.randn(5, 24),
    "bf16": lambda: torch.randn(2, 3, 64).bfloat16(),
    "f16": lambda: torch.randn(3, 48).half(),
    "f64": lambda: torch.randn(2, 3, 7, dtype=torch.float64),
    "no rows": lambda: torch.randn(0, 16),
    "one vector": lambda: torch.randn(33),
    "heads, transposed": lambda: torch.randn(2, 5, 4, 16).transpose(1, 2),
    "cut from wider rows": lambda: torch.randn(4, 40)[:, 8:24],
    "every other column": lambda: torch.randn(4, 40)[:, ::2],
    "large": lambda: torch.randn(3, 16).bfloat16() * 1e18,
    "tiny": lambda: torch.randn(3, 16) * 1e-9,
    "zero": lambda: torch.zeros(3, 16),
}
each_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)


def exact_rms(x, weight, eps, offset):
    x = x.double()
    y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight.double() + offset)


def exact_layer(x, weight, bias, eps):
    x = x.double()
    y = x - x.mean(-1, keepdim=True)
    y = y / torch.sqrt((y**2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


@each_input
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_rms_norm(agrees, make, offset):
    x = make()
    weight = None if offset is None else torch.randn(x.shape[-1]).to(x.dtype)
    agrees(rms_norm, x, weight, 1e-6, offset or 0.0, exact=exact_rms(x, weight, 1e-6, offset), opcheck=offset != 0)


@each_input
@pytest.mark.parametrize("affine", ["", "weight", "weight bias"])
def test_layer_norm(agrees, make, affine):
    x = make()
    weight, bias = (torch.randn(x.shape[-1]).to(x.dtype) if name in affine else None for name in ("weight", "bias"))
    agrees(layer_norm, x, weight, bias, 1e-5, exact=exact_layer(x, weight, bias, 1e-5), opcheck=affine != "weight")


@each_input
def test_the_sum_is_rounded_before_it_is_normalized(agrees, make):
    x, residual = make(), make()
    weight = torch.randn(x.shape[-1]).to(x.dtype)
    total = x + residual
    exact = exact_rms(total, weight, 1e-6, 1.0), total
    agrees(add_rms_norm, x, residual, weight, 1e-6, 1.0, exact=exact)
    exact = exact_layer(total, weight, None, 1e-5), total
    agrees(add_layer_norm, x, residual, weight, None, 1e-5, exact=exact)


def test_a_wider_weight_does_not_widen_the_result(agrees):
    x, weight = torch.randn(2, 16).bfloat16(), torch.randn(16)
    agrees(rms_norm, x, weight, 1e-6, 0.0, exact=exact_rms(x, weight, 1e-6, 0.0))
    agrees(layer_norm, x, weight, None, 1e-6, exact=exact_layer(x, weight, None, 1e-6))


def test_symbolic_sizes(symbolic):
    weight = torch.randn(8)
    small, large = (torch.randn(3, 2, 8), torch.randn(3, 2, 8)), (torch.randn(7, 2, 8), torch.randn(7, 2, 8))
    symbolic(lambda x, r: add_rms_norm(x, r, weight, 1e-6, 0.0), small, large)
    symbolic(lambda x, r: add_layer_norm(x, r, weight, weight, 1e-6), small, large)
    symbolic(lambda x: (rms_norm(x, weight, 1e-6, 1.0), layer_norm(x, None, None, 1e-6)), small[:1], large[:1])
