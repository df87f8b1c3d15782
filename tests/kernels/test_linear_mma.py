"""Some rows on tensor cores against the meaning of `linear`; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels import _tuning
from qcompile.kernels._tuning import MmaTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_mma import mma, mma_gated
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = _tuning.Device.of(torch.device("cuda")) if torch.cuda.is_available() else _tuning.Device()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(OLD, reason="needs a GPU of compute capability 8.0")]

# spec, rows of x, rows of the weight, columns
CASES = [
    *(
        ("u4/g64/asym", m, n, k)
        for m, n, k in ((1, 5, 192), (3, 130, 1024), (7, 64, 256), (17, 4099, 4096), (64, 40, 512), (300, 200, 1088))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "m", "n", "k"), CASES)
def test_meaning(
    spec: str, m: int, n: int, k: int, dtype: torch.dtype, random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    q, x = random_weight(spec, n, k, dtype), (torch.randn(m, k, device="cuda") + 0.25).to(dtype)
    weight = Weight.of(q.data, q.scale, q.zero, spec, k)
    tile = _tuning.mma_tile(m, n, k, weight.layout.bits, DEVICE)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    assert_close(mma(x, weight, None, None, tile), want)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(
    activation: str | None, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    spec = "i8/row/sym"
    q, x = random_weight(spec, 6, 32, torch.float32), torch.randn(5, 32, device="cuda").bfloat16()
    bias = torch.randn(6, device="cuda").bfloat16()
    weight = Weight.of(q.data, q.scale, q.zero, spec, 32)
    got = mma(
        x,
        weight,
        bias,
        activation,
        MmaTile(tokens=8, codes=64, stages=2, splits=1, warps=4, together=1, warp_groups=False),
    )
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation))


@pytest.mark.parametrize(
    "tile",
    [
        MmaTile(8, 64, 2, 1, 2, 1, False),
        MmaTile(8, 512, 3, 2, 4, 1, False),
        MmaTile(16, 128, 4, 3, 8, 1, HOPPER),
        MmaTile(32, 256, 3, 1, 16, 1, HOPPER),
        MmaTile(64, 64, 4, 8, 4, 1, HOPPER),
        MmaTile(128, 128, 4, 2, 16, 1, HOPPER),
        MmaTile(48, 128, 3, 3, 4, 2, HOPPER),
        MmaTile(72, 128, 4, 2, 8, 2, HOPPER),
        MmaTile(112, 64, 4, 1, 4, 1, HOPPER),
        MmaTile(256, 64, 5, 4, 8, 1, HOPPER),
        MmaTile(288, 64, 4, 2, 8, 1, HOPPER),
    ],
    ids=str,
)
def test_tiles(tile: MmaTile, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    if tile.tokens > 64 and not HOPPER:
        pytest.skip("too many registers without warp groups")
    spec = "u4/g64/asym"
    q, x = random_weight(spec, 277, 1600, torch.float16), torch.randn(131, 1600, device="cuda").half()
    bias = torch.randn(277, device="cuda").half()
    got = mma(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), bias, "silu", tile)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, "silu"))


@pytest.mark.parametrize(
    "tile",
    [MmaTile(8, 64, 3, 1, 4, 1, False), MmaTile(16, 128, 4, 1, 8, 1, HOPPER), MmaTile(48, 128, 3, 1, 4, 2, HOPPER)],
    ids=str,
)
def test_gated(tile: MmaTile, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Halves that no tile divides."""
    for spec in ("u4/g64/asym", "i8/row/sym"):
        q, x = random_weight(spec, 278, 1600, torch.float16), torch.randn(51, 1600, device="cuda").half()
        bias = torch.randn(278, device="cuda").half()
        got = mma_gated(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), bias, "silu", tile)
        gate, up = linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, None).chunk(2, -1)
        assert_close(got, ACTIVATIONS["silu"](gate) * up, rounded=True)


@pytest.mark.skipif(not HOPPER, reason="needs warp groups")
def test_stores_wait_for_all_products(random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Sums pass through shared memory that another warp group's last product may still read."""
    spec = "u4/g32/asym"
    q, x = random_weight(spec, 512, 4096, torch.bfloat16), torch.randn(256, 4096, device="cuda").bfloat16()
    weight = Weight.of(q.data, q.scale, q.zero, spec, 4096)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    for _ in range(10):
        assert_close(mma(x, weight, None, None, MmaTile(256, 64, 5, 4, 8, 1, HOPPER)), want)


def test_inputs_far_from_zero(random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Errors of a weight that its whole group shares would add up."""
    for spec, m in (("u4/g64/asym", 9), ("u7/g128/asym", 9), ("u3/g64/asym", 80)):
        for dtype in (torch.float16, torch.bfloat16):
            q, x = random_weight(spec, 64, 4096, dtype), (torch.randn(m, 4096, device="cuda") + 3).to(dtype)
            weight = Weight.of(q.data, q.scale, q.zero, spec, 4096)
            got = mma(x, weight, None, None, _tuning.mma_tile(m, 64, 4096, weight.layout.bits, DEVICE))
            assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))
