"""regions."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile import _torch
from qcompile.graph import capture
from qcompile.regions import compile_graph


class Layer(nn.Module):
    """Remembers what it saw: a cache of its own is written in place."""

    def __init__(self, through_view: bool = False):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.through_view = through_view

    def forward(self, x, place, cache, shift):
        if self.through_view:
            cache.view(-1, 8).mul_(2)
        seen = cache.index_copy_(0, place, x)
        y = self.up(torch.tanh(x) + shift + seen.sum(0))
        y = y * torch.sigmoid(y) + torch.tanh(y) * torch.relu(y) - torch.sin(y)
        return x + self.down(torch.cos(y).abs().sqrt()).exp().neg().sin()


class Layers(nn.Module):
    def __init__(self, count: int, **options: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(**options) for _ in range(count))

    def forward(self, *tensors):
        x, place, *caches = tensors
        for cache in caches:
            torch._check(cache.shape[0] == caches[0].shape[0])
        shift = x.mean(-1, keepdim=True).exp()
        for layer, cache in zip(self.layers, caches):
            x = layer(x, place, cache, shift)
        return torch.log_softmax(x, -1), x


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled; they run as they are."""
    graphs = []

    def keep(gm: Any, fakes: Any, patches: Any = None) -> Any:
        assert len(gm.graph.find_nodes(op="placeholder")) == len(fakes)
        graphs.append(gm)
        return gm

    monkeypatch.setattr(_torch, "inductor", keep)
    return graphs


def call_of(count: int, rows: int = 3, length: int = 7) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, 8), torch.arange(rows) + 1, *(torch.zeros(length, 8) for _ in range(count))


def captured(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Callable[..., Any], list[Any]]:
    found = capture.export(model, inputs)
    weights = [model.get_parameter(x.path) for x in found.inputs if x.path is not None]
    return compile_graph(found.gm, found.fakes), weights


def check(model: nn.Module, run: Callable[..., Any], weights: list[torch.Tensor], inputs: tuple) -> None:
    mine, theirs = [tensor.clone() for tensor in inputs], [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        got, want = run(*weights, *mine), model(*theirs)
    for one, other in zip([*got, *mine], [*want, *theirs], strict=True):
        torch.testing.assert_close(one, other)


def test_what_repeats_is_compiled_once(compiled: list[Any]) -> None:
    model = Layers(6)
    run, weights = captured(model, call_of(6))
    assert len(compiled) == 3
    check(model, run, weights, call_of(6))
    check(model, run, weights, call_of(6, rows=5, length=9))  # sizes stay symbolic


def test_few_layers_are_one_graph(compiled: list[Any]) -> None:
    model = Layers(2)
    run, weights = captured(model, call_of(2))
    assert len(compiled) == 1
    check(model, run, weights, call_of(2))


def test_a_view_of_what_is_written(compiled: list[Any]) -> None:
    model = Layers(4, through_view=True)
    run, weights = captured(model, call_of(4))
    check(model, run, weights, call_of(4))


def test_memory_that_two_inputs_share_is_not_torn_apart(compiled: list[Any]) -> None:
    """A slice that is made before the layers and written in one of them: regions could not see that it is x."""

    class Shares(Layers):
        def forward(self, *tensors):
            x, place, *caches = tensors
            half = caches[0][:3]
            for layer, cache in zip(self.layers, caches):
                x = layer(x, place, cache, half)
            return x, x * 2

    model = Shares(4)
    run, weights = captured(model, call_of(4))
    check(model, run, weights, call_of(4))
    assert len(compiled) == 1


def test_regions_that_return_nothing(compiled: list[Any]) -> None:
    """What lies before and after the layers only writes."""

    class Writes(Layers):
        def forward(self, *tensors):
            x, place, *caches = tensors
            for cache in caches:
                torch._check(cache.shape[0] == caches[0].shape[0])
            caches[0].add_(1)
            for layer, cache in zip(self.layers, caches):
                x = layer(x, place, cache, 1.5)
            caches[1].mul_(2)
            return (x,)

    model = Writes(5)
    run, weights = captured(model, call_of(5))
    check(model, run, weights, call_of(5))


def test_values_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []

    def keep(gm: Any, fakes: Any, patches: Any = None) -> Any:
        def run(*inputs: Any) -> Any:
            outputs = gm(*inputs)
            if outputs[0].shape[-1] == 8:  # x; what stays for all layers is a column
                assert all(ref() is None for ref in passed[:-1])
                passed.append(weakref.ref(outputs[0]))
            return outputs

        return run

    monkeypatch.setattr(_torch, "inductor", keep)
    run, weights = captured(Layers(5), call_of(5))
    with torch.no_grad():
        run(*weights, *call_of(5))
    assert len(passed) >= 4


def test_generate_of_a_deeper_model(tiny_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real compiler: the layer of each of the two programs is compiled once, and never again."""
    counts = []
    inductor = _torch.inductor
    monkeypatch.setattr(_torch, "inductor", lambda gm, *rest: counts.append(len(gm.graph.nodes)) or inductor(gm, *rest))
    inputs = torch.tensor([[1, 5, 9, 42, 7, 3]])
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    want = tiny_llama(num_hidden_layers=4).generate(inputs, **options)
    model = qcompile.optimize(tiny_llama(num_hidden_layers=4), progress=False)
    assert torch.equal(model.generate(inputs, **options), want)
    assert len(counts) == 6
    assert torch.equal(
        model.generate(inputs[:, :4], **options), tiny_llama(num_hidden_layers=4).generate(inputs[:, :4], **options)
    )
    assert len(counts) == 6
