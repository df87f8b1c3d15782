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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.decode_step import NO_CACHE, Step, check_room, room_of, why_not


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

    if (reason := why_not(model, input_ids, model_kwargs)) is not None:
        if reason != NO_CACHE:
            warnings.warn(f"qcompile: generate() runs transformers' own loop: {reason}", stacklevel=2)
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
    config, device = generation_config, input_ids.device
    room = room_of(model_kwargs["past_key_values"])
    check_room(room, input_ids, config, model_kwargs)
    late = input_ids.is_cuda and room is not None and _is_transformers([*logits_processor, *stopping_criteria])
    step, choose = Step(model, config, model_kwargs, room), Choice(config.do_sample, late)
    ended = Ended(streamer, stopping_criteria.max_length, late)
    process = _processor(logits_processor)
    pad = config._pad_token_tensor if any(hasattr(c, "eos_token_id") for c in stopping_criteria) else None
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    all_scores = [] if config.return_dict_in_generate and config.output_scores else None
    all_logits = [] if config.return_dict_in_generate and config.output_logits else None
    logits = step.first(input_ids)
    with model._optimize_model_for_decode():
        while True:
            scores = process(input_ids, logits)
            tokens = choose(scores)
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
            logits = step(tokens)
    kept = slice(None)
    if ended.surplus:
        kept = slice(None, -ended.surplus)
        step.undo(ended.surplus)
        choose.undo()
    choose.check()
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


class Choice:
    """The next token of every sequence, i64[batch] of scores f32[batch, vocabulary]: the likeliest, or `sample`d."""

    def __init__(self, sample: bool, late: bool):
        self.sample, self.late = sample, late
        self.broken: Tensor | bool = False
        self.before: tuple[Tensor, torch.device, Tensor | bool] | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        if not self.sample:
            return scores.argmax(-1)
        likely = scores.softmax(-1)
        if not self.late:
            return torch.multinomial(likely, 1).squeeze(1)
        # What multinomial does, without its wait for the GPU to look for NaN; a row has one everywhere or nowhere.
        self.before = torch.cuda.get_rng_state(scores.device), scores.device, self.broken
        self.broken = likely[:, 0].isnan().any() | self.broken
        return (likely / torch.empty_like(likely).exponential_()).argmax(-1)

    def undo(self) -> None:
        """As if the last token had not been drawn: who draws next gets the numbers that it had."""
        if self.before is not None:
            state, device, self.broken = self.before
            torch.cuda.set_rng_state(state, device)

    def check(self) -> None:
        """Raises RuntimeError, as multinomial does, if there was nothing to choose from."""
        if self.broken:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


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
        going = unfinished.any().to("cpu", non_blocking=self.late)
        if self.streamer is not None:
            tokens = tokens.to("cpu", non_blocking=self.late)
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
