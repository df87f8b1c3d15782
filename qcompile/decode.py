"""The loop of `model.generate()` for an optimized model: greedy decoding and sampling, one token after the other.

transformers prepares everything, as for a loop of its own (this one is its `custom_generate`), and its objects process
the scores and say when to stop. What differs is what surrounds the model's call: tensors stay where they are from step
to step, and on a GPU the next step is launched before anybody knows how the last one ended, as one CUDA graph where
all that happens in it is known beforehand.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.calls import cache_name
from qcompile.choice import Choice
from qcompile.decode_state import State
from qcompile.decode_step import NO_CACHE, Step, check_room, room_of, why_not
from qcompile.recordings import Recording, Recordings, Scores


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    recordings: Recordings | None = None,
    fresh: bool = False,
    **model_kwargs: Any,
) -> Any:
    """What transformers' `_sample` returns for the same arguments, token by token.

    Where `model` takes steps unlike other models', `_sample` itself runs, and a warning says why. Raises ConfigError,
    before anything runs, if the tokens do not fit the static cache. On a GPU, steps over static caches become
    `recordings` if there are such; over a `fresh` one, which is empty, a prompt's length is then one of a few.
    """
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    if (reason := why_not(model, input_ids, model_kwargs)) is not None:
        if reason != NO_CACHE:
            warnings.warn(f"qcompile: generate() runs transformers' own loop: {reason}", stacklevel=2)
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
    config, length = generation_config, input_ids.shape[1]
    room = room_of(model_kwargs[cache_name(model_kwargs)])
    check_room(room, input_ids, config, model_kwargs)
    steady = input_ids.is_cuda and room is not None
    late = steady and _is_transformers([*logits_processor, *stopping_criteria])
    all_scores = [] if config.return_dict_in_generate and config.output_scores else None
    all_logits = [] if config.return_dict_in_generate and config.output_logits else None
    step = Step(model, config, model_kwargs, room)
    logits = step.first(input_ids, fresh and steady and recordings is not None)
    state = step.state(input_ids)
    criteria, limit = _without_known(stopping_criteria)
    if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
        state.pad = config._pad_token_tensor.to(input_ids.device, torch.int64)
        state.ends = _ends(stopping_criteria, input_ids.device)
    choose = Choice(logits_processor, config.do_sample, state, logits.shape[1], all_scores is not None, steady)
    step.as_is = choose.direct and all_logits is None
    ended = Ended(streamer, limit, input_ids.device if late else None)
    advance = Advance(step, choose, recordings if steady else None)
    state.make_room(length + 1)
    scores: Scores | None = (logits, choose(logits, input_ids))
    with model._optimize_model_for_decode():
        while True:
            length += 1
            if all_logits is not None:
                assert scores is not None
                all_logits.append(scores[0])
            if all_scores is not None:
                assert scores is not None
                all_scores.append(scores[1])
            if criteria:
                seen = None if all_scores is None else tuple(all_scores)
                state.unfinished.logical_and_(~criteria(state.text[:, :length], seen))
            if ended(state, length):
                break
            scores = advance(length, copies=all_logits is not None or all_scores is not None)
    kept = slice(None)
    if ended.surplus:
        kept = slice(None, -ended.surplus)
        step.undo(ended.surplus)
        advance.undo()
    choose.check(ended.surplus)
    if streamer is not None:
        streamer.end()
    sequences = state.text[:, : length - ended.surplus].clone()
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # pyright: ignore[reportArgumentType]
        scores=None if all_scores is None else tuple(all_scores[kept]),  # pyright: ignore[reportArgumentType]
        logits=None if all_logits is None else tuple(all_logits[kept]),  # pyright: ignore[reportArgumentType]
        **{step.cache_name: step.cache},
    )


class Advance:
    """One more token of every sequence: the model's call and the choice, one after the other or as a recording."""

    def __init__(self, step: Step, choose: Choice, recordings: Recordings | None):
        self.step, self.choose, self.recordings = step, choose, recordings
        self.bound = False
        self.asked = False
        self.whole: Callable[[], Any] | None = None  # the model's call that ends with the choice
        self.warm = 0
        self.recording: Recording | None = None
        self.before: tuple[Tensor, torch.device] | None = None

    def __call__(self, length: int, copies: bool) -> Scores | None:
        """Logits and scores of the token after `length` others; those of a recording are copied, or gone after the
        next step. None where nobody reads them."""
        if self.whole is not None:
            self.whole()
            return None
        if not self.bound:
            self._bind()
        if self.choose.sample and self.choose.steady:
            device = self.step.now.text.device
            self.before = torch.cuda.get_rng_state(device), device
        if self.recording is None and self.recordings is not None:
            self._record()
        if self.recording is None:
            return self._run(length)
        logits, scores = self.recording()
        return (logits.clone(), scores.clone()) if copies else (logits, scores)

    def _run(self, length: int | None = None) -> Scores:
        logits = self.step()
        if length is not None:
            self.step.now.make_room(length + 1)
        text = self.step.now.text
        scores = self.choose(logits, text if self.choose.direct else text[:, :length])
        if self.choose.by_cpp and not self.asked and logits.dim() == 3:
            self.asked, self.whole = True, self.step.let_follow(self.choose.bound())
        return logits, scores

    def _bind(self) -> None:
        self.bound, bound = True, self.step.bind()
        recordings, self.recordings = self.recordings, None
        if recordings is None or bound is None or (choice := self.choose.key) is None:
            return
        self.key = recordings.key(bound, self.step.now, (choice, self.step.as_is))
        if recordings.refuses(self.key):
            return
        self.recordings = recordings
        self.recording = recordings.find(self.step.cache, self.key)
        if self.recording is not None:
            self.step.now.move_to(self.recording.state)
        self.warm = recordings.warmth(self.step.cache, self.key)

    def _record(self) -> None:
        assert self.recordings is not None
        if self.warm:
            self.warm -= 1
            return
        self.recording = self.recordings.make(self.step.cache, self.key, self.step.now, self._run)
        if self.recording is None:
            self.recordings = None

    def undo(self) -> None:
        """As if the last token had not been drawn: who draws next gets the numbers that it had."""
        if self.before is not None:
            torch.cuda.set_rng_state(*self.before)


