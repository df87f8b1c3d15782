"""fuse_attention: torch's attention and transformers' eager spelling, over heads that are not repeated."""

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


def eager(q, k, v, mask=None, scale=0.25, dropout=0.0):
    """transformers' eager_attention_forward, without the weights among its results."""
    weights = torch.matmul(q, k.transpose(2, 3)) * scale
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=dropout, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


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


def over(f, spelled):
    """`spelled` attention with keys and values through `f` first."""
    return lambda q, k, v, *mask: spelled(q, f(k), f(v), *mask)


REPEATS = {
    "transformers": lambda x: repeat_kv(x, 2),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, 2, dim=1),
    "repeat_interleave, from the end": lambda x: x.repeat_interleave(2, -3),
    "repeat a dimension of one": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "contiguous": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).contiguous().view(len(x), 4, -1, 8),
}
MASKS = [None, "bool", "additive"]


def test_text(graph, golden):
    g = graph(Attention(over(REPEATS["transformers"], sdpa)), *inputs(torch.bfloat16, mask="bool"))
    g.prepare(*normalizing_passes())
    before = g.text()
    g.apply(FuseAttention())
    golden("passes/fuse_attention", f"{before}\nbecomes\n\n{g.text()}")


def test_text_eager(graph, golden):
    g = graph(Attention(over(REPEATS["transformers"], eager)), *inputs(torch.bfloat16, mask="additive"))
    g.prepare(*normalizing_passes())
    before = g.text()
    g.apply(FuseAttention(), rtol=2**-5, atol=2**-5)
    golden("passes/fuse_attention_eager", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize("spelled", [sdpa, eager])
@pytest.mark.parametrize("mask", MASKS)
def test_heads_are_not_repeated(fused, repeat, spelled, mask):
    if spelled is eager and mask == "bool":
        mask = "additive"
    g, result = fused(over(repeat, spelled), mask=mask)
    assert len(result.rewrites) == 1 and not result.misses
    assert only_call(g).args[1].meta["val"].shape[1] == only_call(g).args[2].meta["val"].shape[1] == 2
    assert not {"expand", "repeat", "repeat_interleave", "clone", "softmax", "matmul"} & set(g.ops())


@pytest.mark.parametrize("spelled", [sdpa, eager])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_groups(fused, spelled, dtype):
    g, result = fused(spelled, *inputs(dtype, 4, "additive"), kv_heads=4)
    assert len(result.rewrites) == 1 and only_call(g).args[3] is not None


def test_one_key_head_for_all(fused):
    g, _ = fused(over(lambda x: x.expand(-1, 4, -1, -1), sdpa), kv_heads=1)
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


@pytest.mark.parametrize("spelled", [sdpa, eager])
def test_bf16_is_at_least_as_exact(fused, spelled):
    tensors = inputs(torch.bfloat16, mask="additive")
    module = Attention(over(REPEATS["transformers"], spelled))
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


def test_a_dynamic_cache(graph):
    def decode(q, k, v, keys, values):
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2))

    q, (k, v), (keys, values) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 2, 1, 8), torch.randn(2, 2, 2, 7, 8)
    g = graph(
        lambda *xs: decode(*(x.view(x.shape[0], n, -1, 8) for x, n in zip(xs, (4, 2, 2, 2, 2)))), q, k, v, keys, values
    )
    result = g.prepare(*normalizing_passes()).apply(FuseAttention())
    assert len(result.rewrites) == 1 and "expand" not in g.ops()


EAGER = {
    "mask first": lambda q, k, v, m: torch.softmax(m + q @ k.mT * 0.25, -1) @ v,
    "divided": lambda q, k, v, m: torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8) + m, -1) @ v,
    "query scaled": lambda q, k, v, m: torch.softmax((q * 0.25) @ k.transpose(-2, -1) + m, 3) @ v,
    "both scaled": lambda q, k, v, m: torch.softmax((q * 0.5) @ (k * 0.5).transpose(-2, -1) + m, 3) @ v,
    "keys scaled behind the turn": lambda q, k, v, m: torch.softmax(q @ (k.mT * 0.25) + m, -1) @ v,
    "no scale": lambda q, k, v, m: torch.softmax(q @ k.permute(0, 1, 3, 2) + m, -1) @ v,
    "no mask": lambda q, k, v, m: torch.softmax(q @ k.permute(0, 1, 3, 2) * 0.5, -1) @ v,
    "in float32": lambda q, k, v, m: (torch.softmax(q.float() @ k.float().mT * 0.25 + m.float(), -1) @ v.float()).to(
        q.dtype
    ),
    "added in place": lambda q, k, v, m: torch.softmax((q @ k.mT).mul_(0.25).add_(m), -1) @ v,
}


@pytest.mark.parametrize("function", EAGER.values(), ids=EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_spellings(fused, function, dtype):
    tolerance = {} if dtype == torch.float32 else dict(rtol=2**-4, atol=2**-4)
    g, result = fused(function, *inputs(dtype, 4, "additive"), kv_heads=4, **tolerance)
    assert len(result.rewrites) == 1 and not result.misses
    assert not {"softmax", "matmul", "mul", "div", "add"} & set(g.ops())
    assert only_call(g).args[0].meta["val"].dtype == dtype


def capped(q, k, v):
    logits = torch.tanh(q @ k.transpose(2, 3) * 0.25 / 50.0) * 50.0
    return torch.softmax(logits, -1) @ v


def sinks(q, k, v):
    """gpt-oss: one more column that attends to nothing."""
    logits = q @ k.transpose(2, 3)
    weights = torch.softmax(torch.cat([logits, logits[..., :1]], -1), -1)
    return weights[..., :-1] @ v


def bloom(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return torch.bmm(weights.reshape(-1, *weights.shape[2:]), v.reshape(-1, *v.shape[2:]))


def written(q, k, v):
    keys = repeat_kv(k := k.clone(), 2)
    k.mul_(2.0)
    return sdpa(q, keys, repeat_kv(v, 2)), k


UNKNOWN = "the logits are not q @ k.transpose(2, 3) * scale + mask"
MISSES = {
    "attention weights are dropped at random": lambda q, k, v: sdpa(q, k, v, dropout_p=0.5) * 0,
    "q has 3 dimensions": [
        lambda q, k, v: sdpa(q[0], k[0], v[0]),
        lambda q, k, v: torch.softmax(q[0] @ k[0].transpose(1, 2), -1) @ v[0],
    ],
    "logit soft-capping": capped,
    "the attention weights are read elsewhere": lambda q, k, v: ((w := torch.softmax(q @ k.mT, -1)) @ v, w),
    "matmul has another user": lambda q, k, v: (torch.softmax((w := q @ k.mT) * 0.5, -1) @ v, w),
    "add has another user": lambda q, k, v: (torch.softmax(w := q @ k.mT + v[:, :, None, :, 0], -1) @ v, w),
    "narrow stands between softmax and product": None,
    "reshape_5 stands between softmax and product": None,
    "the softmax is not over the last dimension": lambda q, k, v: torch.softmax(q @ k.mT, 2) @ v,
    "the mask is larger than the logits": lambda q, k, v: torch.softmax(q[:1] @ k[:1].mT + v[:, :1, :1, :1], -1) @ v,
    UNKNOWN: [
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(q[..., :1] > 0, -1e4), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT + v[..., :1].mT + 0.5 * v[..., 1:2].mT, -1) @ v,
        lambda q, k, v: torch.softmax(torch.add(q @ k.mT, v[..., :1].mT, alpha=2), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k[:, :, :8], -1) @ v[:, :, :8],
    ],
}
