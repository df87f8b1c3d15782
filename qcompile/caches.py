"""Static key/value caches of full length, allocated before a graph sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qcompile import _torch, calls
from qcompile.errors import UnsupportedError

# Key/value heads, key width, value width of one layer.
Heads = tuple[int, int, int]


def heads_of(model: nn.Module, forward: Callable[..., Any]) -> list[Heads]:
    """What each layer keeps of a token, found by running the forward on fake tensors.

    Raises UnsupportedError if the model keeps no plain key/value cache, or another error says why that is not known.
    """
    first = next(model.parameters())
    tokens = torch.ones((1, 2), dtype=torch.long, device=first.device)
    try:
        cache = _torch.run_fake(lambda: forward(input_ids=tokens, use_cache=True)).past_key_values
    except Exception as error:  # somebody else's forward: whatever it raises is the reason
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedError(f"{type(model).__name__}.forward(input_ids, use_cache=True): {reason}") from error
    layers = getattr(cache, "layers", None) if calls.is_cache(cache) else None
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise UnsupportedError(f"{type(model).__name__} keeps a {type(cache).__name__} that is not keys and values")
    return [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in layers]


def static_cache(heads: list[Heads], length: int, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A cache of `length` tokens for every layer.

    Layers with a sliding window get the full length too: their mask is the window, and where they stand is a tensor,
    where transformers' own sliding layer counts in Python and would need a new graph every step.
    """
    from transformers.cache_utils import Cache, StaticLayer

    cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in heads])
    allocate(cache, heads, batch, dtype, device)
    return cache


def allocate(cache: Any, heads: list[Heads], batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate the layers of a static cache that are still empty, so that no graph has to."""
    for layer, (count, key_width, value_width) in zip(cache.layers, heads, strict=True):
        if not layer.is_initialized:
            key = torch.empty((batch, count, 0, key_width), dtype=dtype, device=device)
            layer.lazy_initialization(key, key.new_empty((batch, count, 0, value_width)))
