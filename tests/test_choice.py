"""choice: the tokens and scores of transformers' processors, drawn as torch draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from qcompile.choice import TIES, WIDE, Choice, likeliest
from qcompile.decode_state import State

VOCABULARY = 4 * WIDE


def choice(processors: list[Any], sample: bool = True, vocabulary: int = VOCABULARY, batch: int = 3, **options: Any):
    ids = torch.randint(0, 50, (batch, 5))
    state = State(ids, 64, None, None)
    given = {"return_scores": False, "steady": True, **options}
    return Choice(theirs.LogitsProcessorList(processors), sample, state, vocabulary, **given), state


def drawn(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


WARPERS = {
    "top k": [theirs.TopKLogitsWarper(50)],
    "temperature, top k, top p": [
        theirs.TemperatureLogitsWarper(0.6),
        theirs.TopKLogitsWarper(50),
        theirs.TopPLogitsWarper(0.9),
    ],
    "top k, min p": [theirs.TopKLogitsWarper(30), theirs.MinPLogitsWarper(0.05)],
    "top k, typical": [theirs.TopKLogitsWarper(30), theirs.TypicalLogitsWarper(0.7)],
    "top k, epsilon, normalized": [
        theirs.TopKLogitsWarper(30),
        theirs.EpsilonLogitsWarper(0.02),
        theirs.LogitNormalization(),
    ],
    "repetition, top k, top p": [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TopKLogitsWarper(40),
        theirs.TopPLogitsWarper(0.5),
    ],
}


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_large_vocabulary_the_same_tokens_are_drawn(name: str, dtype: torch.dtype) -> None:
    choose, state = choice(WARPERS[name])
    assert choose.narrow is not None and choose.key is not None
    for step in range(20):
        # In bfloat16 many scores are equal, also at the borders; then it is up to torch's sort which of them are left.
        logits = (2 * torch.randn(3, VOCABULARY)).to(dtype).float()
        ids = state.text[:, : 5 + step].clone()
        scores = theirs.LogitsProcessorList(WARPERS[name])(ids, logits)
        torch.manual_seed(step)
        want, then = drawn(scores), torch.rand(1)
        torch.manual_seed(step)
        left = choose(logits, state.text)
        assert torch.equal(torch.rand(1), then)
        if dtype == torch.float32:
            assert torch.equal(state.token[:, 0], want)
        torch.testing.assert_close(left.sort().values, scores.sort().values[:, -left.shape[1] :])
    assert torch.equal(state.text[:, :5], ids[:, :5]) and state.at.item() == 25
    choose.check()


@pytest.mark.parametrize(
    ("processors", "borders"),
    [
        (WARPERS["temperature, top k, top p"], (50, 0.9, 0.0)),
        (WARPERS["top k, min p"], (30, 1.0, 0.05)),
        (WARPERS["top k, typical"], None),
        ([theirs.TopKLogitsWarper(9), theirs.MinPLogitsWarper(0.1), theirs.TopPLogitsWarper(0.9)], None),
        ([theirs.TopKLogitsWarper(9), theirs.TopPLogitsWarper(0.9, min_tokens_to_keep=2)], None),
    ],
)
def test_what_a_kernel_draws(processors: list[Any], borders: Any) -> None:
    assert choice(processors)[0].borders == borders


def test_the_likeliest_are_all_that_top_k_leaves() -> None:
    scores = torch.randn(4, VOCABULARY + 37).bfloat16().float()
    found, places = likeliest(scores, 50 + TIES)
    assert torch.equal(found.sort(descending=True).values, scores.topk(50 + TIES).values)
    assert torch.equal(scores.gather(1, places), found) and (places.diff() > 0).all()


@pytest.mark.parametrize(
    ("processors", "sample"),
    [
        ([theirs.TopPLogitsWarper(0.9)], True),
        ([theirs.TopKLogitsWarper(50)], False),
        ([theirs.TopKLogitsWarper(VOCABULARY // 3)], True),
        ([theirs.TopKLogitsWarper(50, filter_value=-5.0)], True),
        ([theirs.TopKLogitsWarper(50), theirs.RepetitionPenaltyLogitsProcessor(1.1)], True),
        ([theirs.TopKLogitsWarper(50), theirs.SuppressTokensLogitsProcessor([3])], True),
    ],
)
def test_all_scores_are_processed_where_others_count(processors: list[Any], sample: bool) -> None:
    choose, state = choice(processors, sample)
    assert choose.narrow is None
    logits = torch.randn(3, VOCABULARY)
    scores = theirs.LogitsProcessorList(processors)(state.text[:, :5], logits)
    torch.manual_seed(5)
    want = drawn(scores) if sample else scores.argmax(-1)
    torch.manual_seed(5)
    assert torch.equal(choose(logits, state.text), scores)
    assert torch.equal(state.token[:, 0], want)


def test_scores_are_those_of_transformers_and_small_vocabularies_are_whole() -> None:
    processors = WARPERS["temperature, top k, top p"]
    assert choice(processors, return_scores=True)[0].narrow is None
    choose, state = choice(processors, vocabulary=1000)
    logits = torch.randn(3, 1000)
    want = theirs.LogitsProcessorList(processors)(state.text, logits)
    assert torch.equal(choose(logits, state.text), want)


def test_draws_follow_the_probabilities() -> None:
    """4000 draws of five tokens: each count within four standard deviations."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, -1.0]]).expand(4000, -1)
    choose, state = choice([theirs.TemperatureLogitsWarper(0.8)], vocabulary=5, batch=4000)
    choose(logits, state.text)
    counts, likely = Counter(state.token[:, 0].tolist()), (logits[0] / 0.8).softmax(-1).tolist()
    for token, p in enumerate(likely):
        assert abs(counts[token] - 4000 * p) <= 4 * (4000 * p * (1 - p)) ** 0.5


