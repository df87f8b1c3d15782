"""match: patterns and the small vocabulary."""

import pytest
import torch
import torch.fx
from torch import nn

from qcompile.graph import capture
from qcompile.graph.match import (
    Match,
    Miss,
    Pattern,
    argument,
    aten,
    is_call,
    is_input,
    is_tensor,
    module_path,
    named_argument,
    only_user,
    same_shape,
    same_type,
    skip_casts,
    type_of,
    value,
)


class Flat(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def last(function, *inputs):
    """The node that makes the first result of `function`, captured, without torch's assertions."""
    graph = capture.export(Flat(function), inputs).gm.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    return graph.find_nodes(op="output")[0].all_input_nodes[0]


X, Y = torch.randn(4, 8), torch.randn(4, 8)


def matched(pattern, node) -> Match:
    found = pattern.match(node)
    assert found is not None
    return found


NORM = Pattern(lambda x, w, eps: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)), "x w", eps=1e-5)


def norm(x, w, eps=1e-6):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def test_pattern_binds_tensors_and_scalars():
    node = last(norm, X, torch.randn(8))
    found = matched(NORM, node)
    x, w = node.graph.find_nodes(op="placeholder")
    assert found.root is node
    assert found.bound == {"x": x, "w": w, "eps": 1e-6}
    assert found.inner == {n for n in node.graph.nodes if n.op == "call_function"}
    assert found.leak() is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w,
        lambda x, w: w * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x),
        lambda x, w: w * (x * torch.rsqrt(1e-6 + x.pow(2).mean(-1, True))),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2.0).mean(-1, keepdim=True) + 1e-6)),
    ],
)
def test_order_of_sums_and_products(function):
    assert NORM.match(last(function, X, torch.randn(8)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 1e-6)),
        lambda x, w: w * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2))),
        lambda x, w: w * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda x, w: w * (x * torch.rsqrt(w.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda x, w: w + (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    ],
)
def test_pattern_that_is_not_there(function):
    assert NORM.match(last(function, X, torch.randn(8))) is None


def test_scalars_must_be_numbers():
    assert NORM.match(last(lambda x, w, e: norm(x, w, e), X, torch.randn(8), torch.tensor(1e-6))) is None


def test_one_scalar_in_two_places():
    twice = Pattern(lambda x, a: (x + a) * (x - a), "x", a=1)
    assert matched(twice, last(lambda x: (x + 2.0) * (x - 2.0), X)).bound["a"] == 2
    assert twice.match(last(lambda x: (x + 2.0) * (x - 3.0), X)) is None


def test_tensors_of_a_pattern_are_told_apart():
    difference = Pattern(lambda x, y: x.exp() - y.exp(), "x y")
    node = last(lambda a, b: a.exp() - b.exp(), X, Y)
    a, b = node.graph.find_nodes(op="placeholder")
    assert matched(difference, node).bound == {"x": a, "y": b}
    same = Pattern(lambda x: x.exp() - x.exp(), "x")
    assert same.match(node) is None


def test_backtracking():
    """Which factor is which shows only further in."""
    pattern = Pattern(lambda x, y: x.exp() * (y.exp() * x), "x y")
    node = last(lambda a, b: (b * a.exp()) * b.exp(), X, Y)
    a, b = node.graph.find_nodes(op="placeholder")
    assert matched(pattern, node).bound == {"x": b, "y": a}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_are_looked_through(dtype):
    def function(x, w):
        y = x.to(torch.float32)
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    node = last(function, X.to(dtype), torch.randn(8, dtype=dtype))
    x, w = node.graph.find_nodes(op="placeholder")
    found = matched(NORM, node)
    assert found.bound["x"] is x and found.bound["w"] is w
    assert found.leak() is None


def test_casts_in_the_pattern():
    def function(x, w):
        y = x.to(torch.float32)
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    assert Pattern(function, "x w").match(last(norm, X, torch.randn(8)))


def test_a_cast_at_the_root():
    node = last(lambda x, w: norm(x, w).to(torch.bfloat16), X, torch.randn(8))
    found = matched(NORM, node)
    assert found.root is node and found.leak() is None


def test_a_cast_to_integers_is_no_cast():
    exp = Pattern(lambda x: x.exp().exp(), "x")
    assert exp.match(last(lambda x: x.exp().to(torch.int32).exp(), X)) is None


def test_leak():
    found = matched(NORM, last(lambda x, w: [norm(x, w), x.pow(2).mean(-1)][0], X, torch.randn(8)))
    assert found.leak() is None, "another computation of the same"

    def function(x, w):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * r), r

    assert is_call(matched(NORM, last(function, X, torch.randn(8))).leak(), aten.rsqrt.default)

    def through_a_cast(x, w):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * r), r.double()

    assert is_call(matched(NORM, last(through_a_cast, X, torch.randn(8))).leak(), aten.rsqrt.default)


def test_patterns_leave_the_random_state_alone():
    state = torch.get_rng_state()
    Pattern(lambda x: x.exp(), "x")
    assert torch.equal(state, torch.get_rng_state())


def test_vocabulary():
    node = last(lambda x: x.to(torch.float64).add(1).sum(dim=-1, keepdim=True), X)
    (x,) = node.graph.find_nodes(op="placeholder")
    (cast,) = node.graph.find_nodes(op="call_function", target=aten.to.dtype)
    add = node.args[0]
    assert is_call(node, aten.sum.dim_IntList)
    assert not is_call(node, aten.add.Tensor) and not is_call(1, aten.add.Tensor)
    assert is_input(x) and not is_input(node) and not is_input(None)
    assert is_tensor(x) and not is_tensor(1.0)
    assert value(3) == 3 and value(x) is x.meta["val"]
    assert only_user(add) is node and only_user(cast) is add
    assert skip_casts(cast) is x and skip_casts(add) is add
    assert argument(node, 1, "dim") == [-1] and argument(node, 7, "nothing", "default") == "default"
    assert named_argument(node, "keepdim") is True and named_argument(add, "alpha") == 1
    assert named_argument(add, "nothing") is None and named_argument(x, "self") is None
    assert module_path(x) == "" and Miss("why", x).node is x
    x.users[node] = None
    assert only_user(x) is None


def test_same_type_adds_no_guard():
    graph = capture.export(Flat(lambda x, y: (x + 1, y.exp(), x.double())), [X, torch.randn(5, 8)]).gm.graph
    x, y = graph.find_nodes(op="placeholder")
    (plus,) = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    (double,) = graph.find_nodes(op="call_function", target=aten.to.dtype)
    guards = len(x.meta["val"].fake_mode.shape_env.guards)
    assert same_type(x, plus) and not same_type(x, y) and not same_type(x, double)
    assert same_shape((1, 2), torch.Size([1, 2])) and not same_shape((1, 2), (1, 3))
    assert type_of(value(x)) == type_of(value(plus)) != type_of(value(double))
    assert type_of(1) != type_of(1.0) and type_of(1) != type_of(True)
    assert len(x.meta["val"].fake_mode.shape_env.guards) == guards
