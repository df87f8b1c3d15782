"""linear_w8a8 where nothing multiplies the codes: x rounded, and the best kernel of linear."""

from __future__ import annotations

from torch import Tensor

from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear import linear
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import MEANING


def refuses(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> str | None:
    """Why linear has no kernel for this weight, or None."""
    choice = linear.choose(x, data, scale, zero, bias, spec, activation)
    if choice.name != MEANING:
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in choice.refusals)


@linear_w8a8.implementation("rounded", refuses)
def linear_rounded(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> Tensor:
    choice = linear.choose(x, data, scale, zero, bias, spec, activation)
    rounded = round_activation.meaning(x, x_scale, None, rounding)
    return choice.function(rounded, data, scale, zero, bias, spec, activation)
