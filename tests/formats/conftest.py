"""Checkpoints that the real libraries wrote, and what loading them must give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile import formats
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats import Stored
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
def check_optimized(check_compiled: Callable[..., nn.Module], interpreted: None) -> Callable[..., nn.Module]:
    """`check_compiled` without Inductor, for weights stored as others are."""
    return check_compiled


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


@pytest.fixture
def stored_of(tmp_path: Path) -> Callable[..., dict[str, tuple[Stored, Any]]]:
    """`stored_of(tensors, config)` writes a checkpoint of these tensors and this quantization_config, and reads its
    quantized weights back, by path: what the format says of each, and the weight."""

    def run(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, tuple[Stored, Any]]:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        checkpoint = open_checkpoint(tmp_path)
        method = formats.find(checkpoint)
        assert method is not None
        stored = [weight for weight in method.weights(checkpoint) if isinstance(weight, Stored)]
        return {weight.path: (weight, weight.read(checkpoint.read)) for weight in stored}

    return run


@pytest.fixture
def weights_of(stored_of: Callable[..., dict[str, tuple[Stored, Any]]]) -> Callable[..., dict[str, Any]]:
    """`stored_of`, the weights alone."""

    def run(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
        return {path: weight for path, (_, weight) in stored_of(tensors, config).items()}

    return run


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())
