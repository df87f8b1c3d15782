"""fuse_gated_codes: the gate before a linear of codes becomes part of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.gated_linear_w8a8 import gated_linear_w8a8
from qcompile.passes.fuse_gated_codes import FuseGatedCodes
from qcompile.passes.fuse_mlp import FuseMlp
from qcompile.passes.quantize_activation import QuantizeActivation
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.recognize_activation import RecognizeActivation
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import INPUT_ROUNDING, put_rounding
from qcompile.stores import ActivationRounding

BEFORE = (*normalizing_passes(), RecognizeActivation(), QuantizeLinear(), FuseMlp(), QuantizeActivation())


class Gated(nn.Module):
    """`combine(self, gate, up)` around a linear of rounded activations."""

    def __init__(self, combine):
        super().__init__()
        self.linear, self.combine = nn.Linear(64, 8), combine

    def forward(self, gate, up):
        return self.combine(self, gate, up)


def plain(m, gate, up):
    return m.linear(F.silu(gate) * up)


@pytest.fixture
def fused(graph, side_by_side, monkeypatch):
    """`fused(combine)`: the graph and what the pass did, where a kernel for the CPU, which is the meaning, signs up."""

    def run(combine, rounding="i8/token/dynamic", scale=None, reason=None, device="cpu"):
        monkeypatch.setattr(gated_linear_w8a8, "implementations", [])

        def refuses(gate, up, gate_activation, rounding, data, scale, zero, bias, spec, activation):
            return reason

        gated_linear_w8a8.implementation("test", refuses, device=device)(gated_linear_w8a8.meaning)
        module = Gated(combine)
        side_by_side(module.linear, spec="i8/row/sym")
        put_rounding(module.linear, INPUT_ROUNDING, ActivationRounding(ActivationSpec.parse(rounding), scale))
        g = graph(module, torch.randn(3, 64), torch.randn(3, 64)).prepare(*BEFORE)
        return g, g.apply(FuseGatedCodes())

    return run


def test_text(fused, golden):
    g, _ = fused(plain)
    golden("passes/fuse_gated_codes", g.text())


def test_fused(fused):
    g, result = fused(plain)
    assert g.ops() == ["gated_linear_w8a8"] and not result.misses


def test_where_no_kernel_would_make_codes(fused):
    for options in ({"reason": "not here"}, {"device": "cuda"}):
        g, result = fused(plain, **options)
        assert g.ops() == ["gated_act", "linear_w8a8"] and not result.misses


def test_static_scales(fused):
    g, result = fused(plain, "i8/tensor/static", torch.tensor(0.02))
    assert "linear_w8a8" in g.ops() and not result.rewrites and not result.misses


def test_another_user(fused):
    def combine(m, gate, up):
        x = F.silu(gate) * up
        return m.linear(x), x

    _, result = fused(combine)
    assert [reason for reason, _ in result.misses] == ["the gate's product has another user"]


def test_a_factor_that_is_written_to(fused):
    def combine(m, gate, up):
        up = up + 1
        x = F.silu(gate) * up
        up.zero_()
        return m.linear(x), up

    _, result = fused(combine)
    assert not result.rewrites and len(result.misses) == 1
    assert "is written to before the linear" in result.misses[0][0]
