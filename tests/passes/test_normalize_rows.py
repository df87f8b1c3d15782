"""normalize_rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcompile.ops.activation_rounding import round_activation
from qcompile.passes.normalize import Normalize
from qcompile.passes.normalize_linear import NormalizeLinear
from qcompile.passes.normalize_rows import NormalizeRows
from qcompile.passes.normalize_views import NormalizeViews

BEFORE = (Normalize(), NormalizeViews(), NormalizeLinear())


class Block(nn.Module):
    """What OPT does behind its attention, or as `function` says."""

    def __init__(self, function=None):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norms = nn.LayerNorm([3, 4])
        self.rms = nn.RMSNorm(4)
        self.gain = nn.Parameter(torch.randn(4))
        self.function = function or Block.of_opt

    def of_opt(self, x):
        y = x.flatten(0, 1)
        return (y + self.down(self.up(self.norm(y)).relu())).unflatten(0, x.shape[:2])

    def forward(self, x):
        return self.function(self, x)


def test_text(graph, golden):
    g = graph(Block(), torch.randn(2, 3, 4)).prepare(*BEFORE)
    before = g.text()
    g.apply(NormalizeRows())
    golden("passes/normalize_rows", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda m, y: m.up(y), ["linear"]),
        (lambda m, y: m.down(F.gelu(m.up(y))), ["linear", "gelu", "linear"]),
        (lambda m, y: m.norm(y), ["layer_norm"]),
        (lambda m, y: m.rms(y), ["rms_norm"]),
        (lambda m, y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6), ["pow", "mean", "add", "rsqrt", "mul"]),
        (lambda m, y: y * 2 + m.gain, ["mul", "add"]),
        (lambda m, y: y.double().clamp(0, 1), ["to", "clamp"]),
        (lambda m, y: m.up(y).mul(m.up(y).sigmoid()), ["linear", "linear", "sigmoid", "mul"]),
        (lambda m, y: torch.where(y > 0, y, m.gain), ["gt", "where"]),
        (lambda m, y: m.up(round_activation(y, None, None, "u8/token/dynamic")), ["round_activation", "linear"]),
    ],
)
def test_seen_through(graph, function, ops):
    def forward(m, x):
        y = function(m, (x + m.gain).flatten(0, 1))
        return y.unflatten(0, x.shape[:2])

    g = graph(Block(forward), torch.randn(2, 3, 4)).prepare(*BEFORE)
    g.apply(NormalizeRows())
    assert [op for op in g.ops() if op != "sym_size"] == ["add", *ops]


def test_conv1d(graph):
    g = graph(Conv1D(6, 4), torch.randn(2, 3, 4)).prepare(*BEFORE)
    g.apply(NormalizeRows())
    assert [op for op in g.ops() if op != "sym_size"] == ["transpose", "linear"]


def test_four_dimensions(graph):
    g = graph(Block(lambda m, x: m.up(x.flatten(0, 2)).relu()), torch.randn(2, 3, 5, 4)).prepare(*BEFORE)
    g.apply(NormalizeRows())
    assert g.ops() == ["linear", "relu", "reshape"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.view(-1, 8).exp(),  # other rows
        lambda m, x: x.flatten(0, 1).sum(0),  # over the rows
        lambda m, x: x.flatten(0, 1).cumsum(-1),  # not known to work on rows
        lambda m, x: x.flatten(0, 1) + m.up.weight[:1, :4],  # a second operand with rows of its own
        lambda m, x: x.flatten(0, 1) + x.transpose(0, 1).flatten(0, 1),  # rows in another order
        lambda m, x: x.view(-1, 3, 4).exp(),  # not flat
        lambda m, x: m.norms(x.view(-1, 3, 4)),
        lambda m, x: x.flatten(0, 1).t().exp(),
    ],
)
def test_left_alone(graph, function):
    g = graph(Block(function), torch.randn(5, 6, 4)).prepare(*BEFORE)
    assert not g.apply(NormalizeRows()).rewrites


def test_rows_that_are_written_to(graph):
    def forward(m, x):
        y = x.transpose(0, 1).flatten(0, 1)
        z = y.exp()
        y.add_(1)
        return y, z

    g = graph(Block(forward), torch.randn(5, 6, 4)).prepare(*BEFORE)
    assert not g.apply(NormalizeRows()).rewrites
