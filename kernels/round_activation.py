"""round_activation anywhere: its meaning, which Inductor fuses with what is around it."""

from __future__ import annotations

from torch import Tensor

from qcompile.ops.activation_rounding import round_activation


def refuses(x: Tensor, scale: Tensor | None, zero: Tensor | None, spec: str) -> str | None:
    """Nothing."""
    return None


@round_activation.implementation("inductor", refuses)
def round_activation_inductor(x: Tensor, scale: Tensor | None, zero: Tensor | None, spec: str) -> Tensor:
    return round_activation.meaning(x, scale, zero, spec)
