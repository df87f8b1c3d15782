"""recognize_attention: matmul and softmax are torch's attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.attention import attention
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.recognize_attention import RecognizeAttention

sdpa = torch.ops.aten.scaled_dot_product_attention.default


def eager(q, k, v, mask=None, scale=0.25, dropout=0.0):
    """transformers' eager_attention_forward, without the weights among its results."""
    weights = torch.matmul(q, k.transpose(2, 3)) * scale
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=dropout, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """`function(q, k, v, mask)` on 4 heads of 8 columns, cut from projections."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v, *mask):
        # Sizes are written down: columns of a projection are no symbols.
        return self.function(*(x.view(*x.shape[:2], 4, 8).transpose(1, 2) for x in (q, k, v)), *mask)


def inputs(dtype=torch.float32, mask=False):
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    allowed = torch.rand(2, 1, 5, 6) < 0.7
    allowed[..., 0] = True
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)
    return [x.to(dtype) for x in ((q, k, v, bias) if mask else (q, k, v))]


@pytest.fixture
def recognized(graph):
    def run(function, *tensors, **tolerance):
        g = graph(Attention(function), *(tensors or inputs())).prepare(*normalizing_passes())
        return g, g.apply(RecognizeAttention(), **tolerance)

    return run


def only_call(g):
    (node,) = [node for node in g.gm.graph.nodes if node.target is sdpa]
    return node


def test_text(graph, golden):
    g = graph(Attention(eager), *inputs(torch.bfloat16, mask=True)).prepare(*normalizing_passes())
    before = g.text()
    g.apply(RecognizeAttention(), rtol=2**-5, atol=2**-5)
    golden("passes/recognize_attention", f"{before}\nbecomes\n\n{g.text()}")


SPELLINGS = {
    "transformers": lambda q, k, v, m: eager(q, k, v, m),
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


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings(recognized, function, dtype):
    tolerance = {} if dtype == torch.float32 else dict(rtol=2**-4, atol=2**-4)
    g, result = recognized(function, *inputs(dtype, mask=True), **tolerance)
    assert len(result.rewrites) == 1 and not result.misses
    assert not {"softmax", "matmul", "mul", "div", "add"} & set(g.ops())
    assert only_call(g).args[0].meta["val"].dtype == dtype


def gemma2(q, k, v, mask, scale=0.25, softcap=3.0):
    """transformers' eager_attention_forward of Gemma 2."""
    weights = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * scale / softcap) * softcap + mask
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


CAPPED = {
    "transformers": (gemma2, 0.25, 3.0),
    "cap first": (lambda q, k, v, m: torch.softmax(m + 3.0 * torch.tanh(q @ k.mT * 0.5), -1) @ v, 1.5, 3.0),
    "weights in float32": (
        lambda q, k, v, m: (torch.softmax(2.0 * torch.tanh(q @ k.mT) + m, -1).float() @ v.float()).to(q.dtype),
        2.0,
        2.0,
    ),
    "cap of 1": (lambda q, k, v, m: torch.softmax(torch.tanh(q @ k.mT) + m, -1) @ v, 1.0, 1.0),
}


