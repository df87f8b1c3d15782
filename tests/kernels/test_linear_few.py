"""A few rows on tensor cores against the meaning of `linear`; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels import _tuning
from qcompile.kernels._tuning import FewTile
from qcompile.kernels._weight import Layout, Weight
from qcompile.kernels.linear_few import can_sum, few, few_gated
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
DEVICE = _tuning.Device.of(torch.device("cuda")) if torch.cuda.is_available() else _tuning.Device()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(OLD, reason="needs a GPU of compute capability 8.0")]

# spec, rows of x, rows of the weight, columns
CASES = [
    *(
        ("u4/g64/asym", m, n, k)
        for m, n, k in ((1, 5, 192), (3, 130, 1024), (7, 64, 256), (16, 4099, 4096), (40, 40, 512))
    ),
    *(
        ("i4/g128/sym", 5, 1, 128),
        ("u4/g16/asym_int", 3, 3, 48),
        ("u4/g32/asym", 9, 18, 544),
        ("u4/g48/asym", 4, 9, 96),
    ),
    *(
        ("i4/row/sym", 3, 7, 48),
        ("i8/row/sym", 33, 33, 144),
        ("u8/g256/asym_int", 8, 3, 512),
        ("i8/g32/sym", 90, 20, 96),
    ),
    *(("u3/g64/asym", 12, 3, 320), ("i3/row/sym", 6, 2, 80), ("u2/g32/asym", 5, 5, 96), ("u2/g128/asym", 16, 2, 640)),
    *(
        ("u1/g64/asym", 4, 3, 192),
        ("u1/g256/asym", 9, 2, 1024),
        ("ternary/g128/sym", 3, 1, 256),
        ("i5/g64/sym", 3, 2, 64),
    ),
    *(
        ("u6/g128/asym", 20, 2, 384),
        ("u7/tensor/asym", 3, 3, 272),
        ("u4/g32/shift", 4, 3, 160),
        ("u2/row/shift", 5, 3, 208),
    ),
]


DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("spec", "m", "n", "k", "dtype"),
    [(*case, dtype) for case in CASES for dtype in DTYPES if can_sum(dtype, Layout.of(case[0]))],
    ids=str,
)
def test_meaning(
    spec: str, m: int, n: int, k: int, dtype: torch.dtype, random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    q, x = random_weight(spec, n, k, dtype), (torch.randn(m, k, device="cuda") + 0.25).to(dtype)
    weight = Weight.of(q.data, q.scale, q.zero, spec, k)
    tile = _tuning.few_tile(m, n, k, weight.layout.bits, DEVICE)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    assert_close(few(x, weight, None, None, tile), want)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(
    activation: str | None, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    spec = "i8/row/sym"
    q, x = random_weight(spec, 6, 32, torch.float32), torch.randn(5, 32, device="cuda").bfloat16()
    bias = torch.randn(6, device="cuda").bfloat16()
    weight = Weight.of(q.data, q.scale, q.zero, spec, 32)
    tile = FewTile(tokens=8, codes=64, stages=2, parts=1, split=2, warps=4, together=1)
    got = few(x, weight, bias, activation, tile)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation))


@pytest.mark.parametrize(
    "tile",
    [
        FewTile(tokens=8, codes=64, stages=2, parts=1, split=1, warps=2, together=1),
        FewTile(tokens=8, codes=256, stages=3, parts=3, split=4, warps=4, together=3),
        FewTile(tokens=16, codes=128, stages=4, parts=1, split=8, warps=8, together=1),
        FewTile(tokens=16, codes=512, stages=2, parts=2, split=1, warps=4, together=1),
        FewTile(tokens=32, codes=128, stages=3, parts=1, split=2, warps=4, together=2),
    ],
    ids=str,
)
def test_tiles(tile: FewTile, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    spec = "u4/g64/asym"
    q, x = random_weight(spec, 277, 1600, torch.float16), torch.randn(37, 1600, device="cuda").half()
    bias = torch.randn(277, device="cuda").half()
    got = few(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), bias, "silu", tile)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, "silu"))


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("spec", ["u4/g64/asym", "i8/row/sym"])
def test_gated(spec: str, split: int, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Halves that no tile divides."""
    tile = FewTile(tokens=8, codes=128, stages=3, parts=1, split=split, warps=4, together=2)
    q, x = random_weight(spec, 278, 1600, torch.float16), torch.randn(13, 1600, device="cuda").half()
    bias = torch.randn(278, device="cuda").half()
    got = few_gated(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), bias, "silu", tile)
    gate, up = linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, None).chunk(2, -1)
    assert_close(got, ACTIVATIONS["silu"](gate) * up)


def test_inputs_far_from_zero(random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Errors of a weight that its whole group shares would add up."""
    for spec, m in (("u4/g64/asym", 4), ("u7/g128/asym", 4), ("u3/g64/asym", 9)):
        for dtype in (torch.float16, torch.bfloat16):
            q, x = random_weight(spec, 64, 4096, dtype), (torch.randn(m, 4096, device="cuda") + 3).to(dtype)
            weight = Weight.of(q.data, q.scale, q.zero, spec, 4096)
            got = few(x, weight, None, None, _tuning.few_tile(m, 64, 4096, weight.layout.bits, DEVICE))
            assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))
