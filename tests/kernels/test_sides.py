"""Scales and zero points copied beside the codes: which can be, and that it makes no difference."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import pad

from qcompile.kernels._sides import can_copy
from qcompile.kernels._tuning import FewTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_few import few
from qcompile.ops.linear import linear
from qcompile.quant.tensor import QTensor

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)


def weight(spec: str, columns: int, group: int, side: torch.dtype = torch.bfloat16) -> Weight:
    data = torch.zeros(8, columns // 2, dtype=torch.uint8)
    scale = torch.ones(8, columns // group, dtype=side)
    return Weight.of(data, scale, scale.clone() if "asym" in spec else None, spec, columns)


def test_what_can_be_copied() -> None:
    u4, i4 = weight("u4/g64/asym", 4096, 64), weight("i4/g128/sym", 4096, 128)
    assert can_copy(u4, 1024, 64) and can_copy(u4, 512, 64) and can_copy(i4, 1024, 16)
    assert not can_copy(u4, 1024, 63)  # no room
    assert not can_copy(u4, 256, 64) and not can_copy(i4, 512, 64)  # eight bytes of a row
    assert not can_copy(u4, 32, 64)  # half a group
    assert not can_copy(weight("u4/g64/asym", 4160, 64), 1024, 64)  # the last step is behind the end of a row
    assert not can_copy(weight("u4/g64/asym", 512, 64), 512, 64)  # rows of scales begin at no multiple of 16
    assert can_copy(weight("u4/g64/asym", 1024, 64, torch.float32), 256, 64)
    assert not can_copy(weight("i4/row/sym", 4096, 4096), 512, 64)


@pytest.mark.cuda
@pytest.mark.skipif(OLD, reason="needs a GPU of compute capability 8.0")
@pytest.mark.parametrize("spec", ["u4/g64/asym", "u4/g32/asym_int", "i4/g64/sym", "u8/g32/asym", "u4/g64/shift"])
def test_copied_or_not(spec: str, random_weight: Callable[..., QTensor], assert_close: Callable[..., None]) -> None:
    """Scales whose rows begin where copies may, and elsewhere."""
    q, x = random_weight(spec, 70, 2048, torch.bfloat16), torch.randn(13, 2048, device="cuda").bfloat16()
    want = linear.meaning(x.double(), q.data, q.scale, q.zero, None, spec, None)
    tile = FewTile(tokens=16, codes=128, stages=3, parts=1, split=4, warps=4, together=1)
    for apart in (0, 1):
        scale, zero = (
            None if side is None else pad(side, (0, apart))[:, : side.shape[1]] for side in (q.scale, q.zero)
        )
        assert scale is not None
        weight = Weight.of(q.data, scale, zero, spec, 2048)
        assert can_copy(weight, 512, 1 << 10) == (apart == 0)
        assert_close(few(x, weight, None, None, tile), want)
