from collections.abc import Callable

import pytest
import torch

from qcompile.ops.activation import gated_act
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.gated_linear_w8a8 import gated_linear_w8a8


@pytest.mark.parametrize("element", ["i8", "fp8_e4m3"])
def test_gated_linear_w8a8(agrees: Callable, symbolic: Callable, element: str) -> None:
    gate, up, bias, scale = torch.randn(2, 3, 64), torch.randn(2, 3, 64), torch.randn(8), torch.rand(8, 1)
    data = torch.randint(0, 120, (8, 64), dtype=torch.uint8)
    weight = data.double() - 128 if element == "i8" else data.view(torch.float8_e4m3fn).double()
    rest = (f"{element}/token/dynamic", data, scale, None, bias, f"{element}/row/sym", None)
    x = round_activation(gated_act(gate, up, "silu"), None, None, f"{element}/token/dynamic")
    agrees(gated_linear_w8a8, gate, up, "silu", *rest, exact=x.double() @ (weight * scale).T + bias)
    symbolic(lambda a, b: gated_linear_w8a8(a, b, "gelu", *rest), (gate, up), (torch.randn(5, 3, 64),) * 2)
