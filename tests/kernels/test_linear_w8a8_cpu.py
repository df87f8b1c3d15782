"""Products of 8-bit integers on the CPU against the op's meaning."""

from __future__ import annotations

import pytest
import torch

from qcompile.kernels import linear_rounded
from qcompile.kernels import linear_w8a8_cpu as kernel
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.quant.packing import pack

# Integers are summed exactly; the meaning rounds x' to the dtype, and both round the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def weight(rows: int, columns: int, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return pack(codes, 8), torch.rand(1 if "tensor" in spec else rows, 1) * 0.01 + 0.001


@pytest.mark.parametrize("spec", ["i8/row/sym", "i8/tensor/sym"])
@pytest.mark.parametrize("rounding", ["i8/token/dynamic", "i8/token/dynamic/half", "i8/tensor/static"])
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 8, 64), (3, 5, 33), (65, 37, 100), (130, 1, 16)])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_meaning(spec: str, rounding: str, rows: int, outputs: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, columns).to(dtype)
    x_scale = torch.tensor(0.03) if "static" in rounding else None
    data, scale = weight(outputs, columns, spec)
    bias = torch.randn(outputs).to(dtype) if rows % 2 else None
    args = (x, x_scale, rounding, data, scale, bias, spec, "relu" if rows % 3 else None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    got, want = kernel.linear_w8a8_cpu(*args), linear_w8a8.meaning(*args)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want.double()).norm() <= TOLERANCE[dtype] * want.double().norm() + 1e-6
    again = linear_rounded.linear_rounded(*args)
    assert (again.double() - want.double()).norm() <= TOLERANCE[dtype] * want.double().norm() + 1e-6


def test_slabs_and_more_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SLAB_BYTES", 200)
    x, (data, scale) = torch.randn(5, 7, 64), weight(10, 64, "i8/row/sym")
    args = (x, None, "i8/token/dynamic", data, scale, torch.randn(10), "i8/row/sym", None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    torch.testing.assert_close(kernel.linear_w8a8_cpu(*args), linear_w8a8.meaning(*args), rtol=1e-4, atol=1e-4)


def test_extremes_are_summed_exactly() -> None:
    x = torch.full((32, 4096), -1.0)
    data = pack(torch.zeros(16, 4096, dtype=torch.uint8), 8)
    args = (x, torch.tensor(1 / 128), "i8/tensor/static", data, torch.ones(16, 1), None, "i8/row/sym", None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    assert (kernel.linear_w8a8_cpu(*args) == 4096 * 128).all()


def test_refuses_without_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    data, scale = weight(4, 64, "i8/row/sym")
    args = (torch.randn(2, 64), None, "i8/token/dynamic", data, scale, None, "i8/row/sym", None)
    monkeypatch.setattr(kernel, "processor_features", lambda: frozenset({"avx2"}))
    assert "exactly" in str(kernel.refuses(*args)) or "C++" in str(kernel.refuses(*args))


def test_both_refuse_what_linear_has_no_kernel_for() -> None:
    data, scale = weight(4, 64, "i8/row/sym")
    args = (torch.randn(2, 64).double(), None, "i8/token/dynamic", data, scale, None, "i8/row/sym", None)
    assert "float64" in str(kernel.refuses(*args)) and "float64" in str(linear_rounded.refuses(*args))
