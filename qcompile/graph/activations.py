"""Activations by name, whether one op or two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.match import Pattern, aten, is_call, named_argument

# What torch has an op for.
OPS = {
    "silu": aten.silu.default,
    "gelu": aten.gelu.default,
    "relu": aten.relu.default,
    "sigmoid": aten.sigmoid.default,
    "tanh": aten.tanh.default,
}
_NAMES = {target: name for name, target in OPS.items()}
_RELU2 = Pattern(lambda x: x.relu().pow(2), "x")
_QUICK_GELU = Pattern(lambda x, slope: x * (x * slope).sigmoid(), "x", slope=1.702)


@dataclass(frozen=True)
class Activation:
    """`node` is the activation `name` of `x`.

    `inner` are the nodes that compute it, `node` included; `leak` is one of them that something else reads, if any.
    """

    name: str
    node: Node
    x: Node
    inner: frozenset[Node]
    leak: Node | None = None


def activation_of(node: Any) -> Activation | None:
    """Which activation of what a node is, or None."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if (name := _NAMES.get(node.target)) is not None:  # type: ignore[arg-type]
        tanh = name == "gelu" and named_argument(node, "approximate") == "tanh"
        return Activation("gelu_tanh" if tanh else name, node, node.args[0], frozenset([node]))  # type: ignore[arg-type]
    if is_call(node, aten.pow.Tensor_Scalar) and (found := _RELU2.match(node)):
        return Activation("relu2", node, found.bound["x"], found.inner, found.leak())
    if is_call(node, aten.mul.Tensor) and (found := _QUICK_GELU.match(node)):
        if abs(found.bound["slope"] - 1.702) < 1e-3:
            return Activation("quick_gelu", node, found.bound["x"], found.inner, found.leak())
    return None
