"""For few rows, what stands around a quantized linear becomes part of it.

    n = qcompile.rms_norm(x, w, eps, offset)
    y = qcompile.linear(n, W)                             ->    y = qcompile.fused_linear(x, w, eps, offset, W)

    y = qcompile.linear(x, W)
    z = qcompile.gated_act(halves of y, "silu")           ->    z = qcompile.fused_linear(x, W, "silu", gated)

    z = r + qcompile.linear(x, W)                         ->    z = qcompile.fused_linear(x, W, residual=r)

    r = round_activation(x, "i8/token/dynamic")
    y = qcompile.linear(r, W)                             ->    y = qcompile.fused_linear(x, W, "i8/token/dynamic")

Why: at a token of decoding each of these is a launch of its own that moves a few kilobytes.

Where no kernel for this type of device has signed up, or the rows are many or not known, nothing is looked at: there
the ops apart are faster. But for the second: a gate joins its linear wherever a kernel takes any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from qcompile.graph.alias import is_written_between
from qcompile.graph.match import Miss, aten, is_call, is_input, only_user, same_type, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.activation import gated_act
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.fused_linear import fused_linear, has_few_rows, has_known_rows
from qcompile.ops.linear import linear
from qcompile.ops.norm import layer_norm, rms_norm
from qcompile.ops.registry import MEANING, known


@dataclass(frozen=True)
class Fused:
    """`root` is fused_linear of these arguments."""

    root: Node
    arguments: dict[str, Any] = field(hash=False)


class FuseLinear:
    name = "fuse_linear"

    def match(self, node: Node) -> Fused | Miss | None:
        if is_call(node, linear.overload):
            return _after(node)
        if is_call(node, gated_act.overload):
            found = _gated(node)
            return found if isinstance(found, Fused) or has_few_rows(value(node)) else None
        return _summed(node) if is_call(node, aten.add.Tensor) else None

    def rewrite(self, g: Rewriter, m: Fused) -> None:
        *arguments, rounding = m.arguments.values()
        with g.before(m.root):
            g.replace(m.root, g.call(fused_linear.overload, *arguments, *([rounding] if rounding else [])))


def _after(node: Node) -> Fused | Miss | None:
    """With what comes before it: a norm, a rounding, or both."""
    x: Any = node.args[0]
    if (arguments := _arguments(node)) is None:
        return None
    if not is_call(x, round_activation.overload) or x.args[1:3] != (None, None):
        return _normed(node, x, arguments)
    arguments |= {"x": x.args[0], "rounding": x.args[3]}
    both = _normed(node, x.args[0], arguments)
    found = both if isinstance(both, Fused) else _taken(node, arguments)
    return found if isinstance(found, Fused) else None  # there are many ways of rounding, and most have no kernel


def _normed(node: Node, norm: Any, arguments: dict[str, Any]) -> Fused | Miss | None:
    if not is_call(norm, rms_norm.overload, layer_norm.overload):
        return None
    if is_call(norm, layer_norm.overload):
        return Miss("a layer norm stays apart", norm)
    if isinstance(weight := norm.args[1], Node) and not is_input(weight):
        return Miss(f"the norm's weight is computed, by {weight.name}", norm)  # kernels read it ahead of time
    roundings = [user for user in norm.users if is_call(user, round_activation.overload)]
    readers = {user for one in (norm, *roundings) for user in one.users}.difference(roundings)
    if other := next((user for user in sorted(readers) if not is_call(user, linear.overload)), None):
        return Miss(f"the norm is read by {other.name} too", norm)
    return _taken(node, arguments | dict(zip(("x", "norm_weight", "eps", "weight_offset"), norm.args)))


def _gated(node: Node) -> Fused | Miss | None:
    args: Any = node.args
    gate, up, activation = args
    if not (is_call(gate, aten.narrow.default) and is_call(up, aten.narrow.default)):
        return None
    wide = gate.args[0]
    arguments = _arguments(wide, few=has_known_rows(value(node)))
    if arguments is None or up.args[0] is not wide:
        return None
    if set(wide.users) != {gate, up} or any(only_user(half) is not node for half in (gate, up)):
        return Miss("the linear has another user", wide)
    half, last = known(value(node).shape[-1]), value(wide).dim() - 1
    halves = (last, 0, half), (last, half, half)
    if (gate.args[1:], up.args[1:]) != halves or half is None or known(value(wide).shape[-1]) != 2 * half:
        return Miss("the gate is not the first half of the linear", node)
    if arguments["activation"] is not None:
        return Miss("the linear has an activation", wide)
    return _taken(node, arguments | {"activation": activation, "gated": True})


def _summed(node: Node) -> Fused | Miss | None:
    misses = list[Miss]()
    args: Any = node.args
    for one, other in (args, args[::-1]):
        arguments = _arguments(one)
        if arguments is None or node.kwargs or not isinstance(other, Node):
            continue
        if not (same_type(one, node) and same_type(other, node)):
            misses.append(Miss("the sum is of another shape or dtype than the linear", node))
        elif only_user(one) is not node:
            misses.append(Miss("the linear has another user", one))
        elif arguments["residual"] is not None:
            misses.append(Miss("the linear has a residual already", node))
        else:
            found = _taken(node, arguments | {"residual": other})
            if isinstance(found, Fused):
                return found
            misses.append(found)
    return misses[0] if misses else None


def _arguments(node: Any, few: bool = True) -> dict[str, Any] | None:
    """Those of fused_linear by name, for a linear, over few rows if so asked, on a device where it has kernels; else
    None."""
    if is_call(node, linear.overload):
        given = dict(zip(("x", "data", "scale", "zero", "bias", "spec", "activation"), node.args))
    elif is_call(node, fused_linear.overload):
        given = dict(zip(_DEFAULTS, node.args))
    else:
        return None
    x = value(given["x"])
    if (few and not has_few_rows(x)) or not fused_linear.serves(x.device):
        return None
    return _DEFAULTS | given


_DEFAULTS: dict[str, Any] = {argument.name: None for argument in fused_linear.overload._schema.arguments} | {
    "weight_offset": 0.0,
    "gated": False,
}


def _taken(root: Node, arguments: dict[str, Any]) -> Fused | Miss:
    for moved in (arguments["x"], arguments["residual"]):
        if moved is not None and is_written_between(moved, root):
            return Miss(f"{moved.name} is written to in between", root)
    choice = fused_linear.choose(*map_arg(tuple(arguments.values()), value))
    if choice.name == MEANING:
        return Miss("; ".join(reason for _, reason in choice.refusals), root)
    return Fused(root, arguments)
