"""Codes by codes on Hopper against their meaning in float64; on a GPU, as Gluon has no interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _turns
from qcompile.kernels._tuning import Device
from qcompile.kernels._turns import ProductTile, product_tile
from qcompile.kernels.linear_codes import multiply_codes, refuses
from qcompile.ops.activation import ACTIVATIONS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ELEMENTS = ["i8", "fp8_e4m3"]
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


def random_codes(element: str, m: int, k: int) -> Tensor:
    if element == "i8":
        return torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
    return (torch.randn(m, k, device="cuda") * 80).clamp(-448, 448).to(torch.float8_e4m3fn)


def stored(codes: Tensor) -> Tensor:
    """As a weight holds them: from 0, or their bits."""
    return codes.view(torch.uint8) ^ 128 if codes.dtype == torch.int8 else codes.view(torch.uint8)


def tile_of(m: int, n: int, k: int, element: str) -> ProductTile:
    return product_tile(m, n, k, element == "i8", Device.of(torch.device("cuda")))


def meaning(x: Tensor, step: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = x.double() @ w.double().T * step.double()[:, None] * scale.double()
    y = y if bias is None else y + bias.double()
    return y if activation is None else ACTIVATIONS[activation](y)


def check(
    element: str,
    m: int,
    n: int,
    k: int,
    tile: ProductTile,
    close: Callable[..., None],
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    activation: str | None = None,
    shared: bool = False,
) -> None:
    x, w = random_codes(element, m, k), random_codes(element, n, k)
    step, scale = (torch.rand(1 if shared else count, device="cuda") + 0.5 for count in (m, n))
    scale = (scale / (k * 40)).to(dtype)
    b = (torch.randn(n, device="cuda") * 0.1).to(dtype) if bias else None
    got = multiply_codes(x, step, stored(w), scale, b, activation, dtype, tile)
    close(got, meaning(x, step, w, scale, b, activation))


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (17, 136, 144), (300, 520, 4112), (700, 264, 400), (2500, 1000, 256)]
)
def test_meaning(element: str, m: int, n: int, k: int, assert_close: Callable[..., None]) -> None:
    check(element, m, n, k, tile_of(m, n, k, element), assert_close)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_tiles(tokens: int, splits: int, element: str, assert_close: Callable[..., None]) -> None:
    """Also fewer steps than parts of the inputs, and several tiles a program."""
    tile = ProductTile(tokens, min(tokens, 128), 3, splits, programs=7)
    check(element, 333, 400, 496, tile, assert_close, torch.float16, bias=True, activation="silu")
    check(element, 20, 1000, 1808, tile, assert_close, shared=True)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(activation: str | None, splits: int, assert_close: Callable[..., None]) -> None:
    tile = ProductTile(64, 64, 4, splits, programs=132)
    check("i8", 33, 72, 272, tile, assert_close, bias=True, activation=activation)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("splits", [1, 2])
def test_extremes_are_summed_exactly(splits: int) -> None:
    x, w = (torch.full((64, 4096), -128, dtype=torch.int8, device="cuda") for _ in range(2))
    w[:, 2048:], w[:, 0] = 127, -127
    step = torch.ones(64, device="cuda")
    tile = ProductTile(64, 64, 4, splits, programs=132)
    got = multiply_codes(x, step, stored(w), step / 4096, None, None, torch.float16, tile)
    assert (got == (2048 - 1) * 128 / 4096).all()


@pytest.mark.cuda
@on_hopper
def test_long_sums_of_floats(assert_close: Callable[..., None]) -> None:
    """Tensor cores alone would keep 14 bits of them."""
    x, w = (torch.rand(128, 14336, device="cuda").add(0.5).to(torch.float8_e4m3fn) for _ in range(2))
    step = torch.ones(128, device="cuda")
    tile = tile_of(128, 128, 14336, "fp8_e4m3")
    got = multiply_codes(x, step, stored(w), step / 1000, None, None, torch.bfloat16, tile)
    assert_close(got, meaning(x, step, w, step / 1000, None, None))


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_same_each_time(element: str) -> None:
    """No tile is read before it is there, or overwritten while it is read."""
    x, w = random_codes(element, 1000, 4096), random_codes(element, 4096, 4096)
    step, scale = torch.ones(1000, device="cuda"), torch.full((4096,), 1e-5, device="cuda")
    for tokens in (64, 256):
        tile = ProductTile(tokens, min(tokens, 128), 3, 1, 132)
        first, *others = (
            multiply_codes(x, step, stored(w), scale, None, None, torch.bfloat16, tile) for _ in range(10)
        )
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.cuda
def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.zeros(32, 64, dtype=torch.int8, device="cuda"), torch.zeros(16, 64, dtype=torch.uint8, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refuses(x, w, torch.bfloat16) is None
    assert refuses(x, w, torch.float32) == "makes outputs of 16 bits"
    assert refuses(x, w[:12], torch.float16) == "needs multiples of 16 inputs and of 8 outputs, not 64 and 12"
    assert refuses(x.view(-1)[1:-63].view(31, 64), w, torch.float16) == (
        "needs codes that begin at multiples of 16 bytes"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert refuses(x, w, torch.bfloat16) == "needs a GPU of compute capability 9.0"


@pytest.mark.parametrize("integers", [True, False])
def test_tiles_fit_and_follow_the_rows(integers: bool) -> None:
    device, shapes = Device(), ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8, 16))
    for rows in (1, 17, 64, 200, 256, 512, 3000, 100000):
        for outputs, inputs in shapes:
            tile = product_tile(rows, outputs, inputs, integers, device)
            stage = (tile.tokens + _turns.PRODUCT_OUTPUTS) * _turns.PRODUCT_CODES
            held = 2 * tile.tokens * _turns.PRODUCT_OUTPUTS if tile.splits == 1 else 0
            assert tile.stages >= 3 and tile.stages * stage + held <= device.shared_bytes
    assert [product_tile(rows, 4096, 4096, integers, device).tokens for rows in (32, 512, 2048)] == [64, 128, 256]
    assert product_tile(64, 4096, 14336, integers, device).splits == 2
