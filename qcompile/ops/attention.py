"""Attention with grouped key/value heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qcompile.ops.registry import op


@op
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value, with query heads in equal groups over the key/value heads.

    query (batch, heads, q_len, d), key and value (batch, kv_heads, kv_len, d), mask boolean (True: attend) or additive,
    broadcast against (batch, heads, q_len, kv_len). Keys and values are never repeated in memory.
    (Vaswani et al. 2017, Ainslie et al. 2023.)
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
