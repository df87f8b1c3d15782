"""Attention with grouped key/value heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.ops.precision import wide
from qcompile.ops.registry import op
from qcompile.ops.row_codes import dequantize_rows


@op
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(cap(query @ key.T * scale) + mask) @ value, with query heads in equal groups over the key/value heads.

    query (batch, heads, q_len, d), key and value (batch, kv_heads, kv_len, d), mask boolean (True: attend) or additive,
    broadcast against (batch, heads, q_len, kv_len). Keys and values are never repeated in memory. cap(x) is x, or
    softcap * tanh(x / softcap) with a positive softcap. (Vaswani et al. 2017, Ainslie et al. 2023, Gemma Team 2024.)

    With scales (batch, kv_heads, kv_len), key and value are codes, see row_codes.
    """
    if key_scale is not None and value_scale is not None:
        key = dequantize_rows.meaning(key, key_scale, query.dtype)
        value = dequantize_rows.meaning(value, value_scale, query.dtype)
    groups = int(query.shape[1] // key.shape[1])
    if softcap is not None:
        return _capped(query, key, value, mask, is_causal, groups, scale, softcap)
    if groups > 1 and query.shape[2] == 1 and not is_causal:
        return _few_rows(query, key, value, mask, groups, scale)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
    )


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, groups: int, scale: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    """With the logits in memory: torch's attention takes no function of them.

    Its two products are rounded to the dtype of their operands, as in models that spell them; all between is float32.

    NOTE: 8 heads over 4, 512 rows, 1024 keys of 256 columns, 2 CPU cores, bf16: 132 ms, with products in float32 208.
    """
    batch, heads, length, width = query.shape
    rows = (batch, heads // groups, groups * length)
    logits = wide(query.reshape(*rows, width) @ key.transpose(2, 3)) * (scale / softcap)
    logits = torch.tanh(logits).reshape(batch, heads, length, key.shape[2]) * softcap
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    weights = torch.softmax(logits, -1)
    # Rows that attend to nothing are zeros, as in torch's attention.
    weights = weights.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    y = weights.to(value.dtype).reshape(*rows, key.shape[2]) @ value
    return y.reshape(batch, heads, length, value.shape[3])


def _few_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, groups: int, scale: float) -> Tensor:
    """One query row: the heads of a group are the rows of one head.

    NOTE: 9 heads over 3, 1024 keys of 64 columns, 2 CPU cores, bf16: 102 µs, with enable_gqa 675; fp32 alike.
    """
    batch, heads, _, width = query.shape
    if mask is not None and mask.dim() >= 3 and mask.shape[-3] != 1:
        mask = mask.reshape(*mask.shape[:-3], heads // groups, groups, mask.shape[-1])
    rows = query.reshape(batch, heads // groups, groups, width)
    return F.scaled_dot_product_attention(rows, key, value, mask, scale=scale).reshape(batch, heads, 1, value.shape[-1])
