"""rewrite: what holds for every pass."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import Node

from qcompile import _torch
from qcompile.graph import capture
from qcompile.graph.match import Miss, aten, is_call, module_path, same_shape, value
from qcompile.graph.rewrite import Rewriter, Site, apply


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *tensors):
        (x,) = tensors
        return self.layer(x).relu().exp()


@dataclass(frozen=True)
class Found:
    node: Node


class Rule:
    """Rewrites every call of `target` with `build`."""

    name = "rule"

    def __init__(self, target, build):
        self.target = target
        self.build = build

    def match(self, node):
        return Found(node) if is_call(node, self.target) else None

    def rewrite(self, g, m):
        with g.before(m.node):
            g.replace(m.node, self.build(g, m.node))


@pytest.fixture
def gm():
    return capture.export(Model(), [torch.randn(3, 4)]).gm


def ops(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_new_nodes_say_what_they_are(gm):
    def build(g, node):
        x, weight, bias = node.args
        return g.call(aten.add.Tensor, g.call(aten.linear.default, x, weight), bias)

    result = apply(gm.graph, Rule(aten.linear.default, build))
    assert ops(gm) == [aten.linear.default, aten.add.Tensor, aten.relu.default, aten.exp.default]
    for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        assert str(value(node).shape) == str(value(next(iter(node.users))).shape)
        assert value(node).fake_mode is value(node.args[0]).fake_mode
        assert module_path(node) == "layer" and node.meta["origin"] == "rule"
    assert result.rewrites == (Site("linear", "layer"),)
    # Inputs and the output count, too: one input, two parameters.
    assert (result.nodes_before, result.nodes_after) == (7, 8)


def test_names_of_new_nodes(gm):
    apply(gm.graph, Rule(aten.relu.default, lambda g, node: g.call(aten.clamp.default, node.args[0], 0)))
    assert [node.name for node in gm.graph.nodes if node.op == "call_function"] == ["linear", "clamp", "exp"]


@pytest.mark.parametrize(
    ("build", "difference"),
    [
        (lambda g, x: g.call(aten.to.dtype, x, torch.float64), r"is \(s\d+, 4\) torch.float64 .*, relu is .*float32"),
        (lambda g, x: g.call(aten.narrow.default, x, 1, 0, 2), r"narrow is \(s\d+, 2\) torch.float32 on cpu, relu is"),
        (lambda g, x: g.call(aten.chunk.default, x, 2, 1), "chunk has 2 values, relu has 1"),
        (lambda g, x: g.call(aten.sym_size.int, x, 0), "sym_size is SymInt, relu is"),
    ],
)
def test_replace_checks_the_type(gm, build, difference):
    with pytest.raises(RuntimeError, match=rf"rule: .*{difference}"):
        apply(gm.graph, Rule(aten.relu.default, lambda g, node: build(g, node.args[0])))


def test_what_symbolic_sizes_leave_open_is_a_miss(gm):
    before = ops(gm)
    result = apply(
        gm.graph, Rule(aten.relu.default, lambda g, node: g.call(aten.cat.default, [node.args[0], node.args[0]]))
    )
    assert result.misses == (("cat cannot be shown to have the shape of relu", Site("relu", "")),)
    assert not result.rewrites and ops(gm) == before


def test_replaced_nodes_are_gone_at_once(gm):
    """So that counting the users of a node means something in the same pass."""
    users = []

    class Counts(Rule):
        def match(self, node):
            if is_call(node, aten.exp.default):
                users.append(len(gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0].users))
            return super().match(node)

    apply(gm.graph, Counts(aten.relu.default, lambda g, node: g.call(aten.clamp.default, node.args[0], 0)))
    assert users == [1]


def test_what_only_a_replaced_node_used_is_gone(gm):
    def build(g, node):
        return g.call(aten.add.Tensor, node.args[0].args[0], 1)

    apply(gm.graph, Rule(aten.relu.default, build))
    assert ops(gm) == [aten.add.Tensor, aten.exp.default]


def test_writes_stay():
    class Write(nn.Module):
        def forward(self, *tensors):
            tensors[0].add_(1)
            tensors[0].exp()
            return tensors[0].relu()

    gm = capture.export(Write(), [torch.randn(3)]).gm
    apply(gm.graph, Rule(aten.relu.default, lambda g, node: g.call(aten.clamp.default, node.args[0], 0)))
    assert ops(gm) == [aten.add_.Tensor, aten.clamp.default]


def test_erase_removes_even_a_write():
    class Write(nn.Module):
        def forward(self, *tensors):
            return [tensors[0].exp().add_(1), tensors[0].relu()][1]

    class Erase(Rule):
        def rewrite(self, g, m):
            g.erase(m.node)

    gm = capture.export(Write(), [torch.randn(3)]).gm
    apply(gm.graph, Erase(aten.add_.Tensor, None))
    assert ops(gm) == [aten.relu.default]


def test_after(gm):
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    g = Rewriter(gm.graph, "rule")
    with g.after(linear):
        first = g.call(aten.neg.default, linear)
        second = g.call(aten.neg.default, first)
    assert linear.next is first and first.next is second
    assert module_path(second) == "layer"


def test_misses_are_told_once_a_site(gm):
    class Never(Rule):
        def match(self, node):
            return Miss("no", gm.graph.find_nodes(op="call_function", target=self.target)[0])

    result = apply(gm.graph, Never(aten.linear.default, None))
    assert result.misses == (("no", Site("linear", "layer")),)
    assert not result.rewrites and result.nodes_before == result.nodes_after


def test_the_result_runs(gm):
    apply(gm.graph, Rule(aten.relu.default, lambda g, node: g.call(aten.clamp.default, node.args[0], 0)))
    w, b, x = torch.randn(4, 4), torch.randn(4), torch.randn(5, 4)
    gm.recompile()
    torch.testing.assert_close(gm(w, b, x)[0], nn.functional.linear(x, w, b).relu().exp())


def test_a_result_is_found_once_for_calls_alike(gm, monkeypatch):
    asked = []
    monkeypatch.setattr(_torch, "call_on_fakes", lambda target, *args: (asked.append(target), target(*args))[1])
    node = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes[0]
    g = Rewriter(gm.graph, "twice")
    with g.before(node):
        x, weight, _ = node.args[0].args[0].args
        ones = [g.call(aten.add.Tensor, x, 1) for _ in range(2)]
        others = [g.call(aten.add.Tensor, x, 1.0), g.call(aten.add.Tensor, weight, 1)]
    assert len(asked) == 3
    assert value(ones[0]) is value(ones[1])
    assert value(others[1]).shape == value(weight).shape


def test_a_result_that_data_decide_is_never_shared(gm):
    exp = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes[0]
    g = Rewriter(gm.graph, "twice")
    with g.after(exp):
        one, other = (g.call(aten.nonzero.default, x) for x in (exp, exp.args[0]))
    assert not same_shape(value(one).shape, value(other).shape)
