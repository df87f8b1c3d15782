from collections.abc import Callable

import pytest
import torch

from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.quant.packing import pack
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor


@pytest.mark.parametrize("rounding", ["i8/token/dynamic", "i8/tensor/static", "fp8_e4m3/token/dynamic"])
def test_linear_w8a8(agrees: Callable, symbolic: Callable, rounding: str) -> None:
    x, bias = torch.randn(2, 3, 64), torch.randn(8)
    x_scale = torch.tensor(0.05) if "static" in rounding else None
    spec = f"{rounding.partition('/')[0]}/row/sym"
    data, scale = (
        pack(torch.randint(0, 127 if spec[0] == "f" else 256, (8, 64), dtype=torch.uint8), 8),
        torch.rand(8, 1),
    )
    weight = QTensor(QSpec.parse(spec), (8, 64), data, scale).dequantize(torch.float64)
    exact = round_activation(x, x_scale, None, rounding).double() @ weight.T + bias
    agrees(linear_w8a8, x, x_scale, rounding, data, scale, bias, spec, None, exact=exact)
    agrees(linear_w8a8, x, x_scale, rounding, data, scale, bias, spec, "relu", exact=exact.relu())

    def function(x: torch.Tensor) -> torch.Tensor:
        return linear_w8a8(x, x_scale, rounding, data, scale, bias, spec, None)

    symbolic(function, (x,), (torch.randn(5, 3, 64),))
