"""advance_lengths: the lengths of all caches grow at the end of a call."""

import pytest
import torch

from qcompile.graph.match import aten
from qcompile.passes.advance_lengths import AdvanceLengths

ADDS = (aten.add_.Tensor,)
TOGETHER = aten._foreach_add_.Scalar


def layer(x, length, cache, count=1):
    at = torch.arange(count) + length
    length.add_(count)
    return x + cache.index_copy_(0, at, x).sum(0)


def layers(x, first, second, *caches):
    visible = torch.arange(8) <= torch.arange(1) + first
    for length, cache in zip((first, second), caches):
        x = layer(x, length, cache)
    return x, visible


def lengths(count=2):
    return [torch.tensor(3 + i) for i in range(count)]


def caches(count=2):
    return list(torch.randn(count, 8, 4))


def test_text(graph, golden):
    inputs = [torch.randn(1, 4), *lengths(), *caches()]
    before = graph(layers, *inputs).text()
    g = graph(layers, *inputs)
    g.apply(AdvanceLengths())
    golden("passes/advance_lengths", f"{before}\nbecomes\n\n{g.text()}")


def test_one_launch_for_all(graph):
    g = graph(layers, torch.randn(1, 4), *lengths(), *caches())
    result = g.apply(AdvanceLengths())
    assert len(result.rewrites) == 1
    assert (g.count(*ADDS), g.count(TOGETHER)) == (0, 1)
    assert g.ops()[-1] == "_foreach_add_"
    assert g.ops().count("arange") == 1, "positions of one token are the lengths themselves"


def test_several_tokens_have_positions_of_their_own(graph):
    def function(x, first, second, *caches):
        return [layer(x, length, cache, 2) for length, cache in zip((first, second), caches)]

    g = graph(function, torch.randn(2, 4), *lengths(), *caches())
    g.apply(AdvanceLengths())
    assert (g.count(*ADDS), g.count(TOGETHER), g.ops().count("arange")) == (0, 1, 2)


def test_a_number_of_tokens_that_is_known_at_the_call(graph):
    def function(x, first, second):
        for length in (first, second):
            length.add_(x.shape[0])
        return x + 1

    g = graph(function, torch.randn(5, 4), *lengths())
    g.apply(AdvanceLengths())
    assert (g.count(*ADDS), g.count(TOGETHER)) == (0, 1)


def test_each_number_of_tokens_by_itself(graph):
    def function(a, b, c, d, e):
        for length, count in ((a, 1), (b, 2), (c, 1), (d, 2), (e, 3)):
            length.add_(count)
        return torch.zeros(1)

    g = graph(function, *lengths(5))
    assert len(g.apply(AdvanceLengths()).rewrites) == 2
    assert (g.count(*ADDS), g.count(TOGETHER)) == (1, 2)


def read_afterwards(x, first, second):
    first.add_(1)
    second.add_(1)
    return x + first


def written_twice(x, first, second):
    first.add_(1)
    first.add_(1)
    second.add_(1)
    return x + 1


def returned(x, first, second):
    first.add_(1)
    second.add_(1)
    return x + 1, first


def result_is_read(x, first, second):
    second.add_(1)
    return x + first.add_(1)


def of_a_view(x, first, second):
    first.view(1).add_(1)
    second.add_(1)
    return x + 1


def another_step(x, first, second):
    first.add_(1)
    second.add_(2)
    return x + 1


def by_a_tensor(x, first, second):
    first.add_(x.sum().long())
    second.add_(1)
    return x + 1


def scaled(x, first, second):
    first.add_(1, alpha=2)
    second.add_(1)
    return x + 1


@pytest.mark.parametrize(
    "function",
    [read_afterwards, written_twice, returned, result_is_read, of_a_view, another_step, by_a_tensor, scaled],
)
def test_stays(graph, function):
    g = graph(function, torch.randn(1, 4), *lengths())
    assert not g.apply(AdvanceLengths()).rewrites


def test_what_is_a_view_of_another_input_stays(graph):
    def function(x, first, other, second, third):
        for length in (first, second, third):
            length.add_(1)
        return x + other

    first, second, third = lengths(3)
    g = graph(function, torch.randn(1, 4), first, first.view(1), second, third)
    g.apply(AdvanceLengths())
    assert (g.count(*ADDS), g.count(TOGETHER)) == (1, 1)


@pytest.mark.parametrize("backend", ["eager", "qcompile"])
def test_a_view_of_a_length_is_read_after_it_grew(backend):
    def function(x, first, other, second):
        first.add_(1)
        second.add_(1)
        return x + other

    first, second = lengths()
    with torch.no_grad():
        got = torch.compile(function, backend=backend)(torch.zeros(1), first, first.view(1), second)
    assert (got.item(), first.item(), second.item()) == (4, 4, 5)


def test_rows_stay(graph):
    def function(first, second):
        first.add_(1)
        second.add_(1)
        return torch.zeros(1)

    assert not graph(function, torch.arange(3), torch.arange(3)).apply(AdvanceLengths()).rewrites


def returned_position(x, first, second):
    at = torch.arange(1) + first
    first.add_(1)
    second.add_(1)
    return x + 1, at


def written_position(x, first, second):
    at = torch.arange(1) + first
    at.add_(1)
    first.add_(1)
    second.add_(1)
    return x + at


def narrower_position(x, first, second):
    at = torch.arange(1, dtype=torch.float64) + first
    first.add_(1)
    second.add_(1)
    return x + at


def position_elsewhere(x, first, second):
    at = torch.arange(1, device="meta") + first
    first.add_(1)
    second.add_(1)
    return x + torch.zeros_like(at, device=x.device)


@pytest.mark.parametrize("function", [returned_position, written_position, narrower_position, position_elsewhere])
def test_positions_that_are_more_than_read(graph, function):
    g = graph(function, torch.randn(1, 4), *lengths())
    assert g.apply(AdvanceLengths()).rewrites
    assert g.ops().count("arange") == 1
