"""fused_linear of a few rows on the CPU: one call of C++ for a linear and what stands around it (cpu/fused.h)."""

from __future__ import annotations

import math

from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.ops.activation import ACTIVATIONS, gated_act
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.norm import rms_norm
from qcompile.ops.registry import known, opaque

HANDLED = ("silu", "quick_gelu", "gelu_tanh")
ROUNDING = "i8/token/dynamic"  # in linear.h, too


def refuses(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run the call, or None."""
    if reason := linear_cpu.refuses(x, data, scale, zero, bias, spec, None):
        return reason
    if activation is not None and activation not in HANDLED:
        return f"handles {', '.join(HANDLED)}, not {activation}"
    if rounding not in (None, ROUNDING):
        return f"rounds x as {ROUNDING}, not as {rounding}"
    if norm_weight is not None and norm_weight.dtype not in packed.FLOATS:
        return f"the norm's weight is {norm_weight.dtype}; float32, bfloat16 and float16 are handled"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {residual.dtype}, x {x.dtype}"
    if (columns := known(x.shape[-1])) is None:
        return f"the number of inputs is not known, but {x.shape[-1]}"
    most = linear_cpu.most_few_rows(x.dtype, packed.Reader.of(spec, columns))
    if math.prod(known(size) or most + 1 for size in x.shape[:-1]) > most:
        return f"handles up to {most} rows of {x.dtype}, not {tuple(x.shape[:-1])}"
    return None if linear_cpu.without_python() else "the C++ that torch calls does not compile here"


@opaque(fused_linear.fake)
def fused_anyhow(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    if eps is not None:
        x = rms_norm.meaning(x, norm_weight, eps, weight_offset)
    if rounding is not None:
        x = round_activation.meaning(x, None, None, rounding)
    y = linear_cpu.linear_anyhow(x, data, scale, zero, bias, spec)
    if activation is not None:
        y = gated_act.meaning(*y.chunk(2, -1), activation) if gated else ACTIVATIONS[activation](y)
    return y if residual is None else residual + y


@opaque(fused_linear.fake)
def fused_packed(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    # linear_op.cpp takes this one's place, and gives back what is not for it.
    return fused_anyhow(
        x, norm_weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated, rounding
    )


@fused_linear.implementation("cpu", refuses, device="cpu")
def fused_linear_cpu(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    return fused_packed(
        x, norm_weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated, rounding
    )
