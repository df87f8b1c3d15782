"""gated_act and the activations that it knows by name."""

import math

import pytest
import torch

from qcompile.ops.activation import ACTIVATIONS, gated_act

INPUTS = {
    "rows": lambda: torch.randn(5, 24),
    "bf16": lambda: torch.randn(2, 3, 64).bfloat16(),
    "f16": lambda: torch.randn(3, 48).half(),
    "f64": lambda: torch.randn(2, 3, 7, dtype=torch.float64),
    "no rows": lambda: torch.randn(0, 16),
    "transposed": lambda: torch.randn(2, 5, 4, 16).transpose(1, 2),
    "half of a wider tensor": lambda: torch.randn(4, 32)[:, 16:],
    "large": lambda: torch.randn(3, 16) * 60,
}

EXACT = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def test_every_activation_is_tested():
    assert EXACT.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("activation", EXACT)
def test_gated_act(agrees, make, activation):
    gate, up = make(), make()
    exact = gate.double().clone().apply_(EXACT[activation]) * up.double()
    agrees(gated_act, gate, up, activation, exact=exact, opcheck=activation == "silu")


def test_symbolic_sizes(symbolic):
    small, large = torch.randn(2, 3, 8), torch.randn(2, 9, 8)
    symbolic(lambda gate, up: gated_act(gate, up, "silu"), tuple(small), tuple(large))
