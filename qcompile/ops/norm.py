"""Norms over the last dimension, with the residual add before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.ops.precision import wide
from qcompile.ops.registry import op_with_fake


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _dense(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@op_with_fake(_like)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * (weight + weight_offset), x (…, n), weight (n,) or None for one.

    Computed in float32, rounded once. weight_offset is 1 for Gemma, else 0. (Zhang and Sennrich 2019.)
    """
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (wide(weight) + weight_offset)
    return y.to(x.dtype)


@op_with_fake(lambda x, residual, *_: (_like(total := x + residual), total))
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to the dtype of x."""
    total = x + residual
    return rms_norm.meaning(total, weight, eps, weight_offset), total


@op_with_fake(_dense)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, x (…, n). (Ba et al. 2016.)"""
    y = wide(x)
    weight = None if weight is None else weight.to(y.dtype)
    bias = None if bias is None else bias.to(y.dtype)
    return F.layer_norm(y, x.shape[-1:], weight, bias, eps).to(x.dtype)


@op_with_fake(lambda x, residual, *_: (_dense(total := x + residual), total))
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual rounded to the dtype of x."""
    total = x + residual
    return layer_norm.meaning(total, weight, bias, eps), total