@pytest.mark.parametrize(("function", "scale", "softcap"), CAPPED.values(), ids=CAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_capping(recognized, function, scale, softcap, dtype):
    tolerance = {} if dtype == torch.float32 else dict(rtol=2**-4, atol=2**-4)
    g, result = recognized(function, *inputs(dtype, mask=True), **tolerance)
    assert len(result.rewrites) == 1 and not result.misses
    assert not {"softmax", "matmul", "mul", "div", "add", "tanh"} & set(g.ops())
    (node,) = (node for node in g.gm.graph.nodes if node.target is attention.overload)
    assert node.args[4:] == (False, pytest.approx(scale), softcap)
    assert g.apply(FuseAttention()).rewrites == ()


def bloom(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return torch.bmm(weights.reshape(-1, *weights.shape[2:]), v.reshape(-1, *v.shape[2:]))


UNKNOWN = "the logits are not q @ k.transpose(2, 3) * scale + mask"
MISSES = {
    "attention in 3 dimensions": lambda q, k, v: torch.softmax(q[0] @ k[0].transpose(1, 2), -1) @ v[0],
    "the attention weights are read elsewhere": lambda q, k, v: ((w := torch.softmax(q @ k.mT, -1)) @ v, w),
    "matmul has another user": lambda q, k, v: (torch.softmax((w := q @ k.mT) * 0.5, -1) @ v, w),
    "add has another user": lambda q, k, v: (torch.softmax(w := q @ k.mT + v[..., 0, :1, None], -1) @ v, w),
    "narrow stands between softmax and product": lambda q, k, v: torch.softmax(q @ k.mT, -1)[..., :3] @ v[:, :, :3],
    "reshape stands between softmax and product": bloom,
    "the softmax is not over the last dimension": lambda q, k, v: torch.softmax(q @ k.mT, 2) @ v,
    "the mask is larger than the logits": lambda q, k, v: torch.softmax(q[:1] @ k[:1].mT + v[..., :1, :1], -1) @ v,
    "the mask is float64, q is float32": lambda q, k, v: (
        torch.softmax(q @ k.mT + v[..., :1, :1].double(), -1).float() @ v
    ),
    "k has other heads than q": lambda q, k, v: torch.softmax(q @ k[:, :1].mT, -1) @ v,
    "v has other heads than q": lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v[:, :1],
    "v is float64, q is float32": lambda q, k, v: (
        torch.softmax(q @ k.mT, -1).double() @ v.exp().double().exp()
    ).float(),
    "soft-capped scores are float64, q is float32": lambda q, k, v: (
        torch.softmax(torch.tanh(q.double() @ k.double().mT), -1) @ v.double()
    ).float(),
    "the result is float64, q is float32": lambda q, k, v: torch.softmax(q @ k.mT, -1).double() @ v.double(),
    UNKNOWN: [
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(q[..., :1] > 0, -1e4), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT + v[..., :1].mT + v[..., 1:2].mT, -1) @ v,
        lambda q, k, v: torch.softmax(torch.add(q @ k.mT, v[..., :1].mT, alpha=2), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT + 1.0, -1) @ v,
        lambda q, k, v: torch.softmax(-2.0 * torch.tanh(q @ k.mT), -1) @ v,
        lambda q, k, v: torch.softmax(torch.tanh(torch.tanh(q @ k.mT)), -1) @ v,
        lambda q, k, v: torch.softmax(torch.tanh(q), -1) @ q.mT,
        lambda q, k, v: torch.softmax(q @ k.mT.exp(), -1) @ v,
        lambda q, k, v: torch.softmax(q.exp(), -1) @ q.mT,
    ],
}


@pytest.mark.parametrize(
    ("reason", "function"),
    [(reason, f) for reason, fs in MISSES.items() for f in (fs if isinstance(fs, list) else [fs])],
)
def test_misses(recognized, reason, function):
    _, result = recognized(function)
    assert not result.rewrites and [miss for miss, _ in result.misses] == [reason]


def masked(function, low, kept=0):
    """Two attentions, as of two layers, under one mask that is `kept` where m is 0 and `low` elsewhere."""

    def run(q, k, v, m):
        mask = torch.where(m == 0, torch.full((), kept, dtype=m.dtype), low)
        return function(q, k, v, mask) + function(q * 2, k, v, mask)

    return run


def test_a_mask_of_infinity_is_a_choice_of_keys(recognized):
    for kept, low, dtype in ((0, -math.inf, torch.bool), (0, -1e4, torch.float32), (1, -math.inf, torch.float32)):
        g, _ = recognized(masked(eager, low, kept), *inputs(mask=True))
        masks = {node.args[3] for node in g.gm.graph.nodes if node.target is sdpa}
        assert [mask.meta["val"].dtype for mask in masks] == [dtype]


@pytest.mark.parametrize("function", [eager, gemma2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_the_lowest_number_keeps_rows_that_see_nothing(recognized, function, dtype):
    *tensors, bias = inputs(dtype, mask=True)
    bias[0, :, :2] = -1  # these see nothing: the mean of all values
    function = masked(function, torch.finfo(dtype).min)
    tolerance = {} if dtype == torch.float32 else dict(rtol=2**-4, atol=2**-4)
    g, result = recognized(function, *tensors, bias, **tolerance)
    (mask,) = {node.args[3] for node in g.gm.graph.nodes if node.target in (sdpa, attention.overload)}
    assert len(result.rewrites) == 2 and g.ops().count("any") == 1
    assert mask.args[1] == -math.inf and mask.meta["val"].dtype == dtype
    y, (q, k, v) = g.run()[0], tensors
    want = Attention(function)(q.double(), k.double(), v.double(), bias.double())
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-6)


def test_misses_a_mask_of_bools_that_is_added(recognized):
    """Torch's attention would take it for a choice of keys."""
    *tensors, bias = inputs(mask=True)
    _, result = recognized(lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v, *tensors, bias < 0)
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["the mask is bool, q is float32"]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.softmax(q, -1),  # a router, a sampler
        lambda q, k, v: torch.softmax(q, -1) * 2,
        lambda q, k, v: q @ torch.softmax(k.mT, -1),
    ],
)
def test_not_attention(recognized, function):
    _, result = recognized(function)
    assert not result.rewrites and not result.misses


@pytest.mark.parametrize("function", [eager, gemma2])
def test_bf16_is_at_least_as_exact(recognized, function):
    tensors = inputs(torch.bfloat16, mask=True)
    module = Attention(function)
    before = module(*tensors)
    g, _ = recognized(function, *tensors, rtol=2**-5, atol=2**-5)
    want = module(*(x.double() for x in tensors))
    error, was = ((y.double() - want).abs().mean() for y in (g.run()[0], before))
    assert error <= was * 1.05 and error < 2**-8


def test_repeated_heads_are_left_to_fuse_attention(recognized):
    def repeat(x):
        return x[:, :2, None].expand(-1, 2, 2, -1, -1).reshape(len(x), 4, -1, 8)

    for function in (eager, gemma2):
        g, _ = recognized(lambda q, k, v, m, f=function: f(q, repeat(k), repeat(v), m), *inputs(mask=True))
        assert len(g.apply(FuseAttention()).rewrites) == 1 and "expand" not in g.ops()
        assert not g.apply(FuseAttention()).rewrites
