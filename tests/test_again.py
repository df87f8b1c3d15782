"""again: what a call has to have in common with the one before, and what it may not keep alive."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile import runtime
from qcompile.caches import static_cache

Make = Callable[..., nn.Module]
HEADS = [(2, 16, 16)] * 2


@pytest.fixture
def model(tiny_llama: Make, interpreted: None) -> nn.Module:
    return qcompile.optimize(tiny_llama(), "u4/g32/asym", progress=False)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that were not recognized."""
    calls, find = [], runtime.Runner._find
    monkeypatch.setattr(runtime.Runner, "_find", lambda self, kwargs: calls.append(kwargs) or find(self, kwargs))
    return calls


def cache() -> Any:
    return static_cache(HEADS, 32, 1, torch.float32, torch.device("cpu"))


@torch.no_grad()
def step(model: nn.Module, kv: Any, token: int = 5, **options: Any) -> torch.Tensor:
    """The model's call beside the original forward on a copy of the cache."""
    given = dict(input_ids=torch.tensor([[token]]), use_cache=True, **options)
    twin = copy.deepcopy(kv)
    got = model(past_key_values=kv, **given).logits
    torch.testing.assert_close(got, model.forward.original(past_key_values=twin, **given).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a.cumulative_length, b.cumulative_length) for a, b in zip(kv.layers, twin.layers))
    return got


def test_steps_are_recognized(model: nn.Module, searched: list[Any]) -> None:
    kv = cache()
    outs = [step(model, kv, token) for token in (5, 6, 7)]
    assert len(searched) == 1 and not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda model, kv: model.model.norm.register_parameter("weight", nn.Parameter(torch.full((64,), 2.0), False)),
        lambda model, kv: setattr(model.model.norm.weight, "data", torch.full((64,), 3.0)),
        lambda model, kv: model.model.norm.weight.data.mul_(2),
        lambda model, kv: setattr(model.model, "norm", copy.deepcopy(model.model.norm)),
        lambda model, kv: model.model.norm.register_forward_hook(lambda *_: None),
        lambda model, kv: [setattr(layer, "keys", layer.keys.clone()) for layer in kv.layers],
    ],
    ids=["parameter", "data", "in place", "module", "hook", "cache"],
)
def test_what_was_exchanged_is_seen(model: nn.Module, change: Callable[[Any, Any], object]) -> None:
    kv = cache()
    for token in (5, 6):
        step(model, kv, token)
    change(model, kv)
    model.requires_grad_(False)
    for token in (7, 8):
        step(model, kv, token)


def test_weights_that_lie_otherwise_are_searched_for(model: nn.Module, searched: list[Any]) -> None:
    kv, weight = cache(), model.model.norm.weight
    step(model, kv)
    with torch.no_grad():
        weight.data = torch.stack([weight.data, weight.data], 1)[:, 0]
    step(model, kv)
    assert len(searched) == 2


def test_other_calls_are_searched_for(model: nn.Module, searched: list[Any]) -> None:
    kv = cache()
    step(model, kv)
    for count, options in enumerate((dict(logits_to_keep=1), dict(position_ids=torch.tensor([[3]]))), 2):
        step(model, kv, **options)
        assert len(searched) == count
    step(model, static_cache(HEADS, 48, 1, torch.float32, torch.device("cpu")))
    assert len(searched) == 4


def test_several_kinds_of_calls_are_recognized(
    model: nn.Module, searched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.forward, "_agains", deque(maxlen=2))
    kv = cache()
    kinds = {}, dict(logits_to_keep=1), dict(position_ids=torch.tensor([[3]]))
    for kind, count in ((0, 1), (1, 2), (0, 2), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        step(model, kv, **kinds[kind])
        assert len(searched) == count  # of two kinds those that came last


def test_inputs_that_lie_otherwise_are_searched_for(model: nn.Module, searched: list[Any]) -> None:
    tokens = torch.randint(3, 100, (2, 7))
    for ids, count in ((tokens[:, :5].contiguous(), 1), (tokens[:, :5].clone(), 1), (tokens[:, :5], 2)):
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, model.forward.original(ids).logits, rtol=1e-4, atol=1e-5)
        assert len(searched) == count


def test_a_weight_that_is_there_twice_is_recognized(model: nn.Module, searched: list[Any]) -> None:
    layers = model.model.layers
    layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
    kv = cache()
    for token in (5, 6, 7):
        step(model, kv, token)
    assert len(searched) == 1
    layers[1].input_layernorm.weight = nn.Parameter(layers[0].input_layernorm.weight + 1)
    step(model, kv)
    assert len(searched) == 2


def test_nothing_is_kept_alive(model: nn.Module) -> None:
    kv = cache()
    step(model, kv)
    seen = [weakref.ref(kv), weakref.ref(kv.layers[0].keys), weakref.ref(model.model.norm.weight)]
    del kv
    model.model.norm.weight = nn.Parameter(torch.ones(64), requires_grad=False)
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_it_is_little_work(tiny_llama: Make, interpreted: None) -> None:
    """The bookkeeping of a call over some 180 tensors, beside the search that it saves, in calls of functions."""
    model = qcompile.optimize(tiny_llama(num_hidden_layers=10), "u4/g32/asym", progress=False)
    kv = static_cache(HEADS * 5, 32, 1, torch.float32, torch.device("cpu"))
    step(model, kv)
    runner, kwargs = model.forward, dict(past_key_values=kv, input_ids=torch.tensor([[5]]), use_cache=True)

    def work(function: Callable[[Any], Any]) -> int:
        counted: Counter[str] = Counter()
        sys.setprofile(lambda frame, event, arg: counted.update([event]))
        try:
            assert function(kwargs) is not None
        finally:
            sys.setprofile(None)
        return counted["call"] + counted["c_call"]

    assert work(runner._recognized) < work(runner._find) / 4
