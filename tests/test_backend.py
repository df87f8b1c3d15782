"""torch.compile(model, backend="qcompile")."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import qcompile

Make = Callable[..., nn.Module]
SPEC = {"weights": "u4/g32/asym"}


def quantized_twin(model: nn.Module) -> nn.Module:
    """The float model with the weights that the backend will use."""
    twin, donor = copy.deepcopy(model), copy.deepcopy(model)
    twin.load_state_dict(qcompile.dequantize(qcompile.optimize(donor, SPEC, progress=False)))
    return twin


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_equals_the_quantized_model_and_sees_edits(tiny_llama: Make, interpreted: None) -> None:
    model = tiny_llama()
    reference = quantized_twin(model)
    fast = torch.compile(model, backend="qcompile", options=SPEC, fullgraph=True)
    x = torch.randint(0, 100, (2, 7))
    close(fast(x, use_cache=False).logits, reference(x).logits)
    for m in (model, reference):
        m.model.layers[0].self_attn.q_proj.weight.mul_(2)
        m.model.layers[1].mlp.down_proj.weight.mul_(-1)
    close(fast(x, use_cache=False).logits, reference(x).logits)


@torch.no_grad()
def test_lengths_do_not_recompile(tiny_llama: Make, interpreted: None) -> None:
    model = tiny_llama()
    fast = torch.compile(model, backend="qcompile", options=SPEC, fullgraph=True, dynamic=True)
    fast(torch.randint(0, 100, (2, 7)), use_cache=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (5, 9, 12):
            fast(torch.randint(0, 100, (2, length)), use_cache=False)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(64, 64), 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.scale)


@torch.no_grad()
def test_floats_of_modules_are_constants() -> None:
    """Dynamo makes them inputs where sizes are dynamic; with fullgraph=True it settles them by itself."""
    model = Scaled()
    reference = quantized_twin(model)
    fast = torch.compile(model, backend="qcompile", options=SPEC, dynamic=True)
    torch.compiler.reset()
    counters.clear()
    for rows, scale in ((3, 0.5), (5, 3.0)):
        model.scale = reference.scale = scale
        x = torch.randn(rows, 64)
        torch.testing.assert_close(fast(x), reference(x), rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # one for each scale


def test_unknown_options_and_modes_are_named() -> None:
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    with torch.no_grad(), pytest.raises(Exception, match="unknown config key 'wheights'; did you mean 'weights'"):
        torch.compile(model, backend="qcompile", options={"wheights": "u4/g64/asym"})(x)
    with torch.no_grad(), pytest.raises(Exception, match="unknown mode 'fastest'"):
        from qcompile.backend import qcompile_backend

        torch.compile(model, backend=lambda gm, inputs: qcompile_backend(gm, inputs, mode="fastest"))(x)


def test_gradients_compile_in_float_and_say_so(tiny_llama: Make) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(2, 64)
    fast = torch.compile(model, backend="qcompile", options={"weights": "u4/g64/asym"})
    with pytest.warns(UserWarning, match="compiled in float"):
        fast(x).sum().backward()
    assert model[0].weight.grad is not None


def test_no_import_needed() -> None:
    code = (
        "import torch; m = torch.nn.Linear(64, 64)\n"
        "f = torch.compile(m, backend='qcompile', options={'weights': 'u4/g64/asym'})\n"
        "with torch.no_grad(): print(f(torch.ones(2, 64)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([2, 64])" in done.stdout, done.stderr[-2000:]


@torch.no_grad()
def test_strict_is_not_ignored(interpreted: None) -> None:
    model = nn.Sequential(nn.Linear(85, 33), nn.Linear(33, 64))
    fast = torch.compile(model, backend="qcompile", options={"weights": "u4/g64/asym", "strict": True})
    with pytest.raises(Exception, match="1 parameters would stay dense"):
        fast(torch.randn(2, 85))


@torch.no_grad()
def test_the_environment_names_a_dump_folder(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QCOMPILE_DUMP", str(tmp_path))
    torch.compile(nn.Linear(64, 64), backend="qcompile", options={"weights": "u4/g64/asym"})(torch.randn(2, 64))
    names = {file.name for file in tmp_path.glob("*/*.txt")}
    assert "000-captured.txt" in names
    assert any(name.endswith("-quantize_linear.txt") for name in names)


@torch.no_grad()
def test_exchanged_data_is_seen(interpreted: None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    fast = torch.compile(model, backend="qcompile", options=SPEC)
    close(fast(x), quantized_twin(model)(x))
    model[0].weight.data = torch.randn(64, 64)
    close(fast(x), quantized_twin(model)(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_made_under_inference_mode(mode: Callable[..., Any], interpreted: None) -> None:
    """They count no writes: a warning says that edits in place are not seen. Exchanged ones are."""
    normal, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    with torch.inference_mode():
        model = copy.deepcopy(normal)
        assert model[0].weight.is_inference()
    fast = torch.compile(model, backend="qcompile", options=SPEC)
    with mode():
        with pytest.warns(UserWarning, match=r"1 weights were made under torch.inference_mode\(\), so edits of them"):
            close(fast(x), quantized_twin(normal)(x))
        normal[0].weight.data = torch.randn(64, 64)
        with torch.inference_mode():
            model[0].weight.data = normal[0].weight.data.clone()
        close(fast(x), quantized_twin(normal)(x))


def test_edits_under_inference_mode_are_seen(interpreted: None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    fast = torch.compile(model, backend="qcompile", options=SPEC)
    for _ in range(2):
        with torch.inference_mode():
            close(fast(x), quantized_twin(model)(x))
            model[0].weight.mul_(-2)
        with torch.no_grad():
            close(fast(x), quantized_twin(model)(x))
