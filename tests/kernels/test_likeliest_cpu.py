"""likeliest_cpu against torch's argmax and State.put."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.decode_state import State
from qcompile.kernels.likeliest_cpu import bind_likeliest, refuses

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BANNED, LEAST = torch.tensor([0, 5, 5, 1022, 1029]), torch.tensor([9, 2, 9, 9, 9])


def states(batch: int, room: int = 12, **others: Any) -> tuple[State, State]:
    ids = torch.randint(0, 50, (batch, 5))
    pair = State(ids, room, None, None), State(ids, room, None, None)
    for state in pair:
        for name, value in others.items():
            setattr(state, name, None if value is None else value.clone())
    return pair


def put(scores: Tensor, state: State, banned: Tensor = BANNED[:0], least: Tensor = LEAST[:0]) -> None:
    texts = (state.text, state.at, state.token, state.unfinished, state.pad, state.ends)
    bind_likeliest(banned, least, *texts)(scores)


def check(scores: Tensor, banned: Tensor = BANNED[:0], least: Tensor = LEAST[:0], **others: Any) -> None:
    mine, other = states(len(scores), **others)
    put(scores, mine, banned, least)
    left = scores.reshape(len(scores), -1).clone()
    left[:, banned[other.at < least]] = -torch.inf
    other.put(left.argmax(-1))
    for name, value in vars(other).items():
        assert value is None or torch.equal(getattr(mine, name), value), name


@pytest.fixture(autouse=True)
def compiled() -> None:
    if reason := refuses(torch.empty(0, dtype=torch.int64)):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 7, 16, 33, 512, 1030, 5000])
def test_the_first_of_the_largest(dtype: torch.dtype, count: int) -> None:
    for _ in range(5):
        check(torch.randn(3, count).to(dtype))
        check(torch.randint(-3, 0, (2, count)).to(dtype))  # of negative numbers, many of which are equal


@pytest.mark.parametrize("count", [1030, 1024, 40])
def test_banned_tokens(count: int) -> None:
    banned, least = BANNED[count > BANNED], LEAST[count > BANNED]
    scores = torch.randn(2, count)
    scores[0, banned], scores[1, 5] = 9, 9
    check(scores, banned, least)
    scores[:, 3] = torch.nan
    check(scores, banned, least)
    scores[:, 5] = torch.nan  # behind the other one; and banned
    check(scores, banned, least)
    check(torch.full((2, count), -torch.inf), banned, least)
    check(torch.randn(2, 1), banned[:1], least[:1])  # all are banned


def test_what_is_no_number_comes_first() -> None:
    scores = torch.randn(3, 2000)
    scores[0, 1500], scores[0, 1501], scores[1, 1999], scores[2, 7] = torch.nan, torch.inf, torch.nan, torch.inf
    check(scores)


def test_sequences_that_end_and_have_ended() -> None:
    scores = torch.zeros(4, 100)
    scores[range(4), [7, 8, 9, 7]] = 1
    unfinished = torch.tensor([True, True, True, False])
    check(scores, ends=torch.tensor([9, 7]), pad=torch.tensor(3), unfinished=unfinished)
    check(scores, ends=torch.tensor([3]), pad=torch.tensor(3), unfinished=unfinished)
    check(scores, pad=None, unfinished=unfinished)


def test_rows_that_lie_apart_and_numbers_of_64_bits() -> None:
    check(torch.randn(3, 4, 50)[:, -1])
    check(torch.randn(50, 3).t())
    check(torch.randn(3, 1, 50))
    check(torch.randn(3, 50, 1).transpose(1, 2))
    check(torch.randn(2, 50, dtype=torch.float64))


def test_refusals() -> None:
    assert refuses(torch.empty(0, dtype=torch.int32)) == "handles tokens of int64, not torch.int32"
    assert refuses(torch.empty(0, dtype=torch.int64, device="meta")) == "needs cpu, got meta"
