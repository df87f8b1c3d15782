"""Packed weights in modules: the model around them keeps working."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qcompile
from qcompile.ops.activation_rounding import round_activation
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import INPUT_ROUNDING, OUTPUT_ROUNDING, packed_parameters, packed_tensor, put_rounding
from qcompile.stores import ActivationRounding


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 48), nn.Linear(64, 32)
        self.o = nn.Linear(48, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.relu(self.q(x))) + self.k(x).sum(-1, keepdim=True)


@pytest.fixture
def block() -> nn.Module:
    return qcompile.optimize(Block(), "u4/g16/asym", example={"x": torch.randn(2, 3, 64)}, progress=False)


X = torch.randn(2, 3, 64)


def plain(block: nn.Module) -> torch.Tensor:
    """The forward on unpacked weights."""
    with torch.no_grad():
        return type(block).forward(block, X)


def test_siblings_share_one_store(block: nn.Module) -> None:
    assert block.q.packed_weight is block.k.packed_weight
    assert block.q.packed_weight.data.shape[0] == 80
    assert isinstance(block.q, nn.Linear) and type(block.q).__name__ == "Linear"
    assert set(packed_parameters(block.q)) == {"weight", "bias"}
    assert block.q.weight.shape == (48, 64) and block.k.bias.shape == (32,)


def test_deepcopy_keeps_sharing_inside_and_not_across(block: nn.Module) -> None:
    twin = copy.deepcopy(block)
    assert twin.q.packed_weight is twin.k.packed_weight
    assert twin.q.packed_weight is not block.q.packed_weight
    assert torch.equal(plain(twin), plain(block))


def test_pickle(block: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert twin.q.packed_weight is twin.k.packed_weight
    assert torch.equal(plain(twin), plain(block))


def test_state_dict_holds_each_module_its_own_rows(block: nn.Module) -> None:
    state = block.state_dict()
    assert state["q.weight.data"].shape[0] == 48 and state["k.weight.data"].shape[0] == 32
    assert not any("packed" in name for name in state)
    twin = copy.deepcopy(block)
    twin.q.packed_weight.data.zero_()
    assert not torch.equal(plain(twin), plain(block))
    twin.load_state_dict(state)
    assert torch.equal(plain(twin), plain(block))


def test_load_state_dict_names_what_is_wrong(block: nn.Module) -> None:
    state = block.state_dict()
    state["q.weight.scale"] = state["q.weight.scale"][:1]
    del state["k.weight.zero"]
    with pytest.raises(RuntimeError, match=r"k\.weight\.zero") as raised:
        block.load_state_dict(state)
    assert "q.weight.scale is (1, 4)" in str(raised.value)


def test_to_dtype_changes_what_is_unpacked_and_not_what_is_stored(block: nn.Module) -> None:
    before = packed_tensor(block.q, "weight")
    block.to(torch.bfloat16)
    assert block.q.weight.dtype == torch.bfloat16 and block.q.bias.dtype == torch.bfloat16
    after = packed_tensor(block.q, "weight")
    assert after.scale.dtype == before.scale.dtype == torch.float32
    assert torch.equal(after.dequantize(), before.dequantize())


def test_gradients_reach_the_input(block: nn.Module) -> None:
    x = X.clone().requires_grad_()
    type(block).forward(block, x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_moving_to_meta_keeps_sharing(tiny_llama: Callable[..., nn.Module]) -> None:
    model = qcompile.optimize(tiny_llama(), "u4/g32/asym", progress=False).to("meta")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.packed_weight is attention.v_proj.packed_weight
    assert attention.q_proj.weight.is_meta


@pytest.fixture
def rounding(block: nn.Module) -> nn.Module:
    """A block whose o reads rounded values, and whose k returns them."""
    static = ActivationRounding(ActivationSpec.parse("i8/tensor/static"), torch.tensor(0.01))
    put_rounding(block.o, INPUT_ROUNDING, ActivationRounding(ActivationSpec.parse("i8/token/dynamic")))
    put_rounding(block.k, OUTPUT_ROUNDING, static)
    return block


def test_roundings_are_part_of_the_forward(rounding: nn.Module) -> None:
    q, k = (nn.functional.linear(X, m.weight, m.bias) for m in (rounding.q, rounding.k))
    hidden = round_activation(torch.relu(q), None, None, "i8/token/dynamic")
    returned = round_activation(k, torch.tensor(0.01), None, "i8/tensor/static")
    want = hidden @ rounding.o.weight.T + returned.sum(-1, keepdim=True)
    assert torch.equal(plain(rounding), want)
    assert isinstance(rounding.o, nn.Linear) and "input_rounding" not in dict(rounding.q.named_modules())
    assert torch.allclose(rounding(X), want, atol=1e-5)


def test_roundings_are_copied_saved_and_moved(rounding: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(rounding, file)
    file.seek(0)
    want = plain(rounding)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(rounding)):
        assert torch.equal(plain(twin), want)
        twin.k.output_rounding.scale.fill_(1)
        assert not torch.equal(plain(twin), want)
        twin.load_state_dict(rounding.state_dict())
        assert torch.equal(plain(twin), want)
    assert "k.output_rounding.scale" in rounding.state_dict()
    rounding.to(torch.bfloat16)
    assert rounding.k.output_rounding.scale.dtype == torch.float32
    assert set(qcompile.dequantize(rounding)) == set(Block().state_dict())
