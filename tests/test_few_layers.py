"""few_layers: what is left out, and that a plan is the same without."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile import roles
from qcompile.few_layers import few_layers
from qcompile.plan import Plan

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120,
}  # fmt: skip


def planned(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, few: bool = True, **kwargs: Any
) -> tuple[Plan, list[int]]:
    """The plan, and how many parameters each captured model had."""
    sizes: list[int] = []
    capture = roles.capture_call

    def count(model: nn.Module, *args: object) -> object:
        sizes.append(len(list(model.parameters())))
        return capture(model, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(roles, "capture_call", count)
        if not few:
            patch.setattr(roles, "few_layers", lambda model: (model, {}))
        return qcompile.plan(model, "u4/g32/asym", **kwargs), sizes


def test_a_plan_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **SIZES))
    (few, two), (full, six) = planned(model, monkeypatch), planned(model, monkeypatch, few=False)
    assert few == full and len(few.groups) == 24
    assert two == [21] and six == [57]


def test_layers_of_each_kind_stay() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=8, layer_types=kinds * 4, head_dim=16, **SIZES)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    few, twins = few_layers(model)
    assert list(few.get_submodule("model.layers")._modules) == ["0", "1", "6", "7"]
    assert twins == {f"model.layers.{i}": f"model.layers.{i % 2}" for i in range(2, 6)}
    assert len(model.get_submodule("model.layers")._modules) == 8, "the model itself stays as it is"
    assert few.get_submodule("model.layers.7") is model.get_submodule("model.layers.7")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(5):
            x = self.layers[number](x)
        return x


def test_a_forward_that_counts_is_captured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, sizes = planned(Counting(), monkeypatch, example={"x": torch.ones(2, 64)})
    assert sizes == [4, 10] and plan.source == "graph" and len(plan.groups) == 5


def test_nothing_to_leave_out() -> None:
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    assert few_layers(model) == (model, {})
