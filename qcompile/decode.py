"""The loop of `model.generate()` for an optimized model: greedy decoding and sampling, one token after the other.

transformers prepares everything, as for a loop of its own (this one is its `custom_generate`), and its objects process
the scores and say when to stop. What differs is what surrounds the model's call: its arguments keep their shapes from
step to step, and on a GPU the next step is launched before anybody knows how the last one ended.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ConfigError

# Arguments that this loop carries on from step to step; any others must be plain values.
_CARRIED = ("past_key_values", "attention_mask", "position_ids")
# A model that has one of its own takes steps unlike other models'.
_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill", "_sample")
_NO_CACHE = "there is no key/value cache"


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What transformers' `_sample` returns for the same arguments, token by token.

    Where `model` takes steps unlike other models', `_sample` itself runs, and a warning says why. Raises ConfigError,
    before anything runs, if the tokens do not fit the static cache.
    """
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    if (reason := _why_not(model, input_ids, model_kwargs)) is not None:
        if reason != _NO_CACHE:
            warnings.warn(f"qcompile: generate() runs transformers' own loop: {reason}", stacklevel=2)
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
    cache, config, device = model_kwargs["past_key_values"], generation_config, input_ids.device
    room = _room(cache)
    _check_room(room, input_ids, config, model_kwargs)
    outputs = model._prefill(input_ids, config, model_kwargs)
    late = input_ids.is_cuda and room is not None and _is_transformers([*logits_processor, *stopping_criteria])
    ended = Ended(streamer, stopping_criteria.max_length, late)
    step = Step(model, outputs, model_kwargs, room)
    process = _processor(logits_processor)
    pad = config._pad_token_tensor if any(hasattr(c, "eos_token_id") for c in stopping_criteria) else None
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    all_scores = [] if config.return_dict_in_generate and config.output_scores else None
    all_logits = [] if config.return_dict_in_generate and config.output_logits else None
    random = None
    with model._optimize_model_for_decode():
        while True:
            # A copy, since a view of the last row would keep the logits of a whole prompt.
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            scores = process(input_ids, logits)
            if config.do_sample:
                random = torch.cuda.get_rng_state(device) if late else None
                tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if pad is not None:
                tokens = torch.where(unfinished, tokens, pad.to(device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if all_logits is not None:
                all_logits.append(logits)
            if all_scores is not None:
                all_scores.append(scores)
            seen = None if all_scores is None else tuple(all_scores)
            unfinished = unfinished & ~stopping_criteria(input_ids, seen)
            if ended(unfinished, tokens, input_ids.shape[1]):
                break
            outputs = step(tokens)
    kept = slice(None, -ended.surplus or None)
    if ended.surplus:
        step.undo(ended.surplus)
        if random is not None:
            torch.cuda.set_rng_state(random, device)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids[:, kept]
    return GenerateDecoderOnlyOutput(
        sequences=input_ids[:, kept],  # pyright: ignore[reportArgumentType]
        scores=None if all_scores is None else tuple(all_scores[kept]),  # pyright: ignore[reportArgumentType]
        logits=None if all_logits is None else tuple(all_logits[kept]),  # pyright: ignore[reportArgumentType]
        past_key_values=step.cache,
    )


class Step:
    """The model's call for one more token of every sequence, after the call that gave `outputs`.

    `room` is the length of a static cache: an attention mask for it has that length from the start, of ones for the
    tokens to come, which the model hides by itself. Other masks grow.
    """

    def __init__(self, model: Any, outputs: Any, model_kwargs: Mapping[str, Any], room: int | None):
        self.model = model
        self.plain = {name: value for name, value in model_kwargs.items() if name not in _CARRIED}
        self.cache = outputs.get("past_key_values", model_kwargs["past_key_values"])
        position = model_kwargs.get("position_ids")
        self.position = None if position is None else position[..., -1:]
        mask = model_kwargs.get("attention_mask")
        self.mask = None if mask is None or (mask == 1).all() else mask
        self.grows = room is None
        if self.mask is not None and room is not None:
            self._lengthen(room - self.mask.shape[1])

    def __call__(self, tokens: Tensor) -> Any:
        given = {"input_ids": tokens[:, None], "past_key_values": self.cache}
        if self.position is not None:
            given["position_ids"] = self.position = self.position + 1
        if self.mask is not None:
            if self.grows:
                self._lengthen(1)
            given["attention_mask"] = self.mask
        return self.model(**given, **self.plain, return_dict=True)

    def _lengthen(self, count: int) -> None:
        assert self.mask is not None
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), count)], dim=1)

    def undo(self, count: int) -> None:
        """Forget the last tokens of a static cache. What they wrote will be written over and is hidden until then."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(count)


class Ended:
    """Whether all sequences have ended; streams their tokens.

    With `late` it says so a step afterwards: then the GPU has begun the next step, which `surplus` counts, and has not
    waited for the answer.
    """

    def __init__(self, streamer: Any, max_length: int | None, late: bool):
        self.streamer = streamer
        self.max_length = math.inf if max_length is None else max_length
        self.late = late
        self.unread: deque[tuple[Tensor, Tensor, Any]] = deque()

    def __call__(self, unfinished: Tensor, tokens: Tensor, length: int) -> bool:
        event = None
        # On the way from a GPU `non_blocking` memory is pinned, and has its content when the event has come.
        going, tokens = (x.to("cpu", non_blocking=self.late) for x in (unfinished.any(), tokens))
        if self.late:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(unfinished.device))
        self.unread.append((going, tokens, event))
        last = length >= self.max_length
        while len(self.unread) > (self.late and not last):
            going, tokens, event = self.unread.popleft()
            if event is not None:
                event.synchronize()
            if self.streamer is not None:
                self.streamer.put(tokens)
            if not going:
                return True
        return last

    @property
    def surplus(self) -> int:
        return len(self.unread)


def _why_not(model: Any, input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> str | None:
    """Why these steps need transformers' own loop; None if this one can take them."""
    from transformers import GenerationMixin

    kind = type(model)
    for name in _METHODS:
        if getattr(kind, name, None) is not getattr(GenerationMixin, name, name):
            return f"{kind.__name__} has a {name} of its own"
    if hasattr(kind, "create_masks_for_generate"):
        return f"{kind.__name__} makes masks of its own"
    if model_kwargs.get("past_key_values") is None or not model_kwargs.get("use_cache", True):
        return _NO_CACHE
    if input_ids.device != model.device:
        return f"input_ids are on {input_ids.device}, the model is on {model.device}"
    for name, value in model_kwargs.items():
        if name not in _CARRIED and not isinstance(value, (type(None), bool, int, float, str)):
            return f"the argument {name}"
    return None


def _room(cache: Any) -> int | None:
    """How many tokens a static cache holds; None for caches that grow, or have layers of several lengths."""
    from transformers.cache_utils import StaticLayer

    rooms = {layer.max_cache_len if type(layer) is StaticLayer else None for layer in getattr(cache, "layers", ())}
    return rooms.pop() if len(rooms) == 1 else None


def _check_room(room: int | None, input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> None:
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


def _processor(processors: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """All processors, one after the other, without transformers' look at their signatures at each step."""
    if any(len(inspect.signature(processor.__call__).parameters) > 2 for processor in processors):
        return processors  # says which arguments are missing

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        for processor in processors:
            scores = processor(input_ids, scores)
        return scores

    return process


def _is_transformers(objects: Sequence[Any]) -> bool:
    """Whether nobody's own code would see a token that is taken back later."""
    ours = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")
    return all(type(x).__module__ in ours and type(x).__name__ != "PrefixConstrainedLogitsProcessor" for x in objects)