class Ended:
    """Whether all sequences have ended; streams their tokens.

    With a GPU as `late` it says so a step afterwards: then that has begun the next step, which `surplus` counts, and
    has not waited for the answer.
    """

    def __init__(self, streamer: Any, max_length: float, late: torch.device | None):
        self.streamer, self.max_length, self.copies = streamer, max_length, Copies()
        # What is read comes on a stream of its own, so that the next step waits for no copy.
        self.reads = None if late is None else torch.cuda.Stream(late)
        self.unread: deque[Read] = deque()

    def __call__(self, state: State, length: int) -> bool:
        """With `length` tokens in the text."""
        last = length >= self.max_length
        if self.reads is None:
            if self.streamer is not None:
                self.streamer.put(self.copies(state.token))
            return last or True not in state.unfinished.tolist()
        self.unread.append(Read(state, length, self.streamer is not None, self.reads))
        while len(self.unread) > (not last):
            read = self.unread.popleft()
            read.event.synchronize()
            if read.tokens is not None:
                self.streamer.put(read.tokens)
            if not read.going:
                return True
        return last

    @property
    def surplus(self) -> int:
        return len(self.unread)


class Copies:
    """Copies of the same i64[batch, 1] on the CPU, i64[batch] each, made room for in advance: one by one, after a step
    that has emptied the processor's caches, torch takes 20 us for each."""

    def __init__(self) -> None:
        self.left: list[tuple[Tensor, memoryview]] = []
        self.given: memoryview | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.given is None:
            if tokens.device.type != "cpu":
                return tokens.view(-1).to("cpu")
            self.given = _bytes_of(tokens)
        if not self.left:
            self.left = [(each, _bytes_of(each)) for each in torch.empty(64, len(tokens), dtype=tokens.dtype).unbind()]
        copy, memory = self.left.pop()
        memory[:] = self.given
        return copy


def _bytes_of(dense: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, which this keeps alive."""
    return memoryview(dense.numpy()).cast("B")  # pyright: ignore[reportArgumentType]


class Read:
    """On its way from a GPU, and there when `event` has come: whether a sequence goes on, and the last tokens."""

    def __init__(self, state: State, length: int, with_tokens: bool, stream: torch.cuda.Stream):
        self.tokens = None
        self.from_gpu = state.unfinished.any()  # kept until it is read: its memory is the other stream's as well
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            # On the way from a GPU `non_blocking` memory is pinned.
            self.going = self.from_gpu.to("cpu", non_blocking=True)
            if with_tokens:
                self.tokens = state.text[:, length - 1].to("cpu", non_blocking=True, copy=True)
            self.event = torch.cuda.Event(blocking=True)
            self.event.record(stream)


def _without_known(criteria: Any) -> tuple[Any, float]:
    """The criteria that have to look at every step's tokens, and the length at which all sequences end."""
    from transformers.generation import stopping_criteria as theirs

    limit, others = math.inf, theirs.StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is theirs.MaxLengthCriteria:
            limit = min(limit, criterion.max_length)
            longest = criterion.max_position_embeddings
            if longest is not None and longest < criterion.max_length:
                others.append(criterion)  # it says so when it comes to that
        elif type(criterion) is not theirs.EosTokenCriteria:
            others.append(criterion)
    return others, limit


def _ends(criteria: Any, device: torch.device) -> Tensor | None:
    from transformers.generation.stopping_criteria import EosTokenCriteria

    ends = [c.eos_token_id.to(device, torch.int64).flatten() for c in criteria if type(c) is EosTokenCriteria]
    return torch.cat(ends) if ends else None


def _is_transformers(objects: Sequence[Any]) -> bool:
    """Whether nobody's own code would see a token that is taken back later."""
    ours = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")
    return all(type(x).__module__ in ours and type(x).__name__ != "PrefixConstrainedLogitsProcessor" for x in objects)
