"""fuse_mlp."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from qcompile.normal import normalizing_passes
from qcompile.ops.activation import ACTIVATIONS, gated_act
from qcompile.ops.linear import linear
from qcompile.passes.fuse_mlp import FuseMlp
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.recognize_activation import RecognizeActivation

BEFORE = (*normalizing_passes(), RecognizeActivation(), QuantizeLinear(), FuseSiblings())
FORMULAS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": ACT2FN["gelu_pytorch_tanh"],
    "quick_gelu": ACT2FN["quick_gelu"],
    "relu": F.relu,
    "relu2": ACT2FN["relu2"],
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class Gated(nn.Module):
    """act(gate(x)) * up(x), or as `combine` says."""

    def __init__(self, combine):
        super().__init__()
        self.gate, self.up = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
        self.down = nn.Linear(8, 4, bias=False)
        self.combine = combine

    def forward(self, x):
        return self.combine(self.gate(x), self.up(x), self.down)


class Plain(nn.Module):
    """down(act(up(x))), or as `combine` says."""

    def __init__(self, combine):
        super().__init__()
        self.up, self.down = nn.Linear(64, 8), nn.Linear(8, 4)
        self.combine = combine

    def forward(self, x):
        return self.combine(self.up(x), self.down)


@pytest.fixture
def gated(graph, side_by_side):
    def run(combine, dtype=torch.float32):
        module = Gated(combine).to(dtype)
        side_by_side(module.gate, module.up)
        g = graph(module, torch.randn(3, 64, dtype=dtype)).prepare(*BEFORE)
        return g, g.apply(FuseMlp(), rtol=1e-5, atol=1e-5)

    return run


@pytest.fixture
def plain(graph, side_by_side):
    def run(combine):
        module = Plain(combine)
        side_by_side(module.up)
        g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
        return g, g.apply(FuseMlp(), rtol=1e-5, atol=1e-5)

    return run


def reasons(result):
    return [reason for reason, _ in result.misses]


def test_text(graph, side_by_side, golden):
    module = nn.Sequential(Gated(lambda gate, up, _: F.silu(gate) * up), nn.Linear(8, 4), nn.GELU())
    side_by_side(module[0].gate, module[0].up)
    side_by_side(module[1], spec="i8/row/sym")
    g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
    before = g.text()
    g.apply(FuseMlp())
    golden("passes/fuse_mlp", f"{before}\nbecomes\n\n{g.text()}")


def test_every_activation_is_tried():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_gate(gated, name):
    act = FORMULAS[name]
    g, result = gated(lambda gate, up, down: down(act(gate) * up))
    (node,) = g.gm.graph.find_nodes(op="call_function", target=gated_act.overload)
    assert node.args[2] == name
    assert g.ops() == ["linear", "narrow", "narrow", "gated_act", "linear"]
    assert not result.misses


def test_gate_on_the_right(gated):
    g, _ = gated(lambda gate, up, down: down(up * F.silu(gate)))
    assert g.count(gated_act.overload) == 1


def test_gate_between_linears_that_were_not_fused(graph, side_by_side):
    module = Gated(lambda gate, up, down: down(F.silu(gate) * up))
    side_by_side(module.gate)
    side_by_side(module.up)
    g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
    g.apply(FuseMlp())
    assert g.ops() == ["linear", "linear", "gated_act", "linear"]


def test_gate_of_one_wide_linear(graph, side_by_side):
    """gate_up_proj of Phi-3."""

    def combine(y, down):
        up, gate = y.chunk(2, -1)
        return up * F.silu(gate)

    module = Plain(combine)
    side_by_side(module.up)
    g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
    g.apply(FuseMlp())
    assert g.ops() == ["linear", "narrow", "narrow", "gated_act"]


def test_two_activations(gated):
    """silu(a) * sigmoid(b): either may be the gate."""
    g, _ = gated(lambda gate, up, down: F.silu(gate) * torch.sigmoid(up))
    assert g.ops() == ["linear", "narrow", "narrow", "sigmoid", "gated_act"]


@pytest.mark.parametrize("name", FORMULAS)
def test_linear(plain, name):
    act = FORMULAS[name]
    g, result = plain(lambda y, down: down(act(y)))
    (node,) = g.gm.graph.find_nodes(op="call_function", target=linear.overload)
    assert node.args[6] == name
    assert g.ops() == ["linear", "linear"]
    assert not result.misses


def test_the_activation_of_a_linear_may_have_many_readers(plain):
    g, _ = plain(lambda y, down: [z := F.silu(y), z * y.shape[0], z * z.exp()])
    assert [op for op in g.ops() if op != "sym_size"] == ["linear", "mul", "exp", "mul"]


def test_the_relu_of_a_squared_relu_that_is_read(plain):
    g, _ = plain(lambda y, down: [r := F.relu(y), r * r])
    assert g.ops() == ["linear", "pow"]


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_gates_that_are_no_mlp(graph, name):
    act = FORMULAS[name]
    g = graph(lambda x, y: act(x) * y, torch.randn(3, 4), torch.randn(3, 4))
    result = g.apply(FuseMlp())
    assert not result.rewrites and not result.misses


def test_dense_linears_keep_their_activation(graph):
    g = graph(Plain(lambda y, down: down(F.silu(y))), torch.randn(3, 64)).prepare(*BEFORE)
    assert not g.apply(FuseMlp()).rewrites


def test_miss_read_activation(gated):
    _, result = gated(lambda gate, up, down: [z := F.silu(gate), z * up])
    assert reasons(result) == ["the activation has another user"]


def test_miss_read_inside(gated):
    _, result = gated(lambda gate, up, down: [r := F.relu(gate), r.square() * up])
    assert reasons(result) == ["the activation has another user"]


def test_miss_read_inside_of_a_plain_one(plain):
    _, result = plain(lambda y, down: [s := torch.sigmoid(1.702 * y), y * s])
    assert reasons(result) == ["the activation has another user"]


def test_miss_broadcast(graph):
    g = graph(lambda x, y: F.silu(x) * y, torch.randn(3, 4), torch.randn(4))
    assert reasons(g.apply(FuseMlp())) == ["the gate is f32[s0,s1], its factor f32[s1]"]


def test_miss_dtypes(gated):
    _, result = gated(lambda gate, up, down: F.silu(gate) * up.double())
    assert reasons(result) == ["the gate is f32[s0,8], its factor f64[s0,8]"]


def test_miss_dtypes_inside(plain):
    def combine(y, down):
        z = y.double()
        return z * torch.sigmoid(1.702 * z)

    _, result = plain(combine)
    assert reasons(result) == ["the activation is computed in another dtype"]


def test_miss_written_gate(gated):
    def combine(gate, up, down):
        z = F.silu(gate) * up
        gate.add_(1)
        return z, gate

    _, result = gated(combine)
    assert reasons(result) == ["the gate is written in place"]


def test_miss_read_linear(plain):
    _, result = plain(lambda y, down: down(F.silu(y)) + y.sum())
    assert reasons(result) == ["the linear has another user"]


@pytest.mark.parametrize(
    ("name", "act"), [("elu", F.elu), ("leaky_relu", F.leaky_relu), ("mish", F.mish), ("softplus", F.softplus)]
)
def test_miss_unknown(plain, gated, name, act):
    _, result = plain(lambda y, down: down(act(y)))
    assert reasons(result) == [f"activation aten.{name} has no fused form"]
    _, result = gated(lambda gate, up, down: down(act(gate) * up))
    assert reasons(result) == [f"activation aten.{name} has no fused form"]


def test_unknown_elsewhere(plain):
    _, result = plain(lambda y, down: F.elu(y))
    assert not result.misses
