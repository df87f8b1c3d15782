"""Checkpoints that the real libraries wrote, and what loading them must give."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qcompile
from qcompile.load import load

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 100, 200]])


@pytest.fixture
def check() -> Callable[..., nn.Module]:
    """`check("awq-gemm-g128", torch.float16)` loads a checkpoint in float32 and compares its weights, exactly once they
    are rounded to the dtype that the writing library computes in, and its logits; returns the model."""

    def run(name: str, rounded: torch.dtype = torch.float32) -> nn.Module:
        model = load(str(CHECKPOINTS / name), dtype=torch.float32, quantize_inputs=False, progress=False)
        expected = load_file(CHECKPOINTS / name / "expected.safetensors")
        logits = expected.pop("logits", None)
        weights = qcompile.dequantize(model)
        compared = 0
        for path, want in expected.items():
            if path in weights:
                got = weights[path].to(rounded).float()
                assert torch.equal(got, want.float()), f"{path}: off by {(got - want).abs().max():.3g}"
                compared += 1
        assert compared, f"{name}: none of {list(expected)[:3]} is among the model's weights"
        if logits is not None:
            # The expected logits come from weights rounded to 16 bits, where the library computes in 16 bits.
            assert error(model(INPUT_IDS).logits, logits) < (2e-6 if rounded == torch.float32 else 1e-2)
        return model

    return run


@pytest.fixture
def check_compiled(check: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`check`, and then optimize() must give the same logits as the eager model."""

    def run(name: str, rounded: torch.dtype = torch.float32) -> nn.Module:
        model = check(name, rounded)
        eager = model(INPUT_IDS).logits
        model = qcompile.optimize(model, progress=False)
        assert error(model(INPUT_IDS).logits, eager) < 1e-5
        return model

    return run


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())
