"""The written weight against the meaning of `dequantize`: rounded once, so right to the last bit but for ties."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels import dequantize_gpu
from qcompile.ops.linear import dequantize
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

SPECS = ["u4/g64/asym", "i4/g32/sym", "u8/g128/asym_int", "i8/row/sym", "u3/g16/asym", "i5/row/sym", "u6/tensor/asym"]
SPECS += ["i7/g64/sym", "u2/g64/asym", "u1/g128/asym_int", "ternary/row/sym", "u4/g32/shift", "u3/row/shift"]
SPECS += ["fp8_e4m3/row/sym", "fp8_e5m2/g32/sym", "fp6_e2m3/g32/sym", "fp6_e3m2/g32/sym", "fp4_e2m1/g16/sym"]
SPECS += ["nf4/g64/sym", "fp4_bnb/g64/sym", "iq4/g32/sym", "fp8_e4m3/b2x48/sym", "i8/b128x128/sym"]


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


@pytest.mark.parametrize("tag", ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "fp4_bnb", "nf4", "iq4"])
def test_every_code_of_a_float(tag: str, device: str) -> None:
    """Exactly, inf and NaN too; in every byte of a word."""
    levels = QSpec.parse(f"{tag}/tensor/sym").element.levels
    codes = torch.arange(levels, dtype=torch.uint8).repeat(5)[None].to(device)
    q = QTensor.from_codes(QSpec.parse(f"{tag}/tensor/sym"), codes, torch.ones(1, 1, device=device), None)
    args = (q.data, q.scale, q.zero, f"{tag}/tensor/sym", list(codes.shape), torch.float32)
    got, want = dequantize_gpu.dequantize_cuda(*args), dequantize.meaning(*args)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=0 if not q.spec.element.table else 2**-23, atol=0, equal_nan=True)


def test_refuses_float64(random_weight: Callable[..., QTensor]) -> None:
    q = random_weight("i4/row/sym", 2, 16, torch.float32)
    reason = dequantize_gpu.refuses(q.data, q.scale, q.zero, "i4/row/sym", [2, 16], torch.float64)
    assert reason == "writes float32, float16 and bfloat16, not float64"


def test_empty(device: str) -> None:
    data, scale = torch.empty(0, 16, dtype=torch.uint8, device=device), torch.empty(0, 1, device=device)
    assert dequantize_gpu.dequantize_cuda(data, scale, None, "i8/row/sym", [0, 16], torch.float32).shape == (0, 16)
