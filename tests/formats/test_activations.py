"""Models whose activations are rounded, against what their own libraries computed in bfloat16 (peer_logits)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile
from qcompile.errors import CheckpointError
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
    used = [(low.op, low.detail.partition(" by ")[2]) for low in program.lowered if low.op == "linear_w8a8"]
    assert used == [("linear_w8a8", "i8/row/sym")] * 4


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """`changed(input_scale=…)`: the folder of ct-int8-w8a8-static with other tensors at its first q_proj."""

    def make(activations: dict | None = None, **change: Tensor) -> str:
        source = CHECKPOINTS / "ct-int8-w8a8-static"
        tensors = load_file(source / "model.safetensors")
        tensors |= {f"model.layers.0.self_attn.q_proj.{name}": tensor for name, tensor in change.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= activations or {}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (torch.tensor([0.0]), "q_proj.input_scale is 0.0"),
        (torch.tensor([-1.0]), "not a positive float"),
        (torch.tensor([torch.inf]), "q_proj.input_scale is inf"),
        (torch.tensor([torch.nan]), "q_proj.input_scale is nan"),
        (torch.tensor([1]), "not a positive float"),
        (torch.ones(2), r"q_proj.input_scale is \(2,\); activations have one static scale"),
    ],
)
def test_static_scales_that_are_none(changed: Callable[..., str], scale: Tensor, says: str) -> None:
    folder = changed(input_scale=scale)
    with pytest.raises(CheckpointError, match=says):
        load(folder, progress=False)
    load(folder, quantize_inputs=False, progress=False)


def test_static_zero_points_are_counted_from_the_first_code(changed: Callable[..., str]) -> None:
    names = [f"{kind}_proj" for kind in "qkvo"]
    folder = changed({"symmetric": False}, input_zero_point=torch.tensor([-3], dtype=torch.int8))
    tensors = load_file(f"{folder}/model.safetensors")
    for name in [name for name in tensors if name.endswith("input_scale")]:
        tensors.setdefault(name.replace("scale", "zero_point"), torch.tensor([5], dtype=torch.int8))
    save_file(tensors, f"{folder}/model.safetensors")
    attention = load(folder, progress=False).model.layers[0].self_attn
    assert [int(getattr(attention, name).input_rounding.zero) for name in names] == [125, 133, 133, 133]
    assert attention.k_proj.input_rounding is attention.v_proj.input_rounding
    assert attention.q_proj.input_rounding is not attention.k_proj.input_rounding


def test_symmetric_codes_have_no_zero_point(changed: Callable[..., str]) -> None:
    folder = changed(input_zero_point=torch.tensor([0], dtype=torch.int8))
    load(folder, progress=False)
    with pytest.raises(CheckpointError, match=r"q_proj.input_zero_point is 4; i8/tensor/static/native is symmetric"):
        load(changed(input_zero_point=torch.tensor([4], dtype=torch.int8)), progress=False)
