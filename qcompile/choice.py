"""The choice of the next token, from its scores: what transformers' processors make of them, then the likeliest token
or one that is drawn.

Where they keep the `top_k` likeliest of a large vocabulary, what comes after has only these to look at: to sort 128,256
scores for `top_p` takes an H100 about a tenth of a decoding step, and a CPU longer than the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.calls import PLAIN
from qcompile.decode_state import State
from qcompile.kernels import draw, likeliest_cpu, likeliest_cuda
from qcompile.kernels._scores import NONE, Changes
from qcompile.kernels.likeliest_cpu import Likeliest

Process = Callable[[Tensor, Tensor], Tensor]

# A vocabulary of fewer tokens is processed as a whole.
WIDE = 4096
# So many more than top_k are looked at, for there may be several of the same score as the last one.
TIES = draw.TIES
# Parts of the vocabulary that are searched side by side.
PARTS = 64
# Processors of transformers that read the scores alone, and take one of -inf for one that is not there.
_OF_SCORES = frozenset({
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "LogitNormalization",
})  # fmt: skip
# Those that do the same at every step.
_STEADY = _OF_SCORES | {"InfNanRemoveLogitsProcessor", "Banned", "Penalized"}
_MODULE = "transformers.generation.logits_process"


class Choice:
    """Puts the next token of every sequence into a state: `choose(logits, ids)` of f32[batch, vocabulary]. A `direct`
    choice takes the model's own numbers, also of [batch, 1, vocabulary], gives them back as the scores, and does not
    look at `ids`.

    The tokens and, with `return_scores`, the scores are those of transformers' loop after the same seed. If more than
    TIES tokens have the score of the last of the top_k, only so many of them can be drawn. `steady` choices never wait
    for the GPU.
    """

    def __init__(
        self, processors: Sequence[Any], sample: bool, state: State, vocabulary: int, return_scores: bool, steady: bool
    ):
        self.sample, self.state, self.steady = sample, state, steady
        self.processors = _steady(processors, state, vocabulary)
        first = next((i for i, p in enumerate(self.processors) if _name(p) == "TopKLogitsWarper"), None)
        self.narrow: int | None = None
        if sample and not return_scores and first is not None and all(map(_is_of_scores, self.processors[first:])):
            count = self.processors[first].top_k + TIES
            self.narrow = first if vocabulary > WIDE and count * PARTS < vocabulary // 2 else None
        self.borders = None if self.narrow is None else _borders(self.processors[self.narrow :])
        self.front = self.processors[: self.narrow]
        if not sample:
            self.by_kernels = likeliest_cuda.refuses(state.text, vocabulary) is None
        else:
            top_k = None if self.borders is None else self.borders[0]
            self.by_kernels = top_k is not None and draw.refuses(state.text, vocabulary, top_k) is None
        # Where the scores are nobody else's, and nothing but what kernels do where they read them is done to them.
        self.temperature = None if return_scores else _temperature(self.front)
        # On a CPU the likeliest token needs neither float32 nor scores of its own.
        self.by_cpp = not (sample or steady) and self.temperature == 1 and likeliest_cpu.refuses(state.text) is None
        self.direct = self.by_cpp or (self.by_kernels and self.temperature is not None)
        self.texts: Tensor | None = None  # that `likeliest` appends to

    @property
    def key(self) -> Hashable | None:
        """What makes two choices the same operations on their states; None if operations differ from step to step."""
        if not all(_name(processor) in _STEADY for processor in self.processors):
            return None
        values = [(_name(p), name, x) for p in self.processors for name, x in vars(p).items() if name != "state"]
        if not all(isinstance(value, PLAIN) for *_, value in values):
            return None
        return tuple(map(_name, self.processors)), tuple(values), self.sample, self.narrow, self.direct

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The scores. `ids` i64[batch, …] are the text, as the processors are to see it."""
        state, quotients = self.state, None
        if self.by_cpp:
            self.bound()(logits)
            return logits
        if self.direct and self.temperature is not None:
            scores = logits if logits.dim() == 2 else logits.select(1, -1)
            changes = Changes(state.banned, state.least, state.at, self.temperature)
        else:
            scores, changes = _processed(self.front, ids, logits), NONE
        if not self.sample:
            tokens = likeliest_cuda.likeliest(scores, changes) if self.by_kernels else scores.argmax(-1)
        else:
            noise = torch.empty_like(scores, dtype=torch.float32).exponential_()
            if self.by_kernels and self.borders is not None:
                tokens, quotients = draw.draw(scores, noise, *self.borders, changes)
            else:
                scores, tokens, quotients = self._drawn(scores, noise, ids)
        state.put(tokens, quotients)
        if not self.steady:
            self.check()
        return scores

    def bound(self) -> Likeliest:
        """What a choice `by_cpp` does, in the memory that the state has now."""
        state = self.state
        if self.texts is not state.text:
            self.texts = state.text
            texts = (state.text, state.at, state.token, state.unfinished, state.pad, state.ends)
            self.likeliest = likeliest_cpu.bind_likeliest(*_bans(state), *texts)
        return self.likeliest

    def _drawn(self, scores: Tensor, noise: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores, of the likeliest tokens where no other can be drawn; the tokens; and by what they were drawn."""
        places = None
        if self.narrow is not None:
            scores, places = likeliest(scores, self.processors[self.narrow].top_k + TIES)
            scores = _processed(self.processors[self.narrow :], ids, scores)
            noise = noise.gather(1, places)
        # What torch.multinomial does, without its wait for the GPU to look for NaN.
        quotients, tokens = (scores.softmax(-1) / noise).max(-1, keepdim=True)
        tokens = tokens if places is None else places.gather(1, tokens)
        return scores, tokens[:, 0], quotients[:, 0]

    def check(self, surplus: int = 0) -> None:
        """Raises RuntimeError, as multinomial does, if there was nothing to choose from; before a surplus step."""
        if self.sample and self.state.broken[surplus].any():
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


class Banned:
    """What MinLength and MinNewTokensLength do, with the text's length read where it lies."""

    def __init__(self, state: State, place: int):
        self.state, self.place = state, place

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        banned, least = self.state.banned, self.state.least
        assert banned is not None and least is not None
        return scores.masked_fill(banned[self.place] & (self.state.at < least[self.place]), -torch.inf)


class Penalized:
    """What RepetitionPenalty does, on a text of fixed room."""

    def __init__(self, state: State, penalty: float):
        self.state, self.penalty = state, penalty

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        text, ignored, vocabulary = self.state.text, self.state.ignored, scores.shape[1]
        assert ignored is not None
        place = torch.arange(text.shape[1], device=text.device)
        outside = (place < ignored[:, None]) | (place >= self.state.at)
        # Whatever is no token of a score of its own is one more, left out in the end.
        ids = text.masked_fill(outside, vocabulary).clamp(max=vocabulary)
        scores = torch.nn.functional.pad(scores, (0, 1))
        score = scores.gather(1, ids)
        score = torch.where(score < 0, score * self.penalty, score / self.penalty)
        return scores.scatter(1, ids, score)[:, :vocabulary]


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of every row and their places, ordered by place; those of PARTS parts first.

    NOTE: of 128,256 torch.topk looks for them by sorting all.
    """
    width = scores.shape[1] // PARTS
    whole = width * PARTS
    best, places = scores[:, :whole].unflatten(1, (PARTS, width)).topk(count, sorted=False)
    places = (places + torch.arange(0, whole, width, device=scores.device)[:, None]).flatten(1)
    best = torch.cat([best.flatten(1), scores[:, whole:]], 1)
    rest = torch.arange(whole, scores.shape[1], device=scores.device).expand(len(scores), -1)
    chosen = best.topk(count, sorted=False).indices
    places = torch.cat([places, rest], 1).gather(1, chosen).sort().values
    return scores.gather(1, places), places


def _steady(processors: Sequence[Any], state: State, vocabulary: int) -> Sequence[Any]:
    """The processors, where they depend on the text's length exchanged for ones that read it in the state."""
    if any(len(inspect.signature(processor.__call__).parameters) > 2 for processor in processors):
        return [processors]  # their list says which arguments are missing
    device = state.text.device
    tokens = torch.arange(vocabulary, device=device)
    exchanged: list[Any] = []
    banned, least = [], []
    for processor in processors:
        if (length := _least(processor)) is not None:
            banned.append(torch.isin(tokens, processor.eos_token_id.to(device)))
            least.append(length)
            processor = Banned(state, len(least) - 1)
        elif _name(processor) == "RepetitionPenaltyLogitsProcessor" and state.ignored is None:
            ignored = processor.prompt_ignore_length
            with torch.inference_mode(False):
                ignored = torch.as_tensor(0 if ignored is None else ignored, device=device)
                state.ignored = ignored.expand(len(state.text)).clone()
            processor = Penalized(state, processor.penalty)
        exchanged.append(processor)
    if banned:
        with torch.inference_mode(False):
            state.banned, state.least = torch.stack(banned), torch.tensor(least, device=device)
    return exchanged


def _temperature(processors: Sequence[Any]) -> float | None:
    """By what these processors divide the scores, if besides they only ban tokens."""
    temperature = 1.0
    if processors and _name(processors[-1]) == "TemperatureLogitsWarper":
        *processors, last = processors
        temperature = last.temperature
    return temperature if all(isinstance(processor, Banned) for processor in processors) else None


def _bans(state: State) -> tuple[Tensor, Tensor]:
    """Banned tokens in ascending order, and how many tokens there have to be before each of them may come."""
    if state.banned is None or state.least is None:
        none = torch.empty(0, dtype=torch.int64)
        return none, none
    tokens, processors = state.banned.t().nonzero(as_tuple=True)
    return tokens.contiguous(), state.least[processors]


def _least(processor: Any) -> int | None:
    """The length before which a processor bans the ends."""
    if (name := _name(processor)) == "MinLengthLogitsProcessor":
        return processor.min_length
    if name == "MinNewTokensLengthLogitsProcessor":
        return processor.prompt_length_to_skip + processor.min_new_tokens
    return None


def _processed(processors: Sequence[Any], ids: Tensor, scores: Tensor) -> Tensor:
    """All processors, one after the other, without transformers' look at their signatures at each step."""
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def _name(processor: Any) -> str:
    """The name of a processor's class, "" if it is neither transformers' nor ours."""
    return type(processor).__name__ if type(processor).__module__ in (_MODULE, __name__) else ""


def _borders(processors: Sequence[Any]) -> tuple[int, float, float] | None:
    """top_k, top_p and min_p of processors that are these, in this order."""
    names = [_name(processor) for processor in processors]
    order = [name for name in ("TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper") if name in names]
    if names != order or any(processor.min_tokens_to_keep != 1 for processor in processors[1:]):
        return None
    given = {"top_p": 1.0, "min_p": 0.0}
    for processor in processors:
        given |= {name: value for name, value in vars(processor).items() if name in ("top_k", "top_p", "min_p")}
    return int(given["top_k"]), given["top_p"], given["min_p"]


def _is_of_scores(processor: Any) -> bool:
    return _name(processor) in _OF_SCORES and getattr(processor, "filter_value", -torch.inf) == -torch.inf
