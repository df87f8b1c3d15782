"""append against State.put by torch's ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qcompile.decode_state import State
from qcompile.kernels import append


def check(monkeypatch: pytest.MonkeyPatch, device: str, tokens: list[int], quotients: Any = None, **given: Any) -> None:
    """Three tokens more, one after the other."""
    ids = torch.randint(0, 50, (len(tokens), 5), device=device)
    states = [State(ids, 9, None, None), State(ids, 9, None, None)]
    drawn = None if quotients is None else torch.tensor(quotients, device=device)
    for state in states:
        for name, value in given.items():
            setattr(state, name, torch.tensor(value, device=device))
    assert append.refuses(ids) is None
    for step in range(3):
        chosen = torch.tensor(tokens, device=device) + step
        states[0].put(chosen, drawn)
        with monkeypatch.context() as patch:
            patch.setattr(append, "refuses", lambda text: "for comparison")
            states[1].put(chosen, drawn)
        for name, value in vars(states[1]).items():
            assert value is None or torch.equal(getattr(states[0], name), value), name
        drawn = None if drawn is None else drawn.flip(0)
    assert states[0].at.item() == 8 and states[0].text[:, 7].equal(states[0].token[:, 0])


@pytest.mark.parametrize("tokens", [[7], [7, 8, 9], list(range(40))])
def test_what_torch_does(monkeypatch: pytest.MonkeyPatch, device: str, tokens: list[int]) -> None:
    check(monkeypatch, device, tokens)


def test_sequences_that_end_and_have_ended(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    unfinished = [True, True, True, False]
    check(monkeypatch, device, [7, 8, 9, 7], ends=[9, 7], pad=3, unfinished=unfinished)
    check(monkeypatch, device, [7, 8, 9, 7], ends=[3], pad=3, unfinished=unfinished)
    check(monkeypatch, device, [7, 8, 9, 7], unfinished=unfinished)
    check(monkeypatch, device, [2**33, 8, 9, 7], ends=[2**33], unfinished=unfinished)


def test_nothing_to_choose_from(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    check(monkeypatch, device, [1, 2, 3], [0.5, torch.nan, 0.0])
    check(monkeypatch, device, [1, 2, 3], [0.5, torch.inf, -torch.inf], ends=[2], pad=0)


def test_a_text_without_room_is_left_as_it_is(device: str) -> None:
    state = State(torch.zeros(2, 3, dtype=torch.int64, device=device), 0, None, None)
    state.put(torch.tensor([7, 8], device=device))
    assert state.text.tolist() == [[0] * 3] * 2 and state.token.tolist() == [[7], [8]]


def test_refusals(device: str) -> None:
    many = torch.empty(append.MOST + 1, 2, dtype=torch.int64, device=device)
    assert append.refuses(many) == f"handles {append.MOST} sequences, not {len(many)}"
    assert append.refuses(many.to("meta")) == "needs cuda, the text is on meta"
