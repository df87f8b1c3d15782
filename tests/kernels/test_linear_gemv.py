"""A few rows against the meaning of `linear`, in every width, granularity and zero point."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import linear_cuda
from qcompile.kernels._tuning import GemvTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_gemv import gemv
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

SMALL = GemvTile(outputs=4, chunks=4, warps=1)

# rows of x, rows of the weight, columns
CASES = [
    ("u4/g64/asym", 1, 5, 192),
    ("u4/g16/asym_int", 2, 3, 48),
    ("u4/g32/asym", 3, 2, 544),
    ("i4/g128/sym", 1, 1, 128),
    ("i4/row/sym", 1, 7, 50),
    ("i4/g48/sym", 2, 3, 96),
    ("i8/row/sym", 5, 2, 130),
    ("u8/g256/asym_int", 1, 3, 512),
    ("i8/tensor/sym", 1, 2, 9),
    ("u3/g64/asym", 2, 3, 320),
    ("i3/row/sym", 1, 2, 37),
    ("u2/g32/asym", 1, 5, 96),
    ("u2/g16/asym_int", 3, 2, 80),
    ("u1/g64/asym", 1, 3, 192),
    ("u1/g256/asym", 2, 2, 1024),
    ("ternary/row/sym", 1, 5, 200),
    ("ternary/g128/sym", 8, 1, 256),
    ("i5/g64/sym", 1, 2, 64),
    ("u6/g128/asym", 2, 2, 384),
    ("i7/row/sym", 1, 2, 17),
    ("u7/tensor/asym", 1, 3, 272),
    ("u4/row/asym", 4, 2, 1),
    # floats: bit fields and tables
    ("fp8_e4m3/row/sym", 2, 3, 130),
    ("fp8_e5m2/g32/sym", 3, 4, 160),
    ("fp8_e4m3/tensor/sym", 1, 5, 64),
    ("fp6_e2m3/g32/sym", 4, 3, 224),
    ("fp6_e3m2/row/sym", 1, 2, 70),
    ("fp4_e2m1/g16/sym", 2, 5, 112),
    ("fp4_bnb/g64/sym", 1, 3, 192),
    ("nf4/g64/sym", 4, 6, 320),
    ("iq4/g32/sym", 1, 3, 96),
    # what is added after scaling, and tiles, cut off too
    ("u4/g32/shift", 2, 3, 160),
    ("u5/g16/shift", 1, 4, 96),
    ("u2/row/shift", 3, 3, 70),
    ("fp8_e4m3/b2x32/sym", 4, 5, 80),
    ("i8/b3x16/sym", 1, 7, 64),
]


@pytest.mark.parametrize(("spec", "m", "n", "k"), CASES)
def test_meaning(
    spec: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    q = random_weight(spec, n, k, dtype)
    x = random_tensor(m, k)
    got = gemv(x, Weight.of(q.data, q.scale, q.zero, spec, k), None, None, SMALL)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(
    activation: str | None,
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    spec = "i8/row/sym"
    q, x, bias = random_weight(spec, 6, 32, torch.float32), random_tensor(2, 32), random_tensor(6)
    got = gemv(x, Weight.of(q.data, q.scale, q.zero, spec, 32), bias, activation, SMALL)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation))


def test_views_of_a_shared_buffer(
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    """Siblings are narrows of one buffer, and x is a narrow of a wider tensor at an odd offset."""
    spec = "u4/g32/asym"
    q, x = random_weight(spec, 12, 64, dtype), random_tensor(2, 3, 67).narrow(2, 3, 64)
    parts = [part.narrow(0, 5, 6) for part in (q.data, q.scale, q.zero)]  # type: ignore[union-attr]
    got = linear_cuda.linear_cuda(x, *parts, None, spec, None)
    assert_close(got, linear.meaning(x.double(), *parts, None, spec, None))


def test_tiny_and_huge_inputs(
    random_weight: Callable[..., QTensor], assert_close: Callable[..., None], device: str
) -> None:
    """Codes are read as denormals, so x is scaled by powers of two: its whole useful range must survive."""
    spec = "i4/g64/sym"
    q = random_weight(spec, 3, 64, torch.float32)
    for size in (1e-12, 1e12):
        x = torch.randn(1, 64).to(device) * size
        got = gemv(x, Weight.of(q.data, q.scale, q.zero, spec, 64), None, None, SMALL)
        assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))


def test_many_tiles(
    dtype: torch.dtype,
    device: str,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    """The result does not hang on the tile."""
    spec = "u3/g64/asym"
    q, x = random_weight(spec, 5, 320, dtype), random_tensor(1, 320)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    sizes = [(1, 2, 1), (8, 4, 1)] + ([(4, 32, 1), (4, 64, 2), (2, 128, 8), (8, 128, 2)] if device == "cuda" else [])
    for outputs, chunks, warps in sizes:
        got = gemv(x, Weight.of(q.data, q.scale, q.zero, spec, 320), None, None, GemvTile(outputs, chunks, warps))
        assert_close(got, want)


def test_large(
    dtype: torch.dtype,
    device: str,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    if device == "cpu":
        pytest.skip("too slow in the interpreter")
    for spec in ("u4/g64/asym", "i8/row/sym", "u3/g128/asym", "u1/g64/asym"):
        q, x = random_weight(spec, 4099, 4096, dtype), random_tensor(1, 4096)
        got = linear_cuda.linear_cuda(x, q.data, q.scale, q.zero, None, spec, None)
        assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))


def test_refusals(random_weight: Callable[..., QTensor], device: str) -> None:
    def reason(spec: str, columns: int, x: Tensor) -> str | None:
        q = random_weight(spec, 2, columns, torch.float32)
        return linear_cuda.refuses(x, q.data, q.scale, q.zero, None, spec, None)

    x = torch.ones(1, 96, device=device)
    assert reason("u4/g32/asym", 96, x) is None
    assert reason("u4/g8/asym", 96, x) == "u4/g8/asym: the group size must be a multiple of 16"
    assert reason("u4/o2/asym", 96, x) == "u4/o2/asym: groups along the output are not handled"
    assert reason("u4/g64/asym", 96, x) == "u4/g64/asym: groups run on over the row ends, 64 does not divide 96"
    assert reason("u4/g32/asym", 96, x.double()) == "handles float32, float16 and bfloat16, not float64"
    assert reason("u4/g32/asym", 96, x.to("meta")) == "needs cuda, x is on meta"


def test_empty(random_weight: Callable[..., QTensor], device: str) -> None:
    q = random_weight("i8/row/sym", 3, 16, torch.float32)
    x = torch.empty(0, 5, 16, device=device)
    assert linear_cuda.linear_cuda(x, q.data, q.scale, q.zero, None, "i8/row/sym", "silu").shape == (0, 5, 3)
