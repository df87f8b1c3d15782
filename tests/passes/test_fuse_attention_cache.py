"""fuse_attention_cache: attention of one new token takes the rope and the writing of the cache."""

import pytest
import torch
import torch.nn.functional as F

from qcompile.normal import normalizing_passes
from qcompile.ops.attention import attention
from qcompile.ops.attention_into_cache import attention_into_cache
from qcompile.ops.rope import rope_into_cache
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_attention_cache import FuseAttentionCache
from qcompile.passes.fuse_rope import FuseRope
from qcompile.passes.fuse_rope_cache import FuseRopeCache

BEFORE = (*normalizing_passes(), FuseRope(), FuseAttention(), FuseRopeCache())


def turned(x, cos, sin):
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin


def one(q, k, v, cos, sin, keys, values, at):
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    q = turned(q, cos, sin)
    mask = torch.arange(12) <= at[-1]
    return F.scaled_dot_product_attention(q, keys, values, mask[None, None, None], enable_gqa=True)


def inputs(length=1):
    q, k, v = (torch.randn(2, length, 8 * heads) for heads in (4, 2, 2))
    return [q, k, v, *torch.randn(2, 2, length, 8), *torch.randn(2, 2, 2, 12, 8), torch.arange(3, 3 + length)]


@pytest.fixture
def fused(step, monkeypatch):
    def run(function, length=1, reason=None, device="cpu", more=()):
        monkeypatch.setattr(attention_into_cache, "implementations", [])

        def refuses(query, key, value, cos, sin, keys, values, positions, mask, scale, softcap=None):
            return reason

        attention_into_cache.implementation("test", refuses, device=device)(attention_into_cache.meaning)
        g = step(function, *inputs(length), *more).prepare(*BEFORE)
        return g, g.apply(FuseAttentionCache())

    return run


def reasons(result):
    return [reason for reason, _ in result.misses]


def test_text(fused, step, golden):
    before = step(one, *inputs()).prepare(*BEFORE).text()
    g, _ = fused(one)
    golden("passes/fuse_attention_cache", f"{before}\nbecomes\n\n{g.text()}")


def test_layers_one_after_the_other(fused):
    def two(q, k, v, cos, sin, keys, values, at, more_keys, more_values):
        y = one(q, k, v, cos, sin, keys, values, at)
        return one(y, k, v, cos, sin, more_keys, more_values, at), keys.sum()

    g, result = fused(two, more=inputs()[5:7])
    assert not result.misses
    assert len(result.rewrites) == g.count(attention_into_cache.overload) == 2
    assert not g.count(rope_into_cache.overload, attention.overload)


@pytest.mark.parametrize("others", [{"length": 3}, {"device": "cuda"}])
def test_none_of_its_business(fused, others):
    g, result = fused(one, **others)
    assert not result.rewrites and not result.misses and g.count(rope_into_cache.overload) == 1


def test_miss_refused(fused):
    assert reasons(fused(one, reason="does not like it")[1]) == ["does not like it"]


def between(act):
    """A step in ops of ours with `act(q, v, keys)` between the two."""

    def step(q, k, v, cos, sin, keys, values, at):
        q = rope_into_cache(q, k, v, cos, sin, keys, values, at)
        other = act(q, v, keys)
        return attention(q, keys, values, None, False, 0.3), other

    return step


@pytest.mark.parametrize(
    ("reason", "act"),
    [
        ("rope_into_cache has another user", lambda q, v, keys: q.exp()),
        ("sum_1 uses the cache before attention does", lambda q, v, keys: keys.sum()),
        ("transpose_2 is written to in between", lambda q, v, keys: v.zero_()[0, 0, 0, 0] * 1),
    ],
)
def test_misses(fused, reason, act):
    _, result = fused(between(act))
    assert not result.rewrites and reasons(result) == [reason]
