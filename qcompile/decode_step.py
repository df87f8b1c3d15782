"""The model's calls in a text that grows by one token at a time, with arguments that keep their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ConfigError

# Arguments that are carried on from step to step; any others must be plain values.
_CARRIED = ("past_key_values", "attention_mask", "position_ids")
# A model that has one of its own takes steps unlike other models'.
_METHODS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_optimize_model_for_decode",
    "_prefill",
    "_sample",
)
NO_CACHE = "there is no key/value cache"


class Step:
    """The model's calls: `first` on the prompt, then on one more token of every sequence. Both give the logits of the
    next token, f32[batch, vocabulary].

    `room` is the length of a static cache: an attention mask for it has that length from the start, of ones for the
    tokens to come, which the model hides by itself. Other masks grow.
    """

    def __init__(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], room: int | None):
        self.model, self.config, self.given, self.room = model, config, dict(model_kwargs), room
        self.plain = {name: value for name, value in model_kwargs.items() if name not in _CARRIED}
        self.cache = model_kwargs["past_key_values"]
        position, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        self.position = None if position is None else position[..., -1:]
        self.mask = None if mask is None or (mask == 1).all() else mask
        if room is not None:
            self._lengthen(room)

    def first(self, input_ids: Tensor) -> Tensor:
        return self._logits(self.model._prefill(input_ids, self.config, self.given))

    def __call__(self, tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens[:, None], "past_key_values": self.cache}
        if self.position is not None:
            given["position_ids"] = self.position = self.position + 1
        if self.mask is not None:
            if self.room is None:
                self._lengthen(self.mask.shape[1] + 1)
            given["attention_mask"] = self.mask
        return self._logits(self.model(**given, **self.plain, return_dict=True))

    def _logits(self, outputs: Any) -> Tensor:
        self.cache = outputs.get("past_key_values", self.cache)
        # A copy: a view of the last row would keep the logits of a whole prompt.
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)

    def _lengthen(self, length: int) -> None:
        if self.mask is not None:
            ones = self.mask.new_ones(len(self.mask), length - self.mask.shape[1])
            self.mask = torch.cat([self.mask, ones], dim=1)

    def undo(self, count: int) -> None:
        """Forget the last tokens of a static cache. What they wrote will be written over and is hidden until then."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(count)


def why_not(model: Any, input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> str | None:
    """Why these steps need transformers' own loop; None if this one can take them."""
    from transformers import GenerationMixin

    kind = type(model)
    for name in _METHODS:
        if getattr(kind, name, None) is not getattr(GenerationMixin, name, name):
            return f"{kind.__name__} has a {name} of its own"
    if hasattr(kind, "create_masks_for_generate"):
        return f"{kind.__name__} makes masks of its own"
    if model_kwargs.get("past_key_values") is None or not model_kwargs.get("use_cache", True):
        return NO_CACHE
    if input_ids.device != model.device:
        return f"input_ids are on {input_ids.device}, the model is on {model.device}"
    for name, value in model_kwargs.items():
        if name not in _CARRIED and not isinstance(value, (type(None), bool, int, float, str)):
            return f"the argument {name}"
    return None


def room_of(cache: Any) -> int | None:
    """How many tokens a static cache holds; None for caches that grow, or have layers of several lengths."""
    from transformers.cache_utils import StaticLayer

    rooms = {layer.max_cache_len if type(layer) is StaticLayer else None for layer in getattr(cache, "layers", ())}
    return rooms.pop() if len(rooms) == 1 else None


def check_room(room: int | None, input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> None:
    if room is None or config.max_length is None:
        return
    given, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
    # A mask covers what the cache holds already, also where input_ids are only what comes after.
    before = getattr(config, "_mask_length", given) if mask is None else mask.shape[1]
    new = config.max_length - given
    if (needed := before + new - 1) > room:  # the last token is not put into the cache
        raise ConfigError(
            f"past_key_values has room for {room} tokens, a prompt of {before} and {new} new ones need {needed}; "
            "make it longer, or max_new_tokens smaller"
        )
