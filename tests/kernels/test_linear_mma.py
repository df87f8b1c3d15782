"""Some rows on tensor cores against the meaning of `linear`; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels import _tuning
from qcompile.kernels._tuning import MmaTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_mma import mma
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(OLD, reason="needs a GPU of compute capability 8.0")]

# spec, rows of x, rows of the weight, columns
CASES = [
    *(
        ("u4/g64/asym", m, n, k)
        for m, n, k in ((1, 5, 192), (3, 130, 1024), (7, 64, 256), (17, 4099, 4096), (64, 40, 512))
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
        ("i8/g32/sym", 9, 20, 96),
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
    tile = _tuning.mma_tile(m, n, k, weight.step, weight.layout.run)
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
    got = mma(x, weight, bias, activation, MmaTile(words=4, spread=1, tiles=1, columns=1, ahead=1, warps=1))
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation))


@pytest.mark.parametrize(
    "tile",
    [MmaTile(4, 2, 2, 1, 1, 8), MmaTile(4, 2, 1, 4, 3, 2), MmaTile(2, 1, 2, 2, 2, 4), MmaTile(2, 1, 1, 8, 1, 1)],
    ids=str,
)
def test_many_tiles(tile: MmaTile, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    spec = "u4/g64/asym"
    q, x = random_weight(spec, 37, 1600, torch.float16), torch.randn(11, 1600, device="cuda").half()
    got = mma(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), None, None, tile)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))


def test_inputs_far_from_zero(random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """What is multiplied beside the codes is large then, and taken off again."""
    for spec in ("u4/g64/asym", "u7/g128/asym", "i2/g64/sym"):
        for dtype in (torch.float16, torch.bfloat16):
            q, x = random_weight(spec, 64, 4096, dtype), (torch.randn(4, 4096, device="cuda") + 3).to(dtype)
            weight = Weight.of(q.data, q.scale, q.zero, spec, 4096)
            got = mma(x, weight, None, None, _tuning.mma_tile(4, 64, 4096, weight.step, weight.layout.run))
            assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))
