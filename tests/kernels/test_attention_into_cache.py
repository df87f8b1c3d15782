"""attention_into_cache against its meaning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_into_cache
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.kernels._clusters import has_clusters
from qcompile.ops.attention import attention
from qcompile.ops.rope import rope

# batch, heads, kv_heads, width, value width, capacity, position
SHAPES = {
    "one key": (1, 1, 1, 8, 8, 1, 0),
    "grouped": (2, 6, 2, 16, 16, 37, 36),
    "one key head": (1, 20, 1, 24, 24, 50, 3),
    "no groups": (2, 3, 3, 80, 80, 65, 64),
    "odd widths": (2, 4, 2, 18, 7, 40, 17),
    "wide": (1, 2, 1, 256, 192, 70, 69),
    "long": (1, 4, 2, 64, 64, 600, 480),
}
CLUSTERS = torch.cuda.is_available() and has_clusters(_tuning.Device.of(torch.device("cuda", 0)))
TILES = [*(AttentionTile(n, 16, 16, 4, 1) for n in (1, 4)), AttentionTile(2, 16, 64, 4, 3, beside=4)]
TILES += [AttentionTile(4, 16, 32, 4, 2, cluster=True), AttentionTile(8, 16, 128, 8, 2, cluster=True)] * CLUSTERS


@pytest.fixture
def arguments(random_tensor: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(b: int, h: int, kv: int, n: int, width: int, capacity: int, at: int) -> list[Tensor]:
        """q, k and v as cut from one projection."""
        cuts = random_tensor(b, 1, (h + kv) * n + kv * width).split([h * n, kv * n, kv * width], dim=-1)
        q, k, v = (x.view(b, 1, heads, -1).transpose(1, 2) for x, heads in zip(cuts, (h, kv, kv)))
        cos, sin = random_tensor(1, 1, 1, n), random_tensor(1, 1, 1, n)
        keys, values = random_tensor(b, kv, capacity, n), random_tensor(b, kv, capacity, width)
        return [q, k, v, cos, sin, keys, values, torch.tensor([at], device=q.device)]

    return make


def check(args: list[Tensor], mask: Tensor | None, assert_close: Callable, softcap: float | None = None) -> None:
    q, k, v, cos, sin, keys, values, at = args
    # Turned queries and keys are rounded to their dtype, as in the cache.
    turned = [rope.meaning(x.double(), cos.double(), sin.double()).to(x.dtype).double() for x in (q, k)]
    new_keys, new_values = keys.double().index_copy(2, at.long(), turned[1]), values.index_copy(2, at.long(), v)
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    want = attention.meaning(turned[0], new_keys, new_values.double(), exact_mask, False, 0.2, softcap)
    assert attention_into_cache.refuses(*args, mask, 0.2) is None  # type: ignore[call-arg]
    assert_close(attention_into_cache.attention_into_cache_cuda(*args, mask, 0.2, softcap), want)
    assert_close(keys, new_keys)
    assert torch.equal(values, new_values)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("masked", ["not", "boolean", "additive"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_meaning(
    shape: Any, masked: str, tile: AttentionTile, arguments: Callable, assert_close: Callable, chosen_for: Callable,
    monkeypatch: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(_attention_tiles, "attention_tile", lambda *_: tile)
    args, capacity, at = arguments(*shape), shape[5], shape[6]
    chosen_for(tile, args[0], args[2])
    seen = (torch.arange(capacity, device=args[0].device) <= at)[None, None, None]
    mask = {"not": None, "boolean": seen, "additive": torch.where(seen, 0.0, float("-inf")).to(args[0].dtype)}[masked]
    check(args, mask, assert_close)


def test_what_the_cache_held_there_is_not_read(arguments: Callable, assert_close: Callable) -> None:
    args = arguments(*SHAPES["grouped"])
    keys, values, at = args[5:]
    for cache in (keys, values):
        cache[:, :, at] = float("nan")
    check(args, None, assert_close)


def test_soft_cap(arguments: Callable, assert_close: Callable) -> None:
    check(arguments(*SHAPES["grouped"]), None, assert_close, softcap=0.5)


def test_layouts(arguments: Callable, random_tensor: Callable, assert_close: Callable) -> None:
    """Columns with gaps, angles of each sequence or in float32, heads inside of a cache, int32, a mask by sequence."""
    q, k, v, cos, sin, keys, values, at = arguments(2, 4, 2, 16, 16, 40, 9)
    seen = torch.arange(40, device=q.device) < torch.tensor([[10], [12]], device=q.device)
    check([q, k, v, cos.expand(2, 1, 1, 16) * 2, random_tensor(2, 1, 1, 16), keys, values, at], None, assert_close)
    check([q, k, v, cos[0, 0].float(), sin[0].float(), keys, values, at.int()], seen[:, None, None], assert_close)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    check([q[..., ::2], k[..., ::2], v[..., ::2], cos[..., ::2], sin[..., :8], *(x[..., :8] for x in turned), at],
          None, assert_close)  # fmt: skip


def test_a_position_outside_writes_nothing(arguments: Callable) -> None:
    q, k, v, cos, sin, keys, values, at = arguments(1, 2, 1, 8, 8, 4, 0)
    before = [x.clone() for x in (keys, values)]
    for outside in (-1, 2):
        some = keys[:, :, 1:3], values[:, :, 1:3]
        attention_into_cache.attention_into_cache_cuda(q, k, v, cos, sin, *some, at * 0 + outside, None, 0.3)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_a_cache_without_room(arguments: Callable) -> None:
    """Its mask has nothing to read."""
    q, k, v, cos, sin, keys, values, at = arguments(1, 2, 1, 8, 8, 4, 0)
    none = [x[:, :, :0] for x in (keys, values)]
    mask = torch.zeros(1, 1, 1, 0, dtype=torch.bool, device=q.device)
    assert not attention_into_cache.attention_into_cache_cuda(q, k, v, cos, sin, *none, at, mask, 0.3).any()


def test_refusals(arguments: Callable) -> None:
    args = arguments(1, 4, 2, 8, 8, 4, 0)
    by_head = torch.ones(1, 4, 1, 4, dtype=torch.bool, device=args[0].device)
    assert "from head to head" in str(attention_into_cache.refuses(*args, by_head, 0.2))
    assert "from head to head" in str(attention_into_cache.refuses(*args, by_head[0], 0.2))
    two = [x.expand(-1, -1, 2, -1) for x in args[:5]]
    assert "one position" in str(attention_into_cache.refuses(*two, *args[5:], None, 0.2))
