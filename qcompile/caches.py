"""Static key/value caches of full length, allocated before a graph sees them, and kept from text to text."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import _torch, calls
from qcompile.errors import UnsupportedError
from qcompile.layer_loop import NUMBER
from qcompile.stores import CACHE_SCALES

# Key/value heads, key width, value width of one layer.
Heads = tuple[int, int, int]


def heads_of(model: nn.Module, forward: Callable[..., Any]) -> list[Heads]:
    """What each layer keeps of a token, found by running the forward on fake tensors.

    Raises UnsupportedError if the model keeps no plain key/value cache, or another error says why that is not known.
    """
    first = next(model.parameters())
    tokens = torch.ones((1, 2), dtype=torch.long, device=first.device)
    try:
        outputs = _torch.run_fake(lambda: forward(input_ids=tokens, use_cache=True))
        cache = getattr(outputs, calls.cache_name(dir(outputs)))
    except Exception as error:  # somebody else's forward: whatever it raises is the reason
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedError(f"{type(model).__name__}.forward(input_ids, use_cache=True): {reason}") from error
    layers = getattr(cache, "layers", None) if calls.is_cache(cache) else None
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise UnsupportedError(f"{type(model).__name__} keeps a {type(cache).__name__} that is not keys and values")
    return [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in layers]


def static_cache(
    heads: list[Heads], length: int, batch: int, dtype: torch.dtype, device: torch.device,
    codes: torch.dtype | None = None, scales: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Any:  # fmt: skip
    """A cache of `length` tokens for every layer, of numbers or `codes`, by `scales` of each layer's keys and values
    where these are given (see quantized_layer).

    Layers with a sliding window get the full length too: their mask is the window, and where they stand is a tensor,
    where transformers' own sliding layer counts in Python and would need a new graph every step.
    """
    from transformers.cache_utils import Cache, StaticLayer

    from qcompile.quantized_layer import QuantizedStaticLayer

    fixed = scales or [None] * len(heads)
    layers: list[Any] = [QuantizedStaticLayer(length, codes, each) if codes else StaticLayer(length) for each in fixed]
    cache = Cache(layers=layers)
    allocate(cache, heads, batch, dtype, device)
    return cache


def allocate(cache: Any, heads: list[Heads], batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate the layers of a static cache that are still empty, so that no graph has to."""
    for layer, (count, key_width, value_width) in zip(cache.layers, heads, strict=True):
        if not layer.is_initialized:
            key = torch.empty((batch, count, 0, key_width), dtype=dtype, device=device)
            layer.lazy_initialization(key, key.new_empty((batch, count, 0, value_width)))


@dataclass(frozen=True)
class CacheCodes:
    """What generate() caches keys and values as: codes of `element`, one of CODES in ops/row_codes.py, by these scales
    of each layer's keys and values, or with one for each token and head."""

    element: str
    scales: tuple[tuple[Tensor, Tensor], ...] | None = None

    def __str__(self) -> str:
        return f"{self.element}, {'a scale for each token and head' if self.scales is None else 'static scales'}"


def cache_codes(model: nn.Module, kv_cache: str | None) -> CacheCodes | None:
    """What `kv_cache` of the Config says or, where it is None, the checkpoint. None: the numbers as they are."""
    if kv_cache is not None:
        return None if kv_cache == "none" else CacheCodes(kv_cache)
    owners: list[Any] = [module for module in model.modules() if CACHE_SCALES in module._modules]
    if not owners:
        return None
    found = {getattr(module, NUMBER, None): getattr(module, CACHE_SCALES) for module in owners}
    elements = {scales.element for scales in found.values()}
    if len(elements) > 1 or found.keys() != set(range(len(owners))):
        why = f"the checkpoint's scales are of caches {list(found)}, as codes of {', '.join(sorted(elements))}"
        warnings.warn(f"qcompile: keys and values are cached as they are: {why}", stacklevel=4)
        return None
    scales = [found[number] for number in range(len(owners))]
    return CacheCodes(elements.pop(), tuple((each.key, each.value) for each in scales))


class KeptCaches:
    """Static caches that wait for the next text, those that were used last.

    A cache that is taken is nobody else's until it is given back. One that is not is the taker's for good.
    """

    def __init__(self) -> None:
        # Each with the stream of its last text: what that still does is not waited for by others.
        self.kept: list[tuple[Any, Any]] = []
        self.lock = threading.Lock()

    def take(
        self, heads: list[Heads], length: int, batch: int, dtype: torch.dtype, device: torch.device,
        codes: torch.dtype | None = None, scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Any:  # fmt: skip
        """An empty cache of `length` tokens or, on a GPU, of up to twice as many: there it saves recording the steps
        anew, and attention reads no more than is filled."""
        form, stream = (heads, batch, dtype, device, codes, bool(scales)), _stream(device)
        longest = length * (2 if device.type == "cuda" else 1)
        with self.lock:
            free = [kept for of, kept in self.kept if of == stream and _form(kept) == form]
            cache = min((c for c in free if length <= _length(c) <= longest), key=_length, default=None)
            self.kept = [kept for kept in self.kept if kept[1] is not cache]
        if cache is not None:
            cache.reset()
            for layer, given in zip(cache.layers, scales or ()):
                layer.fix(given)
            return cache
        try:
            return _lasting(heads, length, batch, dtype, device, codes, scales)
        except torch.OutOfMemoryError:
            if not self.kept:
                raise
            self.release()
            return _lasting(heads, length, batch, dtype, device, codes, scales)

    def give(self, cache: Any, most: int) -> None:
        """Keep a cache, and of the others so many that there are at `most` this many."""
        with self.lock:
            self.kept = [(_stream(cache.layers[0].keys.device), cache), *self.kept][:most]

    def release(self) -> None:
        """Give up the memory of the kept caches."""
        with self.lock:
            self.kept = []
        gc.collect()  # the first calls of a kind leave cycles that refer to their cache


def _length(cache: Any) -> int:
    return cache.layers[0].max_cache_len


def _form(cache: Any) -> tuple[Any, ...]:
    heads = [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    first = cache.layers[0]
    return (
        heads,
        len(first.keys),
        getattr(first, "dtype", first.keys.dtype),  # where keys are codes, of what these stand for
        first.device,
        getattr(first, "codes", None),
        getattr(first, "fixed", False),
    )


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _lasting(*form: Any) -> Any:
    with torch.inference_mode(False):  # else no call outside of that mode could write to it
        return static_cache(*form)
