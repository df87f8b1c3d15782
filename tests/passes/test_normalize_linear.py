"""normalize_linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.graph.match import aten
from qcompile.passes.normalize import Normalize
from qcompile.passes.normalize_linear import NormalizeLinear
from qcompile.passes.normalize_views import NormalizeViews


def test_text(graph, golden):
    g = graph(Weight(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w.t()) @ m.w), torch.randn(2, 3, 4))
    g.prepare(NormalizeViews())
    before = g.text()
    g.apply(NormalizeLinear())
    golden("passes/normalize_linear", f"{before}\nbecomes\n\n{g.text()}")


class Weight(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(6))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.experts = nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda m, x: F.linear(x, m.w, m.b), ["linear"]),
        (lambda m, x: aten.linear(x, m.w, None), ["linear"]),
        (lambda m, x: x @ m.w.t(), ["linear"]),
        (lambda m, x: x @ m.w.T, ["linear"]),
        (lambda m, x: torch.matmul(x, m.square), ["transpose", "linear"]),
        (lambda m, x: x.double() @ m.w.t().double(), ["to", "transpose", "to", "transpose", "linear"]),
        (lambda m, x: x @ m.experts[1], ["select", "transpose", "linear"]),
        (lambda m, x: torch.mm(x[0], m.w.t()), ["select", "linear"]),
        (lambda m, x: torch.addmm(m.b, x[0], m.w.t()), ["select", "linear"]),
        (lambda m, x: torch.addmm(m.b, x[0], m.w.t(), beta=2), ["select", "transpose", "addmm"]),
        (lambda m, x: torch.addmm(m.b[:1], x[0], m.w.t()), ["narrow", "select", "transpose", "addmm"]),
        (lambda m, x: torch.addmm(x[0], x[0], m.square), ["select", "select", "addmm"]),
        (lambda m, x: x @ x.mT, ["transpose", "mm"]),
        (lambda m, x: x[0].exp() @ x[0].exp().t(), ["select", "exp", "select", "exp", "transpose", "mm"]),
        (lambda m, x: m.square @ x[0].exp().t(), ["select", "exp", "transpose", "mm"]),
        (lambda m, x: x[0, 0] @ m.square, ["select", "select", "mm"]),
    ],
)
def test_spellings(graph, function, ops):
    g = graph(Weight(function), torch.randn(2, 3, 4)).prepare(Normalize(), NormalizeViews())
    g.apply(NormalizeLinear())
    # Which of mm and matmul is captured depends on the release of torch.
    assert [op.replace("matmul", "mm") for op in g.ops() if op != "sym_size"] == ops
