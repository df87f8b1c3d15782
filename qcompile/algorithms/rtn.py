"""Round to nearest: the grid of each group spans its smallest and largest weight. Takes every spec of a weight.

Codes are rounded against the scales and zero points as they are stored, so a bf16 or quantized scale costs no accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.algorithms.weight import encode, largest, matrix, read, storable
from qcompile.errors import SpecError
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor


def refuses(spec: QSpec) -> str | None:
    """Why a weight cannot be rounded to this spec, or None."""
    tag, rest = spec.element.tag, f"{spec.granularity}/sym"
    if tag == "e8m0":
        return "e8m0 holds powers of two, for scales"
    if tag[0] == "u" and spec.zero is Zero.NONE:
        return f"{tag} has no symmetric form; write {f'i{spec.element.bits}' if tag != 'u1' else 'ternary'}/{rest}"
    return None


@torch.inference_mode(mode=False)
def quantize(weight: Tensor, spec: QSpec) -> QTensor:
    """`weight` (…, columns) rounded to the nearest codes of `spec`; SpecError if it is no spec of a weight."""
    if reason := refuses(spec):
        raise SpecError(reason)
    values, dtype = matrix(weight)
    return _quantize(values, spec, dtype, tuple(weight.shape))


def _quantize(values: Tensor, spec: QSpec, dtype: torch.dtype, shape: tuple[int, ...]) -> QTensor:
    groups = spec.scale_shape(*values.shape)
    view, axis = spec.granularity.fold(values)
    low, high = view.amin(axis).reshape(groups), view.amax(axis).reshape(groups)
    top = spec.element.levels - 1
    if spec.element.is_float:
        scale = torch.maximum(high, -low) / largest(spec.element)
    elif spec.zero is Zero.NONE and not spec.offset:
        scale = high / top  # scales of scales, which are positive
    elif spec.zero is Zero.NONE:
        scale = torch.maximum(high / (top - spec.offset), -low / spec.offset).clamp(min=0)
    elif spec.zero is Zero.INT:
        low, high = low.clamp(max=0), high.clamp(min=0)  # the zero point is a code, so the grid includes 0
        scale = (high - low) / top
    else:
        # A group of one value c gets the grid 0, ±|c|, …, which holds c exactly in any dtype.
        scale = torch.where(high == low, low.abs(), (high - low) / top)
    scale = _without_zeros(scale, dtype)
    if spec.zero is Zero.FLOAT:
        scale, _ = storable(scale, low / scale, dtype)
    stored_scale = _side(scale, spec.scale_spec, dtype)
    scale, stored_zero, zero = read(stored_scale), None, spec.offset
    if spec.zero is not Zero.NONE:
        zero = low if spec.zero is Zero.SHIFT else torch.where(scale == 0, 0, -low / scale)
        if spec.zero is Zero.INT:
            stored_zero = zero.round().clamp(0, top).to(torch.uint8)
        elif spec.zero is Zero.SHIFT:
            stored_zero = _side(zero, spec.zero_spec, dtype)
        else:
            stored_zero = _side(storable(scale, zero, dtype)[1], spec.zero_spec, dtype)
        zero = read(stored_zero)
    return QTensor.from_codes(spec, encode(values, spec, scale, zero).reshape(shape), stored_scale, stored_zero)


def _without_zeros(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of `dtype`'s range. Any scale serves a group of zeros; the largest one does not widen a nested grid."""
    scale = scale.clamp(max=torch.finfo(dtype).max)
    dead = scale.to(dtype) == 0
    top = scale.max()
    return torch.where(dead, torch.where(top.to(dtype) == 0, 1, top), scale)


def _side(values: Tensor, spec: QSpec | None, dtype: torch.dtype) -> Tensor | QTensor:
    return _quantize(values, spec, dtype, tuple(values.shape)) if spec else values.to(dtype)
