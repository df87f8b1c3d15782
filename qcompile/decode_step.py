"""The model's calls in a text that grows by one token at a time, with arguments that keep their shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.again import Bound
from qcompile.calls import CACHE_NAMES, cache_name
from qcompile.decode_state import State
from qcompile.errors import ConfigError
from qcompile.kernels._follower_cpu import Follower
from qcompile.kernels.lengths_cpu import bind_lengths
from qcompile.program import BoundProgram
from qcompile.prompt import length_of, lengthened, refuses, with_ones
from qcompile.runtime import runner_of

# Arguments that are carried on from step to step; any others must be plain values.
_CARRIED = (*CACHE_NAMES, "attention_mask", "position_ids")
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
    """The model's calls: `first` on the prompt, then on one more token of every sequence, which lies in a state. Both
    give the logits of the next token, f32[batch, vocabulary]; from where `as_is` is set as the model has them, also
    [batch, 1, vocabulary].

    `room` is the length of a static cache: an attention mask for it has that length from the start, of ones for the
    tokens to come, which the model hides by itself. Other masks grow.
    """

    def __init__(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], room: int | None):
        self.model, self.config, self.given, self.room = model, config, dict(model_kwargs), room
        self.plain = {name: value for name, value in model_kwargs.items() if name not in _CARRIED}
        self.cache_name = cache_name(model_kwargs)
        self.cache = model_kwargs[self.cache_name]
        # Asked before the prompt's call is launched, behind which the answer would come.
        mask = model_kwargs.get("attention_mask")
        self.hides = mask is not None and not bool((mask == 1).all())
        self.bound: Bound | None = None
        self.as_is = False

    def first(self, input_ids: Tensor, fresh: bool = False) -> Tensor:
        """The call on the prompt. Where the cache is `fresh`, a static one that is still empty, prompts of several
        lengths are calls of one."""
        given, more = self.given, 0
        if fresh and self.room is not None and refuses(self.model, self.config, input_ids, given) is None:
            length = length_of(self.model, input_ids, self.room)
            more = length - input_ids.shape[1]
            input_ids, given = lengthened(input_ids, given, length)
        logits = self._logits(self.model._prefill(input_ids, self.config, given))
        if more:
            self.undo(more)
        return logits

    def state(self, input_ids: Tensor) -> State:
        """Where the calls after the first find their token, its positions and the mask."""
        position = self.given.get("position_ids")
        mask = self.given["attention_mask"] if self.hides else None
        if self.room is not None and mask is not None:
            mask = with_ones(mask, self.room)
        limit = self.config.max_length or 0
        room = max(limit, self.room + 1) if self.room is not None else limit
        self.now = State(input_ids, room, None if position is None else position[..., -1:], mask)
        return self.now

    def bind(self) -> Bound | None:
        """From now on the calls are those of one program on these tensors, without a search for it at each of them.

        None where the model is more than its forward, or a call like these runs uncompiled.
        """
        runner, hooks = runner_of(self.model), (self.model._forward_hooks, self.model._forward_pre_hooks)
        if self.room is not None and runner is not None and not any(hooks):
            bound = runner.bind(self._arguments())
            if not isinstance(bound, str):
                build = bound[0].build.only("logits", self.cache_name)
                self.bound = replace(bound[0], build=build), *bound[1:]
                self.call = self.bound[0].calls(*self.bound[1:])
        return self.bound

    def let_follow(self, follower: Follower) -> Callable[[], Any] | None:
        """From now on the only call: it does this behind itself, on its logits, which are as the model has them, and
        gives nothing. None where that cannot be."""
        call, position = self.call if self.bound is not None else None, self.now.position
        if not isinstance(call, BoundProgram):
            return None
        grow = None if position is None else bind_lengths(list(position.unbind()), 1)
        if (position is not None and grow is None) or not call.let_follow("logits", follower):
            return None
        if grow is not None:
            grow()  # for the next call
            call.let_follow("logits", grow)
        return call.run

    def __call__(self) -> Tensor:
        now = self.now
        if now.position is not None:
            now.position.add_(1)
        if now.mask is not None and self.room is None:
            now.mask = with_ones(now.mask, now.mask.shape[1] + 1)
        if self.bound is None:
            return self._logits(self.model(**self._arguments()))
        return self._logits(self.call())

    def _arguments(self) -> dict[str, Any]:
        given = {"input_ids": self.now.token, self.cache_name: self.cache}
        if self.now.position is not None:
            given["position_ids"] = self.now.position
        if self.now.mask is not None:
            given["attention_mask"] = self.now.mask
        return {**given, **self.plain, "return_dict": True}

    def _logits(self, outputs: Any) -> Tensor:
        self.cache = outputs.get(self.cache_name, self.cache)
        logits = outputs["logits"]
        if self.as_is and logits.shape[1] == 1:
            return logits
        logits = logits.select(1, -1)
        # A copy: a view of the last row would keep the logits of a whole prompt.
        return logits if self.as_is else logits.to(copy=True, dtype=torch.float32)

    def undo(self, count: int) -> None:
        """Forget the last tokens of a static cache. What they wrote will be written over and is hidden until then."""
        torch.ops.aten._foreach_sub_([layer.cumulative_length for layer in self.cache.layers], count)


def why_not(model: Any, input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> str | None:
    """Why these steps need transformers' own loop; None if this one can take them."""
    from transformers import GenerationMixin

    kind = type(model)
    for name in _METHODS:
        if getattr(kind, name, None) is not getattr(GenerationMixin, name, name):
            return f"{kind.__name__} has a {name} of its own"
    if hasattr(kind, "create_masks_for_generate"):
        return f"{kind.__name__} makes masks of its own"
    if model_kwargs.get(cache_name(model_kwargs)) is None or not model_kwargs.get("use_cache", True):
        return NO_CACHE
    if input_ids.device != model.device:
        return f"input_ids are on {input_ids.device}, the model is on {model.device}"
    for name, value in model_kwargs.items():
        if name not in _CARRIED and not isinstance(value, (type(None), bool, int, float, str)):
            return f"the argument {name}"
    return None


def room_of(cache: Any) -> int | None:
    """How many tokens a static cache holds; None for caches that grow, or have layers of several lengths."""
    from qcompile.quantized_layer import STATIC_LAYERS

    rooms = {layer.max_cache_len if type(layer) in STATIC_LAYERS else None for layer in getattr(cache, "layers", ())}
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
            f"{cache_name(model_kwargs)} has room for {room} tokens, a prompt of {before} and {new} new ones need "
            f"{needed}; make it longer, or max_new_tokens smaller"
        )
