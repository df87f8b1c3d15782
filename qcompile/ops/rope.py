"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ops.precision import wide
from qcompile.ops.registry import op_with_fake


@op_with_fake(lambda x, cos, sin: torch.empty_like(x))
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin: x (…, n), cos and sin broadcast against it.

    rotate_half(x) = (-x2, x1) for the halves x1, x2 of the last dimension. Computed in float32, rounded once.
    (Su et al. 2021, in the half-split layout of GPT-NeoX and Llama.)
    """
    y = wide(x)
    half = x.shape[-1] // 2
    rotated = torch.cat([-y[..., half:], y[..., :half]], dim=-1)
    return (y * wide(cos) + rotated * wide(sin)).to(x.dtype)
