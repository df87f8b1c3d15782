"""Activations join what they stand next to: a gate's product, or the linear before them.

    mul(act(gate), up)                              ->    qcompile.gated_act(gate, up, "act")
    act(qcompile.linear(x, …, activation=None))     ->    qcompile.linear(x, …, activation="act")

Why: the widest values of a model are written and read once less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.activations import Activation, activation_of
from qcompile.graph.alias import is_written
from qcompile.graph.dump import type_text
from qcompile.graph.match import Miss, aten, is_call, is_tensor, only_user, same_shape, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.activation import gated_act
from qcompile.ops.linear import linear

# Activations that ACTIVATIONS does not know and that stand where ours do.
_UNKNOWN = (
    aten.elu.default,
    aten.celu.default,
    aten.selu.default,
    aten.leaky_relu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.relu6.default,
    aten.log_sigmoid.default,
    aten.prelu.default,
)
# Common apart from gates, too: these need linears on both sides.
_GENERAL = ("sigmoid", "tanh")


@dataclass(frozen=True)
class Gate:
    product: Node
    gate: Node
    up: Node
    activation: str


@dataclass(frozen=True)
class Activated:
    linear: Node
    activation: Activation


class FuseMlp:
    name = "fuse_mlp"

    def match(self, node: Node) -> Gate | Activated | Miss | None:
        if is_call(node, *_UNKNOWN):
            return _unknown(node)
        if (activation := activation_of(node)) is not None:
            return _activated(activation)
        return _gate(node) if is_call(node, aten.mul.Tensor) else None

    def rewrite(self, g: Rewriter, m: Gate | Activated) -> None:
        if isinstance(m, Gate):
            with g.before(m.product):
                g.replace(m.product, g.call(gated_act.overload, m.gate, m.up, m.activation))
            return
        with g.before(m.activation.node):
            g.replace(m.activation.node, g.call(linear.overload, *m.linear.args[:6], m.activation.name))


def _gate(product: Node) -> Gate | Miss | None:
    misses = []
    for one, up in (product.args, product.args[::-1]):
        activation = activation_of(one)
        if activation is None or not is_tensor(up):
            continue
        found = _gate_of(product, activation, up)
        if isinstance(found, Gate):
            return found
        misses.append(found)
    return next((miss for miss in misses if miss), None)


def _gate_of(product: Node, activation: Activation, up: Any) -> Gate | Miss | None:
    gate = activation.x
    a, b, c = value(gate), value(up), value(product)
    if activation.name in _GENERAL and not (_is_from_linear(gate) and _is_from_linear(up)):
        return None
    if not (same_shape(a.shape, b.shape) and a.dtype == b.dtype == c.dtype):
        symbols: dict[str, str] = {}
        return Miss(f"the gate is {type_text(a, symbols)}, its factor {type_text(b, symbols)}", product)
    if activation.leak is not None or only_user(activation.node) is not product:
        return Miss("the activation has another user", activation.node)
    if is_written(gate):
        return Miss("the gate is written in place", product)
    return Gate(product, gate, up, activation.name)


def _activated(activation: Activation) -> Activated | Miss | None:
    node, before = activation.node, activation.x
    if not is_call(before, linear.overload) or before.args[6] is not None:
        return None
    user: Any = only_user(node)
    outer = activation_of(user)
    if outer is not None and outer.x is before:
        return None  # relu in relu(x)²
    if is_call(user, aten.mul.Tensor) and isinstance(_gate(user), Gate):
        return None
    if value(before).dtype != value(node).dtype:
        return Miss("the activation is computed in another dtype", node)
    if not set(before.users) <= activation.inner:
        return Miss("the linear has another user", node)
    if activation.leak is not None:
        return Miss("the activation has another user", node)
    return Activated(before, activation)


def _unknown(node: Node) -> Miss | None:
    after = [reader for user in node.users for reader in (user.users if is_call(user, aten.mul.Tensor) else [user])]
    if _is_from_linear(node.args[0]) and any(is_call(reader, *_LINEARS) for reader in after):
        return Miss(f"activation {str(node.target).removesuffix('.default')} has no fused form", node)
    return None


_LINEARS = (linear.overload, aten.linear.default)


def _is_from_linear(node: Any) -> bool:
    """Whether this is the result of a linear, or a view of it."""
    while is_call(node, aten.narrow.default, aten.reshape.default, aten.transpose.int):
        node = node.args[0]
    return is_call(node, *_LINEARS)
