import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qcompile import models
from qcompile.evaluate import document_tokens, perplexity, throughput, throughputs


class Successor(nn.Module):
    """Gives the successor of each token, modulo 8, the probability `p`, and all the others the same rest."""

    def __init__(self, p: float):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.config = SimpleNamespace(vocab_size=8)
        self.generated: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        odds = torch.full((*input_ids.shape, 8), float((1 - self.p) / 7))
        return SimpleNamespace(logits=odds.scatter(-1, (input_ids[..., None] + 1) % 8, float(self.p)).log())

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, streamer: Any, **options: Any) -> None:
        self.generated.append(max_new_tokens)
        streamer.put(input_ids)
        time.sleep(0.04)
        for _ in range(max_new_tokens):
            streamer.put(input_ids[:, -1])
            time.sleep(0.01)


def test_perplexity_of_a_known_distribution() -> None:
    right = torch.arange(33) % 8
    assert perplexity(Successor(0.25), right, window=8) == pytest.approx(4)
    assert perplexity(Successor(0.25), right.tolist(), window=16, windows=1) == pytest.approx(4)
    surprise = right.clone()
    surprise[16] = 5  # only as what the last token of the second window predicts
    mixed = math.exp(-(15 * math.log(0.25) + math.log(0.75 / 7)) / 16)
    assert perplexity(Successor(0.25), surprise, window=8, windows=2) == pytest.approx(mixed)


def test_each_window_has_a_cache_of_its_own() -> None:
    seen: list[Any] = []

    class Cached(Successor):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = True, past_key_values: Any = None) -> Any:
            seen.append(past_key_values)
            return super().forward(input_ids, use_cache=True)

    made = iter("abc")
    assert perplexity(Cached(0.25), torch.arange(25) % 8, window=8, cache=lambda: next(made)) == pytest.approx(4)
    assert seen == ["a", "b", "c"]


def test_every_window_needs_its_tokens() -> None:
    assert perplexity(Successor(0.5), torch.arange(17) % 8, window=8, windows=2) == pytest.approx(2)
    with pytest.raises(ValueError, match="2 windows of 8 need 17 tokens, got 16"):
        perplexity(Successor(0.5), torch.arange(16) % 8, window=8, windows=2)
    with pytest.raises(ValueError, match="1 windows of 512 need 513 tokens, got 16"):
        perplexity(Successor(0.5), torch.arange(16) % 8)


def test_windows_do_not_see_one_another() -> None:
    class Context(Successor):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            seen.append(input_ids[0].tolist())
            return super().forward(input_ids, use_cache)

    seen: list[list[int]] = []
    perplexity(Context(0.5), torch.arange(9) % 8, window=4)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_documents_begin_with_their_token(tiny_chat: Path) -> None:
    tokenizer = models.load_tokenizer(models.find(str(tiny_chat)))
    a, b = tokenizer("a").input_ids[-1], tokenizer("b").input_ids[-1]
    assert document_tokens("a\n\nb\n\n\n\na", tokenizer).tolist() == [0, a, 0, b, 0, a]
    assert document_tokens("a\n\nb", tokenizer, begin=7).tolist() == [7, a, 7, b]


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on only while somebody sleeps."""
    slept = [0.0]
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(slept))
    twins: dict[str, Any] = {"a": Successor(0.5), "b": Successor(0.5)}
    speeds = throughputs(twins, prompt=4, new=3, rounds=2)
    assert twins["a"].generated == [4] * 3  # the first one is the warm-up
    for speed in speeds.values():
        assert (speed.prompt, speed.new) == (4, 3)
        assert speed.prefill == pytest.approx(4 / 0.04)
        assert speed.decode == pytest.approx(1 / 0.01)


def test_a_slow_machine_ends_after_the_first_round() -> None:
    model: Any = Successor(0.5)
    throughput(model, prompt=4, new=3, rounds=9, warm_up=False, seconds=0.0)
    assert model.generated == [4]


def test_throughput_of_a_real_generate(tiny_chat: Path) -> None:
    model = models.load(models.find(str(tiny_chat)))
    speed = throughput(model, prompt=16, new=8, rounds=3)
    assert speed.decode > 1
    assert speed.prefill > 1


@pytest.mark.slow
def test_the_figure_of_a_real_model(shared: Path) -> None:
    source = models.find(str(shared / "models" / "docs-27m"))
    text = (shared / "models" / "english.txt").read_text("utf-8")[:400_000]
    tokens = document_tokens(text, models.load_tokenizer(source))
    assert tokens[0] == 0
    assert perplexity(models.load(source, "float32"), tokens, 512, 40) == pytest.approx(30.492, abs=0.002)
