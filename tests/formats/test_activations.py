"""Models whose activations are rounded, against what their own libraries computed in bfloat16 (peer_logits)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qcompile
from qcompile.load import load
from qcompile.storage import roundings

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 100, 200]])

BFLOAT16 = [
    "ct-fp8-block",
    "ct-fp8-dynamic",
    "ct-int8-w4a8-int-quantized",
    "ct-int8-w8a8-dynamic",
    "ct-int8-w8a8-static",
    "ct-mixed-precision",
    "ct-mxfp4",
    "ct-nvfp4",
    "quark-fp8-perchannel-dynamic",
    "quark-fp8-pertensor-static",
    "quark-int8-pertensor-static",
    "quark-mxfp4",
    "quark-mxfp6-e2m3",
]


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got - want).norm() / want.norm())


def logits(name: str, quantize_inputs: bool) -> Tensor:
    folder = str(CHECKPOINTS / name)
    model = load(folder, dtype=torch.bfloat16, quantize_inputs=quantize_inputs, progress=False)
    assert quantize_inputs == any(roundings(module) for module in model.modules())
    return model(INPUT_IDS).logits.float()


@pytest.mark.parametrize("name", BFLOAT16)
def test_the_logits_of_the_library(name: str) -> None:
    want = load_file(CHECKPOINTS / name / "peer_logits.safetensors")["logits"]
    # To the last bit but for sums, which torch splits otherwise on other processors.
    assert error(logits(name, True), want) < 1e-3
    assert error(logits(name, False), want) > 1e-2


def test_quantize_inputs_false_gives_the_model_of_the_weights() -> None:
    name = "ct-int8-w8a8-static"
    want = load_file(CHECKPOINTS / name / "expected.safetensors")["logits"]
    model = load(str(CHECKPOINTS / name), dtype=torch.float32, quantize_inputs=False, progress=False)
    assert error(model(INPUT_IDS).logits, want) < 1e-2


@pytest.mark.parametrize("name", ["ct-int8-w8a8-dynamic", "ct-int8-w8a8-static", "quanto-int8-act-int8"])
def test_compiled(name: str) -> None:
    model = load(str(CHECKPOINTS / name), dtype=torch.float32, progress=False)
    eager = model(INPUT_IDS).logits
    model = qcompile.optimize(model, progress=False)
    # One code that falls to the other side of a tie moves all behind it.
    assert error(model(INPUT_IDS).logits, eager) < 5e-2
    (program,) = qcompile.explain(model).outcomes
    passes = {result.name: len(result.rewrites) for result in program.passes}
    assert passes["share_rounding"] == 3 and passes["fuse_siblings"] == 2
    used = [(low.op, low.detail.partition(" by ")[2]) for low in program.lowered if low.op == "linear_int8"]
    assert used == [("linear_int8", "i8/row/sym")] * 4
