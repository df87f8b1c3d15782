"""linear_many: whole tiles and the rows behind them against the meaning of `linear`; on a GPU, for Gluon's kernels."""

from collections.abc import Callable

import pytest
import torch

from qcompile.kernels._tuning import Device
from qcompile.kernels._turns import LEFT_OVER, WgmmaTile, left_over, wgmma_tile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_many import many, many_gated
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
H100 = Device()


@pytest.mark.parametrize("rows", [257, 264, 265, 384, 136])
@pytest.mark.parametrize("spec", ["u4/g64/asym", "i8/row/sym", "u2/g64/asym"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_meaning(
    spec: str, rows: int, dtype: torch.dtype, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    for outputs, inputs, tile in ((200, 1088, WgmmaTile(128, 2, 2)), (4099, 8192, WgmmaTile(128, 2, 1, last=3))):
        q, x = random_weight(spec, outputs, inputs, dtype), torch.randn(rows, inputs, device="cuda").to(dtype)
        weight, bias = Weight.of(q.data, q.scale, q.zero, spec, inputs), torch.randn(outputs, device="cuda").to(dtype)
        got = many(x, weight, bias, "silu", tile)
        assert_close(got, linear.meaning(x.double(), q.data, q.scale, q.zero, bias.double(), spec, "silu"))


@pytest.mark.parametrize("rows", [257, 265, 384])
@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")
def test_gated(rows: int, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    for outputs, inputs in ((139, 1600), (512, 8192)):
        q = random_weight("u4/g64/asym", 2 * outputs, inputs, torch.bfloat16)
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        got = many_gated(
            x, Weight.of(q.data, q.scale, q.zero, "u4/g64/asym", inputs), None, "silu", WgmmaTile(128, 5, 1)
        )
        gate, up = linear.meaning(x.double(), q.data, q.scale, q.zero, None, "u4/g64/asym", None).chunk(2, -1)
        assert_close(got, ACTIVATIONS["silu"](gate) * up, rounded=True)


def test_rows_behind_whole_tiles() -> None:
    assert [left_over(rows, 256, 4) for rows in (1, 256, 257, 264, 265, 768, 769)] == [0, 0, 1, LEFT_OVER, 0, 0, 1]
    assert left_over(257, 256, 2) == 0


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "left"),
    [  # as they were measured, u4/g64/asym, H100
        (129, 28672, 4096, 0),
        (257, 28672, 4096, 0),
        (513, 4096, 14336, 0),
        (769, 28672, 4096, 1),
        (769, 4096, 14336, 1),
        (1025, 28672, 4096, 1),
        (1025, 4096, 4096, 1),
        (1281, 28672, 4096, 1),
        (1281, 6144, 4096, 1),
    ],
)
def test_where_it_pays(rows: int, outputs: int, inputs: int, left: int) -> None:
    assert left_over(rows, wgmma_tile(rows, outputs, inputs, 4, H100).tokens, 4) == left
