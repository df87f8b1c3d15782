from collections.abc import Callable

import pytest
import torch

from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.quant.packing import pack
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

CASES = [
    ("i8/token/dynamic", "i8/row/sym"),
    ("i8/tensor/static", "i8/row/sym"),
    ("i8/token/dynamic", "u3/g32/asym"),
    ("fp8_e4m3/token/dynamic", "fp8_e4m3/row/sym"),
]


@pytest.mark.parametrize(("rounding", "spec"), CASES)
def test_linear_w8a8(agrees: Callable, symbolic: Callable, rounding: str, spec: str) -> None:
    x, bias = torch.randn(2, 3, 64), torch.randn(8)
    x_scale = torch.tensor(0.05) if "static" in rounding else None
    parsed = QSpec.parse(spec)
    codes = torch.randint(0, 127 if spec[0] == "f" else parsed.element.levels, (8, 64), dtype=torch.uint8)
    # Terms of some hundreds that cancel would leave rounding of float32 that is larger than the bounds.
    data, scale = pack(codes, parsed.element.bits), torch.rand(parsed.scale_shape(8, 64)) / 64
    zero = torch.rand_like(scale) * 7 if "asym" in spec else None
    weight = QTensor(parsed, (8, 64), data, scale, zero).dequantize(torch.float64)
    exact = round_activation(x, x_scale, None, rounding).double() @ weight.T + bias
    agrees(linear_w8a8, x, x_scale, rounding, data, scale, zero, bias, spec, None, exact=exact)
    agrees(linear_w8a8, x, x_scale, rounding, data, scale, zero, bias, spec, "relu", exact=exact.relu())

    def function(x: torch.Tensor) -> torch.Tensor:
        return linear_w8a8(x, x_scale, rounding, data, scale, zero, bias, spec, None)

    symbolic(function, (x,), (torch.randn(5, 3, 64),))
