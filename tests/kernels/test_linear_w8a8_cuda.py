"""Products of 8-bit codes on CUDA against the op's meaning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels import linear_w8a8_cuda as kernel
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.quant.activation import ActivationSpec, activation_codes
from qcompile.quant.tensor import QTensor

ROUNDINGS = ["i8/token/dynamic", "i8/token/dynamic/half", "i8/tensor/static", "fp8_e4m3/token/dynamic"]
ROUNDINGS += ["fp8_e4m3/tensor/static", "fp8_e4m3/tensor/dynamic"]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 16, 64), (3, 5, 33), (65, 48, 96), (40, 37, 64)])
def test_meaning(
    granularity: str,
    rounding: str,
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    spec = f"{rounding.partition('/')[0]}/{granularity}/sym"
    q, x = random_weight(spec, outputs, columns, torch.float32), random_tensor(rows, columns)
    x_scale = torch.tensor(0.03, device=x.device) if "static" in rounding else None
    bias = random_tensor(outputs) if rows % 2 else None
    args = (x_scale, rounding, q.data, q.scale, None, bias, spec, "relu" if rows % 3 else None)
    if reason := kernel.refuses(x, *args):
        pytest.skip(reason)
    got = kernel.linear_w8a8_cuda(x, *args)
    codes, step = activation_codes(x, x_scale, ActivationSpec.parse(rounding))
    want = (codes.float().double() * step.double()) @ q.dequantize(torch.float64).T
    want = want if bias is None else want + bias.double()
    assert_close(got, want.relu() if rows % 3 else want, rounded=True)


def test_slabs_and_more_dimensions(
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tuning, "SLAB_ELEMENTS", 64 * 20)
    q, x = random_weight("i8/row/sym", 48, 64, torch.float32), random_tensor(5, 7, 64)
    args = (None, "i8/token/dynamic", q.data, q.scale, None, random_tensor(48), "i8/row/sym", "silu")
    got = kernel.linear_w8a8_cuda(x, *args)
    assert_close(got, linear_w8a8.meaning(x, *args).double(), rounded=True)


def test_by_torch(
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where linear_codes refuses."""
    monkeypatch.setattr(kernel.linear_codes, "refuses", lambda *_: "not here")
    for element in ("i8", "fp8_e4m3"):
        spec = f"{element}/row/sym"
        q, x = random_weight(spec, 48, 96, torch.float32), random_tensor(65, 96)
        args = (None, f"{element}/token/dynamic", q.data, q.scale, None, random_tensor(48), spec, "silu")
        if kernel.refuses(x, *args) is None:
            want = linear_w8a8.meaning(x, *args).double()
            assert_close(kernel.linear_w8a8_cuda(x, *args), want, rounded=True)


def test_extremes_are_summed_exactly(device: str, random_weight: Callable[..., QTensor]) -> None:
    q = random_weight("i8/row/sym", 16, 4096, torch.float32)
    q.data.zero_()
    q.scale.fill_(1)
    x, x_scale = torch.full((32, 4096), -1.0, device=device), torch.tensor(1 / 128, device=device)
    got = kernel.linear_w8a8_cuda(x, x_scale, "i8/tensor/static", q.data, q.scale, None, None, "i8/row/sym", None)
    assert (got == 4096 * 128).all()


@pytest.mark.parametrize("rows", [0, 3, 32])
def test_is_an_op(rows: int, random_weight: Callable[..., QTensor], device: str) -> None:
    q = random_weight("i8/row/sym", 16, 64, torch.float32)
    codes = torch.randint(-128, 128, (2, rows, 64), dtype=torch.int8, device=device)
    step = torch.rand(2, rows, 1, device=device)
    args = (codes, step, q.data, q.scale, None, "i8/row/sym", "relu", torch.float16)
    torch.library.opcheck(kernel.linear_codes_cuda, args)


def test_refuses_other_devices(random_weight: Callable[..., QTensor], device: str) -> None:
    q = random_weight("i8/row/sym", 16, 64, torch.float32)
    x = torch.randn(2, 64, device="meta")
    reason = kernel.refuses(x, None, "i8/token/dynamic", q.data, q.scale, None, None, "i8/row/sym", None)
    assert reason == "needs cuda, x is on meta"
