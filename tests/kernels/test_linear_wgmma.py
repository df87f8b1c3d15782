"""Many rows on tensor cores of Hopper against the meaning of `linear`; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels import _tuning
from qcompile.kernels._tuning import Device
from qcompile.kernels._turns import WgmmaTile, wgmma_stages, wgmma_tile, whole_outputs
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_wgmma import wgmma, wgmma_gated
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
H100 = Device()

# spec, rows of x, rows of the weight, columns
CASES = [
    *(("u4/g64/asym", m, n, k) for m, n, k in ((1, 5, 192), (97, 130, 1024), (300, 200, 1088), (257, 4099, 4096))),
    *(("i4/g128/sym", 129, 1, 128), ("u4/g16/asym_int", 3, 3, 48), ("u4/g32/asym", 200, 18, 544)),
    *(("u4/g48/asym", 4, 9, 96), ("i4/row/sym", 277, 330, 1104), ("u4/g32/shift", 140, 3, 160)),
    *(("i8/g64/sym", 277, 200, 1088), ("u3/g64/asym", 277, 200, 1088), ("u2/g128/asym", 130, 2, 640)),
]


def by_formula(x: torch.Tensor, weight: Weight) -> WgmmaTile:
    return wgmma_tile(x.shape[0], weight.rows, weight.columns, weight.layout.bits, H100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "m", "n", "k"), CASES)
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_meaning(
    spec: str, m: int, n: int, k: int, dtype: torch.dtype, random_weight: Callable[..., QTensor],
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    q, x = random_weight(spec, n, k, dtype), (torch.randn(m, k, device="cuda") + 0.25).to(dtype)
    weight = Weight.of(q.data, q.scale, q.zero, spec, k)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    assert_close(wgmma(x, weight, None, None, by_formula(x, weight)), want)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_bias_and_activation(
    activation: str | None, splits: int, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    spec = "u4/g64/asym"
    q, x = random_weight(spec, 136, 512, torch.float16), torch.randn(131, 512, device="cuda").half()
    bias = torch.randn(136, device="cuda").half()
    got = wgmma(x, Weight.of(q.data, q.scale, q.zero, spec, 512), bias, activation, WgmmaTile(192, 2, splits))
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, activation))


@pytest.mark.parametrize("outputs", [139, 4096])
@pytest.mark.parametrize("tokens", [128, 144, 192, 200, 264])
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_gated(
    tokens: int, outputs: int, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    """Halves that no tile divides, and more tiles than programs."""
    for spec, bits, activation, dtype in (
        ("u4/g64/asym", 4, "silu", torch.bfloat16),
        ("i8/row/sym", 8, "gelu", torch.float16),
    ):
        tile = WgmmaTile(tokens, wgmma_stages(tokens, bits, H100), 1, last=2)
        q, x = random_weight(spec, 2 * outputs, 1600, dtype), torch.randn(531, 1600, device="cuda").to(dtype)
        bias = torch.randn(2 * outputs, device="cuda").to(dtype)
        for given in (bias, None):
            got = wgmma_gated(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), given, activation, tile)
            exact = None if given is None else given.double()
            gate, up = linear.meaning(x.double(), q.data, q.scale, q.zero, exact, spec, None).chunk(2, -1)
            assert_close(got, ACTIVATIONS[activation](gate) * up, rounded=True)


@pytest.mark.parametrize(
    "tile",
    [WgmmaTile(128, 5, 1), WgmmaTile(144, 5, 1), WgmmaTile(192, 3, 2), WgmmaTile(264, 3, 1), WgmmaTile(256, 3, 4)],
    ids=str,
)
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_several_tiles_a_program(
    tile: WgmmaTile, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    """Slots go on from tile to tile, and again the same comes out."""
    spec = "u4/g64/asym"
    q, x = random_weight(spec, 8192, 1600, torch.bfloat16), torch.randn(1000, 1600, device="cuda").bfloat16()
    weight = Weight.of(q.data, q.scale, q.zero, spec, 1600)
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    first = wgmma(x, weight, None, None, tile)
    assert_close(first, want)
    for _ in range(5):
        assert torch.equal(wgmma(x, weight, None, None, tile), first)


@pytest.mark.parametrize(("spec", "outputs"), [("u4/g64/asym", 8192), ("u4/g64/asym", 8204), ("i4/row/sym", 4100)])
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_a_last_turn_in_parts(
    spec: str, outputs: int, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    q, x = random_weight(spec, outputs, 1600, torch.float16), torch.randn(999, 1600, device="cuda").half()
    bias, tile = torch.randn(outputs, device="cuda").half(), WgmmaTile(144, 5, 1, last=3)
    assert 0 < whole_outputs(tile, 999, outputs, _tuning.Device.of(x.device)) < outputs
    got = wgmma(x, Weight.of(q.data, q.scale, q.zero, spec, 1600), bias, "silu", tile)
    assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, "silu"))


def test_whole_outputs() -> None:
    """Of 448 tiles 396 fill three turns, which are two rows of tiles of 198 blocks of 128 outputs."""
    assert whole_outputs(WgmmaTile(144, 5, 1, last=2), 257, 28672, H100) == 198 * 128
    assert whole_outputs(WgmmaTile(144, 5, 1), 257, 28672, H100) == 28672
    assert whole_outputs(WgmmaTile(144, 5, 2), 257, 28672, H100) == 0
    assert whole_outputs(WgmmaTile(256, 3, 1, last=2), 256, 132 * 128 - 5, H100) == 132 * 128 - 5


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tile"),
    [  # the fastest of those measured, u4/g64/asym, H100
        (128, 28672, 4096, WgmmaTile(128, 5, 1)),
        (129, 28672, 4096, WgmmaTile(136, 5, 1)),
        (256, 28672, 4096, WgmmaTile(256, 3, 1)),
        (256, 4096, 4096, WgmmaTile(128, 5, 2)),
        (256, 6144, 4096, WgmmaTile(128, 5, 1)),
        (256, 4096, 14336, WgmmaTile(128, 5, 2)),
        (257, 28672, 4096, WgmmaTile(264, 3, 1)),
        (257, 4096, 14336, WgmmaTile(264, 3, 4)),
        (384, 4096, 14336, WgmmaTile(192, 3, 2)),
        (385, 28672, 4096, WgmmaTile(200, 3, 1, last=2)),
        (385, 4096, 14336, WgmmaTile(200, 3, 2)),
        (512, 28672, 4096, WgmmaTile(256, 3, 1, last=2)),
        (512, 4096, 14336, WgmmaTile(256, 3, 2)),
        (512, 4096, 4096, WgmmaTile(128, 5, 1)),
        (1024, 6144, 4096, WgmmaTile(208, 3, 1)),
        (2048, 28672, 4096, WgmmaTile(256, 3, 1)),
    ],
)
def test_tiles(rows: int, outputs: int, inputs: int, tile: WgmmaTile) -> None:
    assert wgmma_tile(rows, outputs, inputs, 4, H100) == tile


def test_steps_in_shared_memory() -> None:
    assert [wgmma_stages(256, bits, H100) for bits in (2, 4, 8)] == [3, 3, 2]
    assert _tuning.way(97, True, 32, H100) == "wgmma" != _tuning.way(96, True, 32, H100)
    assert _tuning.way(81, True, 32, H100, outputs=16384) == "wgmma" != _tuning.way(80, True, 32, H100, outputs=16384)
    assert _tuning.way(97, True, 16, H100) == "mma" and _tuning.way(4097, True, 32, H100) == "dequantize"
