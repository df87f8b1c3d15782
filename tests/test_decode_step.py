"""decode_step: the model's call that ends with the choice of the token."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from qcompile.decode_step import Step

if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)


@pytest.fixture(scope="module")
def pair(twins: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    return twins("lm_head")


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None: ...


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each text whose steps were asked to end with the choice, whether they do."""
    found: list[bool] = []
    let_follow = Step.let_follow

    def noted(self: Step, follower: Any) -> Any:
        found.append((call := let_follow(self, follower)) is not None)
        return call

    monkeypatch.setattr(Step, "let_follow", noted)
    return found


def prompt() -> dict[str, Tensor]:
    tokens = torch.randint(20, 100, (1, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize(
    "options", [{}, {"min_new_tokens": 9}, {"do_sample": True, "top_k": 5}, {"output_logits": True}]
)
def test_where_tokens_are_the_likeliest_and_nobody_reads_scores(
    pair: tuple[Any, Any], whole: list[bool], options: dict[str, Any]
) -> None:
    options = {"do_sample": False, "return_dict_in_generate": True, **options}
    outs, streamers = [], [Kept(), Kept()]
    for model, streamer in zip(pair, streamers, strict=True):
        torch.manual_seed(2)
        out = model.generate(**prompt(), max_new_tokens=80, pad_token_id=0, streamer=streamer, **options)
        outs.append(out.sequences)
    assert torch.equal(*outs)
    # A streamer may keep what it is given.
    assert torch.equal(torch.cat(streamers[0].values[1:]), outs[0][0, 7:])
    assert whole == [True] * (not options["do_sample"] and "output_logits" not in options)


@pytest.mark.parametrize("end", [None, 46])
def test_a_padded_text(pair: tuple[Any, Any], whole: list[bool], end: int | None) -> None:
    padded = prompt()
    padded["attention_mask"][0, :3] = 0
    options = {"max_new_tokens": 50, "pad_token_id": 0, "eos_token_id": end}
    got, want = (model.generate(**padded, **options) for model in pair)
    assert torch.equal(got, want) and whole == [True]
    assert len(got[0]) == 57 if end is None else 10 < len(got[0]) < 57
