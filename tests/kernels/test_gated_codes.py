"""Codes of a gate's product against those of its meaning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import gated_codes as kernel
from qcompile.ops.activation import ACTIVATIONS, gated_act
from qcompile.ops.gated_linear_w8a8 import gated_linear_w8a8
from qcompile.quant.activation import ActivationSpec, activation_codes
from qcompile.quant.tensor import QTensor


@pytest.fixture(params=["i8", "fp8_e4m3"])
def element(request: pytest.FixtureRequest, device: str) -> str:
    if request.param != "i8" and device == "cpu":
        pytest.skip("the interpreter rounds fp8 wrong")
    if request.param != "i8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU does not know fp8_e4m3")
    return request.param


def check(gate: Tensor, up: Tensor, activation: str, element: str) -> None:
    codes, step = kernel.gated_codes(gate, up, activation, element)
    y = gated_act.meaning(gate, up, activation)
    want, scale = activation_codes(y, None, ActivationSpec.parse(f"{element}/token/dynamic"))
    assert codes.shape == want.shape and codes.dtype == want.dtype and codes.is_contiguous()
    torch.testing.assert_close(step, scale, rtol=4 * torch.finfo(gate.dtype).eps, atol=0)
    # The last bit of an activation may differ, and with it where a code is rounded to.
    near = (codes.float() * step - y.float()).abs()
    width = 0.51 * step if element == "i8" else torch.maximum(y.float().abs() / 15.9, step / 900)
    assert (near <= width).all()
    assert (codes.float() == want.float()).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(1, 16), (3, 7), (2, 5, 100), (1, 1030), (4, 2, 3, 33), (1, 14336)])
def test_meaning(shape: tuple[int, ...], element: str, random_tensor: Callable[..., Tensor]) -> None:
    check(random_tensor(*shape) * 3, random_tensor(*shape), "silu", element)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_tensor(activation: str, element: str, random_tensor: Callable[..., Tensor]) -> None:
    both = random_tensor(3, 2, 300)
    check(both.narrow(-1, 0, 150), both.narrow(-1, 150, 150), activation, element)


def test_zeros_and_what_is_no_number(element: str, device: str) -> None:
    gate = torch.ones(3, 40, device=device)
    gate[0], gate[2, 7] = 0, torch.nan
    codes, step = kernel.gated_codes(gate, torch.ones_like(gate), "silu", element)
    assert (codes[0].float() == 0).all() and step[0] == 1 and step[1].isfinite() and step[2].isnan()
    assert kernel.gated_codes(gate[:0], gate[:0], "silu", element)[1].shape == (0, 1)


@pytest.mark.parametrize("rows", [3, 65])
def test_linear(
    rows: int, element: str, dtype: torch.dtype, random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor], assert_close: Callable[..., None],
) -> None:  # fmt: skip
    spec = f"{element}/row/sym"
    q, both = random_weight(spec, 48, 96, torch.float32), random_tensor(rows, 192)
    rest = ("silu", f"{element}/token/dynamic", q.data, q.scale, None, random_tensor(48), spec, "relu")
    args = (both[:, :96], both[:, 96:], *rest)
    if reason := kernel.refuses(*args):
        assert "fp8" in reason
        return
    want = gated_linear_w8a8.meaning(*args).double()
    assert_close(kernel.gated_linear_w8a8_cuda(*args), want, rounded=True)


def test_refusals(device: str, random_weight: Callable[..., QTensor]) -> None:
    q, x = random_weight("i8/row/sym", 16, 64, torch.float32), torch.ones(2, 64, device=device)

    def refuses(gate: Tensor, up: Tensor, rounding: str = "i8/token/dynamic", spec: str = "i8/row/sym") -> str | None:
        return kernel.refuses(gate, up, "silu", rounding, q.data, q.scale, None, None, spec, None)

    assert refuses(x, x) is None
    assert refuses(x, x, "i8/token/dynamic/half") == (
        "makes codes as i8/token/dynamic or fp8_e4m3/token/dynamic has them, not i8/token/dynamic/half"
    )
    assert refuses(x, x.half()) == "gate and up differ in dtype: torch.float32 and torch.float16"
    assert refuses(x, x[:1]) == "gate and up differ in shape"
    wide = x.new_empty(1, 32784)
    assert refuses(wide, wide) == "handles rows of up to 32768 elements, not 32784"
    reason = refuses(x, x, spec="u4/g64/asym")
    assert reason == "u4/g64/asym: multiplies codes of i8 and fp8_e4m3 with a scale per row or for all"
