"""A decoding step's rope, writing of the cache, and attention over it."""

from __future__ import annotations

from torch import Tensor

from qcompile.ops.attention import attention
from qcompile.ops.registry import op_with_fake
from qcompile.ops.rope import rope_into_cache


def _empty(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], values.shape[3])


@op_with_fake(_empty, writes=("keys", "values"))
def attention_into_cache(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """attention(rope_into_cache(query, key, value, …), keys, values, mask), see these two."""
    turned = rope_into_cache.meaning(query, key, value, cos, sin, keys, values, positions)
    return attention.meaning(turned, keys, values, mask, False, scale, softcap).contiguous()
