"""Scales and zero points copied in chunks of some steps: which can be, and that it makes no difference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from qcompile.kernels import _side_chunks
from qcompile.kernels._tuning import Device, MmaTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_mma import copies_sides, mma
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def tile(codes: int, parts: int = 1) -> MmaTile:
    return MmaTile(48, codes, stages=3, splits=parts, warps=4, together=1, warp_groups=True)


def weight(spec: str, columns: int, group: int, apart: int = 0) -> Weight:
    data = torch.zeros(8, columns // 2, dtype=torch.uint8)
    scale = pad(torch.ones(8, columns // group, dtype=torch.bfloat16), (0, apart))[:, : columns // group]
    return Weight.of(data, scale, scale.clone() if "asym" in spec else None, spec, columns)


def can_copy(weight: Weight, tile: MmaTile, shared: int = 227 << 10) -> bool:
    return _side_chunks.can_copy(weight, tile, shared)


def test_what_can_be_copied() -> None:
    u4, i4 = weight("u4/g64/asym", 4096, 64), weight("i4/g32/sym", 4096, 32)
    assert all(can_copy(w, tile(codes)) for w in (u4, i4) for codes in (128, 256, 512))
    assert not can_copy(u4, tile(32))  # half a group
    assert not can_copy(weight("i4/g128/sym", 4096, 128), tile(256))  # few
    assert can_copy(u4, tile(128), 56 << 10) and not can_copy(u4, tile(128), 52 << 10)
    assert not can_copy(weight("u4/g64/asym", 4096, 64, apart=1), tile(256))
    assert not can_copy(weight("u4/g64/asym", 4160, 64), tile(256))  # the last step is behind the end of a row
    assert not can_copy(weight("u4/g64/asym", 512, 64), tile(256))  # rows of scales are half a chunk
    assert not can_copy(weight("i4/row/sym", 4096, 4096), tile(256))


def test_tiles_that_copy() -> None:
    u4 = weight("u4/g64/asym", 4096, 64)
    tiles = [replace(tile(128), tokens=tokens, splits=splits) for tokens in (16, 32, 48, 96, 128) for splits in (1, 2)]
    copies = [(tile.tokens, tile.splits) for tile in tiles if copies_sides(u4, tile, Device())]
    assert copies == [(16, 2), (48, 1), (48, 2), (96, 1), (96, 2)]
    assert not copies_sides(u4, replace(tile(128), warp_groups=False), Device())


@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("codes", [128, 256])
@pytest.mark.parametrize("spec", ["u4/g64/asym", "u4/g32/asym_int", "i4/g32/sym", "u4/g64/shift"])
def test_copied_or_not(
    spec: str, codes: int, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]
) -> None:
    """Parts that begin within a chunk; scales whose rows begin where copies may, and elsewhere."""
    q, x = random_weight(spec, 70, 4096, torch.bfloat16), torch.randn(13, 4096, device="cuda").bfloat16()
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    for apart in (0, 1):
        scale, zero = (
            None if side is None else pad(side, (0, apart))[:, : side.shape[1]] for side in (q.scale, q.zero)
        )
        assert scale is not None
        given = Weight.of(q.data, scale, zero, spec, 4096)
        assert copies_sides(given, tile(codes), Device()) == (apart == 0)
        assert_close(mma(x, given, None, None, tile(codes, parts=3)), want)
