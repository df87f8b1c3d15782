"""Activations rounded as a checkpoint asks for."""

from __future__ import annotations

from torch import Tensor

from qcompile.ops.registry import op_with_fake
from qcompile.quant import activation
from qcompile.quant.activation import ActivationSpec


@op_with_fake(lambda x, scale, zero, spec: x.new_empty(x.shape))
def round_activation(x: Tensor, scale: Tensor | None, zero: Tensor | None, spec: str) -> Tensor:
    """x (…, n) rounded to what the codes of `spec`, an ActivationSpec, stand for; static scale and zero are scalars."""
    return activation.round_activation(x, scale, zero, ActivationSpec.parse(spec))
