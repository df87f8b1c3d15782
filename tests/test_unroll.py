"""capture_unrolled: the graph is the one that torch traces of all layers, or is traced of all layers."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.node import map_arg
from transformers import (
    AttentionInterface,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qcompile
from qcompile import step, unroll
from qcompile.caches import heads_of, static_cache
from qcompile.graph.capture import Captured, export
from qcompile.graph.match import aten, module_path, type_of, value
from qcompile.step import capture_call
from qcompile.unroll import capture_unrolled

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120,
    "num_hidden_layers": 5, "head_dim": 16,
}  # fmt: skip


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES | options)).eval().requires_grad_(False)


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval().requires_grad_(False)


def quantized() -> nn.Module:
    model = qcompile.optimize(llama(), "u4/g32/asym", progress=False)
    vars(model).pop("forward")
    return model


def call(model: nn.Module, batch: int, tokens: int, cached: bool) -> dict[str, Any]:
    ids = torch.randint(0, 120, (batch, tokens))
    if not cached:
        return {"input_ids": ids, "use_cache": False}
    heads = heads_of(model, model.forward)
    return {"input_ids": ids, "past_key_values": static_cache(heads, 32, batch, torch.float32, torch.device("cpu"))}


def text(captured: Captured) -> str:
    """The graph, its nodes by number, inputs by what they are, symbols in the order in which inputs have them."""
    names: dict[Any, str] = {}
    for node, given in zip(captured.gm.graph.find_nodes(op="placeholder"), captured.inputs, strict=True):
        names[node] = f"%{given.path or given.user}"
    lines: list[str] = sorted(f"{name} {type_of(value(node))}" for node, name in names.items())
    for node in captured.gm.graph.nodes:
        if node.target is aten.sym_size.int:  # inputs of one size are as good as each other to be asked for it
            names[node] = str(value(node))
        elif node.op == "call_function":
            names[node] = f"%{len(lines)}"
            shown = map_arg((node.args, node.kwargs), lambda n: names[n])
            lines.append(f"{node.target} {shown} {type_of(value(node))} {module_path(node)}")
    (end,) = captured.gm.graph.find_nodes(op="output")
    lines.append(str(map_arg(end.args, lambda n: names[n])))
    symbols: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda found: symbols.setdefault(found[0], f"n{len(symbols)}"), "\n".join(lines))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers of the model torch saw, call by call."""
    seen: list[int] = []

    def count(model: nn.Module, *args: Any) -> Any:
        seen.append(max(len(m) for m in model.modules() if isinstance(m, nn.ModuleList)))
        return capture_call(model, *args)

    monkeypatch.setattr(unroll, "capture_call", count)
    return seen


@pytest.mark.parametrize(
    ("make", "shape"),
    [(llama, (1, 1)), (llama, (3, 5)), (qwen3, (3, 1)), (quantized, (1, 5))],
    ids=lambda value: getattr(value, "__name__", str(value)),  # without the address, which each process has another of
)
def test_the_same_graph(make: Callable[[], nn.Module], shape: tuple[int, int], traced: list[int]) -> None:
    torch.manual_seed(0)
    model = make()
    kwargs = call(model, *shape, cached=True)
    captured, tensors, build = capture_unrolled(model, model.forward, kwargs)
    whole, same, _ = capture_call(model, model.forward, kwargs)
    assert traced == [3]
    assert text(captured) == text(whole)
    assert all(a is b for a, b in zip(tensors, same, strict=True))
    captured.gm.graph.lint()


def test_without_a_cache(traced: list[int]) -> None:
    model = llama()
    kwargs = call(model, 2, 5, cached=False)
    captured, _, _ = capture_unrolled(model, model.forward, kwargs)
    assert traced == [3]
    assert text(captured) == text(capture_call(model, model.forward, kwargs)[0])


