"""Linear maps with a quantized weight, and the weight itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.registry import op, op_with_fake
from qcompile.quant import tensor
from qcompile.quant.spec import QSpec


def _empty_weight(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return data.new_empty(shape, dtype=dtype)


@op_with_fake(_empty_weight)
def dequantize(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The float weight of logical `shape` behind packed codes: (code - zero) * scale, see QTensor."""
    return tensor.dequantize(data, scale, zero, QSpec.parse(spec), tuple(shape), dtype)


@op
def reorder(weight: Tensor, order: Tensor) -> Tensor:
    """Stored columns in their places: column order[j] of the result is column j of `weight`, see QTensor.order."""
    return tensor.reorder(weight, order)


def _empty_linear(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


@op_with_fake(_empty_linear)
def linear(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    """act(x @ dequantize(W).T + bias): x (…, in_features) → (…, out_features), W packed (out_features, in_features).

    `activation` is a key of ACTIVATIONS or None. The weight is rounded to the dtype of x, sums are at least float32.
    """
    shape = (data.shape[0], x.shape[-1])
    weight = tensor.dequantize(data, scale, zero, QSpec.parse(spec), shape, x.dtype)
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


@op
def embedding(
    indices: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a quantized table: indices (…) → (…, columns). Only the rows asked for are unpacked.

    Rows carry their own scales: granularity row, or groups that divide the columns.
    """
    flat = indices.reshape(-1)
    parts = [None if part is None else part.index_select(0, flat) for part in (data, scale, zero)]
    assert parts[0] is not None and parts[1] is not None
    rows = tensor.dequantize(parts[0], parts[1], parts[2], QSpec.parse(spec), (flat.shape[0], columns), dtype)
    return rows.reshape(*indices.shape, columns)
