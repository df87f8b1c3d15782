"""What the algorithms share: a weight as a finite float32 matrix, its stored scales, its codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import WeightError
from qcompile.quant.element import Element
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Scales and float zero points are stored in the dtype of the weight.
STORED = {
    torch.float64: torch.float32,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
}


def matrix(weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """`weight` as a float32 (rows, columns) matrix, and the dtype for its scales.

    Raises WeightError if it holds NaN or inf, or no numbers at all; the caller knows its name.
    """
    if weight.dtype not in STORED:
        known = ", ".join(str(dtype) for dtype in STORED)
        raise WeightError(f"cannot quantize a weight of {weight.dtype}; known: {known}")
    if weight.device.type == "meta":
        raise WeightError(f"a weight of shape {tuple(weight.shape)} is on the meta device and has no values")
    if weight.numel() == 0 or weight.dim() == 0:
        raise WeightError(f"cannot quantize a weight of shape {tuple(weight.shape)}")
    values = weight.detach().to(torch.float32).reshape(-1, weight.shape[-1]).contiguous()
    low, high = values.aminmax()  # both are NaN if any value is
    if not torch.isfinite(high - low):
        raise WeightError(_why_not_finite(values))
    return values, STORED[weight.dtype]


def _why_not_finite(values: Tensor) -> str:
    counts = {"NaN": int(values.isnan().sum()), "inf": int(values.isinf().sum())}
    if found := " and ".join(f"{count} {kind}" for kind, count in counts.items() if count):
        return f"{found} among {values.numel()} values"
    return f"values from {values.min():.3g} to {values.max():.3g} are too far apart for float32"


def storable(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same grid, coarser where its numbers would overflow `dtype`: a zero point far from the codes is brought
    nearer and the scale grows as much, which keeps their product."""
    largest = torch.finfo(dtype).max
    over = (zero.abs() / largest).clamp(min=1)
    return (scale * over).clamp(max=largest), zero / over


def read(side: Tensor | QTensor) -> Tensor:
    """Stored scales or zero points in float32."""
    return side.dequantize() if isinstance(side, QTensor) else side.to(torch.float32)


def largest(element: Element) -> float:
    """The largest number that a float element holds."""
    return torch.finfo(element.dtype).max if element.dtype else max(element.table or ())


def encode(values: Tensor, spec: QSpec, scale: Tensor, zero: Tensor | int) -> Tensor:
    """The nearest codes of a matrix, uint8, for scales and zero points in float32 (a scale of 0 gives code = zero)."""

    def spread(side: Tensor) -> Tensor:
        return spec.granularity.spread(side, *values.shape)

    if spec.zero is Zero.SHIFT:
        assert isinstance(zero, Tensor)
        values, zero = values - spread(zero), 0
    steps = values / spread(torch.where(scale == 0, torch.inf, scale))
    if spec.element.is_float:
        return _encode_float(steps, spec.element)
    steps += spread(zero) if isinstance(zero, Tensor) else zero
    return steps.round_().clamp_(0, spec.element.levels - 1).to(torch.uint8)


def _encode_float(steps: Tensor, element: Element) -> Tensor:
    if element.dtype:
        top = largest(element)
        return steps.clamp_(-top, top).to(element.dtype).view(torch.uint8)
    assert element.table is not None
    table, order = torch.tensor(element.table, device=steps.device).sort()
    codes = torch.bucketize(steps, (table[1:] + table[:-1]) / 2)
    return order.to(torch.uint8).index_select(0, codes.reshape(-1)).reshape(codes.shape)
