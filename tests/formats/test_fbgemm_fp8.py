"""fbgemm_fp8."""

from collections.abc import Callable

import pytest
import torch

from qcompile.errors import CheckpointError

CONFIG = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def test_weights_and_logits(check_optimized: Callable) -> None:
    check_optimized("fbgemm-fp8")


def test_inputs_are_rounded_up_to_a_bound(stored_of: Callable) -> None:
    tensors = {
        "a.weight": torch.randn(8, 16).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.rand(8, 1),
        "a.input_scale_ub": torch.tensor([1200.0]),
    }
    stored, got = stored_of(tensors, CONFIG)["a.weight"]
    assert torch.equal(got.dequantize(), tensors["a.weight"].float() * tensors["a.weight_scale"])
    assert set(stored.tensors) == set(tensors)
    assert stored.input is not None
    assert stored.input.spec == "fp8_e4m3/token/dynamic/max(1200.0)"


@pytest.mark.parametrize("scale_shape", [(3, 1, 10), (3, 10, 1)])
def test_experts_are_stored_inputs_first(
    stored_of: Callable, scale_shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.quant.tensor.SLICE", 6 * 7)  # slices that begin and end within experts
    weight, scale = torch.randn(3, 6, 10).to(torch.float8_e4m3fn), torch.rand(scale_shape)
    _, got = stored_of({"e.gate_up_proj": weight, "e.gate_up_proj_scale": scale}, CONFIG)["e.gate_up_proj"]
    want = weight.float() * scale.reshape(3, 1, 10)
    assert torch.equal(got.dequantize(), want.transpose(1, 2))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {}, "a.weight_scale is missing"),
        ({"a.weight_scale": torch.rand(4, 1)}, {}, r"a.weight_scale is \(4, 1\); fp8_e4m3 by row of \(8, 16\) needs"),
        ({}, {"activation_scale_ub": "high"}, "activation_scale_ub is 'high', not a positive number"),
        ({"a.weight": torch.zeros(8).to(torch.float8_e4m3fn)}, {}, r"a.weight is \(8,\), neither a matrix"),
    ],
)
def test_contradictions_are_named(stored_of: Callable, tensors: dict, config: dict, message: str) -> None:
    weight = torch.randn(8, 16).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=message):
        stored_of({"a.weight": weight, **tensors}, {**CONFIG, **config})
