"""recognize_activation: formulas, those of transformers among them."""

import math

import pytest
import torch
from torch import nn
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    ReLUSquaredActivation,
)

from qcompile.graph.activations import activation_of
from qcompile.graph.match import aten, is_call
from qcompile.ops.activation import ACTIVATIONS
from qcompile.passes.normalize import Normalize
from qcompile.passes.recognize_activation import RecognizeActivation

GELU_OF_BERT = GELUActivation(use_gelu_python=True)
TANH_IN_PYTHON = GELUTanh(use_gelu_tanh_python=True)
ROOT = math.sqrt(2 / math.pi)


def test_text(graph, golden):
    g = graph(NewGELUActivation(), torch.randn(2, 4))
    before = g.text()
    g.apply(RecognizeActivation(), atol=1e-5, rtol=1e-4)
    golden("passes/recognize_activation", f"{before}\nbecomes\n\n{g.text()}")


FORMULAS = [
    ("silu", lambda x: x * torch.sigmoid(x)),
    ("silu", lambda x: torch.sigmoid(x) * x),
    ("silu", lambda x: x / (1 + torch.exp(-x))),
    ("silu", lambda x: x / (torch.exp(-x) + 1)),
    ("gelu", GELU_OF_BERT),
    ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x * 0.70710678))),
    ("gelu", lambda x: 0.5 * (x * (1 + torch.erf(x / math.sqrt(2))))),
    ("gelu", lambda x: x * (0.5 * (1 + torch.erf(x / 1.41421)))),
    ("gelu_tanh", NewGELUActivation()),
    ("gelu_tanh", FastGELUActivation()),
    ("gelu_tanh", AccurateGELUActivation()),
    ("gelu_tanh", TANH_IN_PYTHON),
    ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))),
    ("gelu_tanh", lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x * x * x)))),
    ("gelu_tanh", lambda x: x * (0.5 * (1 + torch.tanh(ROOT * x * (1 + 0.044715 * x.pow(2)))))),
]
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(FORMULAS)]


@pytest.mark.parametrize(("name", "function"), FORMULAS, ids=IDS)
def test_recognized(graph, name, function):
    g = graph(function, torch.randn(4, 8)).prepare(Normalize())
    # Constants are written with as few as six digits.
    result = g.apply(RecognizeActivation(), rtol=1e-4, atol=1e-6)
    assert len(result.rewrites) == 1
    (node,) = g.gm.graph.find_nodes(op="output")[0].all_input_nodes
    found = activation_of(node)
    assert found is not None and found.name == name
    assert len(g.ops()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(graph, dtype):
    g = graph(NewGELUActivation(), torch.randn(4, 8, dtype=dtype)).prepare(Normalize())
    # The formula rounds after each step, the op once.
    g.apply(RecognizeActivation(), rtol=1e-7, atol=torch.finfo(dtype).eps * 8)
    assert g.ops() == ["gelu"]


def test_computed_in_float32(graph):
    def function(x):
        y = x.float()
        return (y * torch.sigmoid(y)).to(x.dtype)

    g = graph(function, torch.randn(4, 8, dtype=torch.bfloat16)).prepare(Normalize())
    g.apply(RecognizeActivation())
    assert g.ops() == ["to", "silu", "to"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x + 1),
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3)))),
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.04 * x.pow(3)))),
        lambda x: 0.4 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x.pow(3)))),
        lambda x: 0.5 * x * (1 + torch.erf(x / 1.3)),
        lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2))),
        lambda x: x / (1 + torch.exp(x)),
    ],
)
def test_left_alone(graph, function):
    g = graph(function, torch.randn(4, 8)).prepare(Normalize())
    assert not g.apply(RecognizeActivation()).rewrites


def test_two_tensors_are_not_one(graph):
    g = graph(lambda x, y: x * torch.sigmoid(y), torch.randn(4, 8), torch.randn(4, 8))
    assert not g.apply(RecognizeActivation()).rewrites


def test_an_operand_that_is_written_to(graph):
    def function(x):
        y = torch.sigmoid(x)
        z = x * y
        x.add_(1)
        return z

    g = graph(function, torch.randn(4, 8))
    assert not g.apply(RecognizeActivation()).rewrites


def test_the_sigmoid_may_have_other_readers(graph):
    g = graph(lambda x: [s := torch.sigmoid(x), x * s], torch.randn(4, 8))
    g.apply(RecognizeActivation())
    assert sorted(g.ops()) == ["sigmoid", "silu"]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU(approximate="tanh")),
        ("relu", nn.ReLU()),
        ("sigmoid", nn.Sigmoid()),
        ("tanh", nn.Tanh()),
        ("quick_gelu", QuickGELUActivation()),
        ("relu2", ReLUSquaredActivation()),
        ("relu2", lambda x: [r := torch.relu(x), r * r][1]),
        ("relu2", lambda x: torch.relu(x) ** 2),
        (None, nn.ELU()),
        (None, lambda x: x * torch.sigmoid(1.5 * x)),
        (None, lambda x: torch.relu(x) ** 3),
    ],
)
def test_activation_of(graph, name, function):
    x = torch.randn(4, 8)
    g = graph(function, x).prepare(Normalize(), RecognizeActivation())
    (node,) = g.gm.graph.find_nodes(op="output")[0].all_input_nodes
    found = activation_of(node)
    assert (found and found.name) == name
    if found:
        assert found.name in ACTIVATIONS
        assert found.x.op == "placeholder"
        torch.testing.assert_close(ACTIVATIONS[found.name](x), g.run()[0])


def test_activation_of_what_is_no_node():
    assert activation_of(1.0) is None and activation_of(None) is None


def test_leak(graph):
    g = graph(lambda x: [r := torch.relu(x), r.square()], torch.randn(4, 8)).prepare(Normalize())
    (square,) = g.gm.graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)
    found = activation_of(square)
    assert found is not None and is_call(found.leak, aten.relu.default)
