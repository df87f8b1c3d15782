"""fuse_linear: what stands around a linear of few rows becomes part of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import qcompile
from qcompile.normal import normalizing_passes
from qcompile.ops.activation import gated_act
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.linear import linear
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.fuse_mlp import FuseMlp
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.recognize_activation import RecognizeActivation
from qcompile.passes.recognize_norm import RecognizeNorm

BEFORE = (*normalizing_passes(), RecognizeActivation(), RecognizeNorm(), QuantizeLinear(), FuseSiblings(), FuseMlp())


@pytest.fixture
def served(monkeypatch):
    """`served(refuses)`: a kernel for the CPU, which is the meaning, signs up, and refuses with the reason given."""

    def sign_up(reason=None):
        monkeypatch.setattr(fused_linear, "implementations", [])

        def refuses(
            x, norm_weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated,
            rounding=None,
        ):  # fmt: skip
            return "rounds otherwise" if rounding not in (None, "i8/token/dynamic") else reason

        fused_linear.implementation("test", refuses, device="cpu")(fused_linear.meaning)

    return sign_up


class Layer(nn.Module):
    """`combine(self, x, y)` over a norm, a linear, and a gate and its factor."""

    def __init__(self, combine, kind=nn.RMSNorm, bias=False):
        super().__init__()
        self.norm = kind(64, eps=1e-5)
        self.linear, self.gate, self.up = (nn.Linear(64, 64, bias=bias) for _ in range(3))
        self.combine = combine
        nn.init.normal_(self.norm.weight)

    def forward(self, x, y):
        return self.combine(self, x, y)


@pytest.fixture
def fused(graph, side_by_side, served):
    def run(combine, kind=nn.RMSNorm, bias=False, shape=(1, 1, 64), reason=None):
        served(reason)
        module = Layer(combine, kind, bias)
        side_by_side(module.linear)
        side_by_side(module.gate, module.up)
        g = graph(module, torch.randn(shape), torch.randn(shape)).prepare(*BEFORE)
        return g, g.apply(FuseLinear(), rtol=1e-4, atol=1e-4)

    return run


def decoder_layer(m, x, y):
    x = x + m.linear(y)
    n = m.norm(x)
    return x + m.linear(F.silu(m.gate(n)) * m.up(n))


def reasons(result):
    return [reason for reason, _ in result.misses]


def arguments(g):
    names = [argument.name for argument in fused_linear.overload._schema.arguments]
    return [
        dict(zip(names, node.args)) for node in g.gm.graph.find_nodes(op="call_function", target=fused_linear.overload)
    ]


def test_text(graph, side_by_side, served, golden):
    served()
    module = Layer(decoder_layer)
    side_by_side(module.linear)
    side_by_side(module.gate, module.up)
    g = graph(module, *torch.randn(2, 1, 1, 64)).prepare(*BEFORE)
    before = g.text()
    g.apply(FuseLinear(), rtol=1e-4, atol=1e-4)
    golden("passes/fuse_linear", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(fused, bias):
    g, result = fused(decoder_layer, bias=bias)
    assert g.ops() == ["fused_linear"] * 3 and not result.misses
    o, gate_up, down = arguments(g)
    assert o["eps"] is None and o["residual"] is not None and not o["gated"]
    assert (
        gate_up["eps"] == 1e-5 and gate_up["residual"] is None and gate_up["gated"] and gate_up["activation"] == "silu"
    )
    assert down["eps"] is None and down["residual"].target is fused_linear.overload
    assert all((call["bias"] is not None) is bias for call in (o, gate_up, down))


def test_sum_on_the_other_side_and_norm_of_two_linears(fused):
    g, result = fused(lambda m, x, y: (m.linear(x) + y, m.gate(n := m.norm(x)).relu(), m.linear(n)))
    assert [op for op in g.ops() if op != "narrow"] == ["fused_linear"] * 3 and not result.misses
    assert {call["activation"] for call in arguments(g)} == {None, "relu"}


def test_of_a_sum_of_two_linears_one_takes_the_other(fused):
    g, result = fused(lambda m, x, y: m.linear(x) + m.gate(y) + y)
    assert [op for op in g.ops() if op != "narrow"] == ["linear", "fused_linear", "add"]
    assert reasons(result) == ["the linear has a residual already"]


def test_norm_without_weight(fused):
    g, _ = fused(lambda m, x, y: m.linear(F.rms_norm(x, (64,), eps=1e-3)))
    assert g.ops() == ["fused_linear"] and arguments(g)[0]["norm_weight"] is None


def rounded(x, spec="i8/token/dynamic"):
    return round_activation(x, None, None, spec)


def test_rounding(fused):
    def layer(m, x, y):
        x = x + m.linear(rounded(y))
        n = rounded(m.norm(x))
        return x + m.linear(rounded(F.silu(m.gate(n)) * m.up(n)))

    g, result = fused(layer)
    assert g.ops() == ["fused_linear"] * 3 and not result.misses
    assert [(call["eps"], call["rounding"]) for call in arguments(g)] == [
        (None, "i8/token/dynamic"), (1e-5, "i8/token/dynamic"), (None, "i8/token/dynamic")
    ]  # fmt: skip


def test_rounding_of_a_norm_that_is_read_elsewhere(fused):
    g, result = fused(lambda m, x, y: (m.linear(rounded(n := m.norm(x))), n * 2))
    assert [op for op in g.ops() if op != "mul"] == ["rms_norm", "fused_linear"] and not result.misses
    assert arguments(g)[0]["eps"] is None and arguments(g)[0]["rounding"]


def test_rounding_that_no_kernel_takes(fused):
    g, result = fused(lambda m, x, y: m.linear(rounded(m.norm(x), "u8/token/dynamic")))
    assert g.ops() == ["rms_norm", "round_activation", "linear"] and not result.misses


@pytest.mark.parametrize("shape", [(9, 1, 64), (2, 5, 64)])
def test_of_many_rows_a_gate_alone(fused, shape):
    g, result = fused(decoder_layer, shape=shape)
    assert g.count(fused_linear.overload) == 1 and not result.misses
    (gate_up,) = arguments(g)
    assert gate_up["gated"] and gate_up["eps"] is None and gate_up["residual"] is None
    g, result = fused(decoder_layer, shape=shape, reason="handles few rows")
    assert not result.rewrites and not result.misses


def test_devices_without_a_kernel_are_none_of_its_business(fused, monkeypatch, graph, side_by_side):
    monkeypatch.setattr(fused_linear, "implementations", [])
    module = Layer(decoder_layer)
    side_by_side(module.linear)
    result = graph(module, *torch.randn(2, 1, 1, 64)).prepare(*BEFORE).apply(FuseLinear())
    assert not result.rewrites and not result.misses


def test_miss_refused(fused):
    g, result = fused(decoder_layer, reason="does not like it")
    assert set(reasons(result)) == {"does not like it"} and len(result.misses) == 4 and not result.rewrites


def test_miss_layer_norm(fused):
    _, result = fused(lambda m, x, y: m.linear(m.norm(x)), kind=nn.LayerNorm)
    assert reasons(result) == ["a layer norm stays apart"]


def test_miss_norm_with_a_computed_weight(fused):
    _, result = fused(lambda m, x, y: m.linear(F.rms_norm(x, (64,), m.norm.weight.exp(), 1e-5)))
    assert reasons(result) == ["the norm's weight is computed, by exp"]


def test_miss_norm_that_is_read(fused):
    _, result = fused(lambda m, x, y: m.linear(n := m.norm(x)) * n.exp())
    assert reasons(result) == ["the norm is read by exp too"]


def test_miss_linear_that_is_read(fused):
    _, result = fused(lambda m, x, y: ((z := m.linear(x)) + y, z))
    assert reasons(result) == ["the linear has another user"]


def test_miss_wide_linear_that_is_read(fused):
    _, result = fused(lambda m, x, y: (F.silu(gate := m.gate(x)) * (up := m.up(x)), up))
    assert reasons(result) == ["the linear has another user"]


def test_miss_gate_behind_its_factor(fused):
    g, result = fused(lambda m, x, y: m.gate(x) * F.silu(m.up(x)))
    assert reasons(result) == ["the gate is not the first half of the linear"] and g.count(gated_act.overload) == 1


def test_miss_broadcast_sum(fused):
    _, result = fused(lambda m, x, y: m.linear(x) + y[..., :1])
    assert reasons(result) == ["the sum is of another shape or dtype than the linear"]


def test_miss_written_input(fused):
    def written(m, x, y):
        x = x.exp()
        z = m.linear(x)
        x.mul_(2.0)
        return z + y, x

    g, result = fused(written)
    assert reasons(result) == ["exp is written to in between"] and g.count(linear.overload) == 1


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
# Rewrites: norms of two layers, gates, two sums a layer; and the norm before a quantized lm_head.
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), 11, set()),
    "qwen2, with biases": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), 11, set()),
    "gemma, with its offset": (lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)), 10, set()),
    "gpt-neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), 2, {"a layer norm stays apart"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_a_model(name, served, interpreted):
    make, rewrites, misses = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    token = torch.tensor([[7]])
    logits = []
    for reason in ("refused", None):
        served(reason)
        fast = qcompile.optimize(
            copy.deepcopy(model), "i8/row/sym", include=["lm_head"], algorithm="rtn", progress=False
        )
        with torch.no_grad():
            logits.append(fast(token, use_cache=False).logits)
    (found,) = [r for r in qcompile.explain(fast).outcomes[0].passes if r.name == "fuse_linear"]
    assert len(found.rewrites) == rewrites and set(reasons(found)) >= misses
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
