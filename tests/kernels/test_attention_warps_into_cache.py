"""attention_warps_into_cache against the meaning of attention_into_cache; on a GPU, as Gluon has no interpreter."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import attention_into_cache, attention_warps, attention_warps_into_cache
from qcompile.kernels._attention_tiles import WarpsTile
from qcompile.ops.attention import attention
from qcompile.ops.rope import rope

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.cuda(pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")(test))


TILES = [WarpsTile(1, False, False, 1), WarpsTile(4, False, True, 3, ahead=2), WarpsTile(8, True, False, 1)]
TILES += [WarpsTile(8, True, True, 3, ahead=3)]
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)
# batch, heads, kv_heads, capacity, position: in one step of some tiles, and in several
SHAPES = {"grouped": (1, 32, 8, 1000, 511), "first": (2, 3, 3, 300, 0), "last": (2, 8, 1, 3000, 2999)}
SCALE = 0.2


def arguments(batch: int, heads: int, kv: int, capacity: int, at: int) -> list[Tensor]:
    """q, k and v as cut from one projection; the cache holds nothing at the position yet."""
    qkv = torch.randn(batch, 1, heads + 2 * kv, 128, device="cuda").add(0.25).bfloat16().transpose(1, 2)
    cos, sin = torch.randn(2, 1, 1, 1, 128, device="cuda").bfloat16().expand(2, batch, 1, 1, 128)
    keys, values = torch.randn(2, batch, kv, capacity, 128, device="cuda").bfloat16()
    keys[:, :, at] = values[:, :, at] = math.nan
    return [*qkv.split([heads, kv, kv], 1), cos, sin, keys, values, torch.tensor([at], device="cuda")]


@pytest.fixture
def check(assert_close: Callable[..., None]) -> Callable[..., None]:
    def check(args: list[Tensor], kind: str, call: Callable[..., Tensor]) -> None:
        """What the mask hides is NaN, also a new key."""
        q, k, v, cos, sin, keys, values, at = args
        place = torch.arange(keys.shape[2], device="cuda")
        seen = {"window": (place <= at) & (place > at - 100), "hidden": place < at - 5}.get(kind, place <= at)
        mask = None if kind == "none" else seen.expand(len(q), 1, 1, -1).contiguous()
        if mask is not None:
            for cache in (keys, values):
                cache[:, :, ~seen] = math.nan
        turned = [rope.meaning(x.double(), cos.double(), sin.double()).to(x.dtype) for x in (q, k)]
        want_keys, want_values = keys.index_copy(2, at, turned[1]), values.index_copy(2, at, v)
        given = (x.nan_to_num().double() for x in (turned[0], want_keys, want_values))
        want = attention.meaning(*given, mask, False, SCALE, None)
        assert attention_warps.refuses(q, keys, values, mask) is None
        for _ in range(2):
            assert_close(call(*args, mask, SCALE), want)
            assert_close(keys.nan_to_num(), want_keys.nan_to_num().double())
            assert torch.equal(values.nan_to_num(), want_values.nan_to_num())

    return check


@each_tile
@pytest.mark.parametrize("kind", ["none", "causal", "window", "hidden"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@on_hopper
def test_meaning(shape: Any, kind: str, tile: WarpsTile, check: Callable) -> None:
    check(arguments(*shape), kind, partial(attention_warps_into_cache.attend, tile=tile))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@on_hopper
def test_by_attention_into_cache(shape: Any, check: Callable) -> None:
    """With angles that sequences share, in float32, and columns that are no neighbours."""
    q, k, v, cos, sin, *others = arguments(*shape)
    apart = [x.repeat_interleave(2, 3)[..., ::2] for x in (q, k, v)]
    angles = [x[:1].float() for x in (cos, sin)]
    check([*apart, *angles, *others], "causal", attention_into_cache.attention_into_cache_cuda)


@each_tile
@on_hopper
def test_steps_in_a_graph(tile: WarpsTile, assert_close: Callable) -> None:
    """One after another, of a cache that is filled by them, with a position and a mask that each moves on."""
    q, k, v, cos, sin, keys, values, at = arguments(1, 8, 2, 700, 0)
    at = at.int()
    mask = torch.zeros(1, 1, 1, 700, dtype=torch.bool, device="cuda")
    place = torch.arange(700, device="cuda")

    def step() -> Tensor:
        torch.le(place, at, out=mask[0, 0, 0])
        got = attention_warps_into_cache.attend(q, k, v, cos, sin, keys, values, at, mask, SCALE, tile)
        at.add_(1)
        k.neg_()
        v.neg_()
        return got

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [step() for _ in range(3)]
    for _ in range(100):
        graph.replay()
    length = int(at)
    assert length == 301
    turned = rope.meaning(q.double(), cos.double(), sin.double()).to(q.dtype).double()
    given = (x[:, :, :length].double() for x in (keys, values))
    assert_close(found[-1], attention.meaning(turned, *given, None, False, SCALE, None))


@each_tile
@on_hopper
def test_a_position_outside_writes_nothing(tile: WarpsTile) -> None:
    q, k, v, cos, sin, keys, values, at = arguments(1, 2, 1, 40, 0)
    before = [x.clone() for x in (keys, values)]
    for outside in (-1, 20):
        some = keys[:, :, 10:30], values[:, :, 10:30]
        attention_warps_into_cache.attend(q, k, v, cos, sin, *some, at * 0 + outside, None, SCALE, tile)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip((keys, values), before))
