"""The activations that fused ops know by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.ops.precision import wide
from qcompile.ops.registry import op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@op
def gated_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, both (…, n), computed in float32 and rounded once; `activation` is a key of ACTIVATIONS."""
    return (ACTIVATIONS[activation](wide(gate)) * wide(up)).to(gate.dtype)
