"""normalize: no-ops, casts, squares."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.passes.normalize import Normalize


class Small(nn.Module):
    def forward(self, x):
        y = F.dropout(x.detach().float(), 0.1, self.training) * 1.0
        return (y * y).type_as(x) + 0


def test_text(graph, golden):
    g = graph(Small(), torch.randn(2, 4, dtype=torch.bfloat16))
    before = g.text()
    g.apply(Normalize())
    golden("passes/normalize", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: x.detach().exp(), ["exp"]),
        (lambda x: torch.ops.aten.alias(x).exp(), ["exp"]),
        (lambda x: x.to(torch.float32).exp(), ["exp"]),
        (lambda x: x.to("cpu", torch.float32).exp(), ["exp"]),
        (lambda x: x.to(x.exp()).exp(), ["exp"]),
        (lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32).exp(), ["exp"]),
        (lambda x: x.to(torch.float32, copy=True).exp(), ["exp"]),
        (lambda x: x.type_as(x).exp(), ["exp"]),
        (lambda x: x.contiguous().exp(), ["exp"]),
        (lambda x: x.expand(3, 4).exp(), ["exp"]),
        (lambda x: x.expand_as(x).exp(), ["exp"]),
        (lambda x: F.dropout(x, 0.5, False).exp(), ["exp"]),
        (lambda x: F.dropout(x, 0.0, True).exp(), ["exp"]),
        (lambda x: torch.ops.aten.native_dropout(x, 0.5, False)[0].exp(), ["exp"]),
        (lambda x: (x * 1.0).exp(), ["exp"]),
        (lambda x: (1 * x).exp(), ["exp"]),
        (lambda x: (x + 0).exp(), ["exp"]),
        (lambda x: (x - 0.0).exp(), ["exp"]),
        (lambda x: (x / 1).exp(), ["exp"]),
        (lambda x: x.to("cpu", torch.float64), ["to"]),
        (lambda x: torch.ops.aten._to_copy(x, dtype=torch.float64), ["to"]),
        (lambda x: x.type_as(x.to(torch.float64)), ["to"]),
        (lambda x: x.square(), ["pow"]),
        (lambda x: x * x, ["pow"]),
    ],
)
def test_spellings(graph, function, ops):
    g = graph(function, torch.randn(3, 4))
    g.apply(Normalize())
    assert g.ops() == ops


def test_a_product_with_nothing_to_sum_is_one_of_elements(graph):
    g = graph(lambda x, y: x @ y, torch.randn(2, 3, 1), torch.randn(2, 1, 4))
    g.apply(Normalize())
    assert g.ops() == ["mul"]


def test_attention_to_a_single_key_stays_a_product(graph):
    g = graph(lambda x, y: x @ y, torch.randn(2, 2, 3, 1), torch.randn(2, 2, 1, 4))
    g.apply(Normalize())
    assert g.ops() == ["matmul"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2,
        lambda x: (x > 0) * 1,  # changes the dtype
        lambda x: x + 1,
        lambda x: F.dropout(x, 0.5, True) * 0,
        lambda x: x.to(torch.float16),
        lambda x: x.t().contiguous(),
        lambda x: x[:1].expand(3, 4),
        lambda x: x * x.exp(),
        lambda x: x * 1.0,  # the caller gets a tensor of its own
    ],
)
def test_left_alone(graph, function):
    g = graph(function, torch.randn(3, 4))
    before = [op for op in g.ops() if op != "_assert_tensor_metadata"]
    g.apply(Normalize())
    assert g.ops() == before


def test_a_copy_that_is_written_to_stays_a_copy(graph):
    def function(x):
        y = x * 1.0
        y[0].fill_(7)
        return x.exp(), y.exp()

    g = graph(function, torch.randn(3, 4))
    g.apply(Normalize())
    assert "mul" in g.ops()


def test_a_copy_of_what_is_written_to_stays_a_copy(graph):
    def function(x):
        y = x.to(torch.float32, copy=True)
        x.add_(1)
        return y.exp()

    g = graph(function, torch.randn(3, 4))
    g.apply(Normalize())
    assert g.ops() == ["to", "add_", "exp"]


def test_an_alias_goes_even_where_it_is_written_to(graph):
    """A cache's counter passes through `.to(its own dtype)` before it is advanced."""

    def function(x):
        x.to(torch.float32).add_(1)
        return x.exp()

    g = graph(function, torch.randn(3, 4))
    g.apply(Normalize())
    assert g.ops() == ["add_", "exp"]
