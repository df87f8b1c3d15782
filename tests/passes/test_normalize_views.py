"""normalize_views: reshape, transpose and narrow."""

import pytest
import torch
from torch import nn

from qcompile.passes.normalize import Normalize
from qcompile.passes.normalize_views import NormalizeViews


class Heads(nn.Module):
    def forward(self, x):
        q, k = x.unflatten(2, (2, 6)).swapaxes(1, 2).chunk(2, -1)
        return q @ k.mT, x[..., 2:4], x.flatten(1)


def test_text(graph, golden):
    g = graph(Heads(), torch.randn(2, 3, 12))
    before = g.text()
    g.apply(NormalizeViews())
    golden("passes/normalize_views", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: x.view(3, 8), ["reshape"]),
        (lambda x: x.reshape(3, 8), ["reshape"]),
        (lambda x: x.flatten(1), ["reshape"]),
        (lambda x: x.flatten(), ["reshape"]),
        (lambda x: x.unflatten(2, (2, -1)), ["reshape"]),
        (lambda x: x.view_as(x), []),
        (lambda x: x.reshape(3, 4, 2), []),
        (lambda x: x.view(3, 8).view(6, 4).view(-1), ["reshape"]),
        (lambda x: x.transpose(-1, -2), ["transpose"]),
        (lambda x: x.mT, ["transpose"]),
        (lambda x: x.permute(0, 2, 1), ["transpose"]),
        (lambda x: x.swapaxes(1, 2), ["transpose"]),
        (lambda x: x.swapdims(1, 2), ["transpose"]),
        (lambda x: x.movedim(1, 2), ["transpose"]),
        (lambda x: x.mT.mT, []),
        (lambda x: x.permute(2, 0, 1).permute(1, 2, 0), []),
        (lambda x: x.permute(2, 0, 1), ["permute"]),
        (lambda x: x.permute(2, 0, 1).transpose(0, 1), ["transpose"]),
        (lambda x: x[0].t(), ["select", "transpose"]),
        (lambda x: x[0].T, ["select", "transpose"]),
        (lambda x: x[0, 0].t(), ["select", "select"]),
        (lambda x: x[:, :, :], []),
        (lambda x: x[:, 1:3], ["narrow"]),
        (lambda x: x[:, -2:], ["narrow"]),
        (lambda x: x[:, :-1], ["narrow"]),
        (lambda x: x[:, 3:9], ["narrow"]),
        (lambda x: x[:, 9:], ["narrow"]),
        (lambda x: x.narrow(-2, 1, 2), ["narrow"]),
        (lambda x: x.narrow(1, 0, 4), []),
        (lambda x: x[:, 1:][:, 1:2], ["narrow"]),
        (lambda x: x.chunk(2, 1), ["narrow", "narrow"]),
        (lambda x: x.split(3, 1), ["narrow", "narrow"]),
        (lambda x: x.split([1, 3], 1)[1], ["narrow"]),
        (lambda x: x.tensor_split(3, 1)[2], ["narrow"]),
        (lambda x: x.tensor_split((1, 2), 1)[1], ["narrow"]),
        (lambda x: x.split(4, 1)[0], []),
        (lambda x: x.unbind(-1)[1], ["select"]),
        (lambda x: x[:, ::2], ["slice"]),
        (lambda x: x.view(torch.int32), ["view"]),
    ],
)
def test_spellings(graph, function, ops):
    g = graph(OfWeight(function), torch.randn(2)).prepare(Normalize())
    g.apply(NormalizeViews())
    assert g.ops() == ops


class OfWeight(nn.Module):
    """A function of a weight, whose sizes are numbers."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x):
        return self.function(self.weight)


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: x[:, 1:], ["slice"]),
        (lambda x: x[:, -1:], ["slice"]),
        (lambda x: x[:, : x.shape[0]], ["slice"]),
        (lambda x: x.chunk(2, 1)[0], ["chunk", "getitem", "getitem"]),
        (lambda x: x[:, :1], ["narrow"]),
        (lambda x: x[:, :], []),
        (lambda x: x.flatten(0, 1), ["reshape"]),
        (lambda x: x.unsqueeze(0).flatten(2), ["unsqueeze", "reshape"]),
        (lambda x: x.mT, ["transpose"]),
    ],
)
def test_symbolic_sizes(graph, function, ops):
    g = graph(function, torch.randn(5, 7, 3))
    g.apply(NormalizeViews())
    assert [op for op in g.ops() if op not in ("sym_size", "floordiv", "add", "sub")] == ops


def test_a_copying_reshape_of_what_is_written_to_stays(graph):
    def function(x):
        y = x.t().reshape(-1)
        x.add_(1)
        return y.reshape(2, -1)

    g = graph(function, torch.randn(4, 4))
    g.apply(NormalizeViews())
    assert g.ops() == ["transpose", "reshape", "add_", "reshape"]
