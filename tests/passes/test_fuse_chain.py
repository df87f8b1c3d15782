"""fuse_chain: the calls of a step of decoding become one."""

import pytest
import torch
from torch import nn

from qcompile.graph.alias import writers
from qcompile.normal import normalizing_passes
from qcompile.ops.attention import attention
from qcompile.ops.chain import Step, chain
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.linear import linear
from qcompile.ops.rope import rope_into_cache
from qcompile.passes.fuse_chain import FuseChain


class Weighted(nn.Module):
    """`function(data, scale, *inputs)`: a weight of 16 rows and 8 columns is its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("data", torch.randint(0, 256, (16, 16), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(16, 1) / 100)

    def forward(self, *inputs):
        return self.function(self.data, self.scale, *inputs)


@pytest.fixture
def served(monkeypatch):
    """`served(reason)`: a kernel for the CPU, which is the meaning, signs up; `reason(steps)` says what it refuses."""

    def sign_up(reason=lambda steps: None):
        monkeypatch.setattr(chain, "implementations", [])

        def refuses(tensors, caches, steps):
            return reason(steps)

        chain.implementation("test", refuses, device="cpu")(chain.meaning)

    return sign_up


@pytest.fixture
def chained(graph, served):
    def run(function, *inputs, reason=lambda steps: None):
        served(reason)
        g = graph(Weighted(function), *(inputs or INPUTS)).prepare(*normalizing_passes())
        return g, g.apply(FuseChain())

    return run


def times(data, scale, x, residual=None, rows=16):
    data, scale = data[:rows], scale[:rows]
    return fused_linear(x, None, None, 0.0, data, scale, None, None, residual, "i8/row/sym", None, False)


def attend(y, cos, sin, keys, values, at):
    q, k, v = (
        y.narrow(-1, first, count).view(1, 1, -1, 4).transpose(1, 2) for first, count in ((0, 8), (8, 4), (12, 4))
    )
    q = rope_into_cache(q, k, v, cos, sin, keys, values, at)
    return attention(q, keys, values, None, False, 0.5).transpose(1, 2).reshape(1, 1, 8)


def layer(data, scale, x, cos, sin, keys, values, at):
    a = attend(times(data, scale, x), cos, sin, keys, values, at)
    o = times(data, scale, a, x, 8)
    return times(data, scale, linear(o, data, scale, None, None, "i8/row/sym", None)[..., :8], o, 8)


INPUTS = (torch.randn(1, 1, 8), *torch.randn(2, 1, 1, 4), *torch.randn(2, 1, 1, 6, 4), torch.tensor([2]))


def coded(data, scale, x, cos, sin, keys, values, at, key_scales, value_scales):
    y = times(data, scale, x)
    q, k, v = (y.narrow(-1, first, n).view(1, 1, -1, 4).transpose(1, 2) for first, n in ((0, 8), (8, 4), (12, 4)))
    q = rope_into_cache(q, k, v, cos, sin, keys, values, at, key_scales, value_scales)
    a = attention(q, keys, values, None, False, 0.5, None, key_scales, value_scales).transpose(1, 2).reshape(1, 1, 8)
    return times(data, scale, a, x, 8)


CODED = (*INPUTS[:3], *torch.randint(-9, 9, (2, 1, 1, 6, 4), dtype=torch.int8), INPUTS[5], *torch.rand(2, 1, 1, 6))


def steps(g):
    return [
        [Step.parse(line).op for line in node.args[2].split("\n")]
        for node in g.gm.graph.find_nodes(op="call_function", target=chain.overload)
    ]


LAYER = ["fused_linear", "rope_into_cache", "attention", *["fused_linear"] * 3]


def test_text(graph, served, golden):
    served()
    g = graph(Weighted(layer), *INPUTS).prepare(*normalizing_passes())
    before = g.text()
    g.apply(FuseChain())
    golden("passes/fuse_chain", f"{before}\nbecomes\n\n{g.text()}")


def test_a_layer(chained):
    g, result = chained(layer)
    assert steps(g) == [LAYER] and not result.misses
    assert not {"fused_linear", "rope_into_cache", "attention", "linear"} & set(g.ops())
    assert not g.apply(FuseChain()).rewrites


def test_a_quantized_cache(chained):
    g, _ = chained(coded, *CODED)
    assert steps(g) == [[*LAYER[:3], "fused_linear"]]

    def scales_are_read(data, scale, x, *cache):
        y = times(data, scale, x)
        total = cache[-1].sum()
        return coded(data, scale, y[..., :8], *cache), total + cache[-2].sum()

    assert steps(chained(scales_are_read, *CODED)[0])


def test_several_layers_are_one(chained):
    def two(data, scale, x, cos, sin, keys, values, at, more_keys, more_values):
        y = layer(data, scale, x, cos, sin, keys, values, at)
        return layer(data, scale, y[..., :8], cos, sin, more_keys, more_values, at)

    g, _ = chained(two, *INPUTS, *torch.randn(2, 1, 1, 6, 4))
    assert steps(g) == [LAYER * 2]
    (node,) = g.gm.graph.find_nodes(op="call_function", target=chain.overload)
    assert [user for cache in node.args[1] for user in writers(cache)] == [node] * 4


def test_what_others_read_ends_it(chained):
    def read_in_between(data, scale, x, *cache):
        y = times(data, scale, attend(times(data, scale, x), *cache), rows=8)
        return times(data, scale, times(data, scale, y * 2, rows=8))

    def returned(data, scale, x, *cache):
        y = times(data, scale, attend(times(data, scale, x), *cache), rows=8)
        z = times(data, scale, y, rows=8)
        return times(data, scale, z), z

    def shown(data, scale, x, *cache):
        y = times(data, scale, attend(times(data, scale, x), *cache)).narrow(-1, 0, 8)
        return times(data, scale, times(data, scale, y, rows=8)), y

    assert steps(chained(read_in_between)[0]) == [[*LAYER[:3], "fused_linear"]]
    assert steps(chained(returned)[0]) == [[*LAYER[:3], "fused_linear", "fused_linear"]]
    assert steps(chained(shown)[0]) == [[*LAYER[:3], "fused_linear"]]


def test_a_reshape_that_copies_ends_it(chained):
    def turned(data, scale, x, *cache):
        y = times(data, scale, attend(times(data, scale, x), *cache))
        return times(data, scale, y.view(1, 2, 8).transpose(1, 2).reshape(1, 1, 16)[..., :8])

    assert steps(chained(turned)[0]) == [[*LAYER[:3], "fused_linear"]]


def test_without_a_cache_there_is_none(chained):
    def plain(data, scale, x):
        return times(data, scale, times(data, scale, x, rows=8))

    assert not steps(chained(plain, INPUTS[0])[0])


def test_what_is_written_or_read_in_between(chained):
    def cache_is_read(data, scale, x, cos, sin, keys, values, at):
        a = attend(times(data, scale, x), cos, sin, keys, values, at)
        return times(data, scale, a), keys * 2

    def cache_is_read_before(data, scale, x, cos, sin, keys, values, at):
        a = attend(times(data, scale, x), cos, sin, keys, values, at)
        seen = keys * 2
        return times(data, scale, a), seen

    def position_is_written(data, scale, x, cos, sin, keys, values, at):
        a = attend(times(data, scale, x), cos, sin, keys, values, at)
        at.add_(1)
        return times(data, scale, a)

    assert steps(chained(cache_is_read)[0]) == [[*LAYER[:3], "fused_linear"]]
    assert steps(chained(cache_is_read_before)[0]) == [LAYER[:3]]
    assert steps(chained(position_is_written)[0]) == [LAYER[:3]]


def test_what_the_kernel_refuses(chained):
    g, result = chained(layer, reason=lambda steps: "no attention" if "attention" in steps else None)
    assert steps(g) == [LAYER[:2]] and not result.misses
    g, _ = chained(layer, reason=lambda steps: "none")
    assert not steps(g)


def test_where_no_kernel_has_signed_up(graph, monkeypatch):
    monkeypatch.setattr(chain, "implementations", [])
    assert not graph(Weighted(layer), *INPUTS).prepare(*normalizing_passes()).apply(FuseChain()).rewrites
