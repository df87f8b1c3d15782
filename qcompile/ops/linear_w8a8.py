"""Linear maps of codes by codes of up to 8 bits (W8A8, W4A8)."""

from __future__ import annotations

from torch import Tensor

from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear import linear
from qcompile.ops.registry import op_with_fake


def _empty(x: Tensor, x_scale: Tensor | None, rounding: str, data: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


@op_with_fake(_empty)
def linear_w8a8(
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
    """act(x' @ W.T + bias), where x' is x rounded to the codes of `rounding`, an ActivationSpec by token or tensor,
    and W a weight whose codes can be multiplied by them as they are: integers of up to 8 bits by i8, fp8_e4m3 with a
    scale per row or for all by fp8_e4m3.

    `x_scale` is the static scale of x', or None; the others are those of `linear`.
    """
    rounded = round_activation.meaning(x, x_scale, None, rounding)
    return linear.meaning(rounded, data, scale, zero, bias, spec, activation)