def test_every_layer_has_its_own_weights_and_cache() -> None:
    torch.manual_seed(0)
    model = llama()
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr]
        layer.input_layernorm.weight.fill_(1 + number / 7)  # type: ignore[union-attr]
    optimized = qcompile.optimize(llama(), progress=False)
    optimized.load_state_dict(model.state_dict())
    ids = torch.randint(0, 120, (1, 9))
    heads = heads_of(model, model.forward)
    one, two = (static_cache(heads, 16, 1, torch.float32, torch.device("cpu")) for _ in range(2))
    with torch.no_grad():
        for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:]):
            got, want = optimized(part, past_key_values=one).logits, model(part, past_key_values=two).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for mine, its in zip(one.layers, two.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys, rtol=1e-4, atol=1e-4)
        assert mine.cumulative_length == its.cumulative_length == 9


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Stack(nn.Module):
    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def refused(model: nn.Module, kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> str:
    """Why all layers were traced, after seeing that they were."""
    with caplog.at_level(logging.INFO, "qcompile.unroll"):
        captured, _, _ = capture_unrolled(model, model.forward, kwargs)
    assert text(captured) == text(capture_call(model, model.forward, kwargs)[0])
    (message,) = [record.getMessage() for record in caplog.records if record.name == "qcompile.unroll"]
    return message.removeprefix("qcompile: captured with all layers: ")


def test_code_that_nobody_knows(caplog: pytest.LogCaptureFixture) -> None:
    assert "Stack may tell layers apart" in refused(Stack(), {"x": torch.randn(4, 8)}, caplog)


def test_an_attention_of_somebody_else(caplog: pytest.LogCaptureFixture) -> None:
    """It is given the layer, and so its number."""

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["scaling"] *= 2 if module.layer_idx in (2, 3) else 1
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("somebodys", attention)
    model = llama(attn_implementation="somebodys")
    kwargs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "use_cache": False}
    assert "attention may tell layers apart" in refused(model, kwargs, caplog)


def test_caches_that_grow(caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "past_key_values": DynamicCache()}
    assert refused(llama(), kwargs, caplog) == "what a layer adds to a cache is a tensor of its own"


def test_layers_that_are_read_from_outside(caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "use_cache": False, "output_hidden_states": True}
    assert "more than the layer after it reads layer 1" in refused(llama(), kwargs, caplog)


def test_layers_of_two_kinds(caplog: pytest.LogCaptureFixture) -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | {"num_hidden_layers": 8}, layer_types=kinds * 4)).eval()
    kwargs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "use_cache": False}
    assert refused(model.requires_grad_(False), kwargs, caplog) == "there are no layers alike, or layers of two kinds"


def test_a_cache_with_a_layer_of_another_size(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    kwargs = call(model, 1, 4, cached=True)
    longer = call(model, 1, 4, cached=True)["past_key_values"].layers[3]
    for name in ("keys", "values"):
        setattr(longer, name, torch.zeros(1, 2, 48, 16))
    kwargs["past_key_values"].layers[3] = longer
    with caplog.at_level(logging.INFO, "qcompile.unroll"), pytest.raises(Exception, match="could not be captured"):
        capture_unrolled(model, model.forward, kwargs)
    assert "of different sizes" in caplog.text


def test_caches_of_layers_left_out_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def look(module: nn.Module, tensors: list[Tensor], **names: str) -> Captured:
        given.extend(tensors)
        return export(module, tensors, **names)

    monkeypatch.setattr(step, "export", look)
    model = llama()
    kwargs = call(model, 1, 4, cached=True)
    captured, tensors, _ = capture_unrolled(model, model.forward, kwargs)
    layers = [[x for x in vars(layer).values() if isinstance(x, Tensor)] for layer in kwargs["past_key_values"].layers]
    seen = [[any(x is each for each in given) for x in layer] for layer in layers]
    assert seen == [[here] * len(layer) for layer, here in zip(layers, (True, True, False, False, True), strict=True)]
    assert [each.user for each in captured.inputs if each.user is not None] == list(range(len(tensors)))


def test_a_cache_whose_layers_share_memory(caplog: pytest.LogCaptureFixture) -> None:
    """An input of its own for each would hide it from passes that ask."""
    model = llama()
    kwargs = call(model, 1, 4, cached=True)
    lengths = torch.zeros(5, dtype=torch.long)
    for layer, length in zip(kwargs["past_key_values"].layers, lengths, strict=True):
        layer.cumulative_length = length
    assert refused(model, kwargs, caplog) == "layers of the cache share memory"


def test_few_layers_are_traced(traced: list[int]) -> None:
    model = llama(num_hidden_layers=3)
    capture_unrolled(model, model.forward, call(model, 1, 1, cached=True))
    assert traced == [3]
