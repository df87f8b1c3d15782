"""How good and how fast a language model is: perplexity, and tokens a second. For float and optimized models alike."""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calls import cache_name


def document_tokens(text: str, tokenizer: Any, begin: int | None = None) -> Tensor:
    """The token ids of a text as one row. Documents are separated by blank lines; each starts with the token `begin`,
    by default the tokenizer's bos token if it has one."""
    first = tokenizer.bos_token_id if begin is None else begin
    ids: list[int] = []
    for document in filter(str.strip, text.split("\n\n")):
        ids += [] if first is None else [first]
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    window: int = 512,
    windows: int | None = None,
    cache: Callable[[], Any] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a token, in float32.

    The row of tokens is read in consecutive windows, the first `windows` of them or all. Of each window's tokens, every
    one predicts its successor, which for the last one is the first token of the next window. So `windows` windows need
    windows * window + 1 tokens, and every token counts once. `cache` makes an empty key/value cache for each window,
    through which its tokens see one another.
    """
    ids = torch.as_tensor(token_ids).flatten()
    count = (len(ids) - 1) // window
    if count < (windows or 1):
        raise ValueError(
            f"{windows or 1} windows of {window} need {(windows or 1) * window + 1} tokens, got {len(ids)}"
        )
    device = next(iter([*model.parameters(), *model.buffers()])).device
    name = cache_name(inspect.signature(model.forward).parameters)
    total = 0.0
    for start in range(0, (windows or count) * window, window):
        x = ids[start : start + window + 1].to(device)
        cached = {"use_cache": False} if cache is None else {name: cache()}
        logits = model(input_ids=x[None, :-1], **cached).logits[0].float()
        total += float(nn.functional.cross_entropy(logits, x[1:], reduction="sum"))
    return math.exp(total / ((windows or count) * window))


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one text: `prefill` of `prompt` tokens at once, then `decode` of `new` tokens, one by one."""

    prefill: float
    decode: float
    prompt: int
    new: int


def throughput(model: nn.Module, prompt: int = 128, new: int = 32, rounds: int = 3, **options: Any) -> Speed:
    """The speed of model.generate(), greedy. The first call, which may compile, does not count."""
    return throughputs({"": model}, prompt, new, rounds, **options)[""]


def throughputs(
    models: Mapping[str, nn.Module],
    prompt: int = 128,
    new: int = 32,
    rounds: int = 3,
    warm_up: bool = True,
    seconds: float = math.inf,
    batch: int = 1,
    **options: Any,
) -> dict[str, Speed]:
    """The speed of several models side by side: they take turns, so that a machine's bad moments hit all of them.

    Reported are the median time to a first token and the median time of all later ones. After `seconds` no new round
    begins. `warm_up` is False where each model has generated as many tokens before. `batch` texts grow at once; figures
    are those of one of them. `options` go to generate().
    """
    if warm_up:
        for model in models.values():
            _token_times(model, prompt, new + 1, options, batch)
    first: dict[str, list[float]] = {name: [] for name in models}
    later: dict[str, list[float]] = {name: [] for name in models}
    began = time.perf_counter()
    for _ in range(rounds):
        for name, model in models.items():
            start, *ends = _token_times(model, prompt, new + 1, options, batch)
            first[name].append(ends[0] - start)
            later[name] += [end - begin for begin, end in itertools.pairwise(ends)]
        if time.perf_counter() - began > seconds:
            break
    return {
        name: Speed(prompt / statistics.median(first[name]), 1 / statistics.median(later[name]), prompt, new)
        for name in models
    }


@torch.no_grad()
def _token_times(model: Any, prompt: int, new: int, options: Mapping[str, Any], batch: int) -> list[float]:
    """When generating began, and when each new token was there."""
    device = next(iter([*model.parameters(), *model.buffers()])).device
    vocabulary = getattr(model.config, "vocab_size", None) or model.config.get_text_config().vocab_size
    # Which tokens they are makes no difference.
    tokens = torch.arange(prompt, device=device).mul(7919).remainder(vocabulary).expand(batch, -1)
    times = [time.perf_counter()]

    def tick(input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

    # On a CPU a criterion would be four calls of torch, each of 10 us and more after a step.
    watch = {"stopping_criteria": [tick]} if device.type == "cuda" else {"streamer": Stopwatch(times)}
    model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **watch,
        **options,
    )
    return times if device.type == "cuda" else [times[0], *times[2:]]


@dataclass
class Stopwatch:
    """A streamer that notes when it is given the prompt, and each of the tokens."""

    times: list[float]

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
