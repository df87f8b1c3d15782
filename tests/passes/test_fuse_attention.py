"""fuse_attention: attention over heads that are not repeated."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.attention import attention
from qcompile.passes.fuse_attention import FuseAttention

sdpa = F.scaled_dot_product_attention


def repeat_kv(x, n):
    """As in transformers."""
    batch, heads, length, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, length, width).reshape(batch, heads * n, length, width)


class Attention(nn.Module):
    """`function(q, k, v, mask)` on 4 query heads and 2 key and value heads of 8 columns, cut from projections."""

    def __init__(self, function, kv_heads=2):
        super().__init__()
        self.function = function
        self.kv_heads = kv_heads

    def forward(self, q, k, v, *mask):
        q, k, v = (
            # Sizes are written down: columns of a projection are no symbols.
            x.view(*x.shape[:2], heads, 8).transpose(1, 2)
            for x, heads in ((q, 4), (k, self.kv_heads), (v, self.kv_heads))
        )
        return self.function(q, k, v, *mask)


def inputs(dtype=torch.float32, kv_heads=2, mask=None, rows=5):
    """q, k, v and a mask: None, "bool" or "additive"."""
    q, k, v = torch.randn(2, rows, 32), torch.randn(2, 6, 8 * kv_heads), torch.randn(2, 6, 8 * kv_heads)
    allowed = torch.rand(2, 1, rows, 6) < 0.7
    allowed[..., 0] = True
    masks = {None: (), "bool": (allowed,), "additive": (torch.zeros(allowed.shape).masked_fill(~allowed, -1e4),)}
    return [x.to(dtype) if x.is_floating_point() else x for x in (q, k, v, *masks[mask])]


@pytest.fixture
def fused(graph):
    def run(function, *tensors, kv_heads=2, mask=None, **tolerance):
        g = graph(Attention(function, kv_heads), *(tensors or inputs(kv_heads=kv_heads, mask=mask)))
        g.prepare(*normalizing_passes())
        return g, g.apply(FuseAttention(), **tolerance)

    return run


def only_call(g):
    (node,) = [node for node in g.gm.graph.nodes if node.target is attention.overload]
    return node


def over(repeat):
    """Attention with keys and values through `repeat` first."""
    return lambda q, k, v, *mask: sdpa(q, repeat(k), repeat(v), *mask)


REPEATS = {
    "transformers": lambda x: repeat_kv(x, 2),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, 2, dim=1),
    "repeat_interleave, from the end": lambda x: x.repeat_interleave(2, -3),
    "repeat a dimension of one": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "contiguous": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).contiguous().view(len(x), 4, -1, 8),
}
MASKS = [None, "bool", "additive"]


def test_text(graph, golden):
    g = graph(Attention(over(REPEATS["transformers"])), *inputs(torch.bfloat16, mask="bool"))
    g.prepare(*normalizing_passes())
    before = g.text()
    g.apply(FuseAttention())
    golden("passes/fuse_attention", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize("mask", MASKS)
def test_heads_are_not_repeated(fused, repeat, mask):
    g, result = fused(over(repeat), mask=mask)
    assert len(result.rewrites) == 1 and not result.misses
    assert only_call(g).args[1].meta["val"].shape[1] == only_call(g).args[2].meta["val"].shape[1] == 2
    assert not {"expand", "repeat", "repeat_interleave", "clone"} & set(g.ops())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_groups(fused, dtype):
    g, result = fused(sdpa, *inputs(dtype, 4, "additive"), kv_heads=4)
    assert len(result.rewrites) == 1 and only_call(g).args[3] is not None


def test_one_key_head_for_all(fused):
    g, _ = fused(over(lambda x: x.expand(-1, 4, -1, -1)), kv_heads=1)
    assert only_call(g).args[1].meta["val"].shape[1] == 1 and "expand" not in g.ops()


def test_grouped_by_torch(fused):
    g, _ = fused(lambda q, k, v: sdpa(q, k, v, enable_gqa=True))
    assert only_call(g).args[1].meta["val"].shape[1] == 2


def test_the_scale_is_written_down(fused):
    for scale in (None, 0.3):
        g, _ = fused(lambda q, k, v, s=scale: sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2), scale=s))
        assert only_call(g).args[3:] == (None, False, scale or 1 / math.sqrt(8))
    g, _ = fused(lambda q, k, v: sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True))
    assert only_call(g).args[4] is True


def test_bf16_is_at_least_as_exact(fused):
    tensors = inputs(torch.bfloat16, mask="additive")
    module = Attention(over(REPEATS["transformers"]))
    before = module(*tensors)
    g, _ = fused(module.function, *tensors, rtol=2**-5, atol=2**-5)
    want = module(*(x.double() for x in tensors))
    error, was = ((y.double() - want).abs().mean() for y in (g.run()[0], before))
    assert error <= was * 1.05 and error < 2**-8


@pytest.mark.parametrize("repeat", [True, False])
def test_one_row_over_a_static_cache(graph, repeat):
    """Decoding: keys and values are written into a cache, and attention reads all of it."""

    def decode(q, k, v, keys, values, position):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        mask = torch.arange(keys.shape[2]) <= position
        k, v = (repeat_kv(x, 2) for x in (keys, values)) if repeat else (keys, values)
        return sdpa(q, k, v, mask[None, None, None], enable_gqa=not repeat)

    def heads(q, k, v, *rest):
        q, k, v = (x.view(*x.shape[:2], n, 8).transpose(1, 2) for x, n in ((q, 4), (k, 2), (v, 2)))
        return decode(q, k, v, *rest)

    q, k, v = torch.randn(2, 1, 32), torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    g = graph(heads, q, k, v, *torch.randn(2, 2, 2, 16, 8), torch.tensor([3])).prepare(*normalizing_passes())
    result = g.apply(FuseAttention())
    assert len(result.rewrites) == 1 and g.count(torch.ops.aten.index_copy_.default) == 2
    assert "expand" not in g.ops() and only_call(g).args[1].meta["val"].shape[1] == 2


def test_a_dynamic_cache(fused):
    """Decoding: keys and values so far come before the new ones."""

    def decode(q, k, v):
        k, v = torch.cat([k, k.exp()], 2), torch.cat([v, v.exp()], 2)
        return sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2))

    g, result = fused(decode, *inputs(rows=1))
    assert len(result.rewrites) == 1 and "expand" not in g.ops()


MISSES = {
    "attention weights are dropped at random": lambda q, k, v: sdpa(q, k, v, dropout_p=0.5) * 0,
    "attention in 3 dimensions": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "4 query heads over 4 key heads and 1 value heads": lambda q, k, v: sdpa(q, k, v[:, :1]),
    "k is repeated 1 times, v 4 times": lambda q, k, v: sdpa(q, k, v[:, :1].expand(-1, 4, -1, -1)),
}


@pytest.mark.parametrize(("reason", "function"), MISSES.items())
def test_misses(fused, reason, function):
    _, result = fused(function, *inputs(kv_heads=4), kv_heads=4)
    assert not result.rewrites and [miss for miss, _ in result.misses] == [reason]


def test_misses_keys_that_are_written_to_after_they_were_repeated(fused):
    def written(q, k, v):
        keys = repeat_kv(k := k.exp(), 2)
        k.mul_(2.0)
        return sdpa(q, keys, repeat_kv(v, 2)), k

    _, result = fused(written)
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["exp is written to in between"]


def test_misses_heads_that_vary(graph):
    g = graph(lambda q, k, v: sdpa(q, k, v, scale=0.5), *torch.randn(3, 2, 4, 5, 8))
    result = g.apply(FuseAttention())
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["the number of heads is not a constant"]
    g = graph(lambda q, k, v: sdpa(q, k, v), *torch.randn(3, 2, 4, 5, 8))
    result = g.apply(FuseAttention())
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["the head dimension is not a constant"]


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x: x.repeat(1, 2, 1, 1),  # heads 0, 1, 0, 1, not 0, 0, 1, 1
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.repeat_interleave(2, 2).unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2),
    ],
)
def test_other_repetitions_stay(fused, repeat):
    g, result = fused(over(repeat))
    assert len(result.rewrites) == 1 and only_call(g).args[1].meta["val"].shape[1] == 4
