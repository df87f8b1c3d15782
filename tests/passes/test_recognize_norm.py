"""recognize_norm: every spelling of a norm found in torch and transformers is one op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.norm import layer_norm, rms_norm
from qcompile.passes.recognize_norm import RecognizeNorm

EPS = 1e-6


class Weighted(nn.Module):
    """`function(x, weight, bias)` over a width of 8."""

    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8).to(dtype))
        self.bias = nn.Parameter(torch.randn(8).to(dtype))

    def forward(self, x, *more):
        return self.function(x, self.weight, self.bias, *more)


def scaled(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def centered(x):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + EPS)


def cohere(x, w, b):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((h - mean) * torch.rsqrt(variance + EPS))).to(x.dtype)


def deberta(x, w, b):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return w * ((h - mean) / torch.sqrt(variance + EPS)).to(x.dtype) + b


# Names are those of the models that spell it so.
RMS = {
    "llama": lambda x, w, b: w * scaled(x.float()).to(x.dtype),
    "olmo2": lambda x, w, b: (w * scaled(x.float())).to(x.dtype),
    "helium": lambda x, w, b: (w.float() * scaled(x.float())).to(x.dtype),
    "llama4": lambda x, w, b: scaled(x.float()).type_as(x) * w,
    "t5": lambda x, w, b: w * (x * torch.rsqrt(x.float().pow(2).mean(-1, True) + EPS)).type(w.dtype),
    "gemma": lambda x, w, b: (scaled(x.float()) * (1.0 + w.float())).type_as(x),
    "gemma, in one dtype": lambda x, w, b: scaled(x) * (w + 1),
    "gemma4": lambda x, w, b: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w,
    "inkling": lambda x, w, b: x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype),
    "imagegpt": lambda x, w, b: x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w,
    "one over the root": lambda x, w, b: (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * x * w,
    "reciprocal": lambda x, w, b: w * (x * torch.reciprocal(torch.sqrt(x.square().mean(2, True) + EPS))),
    "eps first": lambda x, w, b: x * torch.rsqrt(EPS + x.pow(2.0).mean((-1,), keepdim=True)),
    "no eps": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "no weight": lambda x, w, b: scaled(x),
    "torch": lambda x, w, b: F.rms_norm(x, (8,), w, EPS),
    "torch, no eps": lambda x, w, b: F.rms_norm(x, (8,), w),
    "torch, weight by hand": lambda x, w, b: w * F.rms_norm(x, (8,), None, EPS),
    "torch, in float32": lambda x, w, b: F.rms_norm(x.float(), (8,), w.float(), EPS).to(x.dtype),
}
LAYER = {
    "cohere": cohere,
    "deberta": deberta,
    "one difference": lambda x, w, b: centered(x) * w + b,
    "no weight": lambda x, w, b: centered(x),
    "torch": lambda x, w, b: F.layer_norm(x, (8,), w, b, EPS),
    "torch, no bias": lambda x, w, b: F.layer_norm(x, (8,), w, None, EPS),
    "torch, weight and bias by hand": lambda x, w, b: F.layer_norm(x, (8,)) * w + b,
    "olmo": lambda x, w, b: F.layer_norm(x.float(), (8,), None, None, EPS).to(x.dtype),
    "nemotron": lambda x, w, b: F.layer_norm(x, (8,), w + 1, b, EPS),
}
each_spelling = pytest.mark.parametrize(
    ("op", "function"),
    [(rms_norm, f) for f in RMS.values()] + [(layer_norm, f) for f in LAYER.values()],
    ids=[f"rms, {name}" for name in RMS] + [f"layer, {name}" for name in LAYER],
)


def test_text(graph, golden):
    def both(x, w, b):
        y = RMS["gemma"](x, w, b)
        return y, cohere(y, w, b)

    g = graph(Weighted(both, torch.bfloat16), torch.randn(2, 3, 8).bfloat16()).prepare(*normalizing_passes())
    before = g.text()
    g.apply(RecognizeNorm())
    golden("passes/recognize_norm", f"{before}\nbecomes\n\n{g.text()}")


@each_spelling
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spellings(graph, op, function, dtype):
    g = graph(Weighted(function, dtype), torch.randn(2, 3, 8).to(dtype)).prepare(*normalizing_passes())
    # Where x is float64, the op is more exact than a spelling that goes through float32.
    result = g.apply(RecognizeNorm(), rtol=1e-5, atol=1e-5)
    assert len(result.rewrites) == g.count(op.overload) == 1 and not result.misses
    assert not {"mean", "rsqrt", "sqrt", "pow", "sub", "div"} & set(g.ops())


@each_spelling
def test_bf16_rounds_once(graph, op, function):
    x = torch.randn(2, 3, 8).bfloat16()
    module = Weighted(function, torch.bfloat16)
    g = graph(module, x).prepare(*normalizing_passes())
    g.apply(RecognizeNorm(), rtol=2**-5, atol=2**-5)
    got, want = g.run()[0], module.double()(x.double())
    assert g.count(op.overload) == 1 and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-8)


def recognized(graph, function, x=None, dtype=torch.float32):
    g = graph(Weighted(function, dtype), torch.randn(2, 3, 8).to(dtype) if x is None else x)
    return g, g.prepare(*normalizing_passes()).apply(RecognizeNorm(), rtol=2**-6, atol=2**-6)


def norms(g, op=rms_norm):
    return [node.args for node in g.gm.graph.nodes if node.target is op.overload]


def test_gemma_adds_one_to_its_weight(graph):
    g, _ = recognized(graph, RMS["gemma"])
    ((_, weight, eps, offset),) = norms(g)
    assert (weight.meta["input_path"], eps, offset) == ("weight", EPS, 1.0)


def test_torch_takes_the_smallest_step_of_the_computing_dtype_for_eps(graph):
    for dtype, eps in ((torch.bfloat16, 2**-23), (torch.float64, 2**-52)):
        g = graph(lambda x: F.rms_norm(x, (8,)), torch.randn(3, 8).to(dtype) * 1e-4)
        g.apply(RecognizeNorm())
        assert norms(g)[0][2] == eps


def test_heads_are_normalized_like_anything_else(graph):
    """The norms of queries and keys in Qwen3, over the last of four dimensions."""
    x = torch.randn(2, 5, 4, 8).transpose(1, 2)
    g, _ = recognized(graph, RMS["llama"], x)
    assert len(norms(g)) == 1


def test_x_is_what_has_the_dtype_of_the_result(graph):
    """Behind a residual stream in float32 the norm of a model in bf16 reads the rounded stream."""
    g, _ = recognized(graph, lambda x, w, b: RMS["llama"](x.bfloat16(), w, b), torch.randn(3, 8), torch.bfloat16)
    assert norms(g)[0][0].meta["val"].dtype == torch.bfloat16
    g, _ = recognized(graph, lambda x, w, b: scaled(x.float()), dtype=torch.bfloat16)
    assert norms(g)[0][0].meta["val"].dtype == torch.float32


def test_what_is_no_weight_stays_outside(graph):
    for function in (
        lambda x, w, b: scaled(x) * w[:1],  # one number
        lambda x, w, b: scaled(x) * (1 + x[:, :1]),  # a row for each sequence, as in a diffusion model
        lambda x, w, b: scaled(x) + b,
        lambda x, w, b: (scaled(x) * w).half(),
    ):
        g, result = recognized(graph, function)
        assert len(norms(g)) == 1 and not result.misses and {"mul", "add", "to"} & set(g.ops())


def test_a_result_that_is_read_twice_ends_the_norm(graph):
    g, result = recognized(graph, lambda x, w, b: ((y := scaled(x)) * w, y * b))
    ((_, weight, _, _),) = norms(g)
    assert weight is None and g.ops().count("mul") == 2 and not result.misses


MISSES = {
    "eps is not a constant": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + b[:1].abs()) * w,
    "the mean is not over the last dimension alone, and kept": [
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w,
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS) * w,
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1) + EPS).unsqueeze(-1) * w,
    ],
    "what is scaled is not what was squared": [
        lambda x, w, b: x.exp() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x, w, b: w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x, w, b: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x, w, b: x * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPS),
        lambda x, w, b: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x, w, b: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) / x,
    ],
    "pow_1 has another user": lambda x, w, b: (x * torch.rsqrt((y := x.pow(2)).mean(-1, keepdim=True) + EPS), y),
    "mean has another user": lambda x, w, b: (x * torch.rsqrt((y := x.pow(2).mean(-1, keepdim=True)) + EPS), y),
    "add has another user": lambda x, w, b: (x * torch.rsqrt(y := x.pow(2).mean(-1, keepdim=True) + EPS), y),
    "rsqrt has another user": lambda x, w, b: (x * (y := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)), y),
    "reciprocal has another user": lambda x, w, b: (
        x * (y := torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS).reciprocal()),
        y,
    ),
    "normalizes over the last 2 dimensions": [
        lambda x, w, b: F.layer_norm(x, (3, 8)),
        lambda x, w, b: F.rms_norm(x, (3, 8)),
    ],
}


@pytest.mark.parametrize(
    ("reason", "function"),
    [(reason, f) for reason, fs in MISSES.items() for f in (fs if isinstance(fs, list) else [fs])],
)
def test_misses(graph, reason, function):
    _, result = recognized(graph, function)
    assert not result.rewrites and [miss for miss, _ in result.misses] == [reason]


def test_misses_a_weight_that_widens_the_result(graph):
    g = graph(Weighted(lambda x, w, b: scaled(x) * w), torch.randn(2, 3, 8).bfloat16())
    result = g.apply(RecognizeNorm())
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["the result is float32, x is bfloat16"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: x * torch.rsqrt(w.abs() + EPS),  # the scale of a batch norm
        lambda x, w, b: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS),
        lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
        lambda x, w, b: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS),
        lambda x, w, b: x * x.pow(2).mean(-1, keepdim=True),
        lambda x, w, b: torch.sqrt(x.abs() + 1),
    ],
)
def test_not_a_norm(graph, function):
    _, result = recognized(graph, function)
    assert not result.rewrites and not result.misses
