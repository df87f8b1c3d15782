"""fused_linear: what it means, against exact numbers."""

import pytest
import torch
import torch.nn.functional as F

from qcompile.ops.fused_linear import fused_linear
from qcompile.quant.packing import pack


@pytest.fixture
def weight():
    """`weight(rows, columns)`: codes of i8/row/sym with their scales, and the exact weight."""

    def make(rows, columns):
        codes, scale = torch.randint(0, 256, (rows, columns), dtype=torch.uint8), torch.rand(rows, 1) * 0.01
        return (pack(codes, 8), scale, None), (codes.double() - 128) * scale

    return make


SHAPES = [(1, 48), (2, 1, 48), (1, 3, 48), (48,), (0, 48)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def arguments(weight, dtype, shape, eps, gated, added):
    (data, scale, zero), w = weight(10, 48)
    x, bias, norm_weight = torch.randn(shape).to(dtype), torch.randn(10).to(dtype), torch.randn(48).to(dtype)
    residual = torch.randn(*shape[:-1], 5 if gated else 10).to(dtype) if added else None
    activation = "silu" if gated else None
    return (x, norm_weight, eps, 1.0, data, scale, zero, bias, residual, "i8/row/sym", activation, gated), w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_exact(weight, dtype, shape, eps, gated, added):
    args, w = arguments(weight, dtype, shape, eps, gated, added)
    x, norm_weight, bias, residual = args[0], args[1], args[7], args[8]
    want = x.double() if eps is None else F.rms_norm(x.double(), (48,), norm_weight.double() + 1, eps)
    want = want @ w.to(dtype).double().T + bias.double()
    if gated:
        want = F.silu(want[..., :5]) * want[..., 5:]
    want = want if residual is None else want + residual.double()
    got = fused_linear(*args)
    assert got.dtype == dtype and got.shape == want.shape
    # Rounded to the dtype of x behind the norm, the linear, the gate and the sum.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * 8)


@pytest.mark.parametrize(
    ("dtype", "shape", "eps", "gated", "added"),
    [
        *((torch.float32, shape, 1e-5, gated, True) for shape in SHAPES for gated in (False, True)),
        *((dtype, (2, 1, 48), eps, True, True) for dtype in DTYPES for eps in (None, 1e-5)),
        *((torch.bfloat16, (1, 48), None, gated, False) for gated in (False, True)),
    ],
)
def test_opcheck(weight, dtype, shape, eps, gated, added):
    torch.library.opcheck(fused_linear.overload, arguments(weight, dtype, shape, eps, gated, added)[0])


def test_norm_without_weight_and_activation_without_gate(weight):
    (data, scale, zero), w = weight(6, 32)
    x = torch.randn(2, 32, dtype=torch.float64)
    got = fused_linear(x, None, 1e-6, 0.0, data, scale, zero, None, None, "i8/row/sym", "gelu", False)
    torch.testing.assert_close(got, F.gelu(F.rms_norm(x, (32,), eps=1e-6) @ w.T), rtol=1e-6, atol=1e-6)
