"""Many rows against the meaning of `linear`, and the choice between the ways."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _tuning, linear_cuda
from qcompile.kernels._tuning import GemmTile
from qcompile.kernels._ways import Choice, tile_of
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_gemm import finish, gemm
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

SMALL = GemmTile(rows=16, outputs=16, chunks=2, splits=1, warps=4, stages=2)

CASES = [
    ("u4/g64/asym", 17, 33, 192),
    ("u4/g16/asym_int", 2, 3, 48),
    ("u4/g32/asym", 1, 20, 544),
    ("i4/g128/sym", 16, 16, 128),
    ("i4/row/sym", 5, 7, 50),
    ("i4/g48/sym", 20, 3, 96),
    ("i8/row/sym", 31, 18, 130),
    ("u8/g256/asym_int", 3, 5, 512),
    ("i8/tensor/sym", 1, 2, 9),
    ("u3/g64/asym", 18, 17, 320),
    ("i3/row/sym", 9, 2, 37),
    ("u2/g32/asym", 33, 5, 96),
    ("u2/g16/asym_int", 3, 30, 80),
    ("u1/g64/asym", 7, 19, 192),
    ("u1/g256/asym", 2, 2, 512),
    ("ternary/row/sym", 15, 5, 200),
    ("i5/g64/sym", 4, 17, 64),
    ("u6/g128/asym", 6, 9, 256),
    ("i7/row/sym", 3, 2, 17),
    ("u7/tensor/asym", 1, 16, 272),
    ("u4/row/asym", 40, 40, 1),
    # floats: bit fields and tables
    ("fp8_e4m3/row/sym", 17, 3, 130),
    ("fp8_e5m2/g32/sym", 3, 4, 160),
    ("fp8_e4m3/tensor/sym", 1, 5, 64),
    ("fp6_e2m3/g32/sym", 20, 3, 224),
    ("fp6_e3m2/row/sym", 1, 2, 70),
    ("fp4_e2m1/g16/sym", 17, 5, 112),
    ("fp4_bnb/g64/sym", 1, 3, 192),
    ("nf4/g64/sym", 20, 6, 320),
    ("iq4/g32/sym", 1, 3, 96),
    # what is added after scaling, and tiles, cut off too
    ("u4/g32/shift", 17, 3, 160),
    ("u5/g16/shift", 1, 4, 96),
    ("u2/row/shift", 3, 3, 70),
    ("fp8_e4m3/b2x32/sym", 20, 5, 80),
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
    q, x = random_weight(spec, n, k, dtype), random_tensor(m, k)
    got = gemm(x, Weight.of(q.data, q.scale, q.zero, spec, k), None, None, SMALL)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None), rounded=True)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_activation_and_splits(
    activation: str | None,
    splits: int,
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    spec = "i4/g32/sym"
    q, x, bias = random_weight(spec, 18, 288, torch.float32), random_tensor(5, 288), random_tensor(18)
    tile = GemmTile(16, 32, 2, splits, 4, 2)
    got = gemm(x, Weight.of(q.data, q.scale, q.zero, spec, 288), bias, activation, tile)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation)
    assert_close(got, want, rounded=True)


@pytest.mark.parametrize("columns", [3, 1030])
def test_finish_fills_columns_of_a_wider_result(
    columns: int, random_tensor: Callable[..., Tensor], assert_close: Callable[..., None]
) -> None:
    parts, bias, out = random_tensor(3, 2, columns).float(), random_tensor(columns), random_tensor(2, columns + 5)
    before = out.clone()
    finish(parts, bias, out[:, 4:-1], "relu")
    assert_close(out[:, 4:-1], (parts.double().sum(0) + bias.double()).relu(), rounded=True)
    assert torch.equal(out[:, :4], before[:, :4]) and torch.equal(out[:, -1:], before[:, -1:])


@pytest.mark.parametrize("way", ["gemv", "gemm", "dequantize"])
def test_every_way_gives_the_meaning(
    way: str,
    dtype: torch.dtype,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile = partial(tile_of, way, device=_tuning.Device())
    monkeypatch.setattr(linear_cuda, "choose", lambda product, device: Choice(way, tile(product)))
    monkeypatch.setattr(_tuning, "SLAB_ELEMENTS", 64 * 3)
    spec = "u4/g32/asym"
    q, x, bias = random_weight(spec, 7, 64, dtype), random_tensor(2, 3, 64).transpose(0, 1), random_tensor(7)
    got = linear_cuda.linear_cuda(x, q.data, q.scale, q.zero, bias, spec, "gelu")
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, "gelu")
    assert_close(got, want, rounded=True)


def test_large(
    dtype: torch.dtype,
    device: str,
    random_tensor: Callable[..., Tensor],
    random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:
    if device == "cpu":
        pytest.skip("too slow in the interpreter")
    for spec, m in (("u4/g64/asym", 16), ("i8/row/sym", 65), ("u3/g128/asym", 200), ("i4/g128/sym", 300)):
        q, x = random_weight(spec, 1030, 4096, dtype), random_tensor(m, 4096)
        got = linear_cuda.linear_cuda(x, q.data, q.scale, q.zero, None, spec, None)
        assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None), rounded=True)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_in_a_cuda_graph(rows: int, random_weight: Callable[..., QTensor]) -> None:
    spec = "u4/g64/asym"
    q = random_weight(spec, 512, 1024, torch.float16)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.float16)
    args = (q.data, q.scale, q.zero, None, spec, None)
    linear_cuda.linear_cuda(x, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_cuda.linear_cuda(x, *args)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, linear_cuda.linear_cuda(x, *args), rtol=0, atol=0)


def test_compiled(random_weight: Callable[..., QTensor], device: str) -> None:
    """Rows stay symbolic: the way is chosen at the call."""
    spec = "i8/row/sym"
    q = random_weight(spec, 6, 32, torch.float32)

    def function(x: Tensor) -> Tensor:
        return linear_cuda.linear_triton(x, q.data, q.scale, q.zero, None, spec, None) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 9):
        x = torch.randn(rows, 32, device=device)
        torch.testing.assert_close(compiled(x), function(x))
