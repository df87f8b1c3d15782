"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ops.precision import wide
from qcompile.ops.registry import op_with_fake
from qcompile.ops.row_codes import quantize_rows, quantize_rows_by


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


def _turned(query: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(query)


@op_with_fake(_turned, writes=("keys", "values", "key_scales", "value_scales"))
def rope_into_cache(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None, fixed: bool = False,
) -> Tensor:  # fmt: skip
    """rope(query); rope(key) and value are written to keys and values, at these positions of dimension 2.

    query (batch, heads, length, n), key and value (batch, kv_heads, length, n or another width), keys and values
    (batch, kv_heads, capacity, …), positions (length,) integers below the capacity, no two the same. With scales
    (batch, kv_heads, capacity), keys and values are codes, see row_codes: by the scales that are there where these are
    `fixed`, else with new ones.
    """
    for new, rows, scales in ((rope.meaning(key, cos, sin), keys, key_scales), (value, values, value_scales)):
        if scales is not None and fixed:
            new = quantize_rows_by.meaning(new, scales.index_select(2, positions), rows.dtype)
        elif scales is not None:
            new, scale = quantize_rows.meaning(new, rows.dtype)
            scales.index_copy_(2, positions, scale)
        rows.index_copy_(2, positions, new)
    return rope.meaning(query, cos, sin)
