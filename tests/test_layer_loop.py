"""layer_loop: what code says of a list of layers."""

from typing import Any

import pytest
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from qcompile.layer_loop import Loop, loop_over, mentions, numbers_only_caches


class Kept(nn.Module):
    layers: Any

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, shift[number])
        return x


class Made(Kept):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, shift.item())
        return x


class Twice(Kept):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.layers[0](x)


class Last(Kept):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return layer.weight + x


class Helped(Kept):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.more(x)

    def more(self, x: Tensor) -> Tensor:
        return getattr(self, "layers")[0](x)  # noqa: B009


class Reversed(Kept):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for layer in self.layers[::-1]:
            x = layer(x)
        return x


def test_loops_of_transformers() -> None:
    assert loop_over(LlamaModel, "layers") == Loop(sliced=True, by_type=False)
    assert loop_over(Gemma3TextModel, "layers") == Loop(sliced=True, by_type=True)


@pytest.mark.parametrize("owner", [Kept, Made, Twice, Last, Helped, Reversed, nn.Linear])
def test_what_is_not_such_a_loop(owner: type[nn.Module]) -> None:
    assert loop_over(owner, "layers") is None


def test_who_names_it() -> None:
    assert mentions(Helped, "layers") and mentions(LlamaModel, "layers") and not mentions(LlamaAttention, "layers")


class Numbered(nn.Module):
    layer_idx = 3

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layer_idx


class AsString(Numbered):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, "layer_idx")  # noqa: B009


def test_numbers_of_layers() -> None:
    assert all(numbers_only_caches(module, "layer_idx") for module in (LlamaAttention, Gemma3Attention, nn.Linear))
    assert not any(numbers_only_caches(module, "layer_idx") for module in (Numbered, AsString))
