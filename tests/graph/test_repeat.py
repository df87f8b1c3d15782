"""repeat: layers found on the graph."""

import pytest
import torch
from torch import nn

from qcompile.graph import capture
from qcompile.graph.match import aten, is_call
from qcompile.graph.repeat import correspond, externals, find_repeat


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, extra: int = 0):
        super().__init__()
        self.up, self.down, self.extra = nn.Linear(width, hidden), nn.Linear(hidden, width), extra
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x, shift):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale + shift
        y = self.up(y)
        y = y * torch.sigmoid(y) + torch.tanh(y) * torch.relu(y) - torch.sin(y)
        for _ in range(self.extra):
            y = torch.cos(y)
        return x + self.down(y.abs().sqrt())


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *tensors):
        (x,) = tensors
        shift, x = x.mean(-1, keepdim=True).exp(), x * 2
        for layer in self.layers:
            x = layer(x, shift)
        return torch.log_softmax(x, -1)


def graph_of(*layers: nn.Module):
    return capture.export(Layers(*layers), (torch.randn(3, 8),)).gm.graph


def test_layers_are_found() -> None:
    graph = graph_of(*(Layer(8, 16) for _ in range(5)))
    stretches = find_repeat(graph)
    assert len(stretches) == 5 and len({len(stretch) for stretch in stretches}) == 1
    nodes = [node for stretch in stretches for node in stretch]
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert nodes == calls[calls.index(nodes[0]) : calls.index(nodes[-1]) + 1]
    assert all(sum(is_call(node, aten.linear.default) for node in stretch) == 2 for stretch in stretches)


def test_one_value_passes_from_stretch_to_stretch() -> None:
    for one, other in zip((stretches := find_repeat(graph_of(*(Layer(8, 16) for _ in range(4))))), stretches[1:]):
        passed = [node for node in externals(other) if node in set(one)]
        assert len(passed) == 1
        assert correspond(one, other) and correspond(other, one)


def test_a_layer_that_differs_ends_it() -> None:
    layers = [Layer(8, 16) for _ in range(7)]
    assert len(find_repeat(graph_of(*layers[:4], Layer(8, 24), *layers[4:]))) == 4
    assert len(find_repeat(graph_of(*layers[:4], Layer(8, 16, extra=1), *layers[4:]))) == 4


def test_an_odd_first_layer_stays_before() -> None:
    class Skips(Layers):
        """Each layer adds what came before the last one; the first has only one thing to add."""

        def forward(self, *tensors):
            (x,) = tensors
            shift = x.mean(-1, keepdim=True).exp()
            before = x
            for layer in self.layers:
                x, before = layer(x, shift) + before, x
            return x

    graph = capture.export(Skips(*(Layer(8, 16) for _ in range(7))), (torch.randn(3, 8),)).gm.graph
    assert len(find_repeat(graph)) >= 5


def test_alternating_layers_repeat_in_pairs() -> None:
    stretches = find_repeat(graph_of(*(Layer(8, 16 + 8 * (i % 2)) for i in range(8))))
    assert len(stretches) == 4
    assert all(sum(is_call(node, aten.linear.default) for node in stretch) == 4 for stretch in stretches)


@pytest.mark.parametrize("layers", [[], [Layer(8, 16)], [Layer(8, 16), Layer(8, 16)]])
def test_too_few(layers: list[nn.Module]) -> None:
    assert find_repeat(graph_of(*layers)) == []


def test_short_stretches_stay_together() -> None:
    class Short(nn.Module):
        def forward(self, *tensors):
            (x,) = tensors
            for _ in range(50):
                x = torch.sin(x) * 2
            return x

    assert find_repeat(capture.export(Short(), (torch.randn(3, 8),)).gm.graph) == []


def test_a_layer_may_be_one_call_of_many_operands() -> None:
    class Wide(nn.Module):
        def forward(self, *tensors):
            x, *others = tensors
            for i in range(4):
                x = torch.stack([x, *others[20 * i : 20 * (i + 1)]]).sum(0)
            return x

    stretches = find_repeat(capture.export(Wide(), tuple(torch.randn(81, 3, 8))).gm.graph)
    assert [len(stretch) for stretch in stretches] == [2] * 4


def test_a_weight_that_two_layers_share() -> None:
    """Stretches correspond; who is behind an input does not matter."""
    layer = Layer(8, 16)
    assert len(find_repeat(graph_of(layer, Layer(8, 16), layer, Layer(8, 16)))) == 4
