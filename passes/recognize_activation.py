"""Activations written as formulas become the op that torch has for them.

    x * sigmoid(x), x / (1 + exp(-x))                                    ->    silu(x)
    0.5 * x * (1 + tanh(√(2/π) * (x + 0.044715 * x³)))                   ->    gelu(x, approximate="tanh")
    x * 0.5 * (1 + erf(x / √2))                                          ->    gelu(x)

Why: the passes that fuse an activation into a linear look for one op, and one op rounds once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompile.graph.alias import is_written
from qcompile.graph.match import Pattern, aten, is_call, same_type, value
from qcompile.graph.rewrite import Rewriter

# How far a constant may be from the exact one: formulas are written with 7 to 10 digits.
_DIGITS = 1e-4

# The places of the half in x/2 * (1 + t).
_HALVES: tuple[Callable[..., Any], ...] = (
    lambda x, t: 0.5 * x * (1 + t),
    lambda x, t: 0.5 * (x * (1 + t)),
    lambda x, t: x * (0.5 * (1 + t)),
)
_TANH: tuple[Callable[..., Any], ...] = (
    lambda x, k, cube: k * (x + cube * x.pow(3)),
    lambda x, k, cube: k * (x + cube * x * x * x),
    lambda x, k, cube: x * k * (1 + cube * x * x),
    lambda x, k, cube: k * x * (1 + cube * x.pow(2)),
)
_ERF: tuple[tuple[Callable[..., Any], float], ...] = (
    (lambda x, k: x / k, math.sqrt(2)),
    (lambda x, k: x * k, math.sqrt(0.5)),
)


@dataclass(frozen=True)
class Formula:
    """A pattern, what its constants must be, and the op with its keyword arguments."""

    pattern: Pattern
    constants: dict[str, float]
    target: Any
    options: dict[str, str]


@functools.cache
def _formulas() -> list[Formula]:
    silu = (lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x)))
    found = [Formula(Pattern(f, "x"), {}, aten.silu.default, {}) for f in silu]
    for half in _HALVES:
        for inner in _TANH:
            pattern = Pattern(lambda x, k, cube, h=half, i=inner: h(x, torch.tanh(i(x, k, cube))), "x", k=1, cube=1)
            constants = {"k": math.sqrt(2 / math.pi), "cube": 0.044715}
            found.append(Formula(pattern, constants, aten.gelu.default, {"approximate": "tanh"}))
        for inner, constant in _ERF:
            pattern = Pattern(lambda x, k, h=half, i=inner: h(x, torch.erf(i(x, k))), "x", k=1)
            found.append(Formula(pattern, {"k": constant}, aten.gelu.default, {}))
    return found


@dataclass(frozen=True)
class Recognized:
    node: Node
    x: Node
    formula: Formula


class RecognizeActivation:
    name = "recognize_activation"

    def __init__(self) -> None:
        self.formulas = _formulas()

    def match(self, node: Node) -> Recognized | None:
        if not is_call(node, aten.mul.Tensor, aten.div.Tensor):
            return None
        for formula in self.formulas:
            found = formula.pattern.match(node)
            if (
                found
                and not is_written(found.bound["x"])
                and all(math.isclose(found.bound[k], v, rel_tol=_DIGITS) for k, v in formula.constants.items())
            ):
                return Recognized(node, found.bound["x"], formula)
        return None

    def rewrite(self, g: Rewriter, m: Recognized) -> None:
        with g.before(m.node):
            x = m.x if same_type(m.x, m.node) else g.call(aten.to.dtype, m.x, value(m.node).dtype)
            g.replace(m.node, g.call(m.formula.target, x, **m.formula.options))
