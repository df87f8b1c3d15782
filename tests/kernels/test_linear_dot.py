"""One or two rows in fixed point against the meaning of `linear`; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import can_read
from qcompile.kernels._tuning import DotTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_dot import Around, dot
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

pytestmark = pytest.mark.cuda

# spec, rows of x, rows of the weight, columns
CASES = [
    *(("u4/g64/asym", m, n, k) for m, n, k in ((1, 5, 192), (2, 130, 1024), (1, 4099, 4096))),
    *(("i4/g128/sym", 1, 1, 128), ("u4/g16/asym_int", 2, 3, 48), ("u4/g32/asym", 1, 2, 544), ("u4/g48/asym", 2, 9, 96)),
    *(
        ("i4/row/sym", 1, 7, 48),
        ("i8/row/sym", 2, 33, 144),
        ("u8/g256/asym_int", 1, 3, 512),
        ("i8/tensor/sym", 1, 2, 16),
    ),
    *(("u3/g64/asym", 2, 3, 320), ("i3/row/sym", 1, 2, 80), ("u2/g32/asym", 1, 5, 96), ("u2/g16/asym_int", 1, 2, 80)),
    *(
        ("u1/g64/asym", 1, 3, 192),
        ("u1/g256/asym", 2, 2, 1024),
        ("ternary/g128/sym", 2, 1, 256),
        ("i5/g64/sym", 1, 2, 64),
    ),
    *(
        ("u6/g128/asym", 2, 2, 384),
        ("u7/tensor/asym", 1, 3, 272),
        ("u4/g32/shift", 2, 3, 160),
        ("u2/row/shift", 1, 3, 208),
        ("u3/g64/asym_int", 1, 66, 4096),
        ("u1/g16/asym", 1, 18, 1024),
        ("u2/g32/asym", 1, 5, 14336),
        ("u7/g64/asym", 1, 17, 1152),
    ),
]
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("spec", "m", "n", "k"), CASES)
def test_meaning(
    spec: str, m: int, n: int, k: int, dtype: torch.dtype, random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    q, x = random_weight(spec, n, k, dtype), (torch.randn(m, k, device="cuda") + 0.25).to(dtype)
    weight = Weight.of(q.data, q.scale, q.zero, spec, k)
    assert can_read(x, weight)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    tile = _tuning.dot_tile(m, n, k, weight.step, weight.layout.bits, _tuning.Device.of(x.device))
    assert_close(dot(x, weight, None, Around(), tile), want)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(
    activation: str | None, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    spec = "i8/row/sym"
    q, x = random_weight(spec, 6, 32, torch.float32), torch.randn(2, 32, device="cuda").bfloat16()
    bias = torch.randn(6, device="cuda").bfloat16()
    got = dot(x, Weight.of(q.data, q.scale, q.zero, spec, 32), bias, Around(activation=activation), DotTile(4, 2, 2))
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation))


@pytest.mark.parametrize(
    "tile",
    [
        DotTile(2, 1, 1),
        DotTile(16, 1, 2),
        DotTile(8, 8, 8),
        DotTile(4, 2, 8),
        DotTile(4, 4, 4, 3, 2),
        DotTile(2, 2, 4, 16, 3),
        DotTile(16, 4, 4, words=1, late=True),
        DotTile(4, 2, 4, 3, 2, words=1, late=True),
        DotTile(8, 8, 8, 2, 2, words=2, late=True),
        DotTile(32, 1, 2, words=2),
    ],
    ids=str,
)
def test_many_tiles(tile: DotTile, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Of scales whose rows are whole chunks of 16 bytes, which are copied, and others."""
    for spec, k in (("u3/g64/asym", 1600), ("u4/g64/asym", 1600), ("u3/g64/asym", 1536), ("u4/g64/asym", 1536)):
        q, x = random_weight(spec, 37, k, torch.float16), torch.randn(1, k, device="cuda").half()
        got = dot(x, Weight.of(q.data, q.scale, q.zero, spec, k), None, Around(), tile)
        assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))


@pytest.mark.parametrize("gated", [False, True])
def test_more_programs_than_there_is_room_for(
    gated: bool, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    """The first ones fetch what later ones copy, and nothing from beyond the weight's end."""
    spec, n = "u4/g64/asym", 9001
    q, x = random_weight(spec, n * (1 + gated), 256, torch.float16), torch.randn(1, 256, device="cuda").half()
    around = Around(activation="silu" if gated else None, gated=gated)
    got = dot(x, Weight.of(q.data, q.scale, q.zero, spec, 256), None, around, DotTile(4, 2, 2))
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    assert_close(got, F.silu(want[:, :n]) * want[:, n:] if gated else want)


def test_fixed_point_of_uneven_inputs(random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """One input a thousand times the others takes ten bits of its neighbours; tiny and huge ones are all there."""
    spec = "i4/g64/sym"
    q = random_weight(spec, 64, 4096, torch.float32)
    weight = Weight.of(q.data, q.scale, q.zero, spec, 4096)
    uneven = torch.randn(1, 4096, device="cuda")
    uneven[0, 77] = 1000.0
    for x in (uneven, torch.randn(1, 4096, device="cuda") * 1e-20, torch.randn(1, 4096, device="cuda") * 1e20):
        x = x.bfloat16()
        got = dot(x, weight, None, Around(), DotTile(8, 4, 4))
        assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float, random_weight: Callable[..., QTensor]) -> None:
    for spec in ("i4/g64/sym", "u4/g64/asym"):
        q, x = random_weight(spec, 8, 256, torch.float32), torch.randn(1, 256, device="cuda").bfloat16()
        x[0, 100] = bad
        got = dot(x, Weight.of(q.data, q.scale, q.zero, spec, 256), None, Around(), DotTile(4, 2, 2))
        assert not got.isfinite().any()
