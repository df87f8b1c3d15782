"""few_layers: what is left out, and that a plan is the same without."""

import itertools
import logging
from collections.abc import Sequence
from functools import partial
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


def test_a_plan_is_the_same_with_layers_of_two_types(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds * 3, head_dim=16, **SIZES))
    (few, four), (full, _) = planned(model, monkeypatch), planned(model, monkeypatch, few=False)
    assert few == full and len(four) == 1 and four[0] < len(list(model.parameters()))
    assert model.config.layer_types == kinds * 3


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


class Layer(nn.Module):
    """Multiplies by its weight, or adds it."""

    def __init__(self, number: int, options: Any = None) -> None:
        super().__init__()
        self.layer_idx, self.options = number, options
        self.w = nn.Parameter(torch.randn(64, 64))

    def multiplies(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T if self.multiplies() else x + self.w[: x.shape[0]]


class InDict(Layer):
    def multiplies(self) -> bool:
        return self.options["multiplies"]


class InPartial(Layer):
    def multiplies(self) -> bool:
        return self.options()


class InFunction(Layer):
    def multiplies(self) -> bool:
        return self.options(0)


class InDtype(Layer):
    def multiplies(self) -> bool:
        return self.options[0] is torch.float32


YES, NO = torch.ones(2), torch.zeros(2)


class InTensor(Layer):
    def multiplies(self) -> bool:
        return self.options is YES


class ByNumber(Layer):
    def multiplies(self) -> bool:
        return self.layer_idx not in (2, 3)


class ByHelper(Layer):
    def multiplies(self) -> bool:
        return of_helper(self)


def of_helper(layer: Any) -> bool:
    return layer.layer_idx not in (2, 3)


class ByHelpersHelper(Layer):
    def multiplies(self) -> bool:
        return of_helpers_helper(self)


def of_helpers_helper(layer: Any) -> bool:
    return of_helper(layer)


class Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Skipping(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x + layer.w[: x.shape[0]] if number in (2, 3) else layer(x)
        return x


class Counting(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for number in range(6):
            x = self.layers[number](x)
        return x


class Heads(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.layers], -1)


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack([Layer(i) for i in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x) + self.stack.layers[2].w[: x.shape[0]]


def no(_: object) -> bool:
    return False


def tied() -> Stack:
    stack = Stack([Layer(i) for i in range(6)])
    stack.layers[3].w = stack.layers[2].w
    return stack


def sharing() -> Stack:
    """Two of the layers have a buffer that the stack has, too."""
    stack = Stack([Layer(i) for i in range(6)])
    stack.register_buffer("table", torch.ones(64))
    for number, layer in enumerate(stack.layers):
        layer.register_buffer("table", stack.table if number in (2, 3) else torch.ones(64))
    return stack


def hooked() -> Stack:
    def grow(module: Any, args: Any, y: Tensor) -> Tensor:
        return y + len(module.layers)

    stack = Stack([Layer(i) for i in range(6)])
    stack.register_forward_hook(grow)
    return stack


INNER = [False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("model", "captured"),
    [
        (Stack([Layer(i) for i in range(6)]), 2),
        (Stack([InDict(i, {"multiplies": not inner}) for i, inner in enumerate(INNER)]), 4),
        (Stack([InPartial(i, partial(bool, not inner)) for i, inner in enumerate(INNER)]), 4),
        (Stack([InFunction(i, no if inner else callable) for i, inner in enumerate(INNER)]), 4),
        (Stack([InDtype(i, [torch.float16 if inner else torch.float32]) for i, inner in enumerate(INNER)]), 4),
        (Stack([ByNumber(i) for i in range(6)]), 6),
        (Stack([InTensor(i, NO if inner else YES) for i, inner in enumerate(INNER)]), 4),
        (Stack([ByHelper(i) for i in range(6)]), 6),
        (Stack([ByHelpersHelper(i) for i in range(6)]), 6),
        (hooked(), 6),
        (Skipping([Layer(i) for i in range(6)]), 6),
        (Counting([Layer(i) for i in range(6)]), 6),
        (Heads([Layer(i) for i in range(6)]), 6),
        (Outside(), 6),
        (tied(), 3),
    ],
    ids=lambda x: f"{type(x).__name__}" if isinstance(x, nn.Module) else "",
)
def test_what_may_differ_is_captured(model: nn.Module, captured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"x": torch.ones(2, 64)}
    few, sizes = planned(model, monkeypatch, example=example)
    full, _ = planned(model, monkeypatch, few=False, example=example)
    assert few == full and few.source == "graph"
    assert sizes == [captured]


def test_where_sizes_do_not_fit_all_are_captured_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    widths = [64, 32, 16, 64, 32, 64, 32, 64, 32, 16, 64]
    model = Stack([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    plan, sizes = planned(model, monkeypatch, example={"x": torch.ones(2, 64)})
    assert sizes == [16, 20] and plan.source == "graph"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_layers_that_share_a_tensor_with_others_are_of_a_kind_of_their_own() -> None:
    assert few_layers(sharing())[1] == {"layers.1": "layers.0", "layers.4": "layers.0"}


def test_nothing_to_leave_out() -> None:
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    assert few_layers(model) == (model, {})