def test_ends_are_banned_up_to_a_length() -> None:
    ends = torch.tensor([7, 8])
    given = [
        theirs.MinLengthLogitsProcessor(8, torch.tensor([3])),
        theirs.TemperatureLogitsWarper(0.5),
        theirs.MinNewTokensLengthLogitsProcessor(5, 2, ends),
    ]
    choose, state = choice(given, False, 10)
    assert choose.key is not None
    for length in range(5, 11):
        logits = torch.randn(3, 10)
        want = theirs.LogitsProcessorList(given)(state.text[:, :length], logits)
        assert torch.equal(choose(logits, state.text), want)


@pytest.mark.parametrize("ignored", [None, 2, torch.tensor([4, 0, 3])])
def test_repetitions_are_penalized(ignored: Any) -> None:
    given = theirs.RepetitionPenaltyLogitsProcessor(1.5, ignored)
    choose, state = choice([given], False, 60)
    assert choose.key is not None
    state.text[:, 2:4] = torch.tensor([60, 75])  # a vocabulary may have fewer scores than tokens
    for length in range(5, 40):
        logits = torch.randn(3, 60)
        assert torch.equal(choose(logits, state.text), given(state.text[:, :length].clone(), logits))


def test_what_makes_choices_alike() -> None:
    keys = [
        choice([theirs.TemperatureLogitsWarper(t), theirs.MinLengthLogitsProcessor(n, torch.tensor([2]))], s)[0].key
        for t, n, s in ((0.5, 3, True), (0.5, 9, True), (0.6, 3, True), (0.5, 3, False))
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3

    class Own(theirs.TemperatureLogitsWarper): ...

    for varying in (
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.SuppressTokensLogitsProcessor([5]),
        Own(0.5),
    ):
        assert choice([varying])[0].key is None


def test_nothing_to_choose_from() -> None:
    nothing, something = torch.full((3, 20), -torch.inf), torch.randn(3, 20)
    choose, state = choice([], vocabulary=20)
    for logits in (something, nothing):
        choose(logits, state.text)
    choose.check(surplus=1)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        choose.check()
    choose(something, state.text)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        choose.check(surplus=1)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        choice([], vocabulary=20, steady=False)[0](nothing, state.text)


def test_processors_that_need_more_say_so() -> None:
    class More(theirs.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, more: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return scores

    choose, state = choice([More()])
    with pytest.raises(ValueError, match=r"required parameters.*more"):
        choose(torch.randn(3, VOCABULARY), state.text)


def test_the_likeliest_token_on_a_cpu_is_found_without_scores() -> None:
    ends = torch.tensor([3, 9])
    processors = [theirs.MinLengthLogitsProcessor(7, ends), theirs.MinNewTokensLengthLogitsProcessor(5, 4, ends)]
    for given in (processors, []):
        choose, state = choice(given, sample=False, steady=False, vocabulary=100)
        twin, other = choice(given, sample=False, steady=False, vocabulary=100, return_scores=True)
        other.text.copy_(state.text)
        assert choose.direct and not twin.direct
        for step in range(6):
            logits = torch.randn(3, 100).bfloat16()
            logits[0, 3], logits[1, 9] = 9, 9
            assert choose(logits, state.text[:, : 5 + step]) is logits
            twin(logits.float(), other.text[:, : 5 + step])
            assert torch.equal(state.text, other.text) and torch.equal(state.token, other.token)
        for each in (state, other):
            each.make_room(each.text.shape[1] + 1)
        logits = torch.randn(3, 1, 100)
        choose(logits, state.text)
        twin(logits[:, 0], other.text[:, :11])
        assert torch.equal(state.text, other.text)


@pytest.mark.parametrize(
    "options",
    [
        {"sample": True},
        {"return_scores": True},
        {"steady": True},
        {"processors": [theirs.TemperatureLogitsWarper(0.6)]},
    ],
)
def test_where_scores_are_asked_for_they_are_made(options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"processors": [], "sample": False, "steady": False, **options}
    assert not choice(**given)[0].direct
