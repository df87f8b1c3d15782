"""likeliest_cuda against torch's argmax."""

from __future__ import annotations

import pytest
import torch

from qcompile.kernels._scores import Changes
from qcompile.kernels.likeliest_cuda import MOST, PART, likeliest, refuses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 100, PART, 2 * PART + 37])
def test_the_first_of_the_largest(dtype: torch.dtype, count: int, device: str) -> None:
    for scores in (torch.randn(3, count), torch.randint(-3, 1, (2, count)) * -0.5, torch.randint(-4, 0, (2, count))):
        scores = scores.to(device, dtype)
        assert torch.equal(likeliest(scores), scores.argmax(-1))


def test_what_is_no_number_comes_first(device: str) -> None:
    scores = torch.randn(4, 2 * PART, device=device)
    scores[0, 3000], scores[0, 3001], scores[1, -1], scores[2, 7] = torch.nan, torch.inf, torch.nan, torch.inf
    scores[3] = -torch.inf
    assert likeliest(scores).tolist() == [3000, 2 * PART - 1, 7, 0]


def test_rows_that_lie_apart(device: str) -> None:
    for scores in (torch.randn(3, 4, 50, device=device)[:, -1], torch.randn(50, 3, device=device).t()):
        assert torch.equal(likeliest(scores), scores.argmax(-1))


def test_tokens_that_may_not_come_yet(device: str) -> None:
    scores = torch.zeros(2, PART + 9, device=device)
    scores[:, PART + 3], scores[:, 5], scores[:, 8] = 3, 2, 1
    banned = torch.zeros(2, PART + 9, dtype=torch.bool, device=device)
    banned[0, PART + 3] = banned[1, 5] = True
    least = torch.tensor([4, 6], device=device)
    for at, token in ((3, 8), (4, PART + 3), (6, PART + 3)):
        changes = Changes(banned, least, torch.tensor([at], device=device))
        assert likeliest(scores, changes).tolist() == [token] * 2


def test_refusals(device: str) -> None:
    like = torch.empty(0, device=device)
    assert refuses(like, MOST * PART) is None
    assert refuses(like, MOST * PART + 1) == f"handles {MOST * PART} tokens, not {MOST * PART + 1}"
    assert refuses(torch.empty(0, device="meta"), 9) == "needs cuda, x is on meta"
