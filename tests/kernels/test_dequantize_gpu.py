"""The written weight against the meaning of `dequantize`: rounded once, so right to the last bit but for ties."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels import dequantize_gpu
from qcompile.ops.linear import dequantize
from qcompile.quant.tensor import QTensor

SPECS = ["u4/g64/asym", "i4/g32/sym", "u8/g128/asym_int", "i8/row/sym", "u3/g16/asym", "i5/row/sym", "u6/tensor/asym"]
SPECS += ["i7/g64/sym", "u2/g64/asym", "u1/g128/asym_int", "ternary/row/sym"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("n", "k"), [(1, 128), (3, 384), (9, 640)])
def test_meaning(
    spec: str, n: int, k: int, dtype: torch.dtype, random_weight: Callable[..., QTensor], assert_close: Callable
) -> None:
    q = random_weight(spec, n, k, torch.float16)
    assert dequantize_gpu.refuses(q.data, q.scale, q.zero, spec, [n, k], dtype) is None
    got = dequantize_gpu.dequantize_cuda(q.data, q.scale, q.zero, spec, [n, k], dtype)
    assert got.dtype == dtype
    assert_close(got, dequantize.meaning(q.data, q.scale, q.zero, spec, [n, k], torch.float64))


@pytest.mark.parametrize("k", [1, 15, 17, 100, 270])
def test_odd_columns_and_more_dimensions(
    k: int, dtype: torch.dtype, random_weight: Callable[..., QTensor], assert_close: Callable
) -> None:
    q = random_weight("i4/row/sym", 6, k, torch.float32)
    got = dequantize_gpu.dequantize_cuda(q.data, q.scale, q.zero, "i4/row/sym", [2, 3, k], dtype)
    want = dequantize.meaning(q.data, q.scale, q.zero, "i4/row/sym", [2, 3, k], torch.float64)
    assert_close(got, want)


def test_refuses_float64(random_weight: Callable[..., QTensor]) -> None:
    q = random_weight("i4/row/sym", 2, 16, torch.float32)
    reason = dequantize_gpu.refuses(q.data, q.scale, q.zero, "i4/row/sym", [2, 16], torch.float64)
    assert reason == "writes float32, float16 and bfloat16, not float64"


def test_empty(device: str) -> None:
    data, scale = torch.empty(0, 16, dtype=torch.uint8, device=device), torch.empty(0, 1, device=device)
    assert dequantize_gpu.dequantize_cuda(data, scale, None, "i8/row/sym", [0, 16], torch.float32).shape == (0, 16)
