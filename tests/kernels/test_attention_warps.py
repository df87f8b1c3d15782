"""attention_warps against the op's meaning; on a GPU, as Gluon has no interpreter."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_decode, attention_warps
from qcompile.kernels._attention_tiles import WarpsTile
from qcompile.kernels._clusters import MOST
from qcompile.ops.attention import attention

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.cuda(pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")(test))


TILES = [WarpsTile(1, False, False, 4), WarpsTile(4, False, True, 4, ahead=2), WarpsTile(8, True, False, 1)]
TILES += [WarpsTile(8, True, True, 3, ahead=3), WarpsTile(4, False, True, 8, ahead=2, piece=32)]
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)
# batch, heads, kv_heads, length, keys: in one step of some tiles, and in several
SHAPES = {
    "grouped": (1, 32, 8, 1, 1000),
    "one key": (2, 3, 3, 1, 1),
    "few queries": (2, 4, 2, 3, 700),
    "eight rows": (1, 8, 1, 1, 5001),
}
SCALE = 0.2


def tensors(batch: int, heads: int, kv: int, length: int, keys: int) -> list[Tensor]:
    sizes = ((heads, length), (kv, keys), (kv, keys))
    return [torch.randn(batch, n, m, 128, device="cuda").add(0.25).bfloat16() for n, m in sizes]


@pytest.fixture
def check(assert_close: Callable[..., None]) -> Callable[..., None]:
    def check(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tile: WarpsTile, want: Tensor | None = None
    ) -> None:
        assert attention_warps.refuses(q, k, v, mask) is None
        if want is None:
            want = attention.meaning(q.double(), k.double(), v.double(), mask, False, SCALE, None)
        for _ in range(3):
            assert_close(attention_warps.attend(q, k, v, mask, SCALE, tile), want)

    return check


@each_tile
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@on_hopper
def test_meaning(masked: bool, shape: Any, tile: WarpsTile, check: Callable) -> None:
    mask = torch.rand(shape[0], 1, 1, shape[4], device="cuda") < 0.6
    mask[..., 0] = True
    check(*tensors(*shape), mask if masked else None, tile)


@each_tile
@on_hopper
def test_keys_that_nobody_attends_to_are_not_read(tile: WarpsTile, check: Callable) -> None:
    """A cache that is partly filled, and windows in it: elsewhere is NaN, which would show."""
    q, k, v = tensors(2, 8, 2, 1, 3000)
    for lo, hi in ((0, 129), (1100, 1200), (2999, 3000)):
        seen = torch.zeros(2, 1, 1, 3000, dtype=torch.bool, device="cuda")
        seen[..., lo:hi] = True
        want = attention.meaning(*(x.double() for x in (q, k[:, :, lo:hi], v[:, :, lo:hi])), None, False, SCALE, None)
        holey = [x.masked_fill(~seen.transpose(2, 3), math.nan) for x in (k, v)]
        check(q, *holey, seen, tile, want=want)


@each_tile
@on_hopper
def test_a_mask_that_the_kernel_before_writes(tile: WarpsTile, assert_close: Callable) -> None:
    """In a graph, where the kernel begins before that is done, and peeks at what it was."""
    q, k, v = tensors(1, 8, 2, 1, 900)
    lengths = torch.tensor([1, 700, 3, 900, 450], device="cuda")
    place, mask = torch.arange(900, device="cuda"), torch.zeros(1, 1, 1, 900, dtype=torch.bool, device="cuda")

    def call() -> list[Tensor]:
        found = []
        for length in lengths:
            torch.lt(place, length, out=mask[0, 0, 0])
            found.append(attention_warps.attend(q, k, v, mask, SCALE, tile))
        return found

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for _ in range(5):
        graph.replay()
        for length, got in zip(lengths.tolist(), found):
            exact = (x.double() for x in (q, k[:, :, :length], v[:, :, :length]))
            assert_close(got, attention.meaning(*exact, None, False, SCALE, None))


@each_tile
@on_hopper
def test_rows_that_attend_to_nothing(tile: WarpsTile, assert_close: Callable) -> None:
    q, k, v = tensors(2, 4, 2, 1, 300)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    mask[0] = False
    got = attention_warps.attend(q, k, v, mask, SCALE, tile)
    assert_close(got, attention.meaning(q.double(), k.double(), v.double(), mask, False, SCALE, None))
    assert not got[0].any()


@on_hopper
def test_layouts_of_a_cache(check: Callable, assert_close: Callable) -> None:
    """Heads last but one, a stretch of a longer cache, an expanded batch; and what is left to attention_decode."""
    q, k, v = tensors(2, 4, 2, 1, 600)
    mask = torch.rand(2, 1, 1, 1200, device="cuda")[..., ::2] < 0.7
    for tile in TILES:
        check(q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)), mask, tile)
        check(q, k[:, :, 3:590], v[:, :, 3:590], mask[..., :587], tile)
        check(q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1), mask, tile)
    apart = torch.empty(*k.shape[:3], k.shape[3] + 4, device="cuda", dtype=k.dtype)[..., : k.shape[3]]
    for odd in (k.transpose(2, 3).contiguous().transpose(2, 3), apart):
        assert "begin at multiples of 16 bytes" in (attention_warps.refuses(q, odd, v, None) or "")
    want = attention.meaning(q.double(), k.double(), v.double(), None, False, SCALE, None)
    got = attention_decode.attend(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, None, SCALE)
    assert_close(got, want)


@on_hopper
def test_refusals() -> None:
    def reason(q: Any, k: Any, mask: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
        q, k = (torch.ones(shape, device="cuda", dtype=dtype) for shape in (q, k))
        return str(attention_warps.refuses(q, k, k, mask))

    q, k, seen = (1, 2, 1, 128), (1, 1, 6, 128), torch.ones(1, 2, 1, 6, dtype=torch.bool, device="cuda")
    assert reason(q, k) == "None"
    assert reason(q, k, seen[:, :1]) == "None"
    assert "bfloat16" in reason(q, k, dtype=torch.float16)
    assert "128 columns" in reason((1, 2, 1, 96), (1, 1, 6, 96))
    assert "8 query rows" in reason((1, 3, 3, 128), k)
    assert "all query rows share" in reason(q, k, seen)
    assert "boolean" in reason(q, k, seen[:, :1].bfloat16())
    assert "sequences times heads" in reason((999, 2, 1, 128), (999, 1, 6, 128))
    assert "soft-cap" in str(
        attention_warps.refuses(*(torch.ones(x, device="cuda").bfloat16() for x in (q, k, k)), None, 3.0)
    )


@on_hopper
def test_empty() -> None:
    q, k = torch.ones(2, 4, 1, 128, device="cuda").bfloat16(), torch.ones(2, 2, 0, 128, device="cuda").bfloat16()
    assert attention_warps.refuses(q, k, k, None) is None
    assert not attention_decode.attend(q, k, k, None, SCALE).any()


@pytest.mark.parametrize("pairs", [1, 8, 16, 128, 5000])
@pytest.mark.parametrize("keys", [0, 1, 128, 1024, 32768])
def test_tiles(pairs: int, keys: int) -> None:
    """Powers of two, no more programs than multiprocessors where there are several parts; clusters of one step."""
    device = _tuning.Device(9, 227 << 10)
    tile = _attention_tiles.warps_tile(pairs, keys, device)
    assert tile.splits & (tile.splits - 1) == 0
    assert tile.splits == 1 or pairs * tile.splits <= device.processors
    assert not tile.cluster or (1 < tile.splits <= MOST and keys <= 128 * tile.splits)
    step = _attention_tiles.step_tile(pairs, keys, device)
    assert step is None or (step.early and (step.splits == 1 or step.cluster))


@pytest.mark.parametrize(("keys", "splits"), [(129, 2), (300, 4), (513, 8), (704, 8), (1024, 8)])
def test_short_caches_of_any_length_are_read_in_one_step(keys: int, splits: int) -> None:
    tile = _attention_tiles.step_tile(8, keys, _tuning.Device(9, 227 << 10))
    assert tile is not None and tile.splits == splits and tile.cluster
