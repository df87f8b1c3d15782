"""draw against transformers' processors and torch's draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from qcompile.kernels._scores import Changes
from qcompile.kernels.draw import TIES, draw, refuses

VOCABULARY = 4196
ALL = {"top_k": 50, "top_p": 1.0, "min_p": 0.0}
WAYS = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.5, "min_p": 0.02},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_p": 0.0},
    {"top_k": 7, "top_p": 0.2},
]


def processed(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    scores = theirs.TopKLogitsWarper(top_k)(scores, scores)
    if top_p < 1:
        # TopPLogitsWarper, sorting as it does on a GPU.
        ordered, places = scores.sort(stable=True)
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        gone[:, -1] = False
        scores = scores.masked_fill(gone.scatter(1, places, gone), -torch.inf)
    return theirs.MinPLogitsWarper(min_p)(scores, scores) if min_p else scores


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_token_that_torch_draws(way: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    borders = {**ALL, **way}
    for _ in range(3 if device == "cuda" else 1):
        # In bfloat16 many scores are equal, also at the borders.
        scores = (2 * torch.randn(4, VOCABULARY, device=device)).to(dtype).float()
        noise = torch.empty_like(scores).exponential_()
        tokens, best = draw(scores, noise, **borders)
        likely = processed(scores, **borders).softmax(-1)
        assert torch.equal(tokens, (likely / noise).argmax(-1))
        assert best.isfinite().all()


def test_what_is_left_is_what_may_be_drawn(device: str) -> None:
    """Each token in turn is the one that noise would have."""
    scores = torch.full((1, VOCABULARY), -20.0, device=device)
    scores[0, [3, 900, 2500, 4000, 4001]] = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5], device=device)
    # 0.40 for the first, 0.15 each, 0.09: of equal ones the later stay.
    for top_p, left in ((0.95, {3, 900, 2500, 4000, 4001}), (0.7, {3, 2500, 4000}), (0.5, {3, 4000}), (0.3, {3})):
        found = set()
        for token in (3, 900, 2500, 4000, 4001, 17):
            noise = torch.ones_like(scores)
            noise[0, token] = 1e-9
            found.add(draw(scores, noise, 5, top_p, 0.0)[0].item())
        assert found == left


def test_nothing_to_draw_from(device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        scores = torch.randn(6, VOCABULARY, device=device).to(dtype)
        scores[1] = -torch.inf
        scores[2, 77] = scores[5] = torch.nan
        scores[3, 5] = scores[4, [7, 4000]] = torch.inf
        tokens, best = draw(scores, torch.ones_like(scores, dtype=torch.float32), **ALL)
        assert best.isnan().tolist() == [False, True, True, True, True, True]
        assert tokens.tolist() == [scores[0].argmax().item(), 0, 0, 0, 0, 0]


LEAST, MOST = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max


@pytest.mark.parametrize(("rest", "few"), [(0.0, (LEAST, 2 * LEAST)), (0.0, (-MOST, MOST)), (-MOST, (-LEAST, LEAST))])
def test_scores_close_together_and_far_apart(rest: float, few: tuple[float, float], device: str) -> None:
    scores = torch.full((1, VOCABULARY), rest, device=device)
    scores[0, [700, 40]] = torch.tensor(few, device=device)
    assert draw(scores, torch.ones_like(scores), 1, 1.0, 0.0)[0].item() == 40


@pytest.mark.parametrize("vocabulary", [70, 1000])
def test_fewer_groups_than_top_k(vocabulary: int, device: str) -> None:
    scores = torch.randn(2, vocabulary, device=device)
    noise = torch.empty_like(scores).exponential_()
    likely = processed(scores, 50, 0.9, 0.0).softmax(-1)
    assert torch.equal(draw(scores, noise, 50, 0.9, 0.0)[0], (likely / noise).argmax(-1))


def test_more_scores_than_groups_of_32(device: str) -> None:
    """As Gemma 3 has."""
    scores = torch.randn(1, 262208, device=device)
    noise = torch.empty_like(scores).exponential_()
    likely = processed(scores, 64, 0.95, 0.0).softmax(-1)
    assert torch.equal(draw(scores, noise, 64, 0.95, 0.0)[0], (likely / noise).argmax(-1))


def test_fewer_than_top_k(device: str) -> None:
    scores = torch.full((1, VOCABULARY), -torch.inf, device=device)
    scores[0, 3000] = -1.0
    assert draw(scores, torch.ones_like(scores), **ALL)[0].item() == 3000


def test_more_equal_scores_than_there_is_room_for(device: str) -> None:
    scores = torch.zeros(1, VOCABULARY, device=device)
    noise = torch.ones_like(scores)
    assert 0 <= draw(scores, noise, **ALL)[0].item() < VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_changed_where_they_are_read(dtype: torch.dtype, device: str) -> None:
    scores, at = torch.randn(3, VOCABULARY, device=device).to(dtype), torch.tensor([6], device=device)
    banned = torch.rand(2, VOCABULARY, device=device) < 0.2
    changes = Changes(banned, torch.tensor([6, 7], device=device), at, 0.7)
    noise = torch.empty_like(scores, dtype=torch.float32).exponential_()
    want = scores.float().masked_fill(banned[1], -torch.inf) * (torch.ones((), device=device) / 0.7)
    tokens, best = draw(scores, noise, 40, 0.9, 0.0, changes)
    other, quotients = draw(want, noise, 40, 0.9, 0.0)
    assert torch.equal(tokens, other) and torch.equal(best, quotients)


def test_refusals(device: str) -> None:
    like = torch.empty(0, device=device)
    assert refuses(like, 262144, 50) is None and refuses(like, 500, 256 - TIES) is None
    assert refuses(like, 128256, 257 - TIES) == f"handles no top_k of {257 - TIES} among 128256"
    assert refuses(like, 262145, 64) is None and refuses(like, 524288, 64) is None
    assert refuses(like, 262145, 65) == "handles no top_k of 65 among 262145"
    assert refuses(like, 524289, 5) == "handles no top_k of 5 among 524289"
    assert refuses(torch.empty(0, device="meta"), 128256, 5) == "needs cuda, x is on meta"
